"""Fused operations of dsalign: each has a plain-torch twin of the same signature in `reference`."""

from dsalign_kernels.reference import selective_logps

__all__ = ["selective_logps"]
