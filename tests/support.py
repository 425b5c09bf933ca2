"""What many tests share: a tiny Llama with a character tokenizer, groups of random tokens, a count of what tensors
hold, and a pool of gloo ranks."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import random
import socket
import tempfile
import traceback
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedTokenizerFast

from dsalign import algos
from dsalign.config.schema import DataOptions, ModelOptions, OptimOptions, OutputOptions
from dsalign.contract.groups import Group
from dsalign.data.rows.iterate import iter_rows
from dsalign.data.rows.records import Row

ALGORITHMS = {  # settings that make a loss depend on the whole batch, where the defaults do not
    "sft": {},
    "rm": {"center_rewards_coefficient": 0.1},
    "dpo": {"beta": 0.5, "loss_type": ("sigmoid", "aot_unpaired"), "rpo_alpha": 0.3},
    "kto": {"beta": 0.5, "desirable_weight": 1.5},
    "cpo": {"beta": 0.5, "label_smoothing": 0.1},
    "orpo": {"beta": 0.5},
    "simpo": {"label_smoothing": 0.1},
}
REQUIRED: dict[type[Any], dict[str, Any]] = {  # the options of each section that have no default
    ModelOptions: {"lora_dropout": 0.0},
    DataOptions: {"dataset": ("rows",)},
    OptimOptions: {"gradient_accumulation_steps": 1, "learning_rate": 1e-3},
    OutputOptions: {"output_dir": "out"},
}
S = TypeVar("S", ModelOptions, DataOptions, OptimOptions, OutputOptions)
CHARACTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 .,:;!?'\"-()\n"
SPECIALS = ("<pad>", "<|im_start|>", "<|im_end|>")
VOCABULARY = len(SPECIALS) + 1 + len(CHARACTERS)


def section(cls: type[S], **changes: Any) -> S:
    """A section of a configuration: its defaults but for `changes`."""
    return cls(**{**REQUIRED[cls], **changes})


def ds_file(settings: dict[str, Any]) -> str:
    """The path of a DeepSpeed file with these settings: the same one for the same settings, as ranks end without a
    chance to remove theirs."""
    text = json.dumps(settings)
    folder = Path(tempfile.gettempdir()) / f"dsalign-tests-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{hashlib.sha256(text.encode()).hexdigest()}.json"
    beside = path.with_suffix(f".{os.getpid()}")
    beside.write_text(text)
    beside.replace(path)  # other ranks may read it
    return str(path)


def read_rows(sources: Sequence[str], kind: str, **options: Any) -> list[Row]:
    """All rows of some sources."""
    return list(iter_rows(sources, kind, **options))


def from_rows() -> tuple[str, ...]:
    """The algorithms that train on completions of their rows; the others sample their own from prompts."""
    return tuple(name for name in algos.names() if not algos.load(name)().traits.online)


def stages_and_tuners(*quick: tuple[str, str]) -> list[Any]:
    """Parameters (stage, tuner) of a test that trains for many steps: ZeRO 0 to 3, full weights and LoRA; all but the
    quick ones are slow, as a step's mathematics at every stage have tests of their own."""
    every = [(stage, tuner) for stage in "0123" for tuner in ("full", "lora")]
    return [quick_if(one in quick, *one) for one in every]


def quick_if(quick: bool, *parameters: Any) -> Any:
    """Parameters of a test that is slow unless `quick`."""
    return pytest.param(*parameters, marks=() if quick else pytest.mark.slow)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; pad 0, <|im_end|> ends a turn; no chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIALS, "<unk>", *CHARACTERS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    inner.decoder = decoders.Fuse()
    inner.add_special_tokens(list(SPECIALS))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<|im_end|>", unk_token="<unk>", bos_token=None
    )


SIZES: dict[str, Any] = {  # of a tiny causal model, in words that most configurations of transformers have
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "bos_token_id": None,
    "initializer_range": 0.2,  # large enough that the tokens' probabilities differ
}


def tiny_config(**changes: Any) -> LlamaConfig:
    """Two layers, 32 wide, grouped-query attention, a head of its own."""
    return LlamaConfig(**{**SIZES, "tie_word_embeddings": False, **changes})


