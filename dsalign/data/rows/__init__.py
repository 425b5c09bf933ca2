"""Sources to rows: files, formats and columns."""
