"""Scores beside the paper's numbers, row by row: the nine tables, and those of a user's own data."""
