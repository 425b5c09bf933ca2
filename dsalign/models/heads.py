"""The two models that engines run: one gives log-probabilities of completion tokens, the other values of positions."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsalign.data.batches.packing import Inputs
from dsalign.models.attention import SharedPrefix
from dsalign.models.balancing import balancing_of
from dsalign.models.classifier import classifier_of
from dsalign.models.logps import Head, HeadLoss, LogitTransform
from dsalign.models.weight_files import read_tensors
from dsalign.models.weights import refuse_broken

VALUE_HEAD_FILE = "value_head.safetensors"
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


def head_file(folder: Path | None) -> Path | None:
    """The file with the value head in a folder: dsalign's own, or value_head.bin, a pickle of the same two tensors.
    None where there is none."""
    files = [] if folder is None else [folder / name for name in (VALUE_HEAD_FILE, "value_head.bin")]
    return next((file for file in files if file.exists()), None)


def unwrap(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model under a PEFT model; its LoRA layers stay in place."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


def num_ids(model: PreTrainedModel | PeftModel) -> int:
    """How many token ids a model has embeddings for, also where an adapter lies on them, or a rank holds a part."""
    inside = unwrap(model).get_input_embeddings().modules()
    return next(one.num_embeddings for one in inside if isinstance(one, nn.Embedding))


class Backbone(nn.Module):
    """A language model up to its last hidden states.

    shares: whether the model's attention can compute a packed row, in which the completions of a group share their
    prompt; else each completion gets a padded row of its own. unsupported: names of the features that a layer asked its
    attention for in the last forward over a packed row and that are not computed there, "" = none. balance: the
    balancing loss of the last forward in training, None where the model has none; balancing: how it is computed.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, shares: bool) -> None:
        super().__init__()
        self.model, self.shares, self.unsupported = model, shares, ""
        self.balancing, self.balance = balancing_of(unwrap(model)), cast("Tensor | None", None)

    def states(self, inputs: Inputs) -> Tensor:
        """The last hidden state of every position of the row, or of all rows one after another: [B T, D]."""
        decoder, more = unwrap(self.model).get_decoder(), dict[str, Any]()
        prefix = SharedPrefix(inputs.spans, inputs.ids.device, read=inputs.read) if inputs.spans else None
        if prefix is not None:
            # transformers would make a T x T mask, which SharedPrefix replaces; one of four dimensions it passes on.
            mask = torch.zeros(1, 1, 1, 1, device=inputs.ids.device)
            more = {"position_ids": inputs.positions, "attention_mask": mask, "shared_prefix": prefix}
        balanced = self.balancing is not None and self.training and torch.is_grad_enabled()
        if self.balancing is not None:
            more["output_router_logits"] = balanced
        out = decoder(input_ids=inputs.ids, use_cache=False, **more)
        self.balance = self.balancing.of(out.router_logits, inputs.real) if self.balancing and balanced else None
        self.unsupported = prefix.unsupported if prefix is not None else ""
        return cast(Tensor, out.last_hidden_state.flatten(0, 1))


