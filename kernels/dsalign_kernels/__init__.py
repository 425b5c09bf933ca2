"""Operations of a language model's head, of decoding and of alignment losses, by Triton kernels on a GPU.

`selective_logps`, `linear_logps`, `linear_loss`, `gae`, `sample_tokens` and `decode_attention` also run without, on any
device.
`preference`, `clipped_policy` and `clipped_value` are kernels alone. Nothing here imports dsalign.
"""

from dsalign_kernels.decode_attention import decode_attention
from dsalign_kernels.head import chunk_rows
from dsalign_kernels.linear_logps import Scheme, default_bytes, linear_logps, linear_loss, scheme
from dsalign_kernels.policy import Clipped, clipped_policy, clipped_value, gae
from dsalign_kernels.preference import Preference, Recipe, preference
from dsalign_kernels.reference import Advantages, Logps
from dsalign_kernels.rows import Impl, has_triton, uses_triton
from dsalign_kernels.sampling import Sampled, gumbel, sample_tokens, token_key
from dsalign_kernels.selective_logps import selective_logps

__all__ = [
    "Advantages",
    "Clipped",
    "Impl",
    "Logps",
    "Preference",
    "Recipe",
    "Sampled",
    "Scheme",
    "chunk_rows",
    "clipped_policy",
    "clipped_value",
    "decode_attention",
    "default_bytes",
    "gae",
    "gumbel",
    "has_triton",
    "linear_logps",
    "linear_loss",
    "preference",
    "sample_tokens",
    "scheme",
    "selective_logps",
    "token_key",
    "uses_triton",
]
