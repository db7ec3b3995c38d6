"""Judges: is an answer right, wrong, or could nobody tell?"""
