"""The sizes of a decoder's parts from its config.json alone: no weights, no torch. Counts are numbers of elements."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj", "qkv_proj", "query_key_value", "c_attn", "Wqkv", "wq", "wk", "wv")
NUMBERS = ("num_local_experts", "num_experts", "n_routed_experts")  # of experts, as config.json files call it
ALL = ("all", "all-linear", "all_linear")
ROUTERS = ("gate", "router")  # names of the layer that chooses experts


class UnknownFamilyError(ValueError):
    """The error of a config.json of a family whose formula is not here."""


@dataclass(frozen=True)
class Linear:
    """A weight [outputs, inputs], in `copies` experts. targeted: whether LoRA's ALL adapts it (no router). ranks: what
    PEFT multiplies the rank of its adapter by: 2 for two matrices of some experts that are one."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    copies: int = 1
    targeted: bool = True
    ranks: int = 1

    @property
    def size(self) -> int:
        """The number of its elements, those of all experts and the bias included."""
        return self.copies * self.outputs * (self.inputs + self.bias)

    @property
    def plain(self) -> bool:
        """Whether it is a layer of its own: no router, and not the matrices of all experts."""
        return self.copies == 1 and self.name not in ROUTERS


@dataclass(frozen=True)
class Layer:
    """A decoder layer. query, key, value, attended: elements a token of the attention's inputs and of its output.
    inner: elements a token in the middle of its MLP; with experts of one expert, of which a token takes `experts`.
    shared: elements in the middle of an MLP that every token takes beside the experts. norms: elements of all norms;
    normed: elements a token that norms read."""

    linears: tuple[Linear, ...]
    norms: int
    normed: int
    query: int
    key: int
    value: int
    attended: int
    inner: int
    experts: int = 0
    shared: int = 0
    float_norms: bool = False  # norms multiply by their weight in float32
    extra: int = 0  # further elements a token that attention and experts keep
    middles: int = 3  # tensors as wide as `inner` that the MLP keeps between its linear layers

    @property
    def size(self) -> int:
        """The number of its parameters."""
        return self.norms + sum(one.size for one in self.linears)

    @property
    def active(self) -> int:
        """The number of its parameters that one token is multiplied with."""
        used = (
            one.size // one.copies * (min(self.experts, one.copies) if one.copies > 1 else 1) for one in self.linears
        )
        return self.norms + sum(used)


@dataclass(frozen=True)
class Shape:
    """A decoder: `count` layers of each kind, embedding and head [vocabulary, width]. source: where the numbers come
    from, in words. positions: elements of learned positions. cache: elements a token and layer that rollouts keep."""

    layers: tuple[tuple[Layer, int], ...]
    vocabulary: int
    width: int
    tied: bool
    final_norm: int
    positions: int = 0
    head_bias: bool = False
    source: str = "config.json"

    @property
    def depth(self) -> int:
        """The number of layers."""
        return sum(count for _, count in self.layers)

    @property
    def embedding(self) -> int:
        """The number of elements of the embedding, which is the head's too where they are tied."""
        return self.vocabulary * self.width

    @property
    def head(self) -> int:
        """The number of elements of a head of its own, 0 where it is the embedding."""
        return 0 if self.tied else self.embedding + self.head_bias * self.vocabulary

    @property
    def total(self) -> int:
        """The number of all parameters."""
        return self._with(lambda layer: layer.size)

    @property
    def active(self) -> int:
        """The number of parameters that one token is multiplied with: fewer than all where there are experts."""
        return self._with(lambda layer: layer.active)

    def _with(self, size: Callable[[Layer], int]) -> int:
        layers = sum(count * size(layer) for layer, count in self.layers)
        return layers + self.embedding + self.head + self.positions + self.final_norm

    @property
    def largest(self) -> int:
        """The number of elements of the largest parameter: an embedding, or the matrices of all experts in one."""
        return max([self.embedding, *(_fused(layer) for layer, _ in self.layers)])

    @property
    def packed(self) -> int:
        """The number of elements that --load_in_4bit puts into 4 bits: linear layers without their biases, but not
        routers, experts, whose matrices are one tensor, and the head."""
        return sum(count * one.inputs * one.outputs for kind, count in self.layers for one in kind.linears if one.plain)

    @property
    def unpacked(self) -> int:
        """The number of elements of the largest layer in 4 bits, which a forward or a backward unpacks for itself."""
        return max((x.inputs * x.outputs for kind, _ in self.layers for x in kind.linears if x.plain), default=0)

    def lora(self, rank: int, words: Sequence[str]) -> int:
        """The number of elements of a LoRA adapter: rank x (inputs + outputs) of each layer that `words` name, as for
        --lora_target_modules. Raises ValueError where they name none."""
        found = sum(
            count * rank * one.ranks * one.copies * (one.inputs + one.outputs)
            for layer, count in self.layers
            for one in layer.linears
            if adapted_by(one, words)
        )
        if not found:
            names = sorted({one.name for layer, _ in self.layers for one in layer.linears})
            raise ValueError(f"lora_target_modules: expected some of {', '.join(names)}, got {' '.join(words)}")
        return found


