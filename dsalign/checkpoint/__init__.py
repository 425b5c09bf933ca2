"""Checkpoints: DeepSpeed state with all that --resume needs, and model folders that transformers or PEFT opens."""
