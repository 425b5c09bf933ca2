"""What an algorithm may see; imports nothing else of dsalign."""