def random_model(config: PreTrainedConfig) -> Any:
    """A causal model of this configuration with random weights, the same each time, for evaluation."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


def tiny_folder(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder that `from_pretrained` opens, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(tiny_config(**changes))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def random_groups(kind: str, n: int, seed: int = 0, longest: int = 9) -> list[Group]:
    """n groups of random tokens with uneven lengths; `kind` as in `Traits.data`. Every second pair begins alike."""
    draw = random.Random(seed)
    count = {"pairs": 2, "labels": 1, "demonstrations": 1, "prompts": 0}[kind]

    def tokens(least: int) -> tuple[int, ...]:
        return tuple(draw.randrange(4, VOCABULARY) for _ in range(draw.randint(least, longest)))

    return [
        Group(
            index=i,
            where=f"rows.jsonl:{i + 1}",
            prompt=tokens(2),
            completions=(alike if i % 2 else tuple)((*tokens(0), 2) for _ in range(count)),
            prompt_text=f"prompt {i}",
            label=draw.random() < 0.6 if kind == "labels" else None,
            margin=draw.random() if kind == "pairs" else None,
        )
        for i in range(n)
    ]


def groups_of(*answers: tuple[tuple[int, ...], ...]) -> list[Group]:
    """A prompt of random tokens for each tuple of completions."""
    return [replace(g, completions=c) for g, c in zip(random_groups("prompts", len(answers)), answers, strict=True)]


def alike(completions: Iterable[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """With the tokens of the first one in all but what stands behind the shortest one's end."""
    given = tuple(completions)
    shared = min(map(len, given), default=1) - 1
    return tuple((*given[0][:shared], *one[shared:]) for one in given)


def learnable_groups(kind: str, n: int = 16) -> list[Group]:
    """Random prompts; the good completion is the letter a three times, the bad one z; labels alternate."""
    good, bad = ((VOCABULARY - len(CHARACTERS) + CHARACTERS.index(c),) * 3 + (2,) for c in "az")
    found = []
    for g in random_groups(kind, n):
        if kind == "labels":
            label = g.index % 2 == 0
            found.append(replace(g, completions=(good if label else bad,), label=label))
        else:
            found.append(replace(g, completions=(good, bad)[: len(g.completions)], margin=None))
    return found


class Live(TorchDispatchMode):
    """The most bytes that tensors made inside hold at a time, `given` ones left out."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and not tensor.is_sparse:  # the parts of a sparse one were counted
                self._count(tensor.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


class RankPool:
    """`world` processes joined by gloo that run functions one after another: imports are paid for once.

    `run(function, *args)` calls a module-level function on every rank and returns rank 0's result. A rank that raises
    or hangs ends the pool with its traceback; the next call starts a new one.
    """

    def __init__(self, world: int) -> None:
        self.world = world
        self._workers: list[tuple[Any, Any]] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 300.0) -> Any:
        if not self._workers:
            self._start()
        for _, pipe in self._workers:
            pipe.send((function, args))
        answers = []
        for rank, (_, pipe) in enumerate(self._workers):
            if not pipe.poll(timeout):
                self.close()
                raise TimeoutError(f"rank {rank} did not answer in {timeout} s")
            try:
                answers.append(pipe.recv())
            except EOFError:
                answers.append(("error", f"rank {rank} died"))
            if answers[-1][0] == "error":
                self.close()
                raise RuntimeError(f"rank {rank}:\n{answers[-1][1]}")
        return answers[0][1]

    def _start(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, rank, self.world, port), daemon=True)
            process.start()
            theirs.close()
            self._workers.append((process, ours))

    def close(self) -> None:
        """End every rank."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join(10)
        self._workers = []


def _serve(pipe: Any, rank: int, world: int, port: int) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    os.environ.setdefault("TORCH_EXTENSIONS_DIR", tempfile.mkdtemp())
    torch.set_num_threads(1)
    from dsalign.engines import dist  # noqa: PLC0415  DeepSpeed is imported in the ranks only
    from dsalign.report.run_log import quiet  # noqa: PLC0415

    quiet(rank)
    dist.init(rank, peer_timeout=60)
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("result", function(*args)))
        except BaseException:
            pipe.send(("error", traceback.format_exc()))
