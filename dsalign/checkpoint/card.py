"""The model card of an exported folder: README.md with the front matter that the hub reads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path

import yaml

from dsalign.config.parse import parse
from dsalign.config.schema import RunConfig, one_line
from dsalign.config.secrets import redacted
from dsalign.models.heads import VALUE_HEAD_FILE
from dsalign.models.names import BASE_FILE

LIBRARIES = ("dsalign", "torch", "transformers", "peft", "deepspeed", "tokenizers")
HASHED_BYTES = 1 << 30  # a longer file is named without its hash
PAPERS = "https://arxiv.org/abs/"
FOUR_BIT = """

The adapter was trained on this base in 4 bits. dsalign opens it so by itself (`dsalign chat`, `dsalign merge`);
transformers needs to be told, or it opens a model that is a little another one:

```python
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=how)
```"""


def write_card(
    folder: Path, config: RunConfig, base: str, metrics: Mapping[str, float], *, at: Path, step: int, num_rows: int
) -> None:
    """Write README.md into an exported folder: what it was made from and how, how it did, and how it is opened.

    base: the model whose weights training started from. metrics: the last value of each. at: where the folder will be.
    step: optimizer steps taken. num_rows: rows of the training set.
    """
    adapter, kind = (folder / "adapter_config.json").exists(), _kind(folder)
    parts = [
        f"---\n{_front_matter(config, base, kind, adapter)}---",
        f"# {Path(config.models.model).name}, {config.algo}",
        f"{'A LoRA adapter' if adapter else 'All weights'} of {_code(config.models.model)} trained with "
        f"[{config.algo}]({_paper(config)}) by dsalign, {step} optimizer steps.",
        "## Use\n\n" + _use(folder, at, kind, adapter),
        _base(folder, base) if adapter else "",
        f"## Data\n\n{num_rows} rows to train on:\n\n" + "\n".join(_data(name) for name in config.data.dataset),
        "## Options that differ from the defaults\n\n" + _options(config),
        "## Last metrics\n\n" + _table({name: f"{value:.6g}" for name, value in sorted(metrics.items())}),
        "## Versions\n\n" + _table(_versions()),
        "## Licence\n\nNone is named here. It is yours to choose, within the licences of the base model and the data: "
        "add `license:` to the lines at the top.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "README.md").write_text(redacted(text), encoding="utf-8")


def _front_matter(config: RunConfig, base: str, kind: str, adapter: bool) -> str:
    """What the hub's index reads. A folder is no name there, so of a local base or data set nothing is said."""
    lines: dict[str, object] = {} if Path(base).exists() else {"base_model": base}
    if lines:
        lines["base_model_relation"] = "adapter" if adapter else "finetune"
    scores = kind != "language model"
    lines["library_name"] = "peft" if adapter else "transformers"
    lines["pipeline_tag"] = "text-classification" if scores else "text-generation"
    lines["tags"] = ["dsalign", config.algo, *["lora"] * adapter, *["reward-model"] * scores]
    if named := [name for name in map(_without_number, config.data.dataset) if _on_the_hub(name)]:
        lines["datasets"] = named
    return yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def _kind(folder: Path) -> str:
    """What an exported folder is to who opens it."""
    if not (folder / VALUE_HEAD_FILE).exists():
        return "language model"
    described = folder / "adapter_config.json"
    if described.exists():
        is_classifier = json.loads(described.read_text()).get("task_type") == "SEQ_CLS"
    else:
        names = json.loads((folder / "config.json").read_text()).get("architectures") or [""]
        is_classifier = names[0].endswith("ForSequenceClassification")
    return "classifier" if is_classifier else "reward model"


