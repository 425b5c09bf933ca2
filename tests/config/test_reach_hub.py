"""An unreachable hub is asked once, and every name that cannot be had is said in one answer."""

from __future__ import annotations

import http.server
import json
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsalign.config import reach_hub
from dsalign.config.parse import ConfigError, parse

SETS = {"shareai": "org/share", "ultrafeedback-kto": "org/kto"}


@pytest.fixture(autouse=True)
def nothing_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty cache, an address where nobody answers, and afterwards the environment as it was."""
    for name in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}")
        yield


def config(*flags: str) -> object:
    return parse(["--algo", "kto", *flags], world_size=1).config


def test_every_name_is_said_at_once() -> None:
    """A misspelt short name, a right one, a data set, each with its option, what is near and the folder form."""
    given = ["--model", "llama3-8b-instuct", "--ref_model", "qwen3-8b", "--tuner", "full", "--dataset", "org/rows#7"]
    with pytest.raises(ConfigError) as caught:
        reach_hub.ready(config(*given), SETS)
    model, reference, rows = caught.value.problems
    assert model.startswith("model: expected a folder, a short name or a name on the hub, got 'llama3-8b-instuct', ")
    assert "Connection refused" in model and "did you mean" in model and "llama3-8b-instruct" in model
    assert model.endswith("give the folder: --model FOLDER")
    assert "got 'qwen3-8b' (on the hub: Qwen/Qwen3-8B), " in reference and "did you mean" not in reference
    assert reference.endswith("--ref_model FOLDER")
    assert rows.startswith("dataset: expected a file, a folder or a name on the hub, got 'org/rows', ")


def test_what_is_cached_is_taken_without_asking_again(tmp_path: Path) -> None:
    """The libraries are told to ask nobody; a line says so. A name that is not there is the only one that is said."""
    snapshot = tmp_path / "hf" / "hub" / "models--Qwen--Qwen3-8B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hf" / "datasets" / "org___kto").mkdir(parents=True)
    line = reach_hub.ready(config("--model", "qwen3-8b", "--dataset", "ultrafeedback-kto"), SETS)
    assert line is not None and line.endswith("taken from the cache: Qwen/Qwen3-8B, org/kto")
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert reach_hub.ready(config("--model", "qwen3-8b", "--dataset", "ultrafeedback-kto"), SETS) is None  # said before
    with pytest.raises(ConfigError) as caught:
        reach_hub.ready(config("--model", "qwen3-8b", "--dataset", "shareai"), SETS)
    assert len(caught.value.problems) == 1
    assert "got 'shareai' (on the hub: org/share)" in caught.value.problems[0]
    assert "HF_HUB_OFFLINE is set" in caught.value.problems[0]


class Refusing(http.server.BaseHTTPRequestHandler):
    """A hub that answers every question with 403."""

    def do_HEAD(self) -> None:
        self.send_response(403)
        self.end_headers()

    def log_message(self, *args: object) -> None: ...


def test_a_hub_that_answers_is_left_to_the_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it answers: a name that it lacks, or a token that is missing, is theirs to say."""
    server = http.server.HTTPServer(("127.0.0.1", 0), Refusing)
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    threading.Thread(target=server.handle_request, daemon=True).start()
    assert reach_hub.ready(config("--model", "org/none"), SETS) is None
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    server.server_close()


def test_a_silent_hub_costs_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """It accepts and says nothing: one question, and the time it was given."""
    monkeypatch.setattr(reach_hub, "LIMIT_S", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        assert (reach_hub.unreachable() or "").startswith(os.environ["HF_ENDPOINT"])


def test_what_is_here_is_not_asked_for(tmp_path: Path) -> None:
    """Folders, files, demo rows, the embedded model, an adapter on a folder; its base on the hub is asked for."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "rows.jsonl").write_text("{}")
    here = config("--model", str(tmp_path / "model"), "--dataset", str(tmp_path / "rows.jsonl"), "demo:labels")
    assert reach_hub.needed_by(here, SETS) == [] and reach_hub.needed_by(config(), SETS) == []
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for base, want in (("../model", []), ("/gone/model", []), ("org/base", ["org/base"])):
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
        assert [one.name for one in reach_hub.needed_by(config("--model", str(adapter)), SETS)] == want
    for broken in ("{", "[]"):
        (adapter / "adapter_config.json").write_text(broken)
        with pytest.raises(
            ConfigError, match=r"^model: expected a JSON object in .*adapter_config.json; copy the file"
        ):
            reach_hub.needed_by(config("--model", str(adapter)), SETS)
