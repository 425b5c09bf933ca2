"""What the trainer calls: a causal model that gives completion log-probabilities, and a backbone with a value head."""

from __future__ import annotations

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dsalign.cpu.tied_gradient import OneGradient
from dsalign.data.batches.packing import Inputs
from dsalign.models.attention import SharedPrefix
from dsalign.models.logps import Head, HeadLoss, LogitTransform

VALUE_HEAD_FILE = "value_head.safetensors"
WEIGHT, BIAS = "v_head.summary.weight", "v_head.summary.bias"


def unwrap(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model under a PEFT model; its LoRA layers stay in place."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


class Backbone(nn.Module):
    """The hidden states of a model. shares: whether it takes packed rows. unsupported: what a layer asked for in the
    last forward over a packed row that such a row does not get, or ""."""

    def __init__(self, model: PreTrainedModel | PeftModel, shares: bool) -> None:
        super().__init__()
        self.model, self.shares, self.unsupported = model, shares, ""

    @property
    def lookups(self) -> list[nn.Embedding]:
        """The embeddings whose weights nothing else computes with."""
        embedding = unwrap(self.model).get_input_embeddings()
        return [embedding] if isinstance(embedding, nn.Embedding) else []

    def states(self, inputs: Inputs, prefix: SharedPrefix | None = None) -> Tensor:
        """[B T, D] the last hidden state of every position. prefix: of a packed row, where it is not the plain one."""
        decoder, more = unwrap(self.model).get_decoder(), dict[str, Any]()
        if prefix is None and inputs.spans:
            prefix = SharedPrefix(inputs.spans, inputs.ids.device, read=inputs.read)
        if prefix is not None:
            # A mask of four dimensions is taken as it is, so that none of size T x T is made; nothing reads it.
            mask = torch.zeros(1, 1, 1, 1, device=inputs.ids.device)
            more = {"position_ids": inputs.positions, "attention_mask": mask, "shared_prefix": prefix}
        out = decoder(input_ids=inputs.ids, use_cache=False, **more)
        self.unsupported = prefix.unsupported if prefix is not None else ""
        return cast(Tensor, out.last_hidden_state.flatten(0, 1))


@dataclass(frozen=True)
class Begun:
    """A forward pass over a packed row as far as the head. states: [T, D]; prefix: with the keys of its prompts."""

    states: Tensor
    prefix: SharedPrefix
    weights: OneGradient


class CausalModel(Backbone):
    """A causal language model, seen through the log-probabilities of chosen positions. head_bytes: memory for logits,
    None = the device's default."""

    def __init__(self, model: PreTrainedModel | PeftModel, shares: bool = False, head_bytes: int | None = None) -> None:
        super().__init__(model, shares)
        self.head = Head(LogitTransform.of(unwrap(model).config.get_text_config()), head_bytes)

    @property
    def lookups(self) -> list[nn.Embedding]:
        head = unwrap(self.model).get_output_embeddings()
        return [x for x in super().lookups if x.weight is not getattr(head, "weight", None)]

    def forward(
        self,
        inputs: Inputs,
        entropy: bool = False,
        temperature: float = 1.0,
        loss: HeadLoss | None = None,
        begun: Begun | None = None,
    ) -> tuple[Tensor, Tensor | None] | Tensor:
        """Log-probabilities [C] float32 of all completion tokens that count, and entropies [C] or None; or of these the
        loss, a scalar. Only what predicts them reaches the head, once where completions share it. begun: a pass over
        these inputs to go on with."""
        model = unwrap(self.model)
        head = model.get_output_embeddings()
        how: dict[str, Any] = {"entropy": entropy, "temperature": temperature}
        weights = OneGradient(model.get_input_embeddings(), head) if begun is None else begun.weights
        with weights():
            states = (self.states(inputs) if begun is None else begun.states)[inputs.predict]
            if loss is not None:
                fewer = loss if inputs.copies is None else loss.of_fewer(inputs.copies, inputs.sizes)
                return self.head.token_loss(states, head, inputs.targets, fewer, **how)
            logps, entropies = self.head.token_logps(states, head, inputs.targets, **how)
            if inputs.copies is None:
                return logps, entropies
            return logps[inputs.copies], None if entropies is None else entropies[inputs.copies]

    def begin(self, inputs: Inputs) -> Begun:
        """A pass over a packed row as far as the head, that keeps the keys and values of its prompts."""
        model = unwrap(self.model)
        weights = OneGradient(model.get_input_embeddings(), model.get_output_embeddings())
        prefix = SharedPrefix(inputs.spans, inputs.ids.device, read=inputs.read, keep=True)
        with weights():
            return Begun(self.states(inputs, prefix), prefix, weights)

    @torch.no_grad()
    def behind(self, begun: Begun, inputs: Inputs, temperature: float = 1.0) -> Tensor:
        """Log-probabilities [N] float32 without gradient of completions (`dsalign.data.batch.behind`) whose prompts are
        those of a pass that was begun."""
        prefix = SharedPrefix(inputs.spans, inputs.ids.device, before=begun.prefix)
        prompts = begun.states[begun.prefix.last(inputs.spans)]
        states = torch.cat([prompts, self.states(inputs, prefix)])[inputs.predict]
        head = unwrap(self.model).get_output_embeddings()
        return self.head.token_logps(states, head, inputs.targets, entropy=False, temperature=temperature)[0]

    def whole_logits(self, ids: Tensor) -> Tensor:
        """The model's own logits [B, T, V], by its own forward: what the start-up check compares with."""
        return cast(Tensor, unwrap(self.model)(input_ids=ids, use_cache=False).logits)


class Float32Linear(nn.Linear):
    """A linear layer that computes in float32 whatever dtype its weights are kept in."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float())


class ValueHead(nn.Module):
    """hidden -> 1; weight N(0, 1 / sqrt(hidden + 1)), bias 0 (Stiennon et al., arXiv:2009.01325)."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        self.summary = Float32Linear(hidden, 1)
        with torch.no_grad():
            noise = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
            self.summary.weight.copy_(noise / (hidden + 1) ** 0.5)
            self.summary.bias.zero_()

    def forward(self, states: Tensor) -> Tensor:
        """[N, D] -> [N] float32."""
        return cast(Tensor, self.summary(states))[:, 0]


class ValueModel(Backbone):
    """A causal language model's backbone with a value head; the language-model head is kept, unused and frozen."""

    def __init__(self, model: PreTrainedModel | PeftModel, seed: int, shares: bool = False) -> None:
        super().__init__(model, shares)
        inner = unwrap(model)
        self.v_head = ValueHead(inner.config.get_text_config().hidden_size, seed)
        head, embedding = inner.get_output_embeddings(), inner.get_input_embeddings()
        if head is not None and getattr(head, "weight", None) is not embedding.weight:
            head.requires_grad_(False)  # it gets no gradient, and ZeRO-3 would step it with an old one

    def forward(self, inputs: Inputs) -> Tensor:
        """Values [M] float32 at the inputs' states."""
        return cast(Tensor, self.v_head(self.states(inputs)[inputs.states]))

    def load_head(self, folder: Path | None) -> bool:
        """Read the value head of a folder, if it has one: ours, or a foreign value_head.bin with tensors only.

        Raises ValueError where the file does not fit the model, or is a pickle of more than tensors.
        """
        if folder is None:
            return False
        if (folder / VALUE_HEAD_FILE).exists():
            state: dict[str, Any] = load_file(folder / VALUE_HEAD_FILE)
        elif (folder / "value_head.bin").exists():
            try:
                state = torch.load(folder / "value_head.bin", weights_only=True, map_location="cpu")
            except pickle.UnpicklingError as error:
                raise ValueError(f"{folder}/value_head.bin holds more than tensors and is not opened") from error
        else:
            return False
        want = tuple(self.v_head.summary.weight.shape)
        found = {name: tuple(tensor.shape) for name, tensor in state.items()}
        if found != {WEIGHT: want, BIAS: (1,)}:
            raise ValueError(f"{folder}: its value head holds {found}; expected {WEIGHT} {want} and {BIAS} (1,)")
        with torch.no_grad():
            self.v_head.summary.weight.copy_(state[WEIGHT])
            self.v_head.summary.bias.copy_(state[BIAS])
        return True
