"""Hub data sets with a short name: where each is, and how its columns become those of a layout in formats.py.

Names, files and columns are those of the hub's public listings; where one has changed since, the error names the row.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Registered:
    """Where a data set is on the hub, which of its files are read, and what is done with its columns."""

    hub_name: str
    files: tuple[str, ...] = ()  # files of the hub repository to read; () = its split
    columns: Mapping[str, str] = field(default_factory=dict)  # theirs -> ours
    convert: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict
    split: str = "train"


def only(*names: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """A converter that keeps these columns: the others say the same again in another layout, or are not needed."""
    return lambda values: {name: values[name] for name in names}


def _hh_rlhf_cn(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """prompt, chosen, rejected as message lists, from turns {"role": "human", "text": ...}."""

    def message(turn: Mapping[str, Any]) -> dict[str, Any]:
        return {"role": "user" if turn["role"] == "human" else turn["role"], "content": turn["text"]}

    answers = {name: [message(values[name])] for name in ("chosen", "rejected")}
    return {"prompt": [message(turn) for turn in values["context"]], **answers}


SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def is_transcript(text: str) -> bool:
    """Whether a text begins like a transcript of a Human and an Assistant."""
    return re.match(r"\s*(Human|Assistant):", text) is not None


def transcript(text: str) -> list[dict[str, str]]:
    """Messages from a transcript, in which each turn is a blank line, "Human:" or "Assistant:", and text.

    Raises ValueError where the text does not begin like this.
    """
    parts = re.split(r"(?:^|\n)\n(Human|Assistant):", text if text.startswith("\n") else f"\n\n{text}")
    if parts[0].strip() or len(parts) < 3:
        raise ValueError(f"expected a transcript that begins with a blank line and 'Human:', got {text[:40]!r}")
    return [
        {"role": SPEAKERS[who], "content": said.strip()} for who, said in zip(parts[1::2], parts[2::2], strict=True)
    ]


def _hh_rlhf(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Two transcripts that differ in their last answer."""
    return {name: transcript(values[name]) for name in ("chosen", "rejected")}


CN = "dikw/hh_rlhf_cn"
REGISTERED: Mapping[str, Registered] = {
    "shareai-llama3-dpo-zh-en-emoji": Registered(
        "shareAI/DPO-zh-en-emoji",
        # The repository also holds the same rows merged in another format.
        files=("0_dpo_loji.jsonl", "1_dpo_zhihu_1.jsonl", "1_dpo_zhihu_2.jsonl", "2_dpo_ruozhiba.jsonl"),
        columns={"question": "query", "answer_zh": "response", "answer_en": "rejected_response"},
    ),
    "hh-rlhf": Registered("Anthropic/hh-rlhf", convert=_hh_rlhf),
    "hh-rlhf-cn": Registered(CN, convert=_hh_rlhf_cn),
    "hh-rlhf-cn-harmless-base-cn": Registered(CN, files=("harmless_base_cn_train.jsonl",), convert=_hh_rlhf_cn),
    "hh-rlhf-cn-helpful-base-cn": Registered(CN, files=("helpful_base_cn_train.jsonl",), convert=_hh_rlhf_cn),
    "ultrafeedback-kto": Registered("argilla/ultrafeedback-binarized-preferences-cleaned-kto"),
    "kto-mix-14k": Registered("trl-lib/kto-mix-14k"),
    "orpo-dpo-mix-40k": Registered("mlabonne/orpo-dpo-mix-40k", convert=only("chosen", "rejected")),
    "ultrafeedback-binarized": Registered(
        "HuggingFaceH4/ultrafeedback_binarized", convert=only("chosen", "rejected"), split="train_prefs"
    ),
    "orca-dpo-pairs": Registered("Intel/orca_dpo_pairs", columns={"question": "prompt"}),
    "distilabel-orca-dpo-pairs": Registered(
        "argilla/distilabel-intel-orca-dpo-pairs",
        convert=only("system", "input", "chosen", "rejected"),
        columns={"input": "prompt"},
    ),
    "ultrachat-200k": Registered("HuggingFaceH4/ultrachat_200k", convert=only("messages"), split="train_sft"),
    "no-robots": Registered("HuggingFaceH4/no_robots", convert=only("messages")),
    "alpaca": Registered("tatsu-lab/alpaca", convert=only("instruction", "input", "output")),
}
