"""What a run says on the console, and what it leaves to read."""
