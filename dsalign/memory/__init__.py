"""The memory that a run takes, computed from the shapes of its models before anything is loaded."""
