"""report.html: what is read from metrics.jsonl and where a curve is drawn."""

from __future__ import annotations

import json
from pathlib import Path

from dsalign.report.page import read_metrics, write_report


def metrics_file(folder: Path, *records: dict[str, float]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_step_logged_twice_counts_once(tmp_path: Path) -> None:
    """A resumed run logs step 2 again: the later value stands, in order of steps; counters are no curves."""
    path = metrics_file(
        tmp_path, {"step": 1, "loss": 3.0}, {"step": 2, "loss": 9.0}, {"step": 2, "loss": 2.0, "epoch": 1}
    )
    assert read_metrics(path) == {"loss": [(1, 3.0), (2, 2.0)]}


def test_the_report_draws_every_metric_and_escapes_the_configuration(tmp_path: Path) -> None:
    """loss falls from 3 to 1 over steps 1 to 3: from the top left (8, 8) to the bottom right (412, 142)."""
    metrics_file(tmp_path, {"step": 1, "loss": 3.0, "kl": 0.5}, {"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0})
    (tmp_path / "config.yaml").write_text("model: <b>\n")
    page = write_report(tmp_path, "dpo & co").read_text()
    assert '<polyline points="8.0,8.0 210.0,75.0 412.0,142.0"/>' in page
    assert "1 to 3, last 1 at step 3" in page
    assert '<polyline points="210.0,75.0"/>' in page, "one point, in the middle"
    assert "<h1>dpo &amp; co</h1>" in page and "model: &lt;b&gt;" in page
