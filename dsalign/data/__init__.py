"""From files to the tensors of a forward pass."""
