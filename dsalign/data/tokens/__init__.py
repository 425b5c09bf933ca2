"""Rows to groups of token ids."""
