"""Rows in, token groups out: readers -> rows -> templates -> tokenize -> batches."""
