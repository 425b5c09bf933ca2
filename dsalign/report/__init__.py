"""What a run says and leaves to read."""
