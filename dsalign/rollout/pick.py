"""From the last hidden states to sampled tokens: the one place of a rollout that calls the head and its kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dsalign.contract.rollout_options import RolloutOptions
from dsalign.models.logps import LogitTransform
from dsalign_kernels import sample_tokens, token_key

__all__ = ["Pick", "signed", "token_key"]


class Pick:
    """The choice of the next token of each row: the head of a causal language model, then Gumbel-max sampling."""

    def __init__(self, model: Any, options: RolloutOptions) -> None:
        self.head, self.options = model.get_output_embeddings(), options
        self.transform = LogitTransform.of(model.config.get_text_config())

    def __call__(self, states: Tensor, keys: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a token for each of n rows.

        states: [n, D], the hidden states that predict the tokens. keys: [n] int64, the bits of each completion's key.
        positions: [n] int64, index of the token in its completion, from 0.
        Returns ([n] int64, [n] float32: log-probabilities of the logits divided by the temperature, nats).
        """
        return self.of_logits(
            self.head(states), keys, positions, scale=self.transform.scale, softcap=self.transform.softcap
        )

    def of_logits(self, logits: Tensor, keys: Tensor, positions: Tensor, **transform: Any) -> tuple[Tensor, Tensor]:
        """The same from logits [n, V]. transform: what the model does to them, if they come straight from the head."""
        options = self.options
        found = sample_tokens(
            logits,
            keys,
            positions,
            temperature=options.temperature,
            top_k=options.top_k,
            top_p=options.top_p,
            **transform,
        )
        return found.tokens, found.logps


def signed(key: int) -> int:
    """The signed 64-bit number that has the bits of an unsigned key, so that int64 holds it."""
    return key - 2**64 if key >= 2**63 else key
