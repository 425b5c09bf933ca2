"""Models by role as DeepSpeed engines."""
