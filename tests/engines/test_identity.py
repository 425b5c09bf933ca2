"""What must be the same on every rank: each kind of difference changes its own key alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support import RankPool, random_groups, tiny_folder
from transformers import AutoTokenizer

from dsalign.config.parse import parse
from dsalign.contract.groups import Group
from dsalign.data.tokens.load_template import load_template
from dsalign.engines import dist, identity
from dsalign.models.names import Source


def changed(one: dict[str, str], two: dict[str, str]) -> set[str]:
    return {key for key in one.keys() | two.keys() if one.get(key) != two.get(key)}


def test_a_changed_option_or_file_changes_its_key(tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text("{}")
    (tmp_path / "r.py").write_text("def f(completions): ...")
    words = ["--algo", "ppo", "--model", "m", "--dataset", "rows", "--deepspeed", f"{tmp_path}/ds.json"]
    words += ["--reward_funcs", f"{tmp_path}/r.py:f"]
    first = identity.of_run(parse(words, world_size=2).config)
    assert changed(first, identity.of_run(parse([*words, "--lr", "1"], world_size=2).config)) == {"learning_rate"}
    assert changed(first, identity.of_run(parse([*words, "--max_steps", "9"], world_size=2).config)) == {"max_steps"}
    (tmp_path / "r.py").write_text("def f(completions): 1")
    (tmp_path / "ds.json").write_text("{ }")
    again = identity.of_run(parse(words, world_size=2).config)
    assert changed(first, again) == {"content of deepspeed", "content of r.py:f"}
    assert {"version of torch", "code of dsalign"} <= set(first)


def test_changed_rows_weights_or_tokenizers_change_their_key(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path / "model")
    template, _ = load_template(AutoTokenizer.from_pretrained(folder), "chatml", (2,))
    groups = random_groups("pairs", 9)
    inputs = {"dataset": groups, "val_dataset": None}
    first = identity.of_inputs(inputs, {"policy": Source(str(folder))}, template)
    other = [*groups[:4], replace(groups[4], prompt=(5, 5)), *groups[5:]]
    assert changed(first, identity.of_inputs({"dataset": other}, {"policy": Source(str(folder))}, template)) == {
        "rows of dataset"
    }
    ended = replace(template, end_ids=(2, 3))
    assert changed(first, identity.of_inputs(inputs, {"policy": Source(str(folder))}, ended)) == {"tokenizer"}
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(bytes(content))
    assert changed(first, identity.of_inputs(inputs, {"policy": Source(str(folder))}, template)) == {
        "files of the policy model"
    }


def test_one_bit_anywhere_changes_a_digest(tmp_path: Path) -> None:
    """Of rows: a token, a label, a further column, a mask, whichever row; its place does not count, as files move. Of a
    file of weights: each byte up to WHOLE, and beyond that those of 64 blocks with the first and the last one."""
    (folder := tmp_path / "m").mkdir()
    groups = random_groups("labels", 40)
    template, _ = load_template(AutoTokenizer.from_pretrained(tiny_folder(tmp_path / "t")), "chatml", (2,))

    def rows(changed: Group, at: int = 17) -> str:
        some = [*groups[:at], changed, *groups[at + 1 :]]
        return identity.of_inputs({"dataset": some}, {}, template)["rows of dataset"]

    one = groups[17]
    (completion,) = one.completions
    others = [
        replace(one, prompt=(*one.prompt[:-1], 3)), replace(one, completions=((*completion, 2),)),
        replace(one, label=not one.label), replace(one, columns={"solution": 4}),
        replace(one, masks=(tuple(i > 0 for i in range(len(completion))),)),
    ]  # fmt: skip
    assert len({rows(one), *map(rows, others)}) == 6
    assert rows(replace(one, where="elsewhere.jsonl:3")) == rows(one)

    def weights(size: int, at: int | None) -> str:
        with (folder / "model.safetensors").open("wb") as file:
            file.truncate(size)  # a file of zeros that takes no space
            if at is not None:
                file.seek(at)
                file.write(b"x")
        return identity.of_inputs({}, {"policy": Source(str(folder))}, template)["files of the policy model"]

    assert len({weights(2_500_000, at) for at in (None, 0, 1_100_000, 2_499_999)}) == 4
    last = 3 * identity.WHOLE - 1
    assert len({weights(last + 1, at) for at in (None, 0, last)}) == 3


def differing(key: str) -> list[str]:
    """What each rank raises where rank 1 has another learning rate."""
    mine = {"seed": "1", key: str(dist.rank())}
    try:
        dist.same_everywhere(mine)
        said = "same"
    except ValueError as error:
        said = f"{type(error).__name__}: {error}"
    return [said, dist.from_rank_0(said)]


def test_a_difference_is_named_with_both_values(two_ranks: RankPool) -> None:
    (said, _) = two_ranks.run(differing, "learning_rate")
    assert said.startswith(
        "ValueError: ranks: expected the same on every rank, got a difference: learning_rate is 0 on"
    )
    assert " and 1 on rank 1 (" in said and said.count(";") == 0


@pytest.mark.parametrize("alone", ["x"])
def test_one_rank_is_alike(alone: str, one_rank: RankPool) -> None:
    assert one_rank.run(differing, alone)[0] == "same"
