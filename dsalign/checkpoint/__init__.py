"""Checkpoints: DeepSpeed state and everything a resume needs, and folders that plain transformers or PEFT opens."""
