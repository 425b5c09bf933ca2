"""The balancing loss of a mixture of experts: the model's own, where its configuration asks for router logits."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Balancing:
    """A model's own balancing loss. coefficient: its weight in the loss, router_aux_loss_coef, > 0."""

    coefficient: float
    function: Callable[..., Any]
    num_experts: int
    num_chosen: int

    def of(self, router_logits: Any, real: Tensor | None) -> Tensor:
        """The loss, a scalar with gradient: num_experts at the least balanced, about num_chosen at the best.

        router_logits: of each layer [tokens, experts]. real: [rows, tokens of a row], 1 for tokens and 0 for padding;
        None = all are tokens.
        """
        found: Tensor = self.function(router_logits, self.num_experts, self.num_chosen, real)
        return found


def balancing_of(model: Any) -> Balancing | None:
    """The balancing loss of a transformers model, None where its configuration asks for none. A line says where one is
    asked for that cannot be computed."""
    config = model.config.get_text_config()
    coefficient = float(getattr(config, "router_aux_loss_coef", 0.0) or 0.0)
    if not getattr(config, "output_router_logits", False) or coefficient <= 0:
        return None
    function = getattr(sys.modules[type(model).__module__], "load_balancing_loss_func", None)
    experts, chosen = getattr(model, "num_experts", None), getattr(model, "num_experts_per_tok", None)
    if function is None or experts is None or chosen is None:
        logger.warning(
            "%s asks for a balancing loss (output_router_logits) that is not known here: it is left out",
            type(model).__name__,
        )
        return None
    return Balancing(coefficient, function, experts, chosen)
