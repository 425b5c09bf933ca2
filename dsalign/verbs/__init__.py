"""Commands beside training, one file each."""
