"""DeepSpeed configurations by name or path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsalign.config import ds_files


def test_names_are_sorted_and_complete() -> None:
    wanted = {"zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload", "zero3_nvme"}
    assert wanted <= set(ds_files.names())
    assert list(ds_files.names()) == sorted(ds_files.names())


@pytest.mark.parametrize("name", ds_files.names())
def test_every_file_is_what_its_name_says(name: str) -> None:
    """The stage of its name, off-loading where it says so, and nothing that has a flag."""
    settings = ds_files.settings(name)
    assert ds_files.read(name) == {key: value for key, value in settings.items() if key != "hybrid_engine"}
    assert ds_files.hybrid(name) == ("hybrid" in name)
    zero = settings["zero_optimization"]
    assert zero["stage"] == int(name[4])
    assert zero.get("offload_optimizer", {}).get("device") == {"offload": "cpu", "nvme": "nvme"}.get(name[6:])


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"zero_optimization": {"stage": 1}}))
    assert ds_files.find(str(mine)) == mine
    assert ds_files.settings(str(mine)) == {"zero_optimization": {"stage": 1}}


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"^deepspeed: expected one of zero0, .*zero3_offload or a JSON file, got 'zer2'$"
    ):
        ds_files.find("zer2")


def test_what_is_not_json_is_named_with_its_line(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text('{\n"bf16": {},\n}')
    with pytest.raises(ValueError, match=r"^deepspeed: .*mine\.json:3: expected JSON, got "):
        ds_files.settings(str(mine))


def test_a_list_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text("[]")
    with pytest.raises(ValueError, match=r"^deepspeed: .*mine\.json must hold a JSON object, got list$"):
        ds_files.settings(str(mine))


def test_a_key_twice_is_refused(tmp_path: Path) -> None:
    """json alone would keep the last of them."""
    mine = tmp_path / "mine.json"
    mine.write_text('{"zero_optimization": {"stage": 2, "stage": 3}}')
    with pytest.raises(
        ValueError, match=r"^deepspeed: .*mine\.json: expected each key once, got stage twice; keep one"
    ):
        ds_files.settings(str(mine))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\xff\xfe{", "expected JSON, got no UTF-8 text"),
        (b"[" * 100_000, "expected a DeepSpeed file, got JSON nested too deeply"),
        (b"", "1: expected JSON, got Expecting value"),
    ],
)
def test_what_cannot_be_read_is_a_line(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_bytes(content)
    (line,) = ds_files.problems(str(tmp_path / "mine.json"))
    assert line == f"{tmp_path}/mine.json:{'' if said[0].isdigit() else ' '}{said}"


def test_what_every_run_sets_itself_is_named(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    hybrid = '{"enabled": true, "max_out_tokens": 9}'
    mine.write_text(f'{{"steps_per_print": 10, "wall_clock_breakdown": false, "hybrid_engine": {hybrid}}}')
    assert ds_files.unused(str(mine)) == ["steps_per_print", "hybrid_engine.max_out_tokens"]
    assert ds_files.hybrid(str(mine))
