"""The one training loop, for every algorithm, and its surroundings: evaluation, logging, checkpoints."""