class CausalModel(Backbone):
    """A causal language model that gives the log-probabilities of the completion tokens in place of logits.

    head_bytes: the most memory that logits may take at a time, None = the device's default.
    """

    def __init__(self, model: PreTrainedModel | PeftModel, shares: bool = False, head_bytes: int | None = None) -> None:
        super().__init__(model, shares)
        self.head = Head(LogitTransform.of(unwrap(model).config.get_text_config()), head_bytes)

    def forward(
        self, inputs: Inputs, entropy: bool = False, temperature: float = 1.0, loss: HeadLoss | None = None
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        """Log-probabilities of the C completion tokens that the masks of `inputs` let count, or a loss of them.

        entropy: whether to compute the entropy of each token's distribution too. temperature: logits are divided by it,
        > 0. Only positions that predict such a token reach the head, and one that predicts the same token for several
        completions of a group reaches it once.
        Returns ([C] float32 nats, [C] float32 nats without gradient or None); with `loss` its value, a scalar.
        """
        head = unwrap(self.model).get_output_embeddings()
        how: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
        states = self.states(inputs)[inputs.predict]
        if loss is not None:
            unique = loss if inputs.copies is None else loss.over_unique_targets(inputs.copies, inputs.sizes)
            return self.head.token_loss(states, head, inputs.targets, unique, **how)
        logps, entropies = self.head.token_logps(states, head, inputs.targets, **how)
        if inputs.copies is None:
            return logps, entropies
        return logps[inputs.copies], None if entropies is None else entropies[inputs.copies]

    def whole_logits(self, ids: Tensor) -> Tensor:
        """Logits [B, T, V] of ids [B, T] by the model's own forward: the check at start-up compares ours with them."""
        return cast(Tensor, unwrap(self.model)(input_ids=ids, use_cache=False).logits)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32, also where its weights and its input are in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class ValueHead(nn.Module):
    """A linear layer from a hidden state to its value. It starts with bias 0 and weights of standard deviation
    1 / sqrt(hidden + 1) (Stiennon et al., arXiv:2009.01325), drawn from `seed`: equal on all ranks. Without a seed all
    weights start at 0."""

    def __init__(self, hidden: int, seed: int | None) -> None:
        super().__init__()
        self.summary = Float32Linear(hidden, 1)
        with torch.no_grad():
            self.summary.weight.zero_()
            self.summary.bias.zero_()
            if seed is not None:
                noise = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
                self.summary.weight.copy_(noise / (hidden + 1) ** 0.5)

    def forward(self, states: Tensor) -> Tensor:
        """The values of N hidden states: [N, D] -> [N] float32."""
        return cast(Tensor, self.summary(states))[:, 0]


class ValueModel(Backbone):
    """A causal language model with a value head on its last hidden states. The language-model head stays in the model,
    so that an export may have it, but is neither run nor trained. seed: as for `ValueHead`.

    reward: whether it is a reward model. Its bias is not trained then: classifiers of transformers have none, and where
    scores are compared it changes nothing. classifier: what it is to transformers, None = not known there, or a critic.
    """

    def __init__(
        self, model: PreTrainedModel | PeftModel, seed: int | None, shares: bool = False, reward: bool = False
    ) -> None:
        super().__init__(model, shares)
        inner = unwrap(model)
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        # Not hidden_size: OPT's decoder may project its last state, which is what both heads read.
        width = inner.config.get_text_config().hidden_size if head is None else head.weight.shape[-1]
        self.v_head = ValueHead(width, seed)
        self.v_head.summary.bias.requires_grad_(not reward)
        self.classifier = classifier_of(inner, width) if reward else None
        if head is not None and getattr(head, "weight", None) is not embedding.weight:
            head.requires_grad_(False)  # it gets no gradient, and ZeRO-3 would step it with an old one

    def forward(self, inputs: Inputs) -> Tensor:
        """The values of the M positions that `inputs.states` lists: [M] float32."""
        return cast(Tensor, self.v_head(self.states(inputs)[inputs.states]))

    def set_head(self, state: dict[str, Tensor], where: str) -> None:
        """Copy a value head (v_head.summary.weight and .bias) or a score layer (score.weight, maybe .bias) into ours.

        where: what the message names. Raises ValueError where names or shapes do not fit this model, as for a
        classifier of several labels, or a number is not finite.
        """
        refuse_broken(where, state)
        given = {name.replace("score.", "v_head.summary."): tensor for name, tensor in state.items()}
        if BIAS not in given and "score.weight" in state:
            given[BIAS] = torch.zeros(1)
        want = tuple(self.v_head.summary.weight.shape)
        found = {name: tuple(tensor.shape) for name, tensor in given.items()}
        if found != {WEIGHT: want, BIAS: (1,)}:
            if "score.weight" in state and state["score.weight"].shape[0] != 1:
                raise ValueError(
                    f"reward model: {where} must have one label (its `score` layer one output), got "
                    f"{state['score.weight'].shape[0]}"
                )
            raise ValueError(f"{where}: its value head holds {found}; expected {WEIGHT} {want} and {BIAS} (1,)")
        with torch.no_grad():
            self.v_head.summary.weight.copy_(given[WEIGHT])
            self.v_head.summary.bias.copy_(given[BIAS])

    def load_head(self, folder: Path | None) -> bool:
        """Read the value head in `folder`, if there is one; returns whether there was.

        Raises ValueError where it does not fit this model, as `set_head`, or the pickle holds more than tensors.
        """
        file = head_file(folder)
        if file is None:
            return False
        self.set_head(read_tensors(file), str(file))
        return True
