"""From names to modules."""
