"""Token groups to global batches and tensors."""
