"""Measurements, each `python -m benchmarks.NAME`: a table on the screen and JSON for the record."""