def _fused(layer: Layer) -> int:
    """The largest parameter of a layer; the matrices of all experts are one."""
    return max(one.size for one in layer.linears)


def adapted_by(one: Linear, words: Sequence[str]) -> bool:
    """Whether --lora_target_modules WORDS gives this layer an adapter."""
    if len(words) == 1 and words[0].lower() in ALL:
        return one.targeted
    wanted = [x for word in words for x in (QUERY_KEY_VALUE if word == "DEFAULT" else (word.rpartition(".")[2],))]
    return one.name in wanted


def text_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config.json that describes the language model; of a model for images too it is a section."""
    inner = config.get("text_config")
    return {**inner, "model_type": inner.get("model_type", "")} if isinstance(inner, Mapping) else config


def of_config(config: Mapping[str, Any]) -> Shape:
    """The shape of the model that a config.json describes.

    Raises UnknownFamilyError for a model_type that is not in FAMILIES, ValueError naming a key that is missing.
    """
    config = text_part(config)
    kind = str(config.get("model_type", ""))
    if kind not in FAMILIES:
        raise UnknownFamilyError(f"model_type {kind!r}")
    try:
        shape = FAMILIES[kind](config)
    except KeyError as error:
        raise ValueError(f"config.json: expected the key {error.args[0]!r} of a {kind} model, found none") from None
    tied = config.get("tie_word_embeddings")
    return shape if tied is None else replace(shape, tied=bool(tied))


def _attention(c: Mapping[str, Any], *, bias: bool, out_bias: bool) -> tuple[list[Linear], dict[str, Any]]:
    heads = c["num_attention_heads"]
    grouped = c.get("num_key_value_heads") or heads
    each = c.get("head_dim") or c["hidden_size"] // heads
    wide, narrow = heads * each, grouped * each
    linears = [
        Linear("q_proj", c["hidden_size"], wide, bias),
        Linear("k_proj", c["hidden_size"], narrow, bias),
        Linear("v_proj", c["hidden_size"], narrow, bias),
        Linear("o_proj", wide, c["hidden_size"], out_bias),
    ]
    return linears, {"query": wide, "key": narrow, "value": narrow, "attended": wide}


def _mlp(width: int, inner: int, *, bias: bool = False) -> list[Linear]:
    pair = [Linear(name, width, inner, bias) for name in ("gate_proj", "up_proj")]
    return [*pair, Linear("down_proj", inner, width, bias)]


def _llama(
    c: Mapping[str, Any],
    *,
    bias: bool | None = None,
    out_bias: bool | None = None,
    norms: int = 2,
    head_norms: bool = False,
    tied: bool = False,
) -> Shape:
    """Llama and its kin: RMSNorm, grouped-query attention, gated MLP. bias: of query, key and value, None = the key
    attention_bias. norms: of a layer, as wide as the model; head_norms: one more of queries and of keys."""
    width = c["hidden_size"]
    bias = bool(c.get("attention_bias")) if bias is None else bias
    attention, sizes = _attention(c, bias=bias, out_bias=bias if out_bias is None else out_bias)
    each = sizes["query"] // c["num_attention_heads"]
    mlp = _mlp(width, c["intermediate_size"], bias=bool(c.get("mlp_bias")))
    layer = Layer(
        tuple([*attention, *mlp]), norms * width + 2 * each * head_norms,
        norms * width + (sizes["query"] + sizes["key"]) * head_norms, inner=c["intermediate_size"], **sizes,
    )  # fmt: skip
    return Shape(((layer, c["num_hidden_layers"]),), c["vocab_size"], width, tied, width)


def _gemma(c: Mapping[str, Any], **of_llama: Any) -> Shape:
    """Gemma: a Llama whose norms multiply in float32, tied."""
    shape = _llama(c, tied=True, **of_llama)
    return replace(shape, layers=((replace(shape.layers[0][0], float_norms=True), shape.depth),))


def _experts(shape: Shape, c: Mapping[str, Any], *, inner: int, shared: int = 0, gate: bool = False) -> Layer:
    """A layer of `shape` with experts in place of its MLP. inner: inner size of one. shared: of the MLP
    beside them; gate: whether that has a gate of one output."""
    layer, width = shape.layers[0][0], shape.width
    experts = next((c[name] for name in NUMBERS if c.get(name)), None) or c[NUMBERS[0]]
    kept = [one for one in layer.linears if one.name not in ("gate_proj", "up_proj", "down_proj")]
    router = Linear("gate", width, experts, targeted=False)
    both = Linear("gate_up_proj", width, 2 * inner, copies=experts)
    down = Linear("down_proj", inner, width, copies=experts)
    beside = _mlp(width, shared) if shared else []
    beside += [Linear("shared_expert_gate", width, 1)] if gate else []
    return replace(
        layer, linears=(*kept, router, both, down, *beside), inner=inner, shared=shared,
        experts=c["num_experts_per_tok"], norms=layer.norms,
        extra=layer.extra + width * (c["num_experts_per_tok"] + gate),
    )  # fmt: skip


def _mixtral(c: Mapping[str, Any]) -> Shape:
    shape = _llama(c, bias=False)
    layer = _experts(shape, c, inner=c["intermediate_size"])
    return replace(shape, layers=((layer, c["num_hidden_layers"]),))


def _as_peft_adapts(shape: Shape) -> Shape:
    """The shape with the adapters that PEFT 0.21 makes for ALL in these families where there are other MLPs beside
    experts: those of the others go to the experts, whose gate and up get twice the rank."""
    plain = ("gate_proj", "up_proj", "down_proj")
    if not any(one.name in plain for layer, _ in shape.layers for one in layer.linears):
        return shape

    def adapted(one: Linear) -> Linear:
        if one.name in plain:
            return replace(one, targeted=one.copies > 1)
        return replace(one, ranks=2) if one.name == "gate_up_proj" else one

    layers = ((replace(layer, linears=tuple(map(adapted, layer.linears))), count) for layer, count in shape.layers)
    return replace(shape, layers=tuple(layers))


def _qwen_moe(c: Mapping[str, Any], **of_llama: Any) -> Shape:
    """Qwen 2 and 3 with experts in every decoder_sparse_step-th layer but those of mlp_only_layers."""
    shape = _llama(c, **of_llama)
    shared = c.get("shared_expert_intermediate_size") or 0 if c["model_type"] == "qwen2_moe" else 0
    sparse = _experts(shape, c, inner=c["moe_intermediate_size"], shared=shared, gate=shared > 0)
    step, dense = c.get("decoder_sparse_step", 1), set(c.get("mlp_only_layers") or ())
    chosen = [i not in dense and (i + 1) % step == 0 for i in range(c["num_hidden_layers"])]
    kinds = ((shape.layers[0][0], chosen.count(False)), (sparse, chosen.count(True)))
    return replace(shape, layers=tuple(kind for kind in kinds if kind[1]))


def _deepseek(c: Mapping[str, Any]) -> Shape:
    """DeepSeek V3: attention with compressed queries, keys and values, and experts behind the first dense layers."""
    width, heads, bias = c["hidden_size"], c["num_attention_heads"], bool(c.get("attention_bias"))
    each, rope, low = c["qk_nope_head_dim"] + c["qk_rope_head_dim"], c["qk_rope_head_dim"], c["kv_lora_rank"]
    query, value, rank = heads * each, heads * c["v_head_dim"], c.get("q_lora_rank")
    asks = [Linear("q_a_proj", width, rank, bias), Linear("q_b_proj", rank, query)] if rank else []
    attention = [
        *(asks or [Linear("q_proj", width, query)]),
        Linear("kv_a_proj_with_mqa", width, low + rope, bias),
        Linear("kv_b_proj", low, heads * (c["qk_nope_head_dim"] + c["v_head_dim"])),
        Linear("o_proj", value, width, bias),
    ]
    extra = (rank or 0) + low
    dense = Layer(
        tuple([*attention, *_mlp(width, c["intermediate_size"])]), 2 * width + extra, 2 * width + extra,
        query=query, key=query, value=value, attended=value, inner=c["intermediate_size"],
    )  # fmt: skip
    shape = Shape(((dense, 1),), c["vocab_size"], width, False, width)
    inner = c["moe_intermediate_size"]
    shared = inner * (c.get("n_shared_experts") or 0)
    sparse = _experts(shape, c, inner=inner, shared=shared)
    sparse = replace(sparse, extra=sparse.extra + 2 * width)  # the router's states are a float32 copy
    first = min(c.get("first_k_dense_replace", 0), c["num_hidden_layers"])
    kinds = ((dense, first), (sparse, c["num_hidden_layers"] - first))
    return replace(shape, layers=tuple(kind for kind in kinds if kind[1]))


def _phi3(c: Mapping[str, Any]) -> Shape:
    """Phi 3: Llama with query, key and value in one matrix, and gate and up in one."""
    shape = _llama({**c, "head_dim": None}, bias=False)
    layer, width = shape.layers[0][0], shape.width
    linears = (
        Linear("qkv_proj", width, layer.query + 2 * layer.key), Linear("o_proj", layer.query, width),
        Linear("gate_up_proj", width, 2 * layer.inner), Linear("down_proj", layer.inner, width),
    )  # fmt: skip
    return replace(shape, layers=((replace(layer, linears=linears), shape.depth),))


def _gpt2(c: Mapping[str, Any]) -> Shape:
    """GPT-2: LayerNorm with bias, learned positions, an MLP without a gate, biases everywhere."""
    width = c["n_embd"]
    inner = c.get("n_inner") or 4 * width
    linears = (
        Linear("c_attn", width, 3 * width, True), Linear("c_proj", width, width, True),
        Linear("c_fc", width, inner, True), Linear("c_proj", inner, width, True),
    )  # fmt: skip
    layer = Layer(linears, 4 * width, 2 * width, width, width, width, width, inner, middles=4)
    positions = c.get("n_positions", 1024) * width
    return Shape(((layer, c["n_layer"]),), c["vocab_size"], width, True, 2 * width, positions)


FAMILIES: Mapping[str, Callable[[Mapping[str, Any]], Shape]] = {
    "llama": _llama,
    "mistral": lambda c: _llama(c, bias=False),
    "qwen2": lambda c: _llama(c, bias=True, out_bias=False),
    "qwen3": lambda c: _llama(c, head_norms=True),
    "granite": _llama,
    "smollm3": lambda c: _llama(c, tied=True),
    "gemma": lambda c: _gemma(c),
    "gemma2": lambda c: _gemma(c, norms=4),
    "gemma3_text": lambda c: _gemma(c, norms=4, head_norms=True),
    "phi3": _phi3,
    "gpt2": _gpt2,
    "mixtral": _mixtral,
    "qwen2_moe": lambda c: _qwen_moe(c, bias=bool(c.get("qkv_bias", True)), out_bias=False),
    "qwen3_moe": lambda c: _as_peft_adapts(_qwen_moe(c, head_norms=True)),
    "deepseek_v3": lambda c: _as_peft_adapts(_deepseek(c)),
}


def of_numbers(
    layers: int,
    hidden: int,
    *,
    params: float | None = None,
    intermediate: int | None = None,
    heads: int | None = None,
    kv_heads: int | None = None,
    vocabulary: int = 128256,
    experts: int = 0,
    experts_per_token: int = 2,
) -> Shape:
    """The shape of a Llama with these numbers, for a model that cannot be had; with `experts` of a Mixtral.

    params: the number of all its parameters, from which the inner size of the MLP is taken where that is not given.
    Raises ValueError where params leaves nothing for it.
    """
    heads = heads or max(1, hidden // 128)
    config = {
        "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads, "vocab_size": vocabulary,
        "num_key_value_heads": kv_heads or min(heads, 8), "num_experts_per_tok": experts_per_token,
        "num_local_experts": experts, "intermediate_size": intermediate or 0,
    }  # fmt: skip
    family = FAMILIES["mixtral" if experts else "llama"]
    if intermediate is None:
        rest = (params or 0) - family(config).total
        config["intermediate_size"] = inner = int(rest / (3 * hidden * layers * max(1, experts)))
        if inner < 1:
            raise ValueError(
                f"--params: expected more than {family({**config, 'intermediate_size': 0}).total:,}, the embeddings "
                f"and attention of {layers} layers of width {hidden}, got {params or 0:,.0f}; or give --intermediate"
            )
    return replace(family(config), source="--params, as a Mixtral" if experts else "--params, as a Llama")
