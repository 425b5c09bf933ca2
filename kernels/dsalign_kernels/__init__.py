"""Fused operations of dsalign: each has a plain-torch twin of the same name in `reference`."""

from dsalign_kernels.head import chunk_rows
from dsalign_kernels.linear_logps import Scheme, default_bytes, linear_logps, linear_loss, scheme
from dsalign_kernels.policy import clipped_policy, clipped_value, gae
from dsalign_kernels.preference import preference
from dsalign_kernels.reference import Advantages, Clipped, Logps, Preference, Recipe
from dsalign_kernels.rows import Impl, uses_triton
from dsalign_kernels.selective_logps import selective_logps

__all__ = [
    "Advantages",
    "Clipped",
    "Impl",
    "Logps",
    "Preference",
    "Recipe",
    "Scheme",
    "chunk_rows",
    "clipped_policy",
    "clipped_value",
    "default_bytes",
    "gae",
    "linear_logps",
    "linear_loss",
    "preference",
    "scheme",
    "selective_logps",
    "uses_triton",
]
