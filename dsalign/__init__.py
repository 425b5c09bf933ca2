"""dsalign: alignment of language models with human preferences on DeepSpeed."""

__version__ = "0.1.0"
