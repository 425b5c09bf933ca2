"""report.html: what is in it, that nothing in it is anything but text, and how Chromium shows it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chromium
import pytest

from dsalign.report.history import read
from dsalign.report.page import differences, names_of, write_comparison, write_report

EVIL = "</script><script>document.title='bad'</script><img src=x onerror=\"document.title='bad'\">"


def a_run(folder: Path, *records: dict[str, Any], settings: str = "algo: dpo\nmodel: org/tiny\nbeta: 0.1\n") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "config.yaml").write_text(settings)
    return folder


def full_run(folder: Path) -> Path:
    """A run with everything, of which all text tries to be a script."""
    steps = [{"step": s, "loss": 1 / s, "rewards/accuracies": 0.5, EVIL: 0.5} for s in range(1, 1500)]
    a_run(
        folder, *steps, {"step": 0, "eval/loss": 2.0}, settings=json.dumps({"algo": "dpo", "model": EVIL, "beta": 0.1})
    )
    (folder / "command.txt").write_text(f"dsalign --token hf_abcdefghijklmnopqrstuv {EVIL}\n")
    lengths = {"prompt": {"p50": 3, "p95": 8, "largest": 9, "counts": [0, 0, 4, 0, 0, 0, 0, 0, 1, 1]}}
    begin = {"kind": "begin", "time": 1, "total": 1500, "rows": 6, "ranks": 2, "device": "cpu",
             "data": {"rows": 6, "lengths": lengths}, "origins": {"beta": "flag --beta", "model": "default"},
             "environment": {"Python": EVIL}}  # fmt: skip
    events = [
        begin,
        {"kind": "warning", "text": EVIL, "step": 3},
        {"kind": "end", "time": 2, "how": "failed", "text": EVIL},
    ]
    (folder / "events.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
    sample = {"step": 0, "prompt": EVIL, "completion": EVIL + "\ud800", "score": 1.0}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def test_everything_is_in_it_as_text(tmp_path: Path) -> None:
    """Three scripts are ours, none from a text; no address is loaded; no secret is left; a setting that was given is
    in the open with its origin, a default in the fold."""
    text = write_report(full_run(tmp_path / "run")).read_text()
    body = text[text.index("<body>") :]
    assert len(re.findall("<script", body)) == 3 and "<img" not in body
    assert not re.search(r"""(src|href)=["'](?!#)""", body)
    assert "hf_abcdefghijklmnopqrstuv" not in text and "[redacted]" in text
    for part in ("charts", "samples", "data", "warnings", "settings", "environment"):
        assert f'<section id="{part}">' in text and f'href="#{part}"' in text
    chosen, folded = text[text.index('id="settings"') :].split("<details", 1)
    assert "<td>beta<td>0.1<td>flag --beta" in chosen and "<td>model<td>" in folded
    assert "<title>2 to 2 tokens: 4</title>" in text
    data = json.loads(text.split('id="figures">')[1].split("</script>")[0])
    assert [chart["title"] for chart in data] == ["Loss", "Reward accuracy", EVIL]
    assert [curve["label"] for curve in data[0]["curves"]] == ["training", "held out"]


def test_a_run_that_logged_nothing(tmp_path: Path) -> None:
    """Crashed before its first step."""
    assert "No number was logged." in write_report(a_run(tmp_path / "run")).read_text()


def test_a_comparison(tmp_path: Path) -> None:
    """Runs of one folder name are told apart by the folder above; equal settings are no difference."""
    one = a_run(tmp_path / "a" / "run", {"step": 1, "loss": 0.5})
    other = a_run(tmp_path / "b" / "run", {"step": 1, "loss": 0.25, "kl": 0.125}, settings="algo: dpo\nbeta: 0.5\n")
    assert names_of([one, other]) == ["a/run", "b/run"]
    assert names_of([one, one]) == [f"{one} (1)", f"{one} (2)"]
    assert differences({"a": read(one), "b": read(other)}) == {"model": ["org/tiny", None], "beta": [0.1, 0.5]}
    text = write_comparison([one, other], tmp_path / "both.html").read_text()
    assert "<td>beta<td>0.1<td>0.5" in text and "<td>kl<td><td>0.125" in text and "<td>algo" not in text


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[chromium.Browser]:
    if chromium.FOUND is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    tab = chromium.Browser(tmp_path_factory.mktemp("profile"))
    yield tab
    tab.close()


PIXELS = """[...document.querySelectorAll('.chart canvas')].map(c => {
  const seen = new Set();
  const image = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
  for (let i = 0; i < image.length; i += 4) if (image[i + 3] > 200) seen.add(image.slice(i, i + 3).join());
  return seen.has(%s);
})"""


def test_chromium_draws_it(browser: chromium.Browser, tmp_path: Path) -> None:
    """One step, 1,499 steps full of tags, and a comparison, wide and narrow, light and dark: no script fails, nothing
    is wider than the window, and each canvas has pixels of the first curve's colour."""
    single = write_report(a_run(tmp_path / "one", {"step": 1, "loss": 0.5, "lr": 1e-4}, {"step": 1, "eval/loss": 0.25}))
    both = write_comparison([tmp_path / "one", full_run(tmp_path / "full")], tmp_path / "both.html")
    for page, charts in ((single, 2), (write_report(tmp_path / "full"), 3), (both, 4)):
        for width, dark, colour in ((1280, False, "'34,96,196'"), (390, True, "'110,168,254'")):
            browser.open(page, width, dark=dark)
            drawn = browser.value(PIXELS % colour)
            assert (len(drawn), any(drawn), browser.errors) == (charts, True, [])
            if page != both:
                assert all(drawn), f"{page}: a chart without its curve"
            assert browser.value("document.documentElement.scrollWidth") <= width
            assert browser.value("document.title").endswith(" - dsalign")


def test_chromium_writes_the_axis_whole(browser: chromium.Browser, tmp_path: Path) -> None:
    """Numbers such as -3.80e-10 beside the axis keep their minus: nothing is drawn at the canvas's left edge, where a
    label that is wider than the axis would be cut."""
    browser.open(write_report(a_run(tmp_path / "run", {"step": 1, "loss": -3.725e-10})), 390)
    empty = """[...document.querySelectorAll('.chart canvas')].every(c =>
      c.getContext('2d').getImageData(0, 0, 2, c.height).data.every(value => value === 0))"""
    assert browser.value(empty) is True


def test_chromium_smooths_and_shows_values(browser: chromium.Browser, tmp_path: Path) -> None:
    """Smoothing is off for three points; at 0.5 the second value of 0, 1 is (0.25 * 0 + 0.5 * 1) / 0.75 = 0.6667, which
    the legend shows at its step."""
    records = [{"step": s, "loss": y} for s, y in ((1, 0), (2, 1), (3, 1))]
    browser.open(write_report(a_run(tmp_path / "run", *records)), 1280)
    assert browser.value("document.getElementById('smoothed').textContent") == "off"
    browser.value(
        "{ const s = document.getElementById('smoothing'); s.value = 0.5; s.dispatchEvent(new Event('input')); 1 }"
    )
    browser.value(
        """{ const over = document.querySelector('.u-over'), box = over.getBoundingClientRect();
        over.dispatchEvent(new MouseEvent('mouseenter', {bubbles: true}));
        over.dispatchEvent(new MouseEvent('mousemove', {clientX: box.x + box.width / 2, clientY: box.y + 5}));
        1 }"""
    )
    shown = "[...document.querySelectorAll('.u-series:not(.faint) .u-value')].map(v => v.textContent)"
    browser.value("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    assert (browser.value(shown), browser.errors) == (["2", "0.6667"], [])
