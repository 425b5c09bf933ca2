"""Fused operations of dsalign: each has a plain-torch twin of the same name in `reference`."""

from dsalign_kernels.linear_logps import Scheme, chunk_rows, default_bytes, linear_logps, linear_loss, scheme
from dsalign_kernels.reference import Logps
from dsalign_kernels.selective_logps import selective_logps

__all__ = [
    "Logps",
    "Scheme",
    "chunk_rows",
    "default_bytes",
    "linear_logps",
    "linear_loss",
    "scheme",
    "selective_logps",
]
