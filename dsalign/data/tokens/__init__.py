"""Rows to token groups: templates, token ids, and groups on disk."""