def _use(folder: Path, at: Path, kind: str, adapter: bool) -> str:
    """The lines that open the folder, which a test runs."""
    if kind == "reward model":
        return (
            f"transformers has no class that gives this model's score; `dsalign --reward_model {at}` has. The "
            f"score is `{VALUE_HEAD_FILE}` times the last hidden state of the token that ends the answer."
        )
    if kind == "classifier":
        more = ", num_labels=1, pad_token_id=tokenizer.pad_token_id" if adapter else ""
        lines = f"""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = {str(at)!r}  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder{more})
messages = [{{"role": "user", "content": "Is water wet?"}}, {{"role": "assistant", "content": "It is."}}]
text = tokenizer.apply_chat_template(messages, tokenize=False)
ends = {_ends(folder)!r}  # the score is read where the answer ends, so nothing may stand behind that
text = text[: max(text.rfind(end) + len(end) for end in ends if end in text)]
batch = tokenizer([text], padding=True, add_special_tokens=False, return_tensors="pt")
print(model(**batch).logits[:, 0])"""
        tail = f"dsalign reads it with `--reward_model {at}`, from `{VALUE_HEAD_FILE}`, which holds the same score."
        return f"```python\n{lines}\n```\n\n{tail}"
    lines = f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = {str(at)!r}  # this folder
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)
messages = [{{"role": "user", "content": "Is water wet?"}}]
batch = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
print(tokenizer.decode(model.generate(**batch, max_new_tokens=64)[0]))"""
    return f"```python\n{lines}\n```"


def _ends(folder: Path) -> list[str]:
    """The tokens that end an answer, as text: those at which generation stops, and the tokenizer's own."""
    file = folder / "generation_config.json"
    given = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
    tokens = json.loads((folder / "tokenizer_config.json").read_text())
    own = tokens.get("eos_token")
    known = {}
    if (folder / "tokenizer.json").exists():
        added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        known = {token["id"]: token["content"] for token in added}
    found = [known.get(i) for i in (given if isinstance(given, list) else [given])]
    found.append(own.get("content") if isinstance(own, dict) else own)
    return sorted({token for token in found if token})


def _base(folder: Path, base: str) -> str:
    """What is to be done where an adapter's base lies elsewhere later, or was in 4 bits when it was trained."""
    beside = json.loads((folder / BASE_FILE).read_text()) if (folder / BASE_FILE).exists() else {}
    return _place(base, beside) + (FOUR_BIT if "quantised" in beside else "")


def _place(base: str, beside: Mapping[str, str]) -> str:
    """Where the base is. beside: what BASE_FILE says."""
    if not Path(base).exists():
        return f"## Base\n\n{_code(base)}, a name on the hub: the adapter opens on any machine that can reach it."
    lines = (
        f"## Base\n\nThe folder {_code(str(Path(base).resolve()))}, which `adapter_config.json` names "
        "(`base_model_name_or_path`). transformers and PEFT look there; after a move write its new place there, or a "
        "name on the hub, or open it by hand: "
        "`PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), FOLDER)`."
    )
    if "relative" in beside:
        lines += (
            f" dsalign also finds it at {_code(beside['relative'])} from this folder (`{BASE_FILE}`), so that a run "
            "and its base can be moved together."
        )
    elif "name" in beside:
        lines += f" dsalign also finds it by its name, {_code(beside['name'])}."
    return lines


def _data(name: str) -> str:
    """One data set: its name, and of a file the beginning of its SHA-256."""
    path = Path(_without_number(name)).expanduser()
    if not path.is_file():
        return f"- {_code(name)}"
    if path.stat().st_size > HASHED_BYTES:
        return f"- {_code(name)}, {path.stat().st_size} bytes"
    total = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return f"- {_code(name)}, sha256 {total.hexdigest()[:16]}"


def _without_number(name: str) -> str:
    """A data set's name without the number of rows that #n asks for."""
    return name if Path(name).exists() else name.partition("#")[0]


def _on_the_hub(name: str) -> bool:
    return not Path(name).expanduser().exists() and name.count("/") == 1 and not name.startswith((".", "~", "/"))


def _options(config: RunConfig) -> str:
    """The options whose value is not what a run of this algorithm and tuner has by default."""
    first = ["--algo", config.algo, "--tuner", config.models.tuner, "--batch_size", str(config.optim.batch_size)]
    usual = parse(first, world_size=1).config.options()
    other = {name: value for name, value in config.options().items() if value != usual.get(name)}
    other.setdefault("tuner", config.models.tuner)
    return _table({name: one_line(list(v) if isinstance(v, tuple) else v) for name, v in other.items()})


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed as a package"
    return found


def _table(rows: Mapping[str, str]) -> str:
    lines = (f"| {name} | {_code(value)} |" for name, value in rows.items())
    return "\n".join(["| | |", "|---|---|", *lines])


def _code(text: str) -> str:
    """Text as code in a table: nothing in it ends a cell or a line."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return f"``{plain}``" if "`" in plain else f"`{plain}`"


def _paper(config: RunConfig) -> str:
    """The address of the paper of an algorithm, which is the first in its docstring."""
    text = type(config.algorithm).__doc__ or ""
    return PAPERS + text.partition("arXiv:")[2][:10]
