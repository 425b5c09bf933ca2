"""Groups to global batches and tensors."""
