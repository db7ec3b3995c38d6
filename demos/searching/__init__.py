"""Searching: a glyph somewhere in a large picture, legible only in a part that was asked for."""
