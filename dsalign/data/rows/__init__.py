"""Files and hub data sets to rows: one prompt and its answers as text."""
