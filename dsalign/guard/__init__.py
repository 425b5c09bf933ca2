"""What watches a run: signals, the other ranks, and the numbers."""
