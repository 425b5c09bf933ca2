"""What forward and backward passes hold beside the states of an engine, in bytes: activations kept for a backward, the
head, keys and values of a rollout. docs/plan.md derives each term."""

from __future__ import annotations

from dataclasses import dataclass

from dsalign.memory.shapes import Layer, Linear, Shape, adapted_by

FLOAT32 = 4
MIB = 2**20
KEEP_RATIO = 6  # as in dsalign_kernels.linear_logps: its logits may be kept up to so many times the work space
HEAD_MIB = 512  # the work space of the head on a GPU, where --head_memory gives none
BUCKET = 64  # tokens: the slots of a rollout are a multiple of it


@dataclass(frozen=True)
class Tuning:
    """How the layers are trained. rank: of the LoRA adapters on the layers that `words` name, 0 = all weights are
    trained. dropout: whether adapters drop inputs. checkpointing: whether layers are computed again in the backward."""

    rank: int = 0
    words: tuple[str, ...] = ("ALL",)
    dropout: bool = False
    checkpointing: bool = False
    itemsize: int = 2

    def adapted(self, one: Linear) -> bool:
        """Whether a linear layer has an adapter."""
        return self.rank > 0 and adapted_by(one, self.words)


def layer_bytes(layer: Layer, tuning: Tuning, width: int, *, first: bool = False) -> float:
    """The bytes a token that autograd keeps of one layer. first: whether it is the first one of a model whose embedding
    is frozen, so that its first norm keeps nothing."""
    item, full = tuning.itemsize, tuning.rank == 0
    # A norm keeps its input in float32, and the normed one where its weight is trained.
    again = (FLOAT32 if layer.float_norms else item) if full else 0
    kept = layer.normed * (FLOAT32 + again) * (0.5 if first and not full else 1)
    attention = layer.query + layer.key + layer.value + layer.attended
    return (
        kept
        + (attention + layer.extra + _products(layer) + _inputs(layer, tuning, width)) * item
        + _masks(layer, tuning, width)
    )


def _products(layer: Layer) -> int:
    """Elements a token of the MLP's middle: gate, activated gate and up."""
    return layer.middles * (layer.inner * max(1, layer.experts) + layer.shared)


def _inputs(layer: Layer, tuning: Tuning, width: int) -> int:
    """Elements a token of the inputs that linear layers keep: of every one that is trained or has an adapter, once for
    those that share one, but with dropout each adapter has its own. An adapter keeps its middle too."""
    full, seen, found = tuning.rank == 0, set[str](), 0
    for one in layer.linears:
        if not full and not tuning.adapted(one):
            continue
        times = max(1, layer.experts) if one.copies > 1 else 1
        source = SOURCES.get(one.name, one.name) + ("*" if one.copies > 1 else "")
        found += tuning.rank * times
        if source in seen and not (tuning.dropout and one.copies == 1):
            continue
        seen.add(source)
        found += one.inputs * times
    return found


def _masks(layer: Layer, tuning: Tuning, width: int) -> int:
    """Bytes a token of the masks of dropout, a byte an element."""
    if not (tuning.rank and tuning.dropout):
        return 0
    return sum(one.inputs for one in layer.linears if tuning.adapted(one) and one.copies == 1)


# Linear layers that read the same tensor.
SOURCES = {name: "attention" for name in ("q_proj", "k_proj", "v_proj", "q_a_proj", "kv_a_proj_with_mqa", "qkv_proj")}
SOURCES |= {name: "mlp" for name in ("gate_proj", "up_proj", "gate_up_proj", "c_fc", "gate", "shared_expert_gate")}


def training_bytes(shape: Shape, tuning: Tuning, tokens: int) -> float:
    """The bytes of activations when the backward of a packed micro-batch of `tokens` tokens begins, head not included.

    With checkpointing each layer keeps its input, and one layer at a time is computed again. Adapters on experts add
    up whole matrices, base and adapter, which are kept whatever the number of tokens.
    """
    summed = [
        sum(one.size for one in layer.linears if one.copies > 1 and tuning.adapted(one)) * tuning.itemsize
        for layer, _ in shape.layers
    ]
    each = [(layer_bytes(layer, tuning, shape.width), count) for layer, count in shape.layers]
    final = shape.width * (FLOAT32 + tuning.itemsize)
    if tuning.checkpointing:
        return tokens * (shape.depth * shape.width * tuning.itemsize + max(one for one, _ in each) + final) + max(
            summed
        )
    first = shape.layers[0][0]
    less = layer_bytes(first, tuning, shape.width) - layer_bytes(first, tuning, shape.width, first=True)
    whole = sum(size * count for size, (_, count) in zip(summed, shape.layers, strict=True))
    return tokens * (sum(one * count for one, count in each) - less + final) + whole


def backward_bytes(shape: Shape, tuning: Tuning, tokens: int) -> float:
    """The bytes that the backward of a layer works in: the gradients of an MLP's middle and of the hidden state."""
    return tokens * tuning.itemsize * max(_work(layer, shape.width) for layer, _ in shape.layers)


def _work(layer: Layer, width: int) -> int:
    return 3 * (layer.inner * max(1, layer.experts) + layer.shared) + 2 * width


def forward_bytes(shape: Shape, itemsize: int, tokens: int, *, adapted: bool = False) -> float:
    """The bytes that a forward without gradient works in: the middle of one MLP three times, with adapters four times,
    and hidden states five times."""
    more = (max(layer.inner * max(1, layer.experts) + layer.shared for layer, _ in shape.layers)) if adapted else 0
    return tokens * itemsize * (max(_work(layer, shape.width) for layer, _ in shape.layers) + 3 * shape.width + more)


def head_bytes(
    shape: Shape, predicted: int, itemsize: int, *, gradient: bool, trained: bool, most: int | None, part: int | None
) -> float:
    """The bytes of the head for `predicted` positions, by the plan that `dsalign_kernels.linear_logps.scheme` makes;
    logits of all positions are never there unless they fit into 6 times the work space.

    most: --head_memory in MiB, None = 512. part: predicted positions of the largest group, None = a loss that reads
    all of them at once.
    """
    space = (most or HEAD_MIB) * MIB
    fit = max(1, space // (shape.vocabulary * itemsize))
    chunk = min(predicted, fit) * shape.vocabulary * itemsize
    states = predicted * shape.width * itemsize
    if not gradient:
        return states + chunk
    if not trained:
        return 2 * states + chunk
    local = part is not None and part <= KEEP_RATIO * fit
    weight = shape.embedding
    if predicted <= (fit if local and itemsize >= FLOAT32 else KEEP_RATIO * fit):
        return 2 * states + predicted * shape.vocabulary * itemsize + weight * itemsize
    if local:  # the weight's gradient adds up in float32, and is then rounded
        rows = max(part or 0, min(fit, predicted))
        return 3 * states + rows * shape.vocabulary * itemsize + weight * (FLOAT32 + itemsize)
    return 2 * states + chunk + weight * itemsize


def cache_bytes(shape: Shape, rows: int, tokens: int, itemsize: int) -> float:
    """The bytes of keys and values of `rows` completions that run at a time, prompt and completion of `tokens` tokens
    each, rounded up to a whole number of 64 tokens."""
    each = sum(count * (layer.key + layer.value) for layer, count in shape.layers)
    return float(rows * -(-tokens // BUCKET) * BUCKET * each * itemsize)
