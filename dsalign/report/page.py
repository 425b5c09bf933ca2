"""report.html: one file with everything in it that says what happened in a run, or how several runs differ."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dsalign.config.secrets import redacted
from dsalign.report import history
from dsalign.report.figures import figures
from dsalign.report.history import History
from dsalign.report.samples import sample_section
from dsalign.report.story import duration, number, short, story

REPORT, COMPARISON = "report.html", "comparison.html"
# Nothing may be loaded: whatever a sample's text tries, the page reaches no network.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
LINKS = {"charts": "Charts", "samples": "Samples", "data": "Data", "warnings": "Warnings", "settings": "Settings",
         "environment": "Environment"}  # fmt: skip


def write_report(output_dir: Path, path: Path | None = None) -> Path:
    """Write a page, by default output_dir/report.html, from what the run left in output_dir; returns its path.

    Raises ValueError where output_dir is no run's folder, OSError where it cannot be written.
    """
    run = history.read(output_dir)
    model = "/".join(str(run.settings.get("model", output_dir.name)).split("/")[-2:])
    name = f"{run.settings.get('algo', 'run')} of {model}"
    sections = {
        "samples": sample_section(run.samples),
        "data": _data(run),
        "warnings": _warnings(run),
        "settings": _settings(run),
        "environment": _environment(run),
    }
    text = f'<p class="story">{_text(" ".join(story(run)))}</p>'
    return _write(path or output_dir / REPORT, name, text, {output_dir.name: run.series}, sections)


def write_comparison(folders: Sequence[Path], path: Path) -> Path:
    """Write a page with the curves of several runs in one chart each, what differs in their settings, and their last
    numbers; returns its path. Raises as `write_report` does."""
    runs = dict(zip(names_of(folders), map(history.read, folders), strict=True))
    stories = "".join(
        f'<p class="story"><i class="key c{i % 8}"></i><b>{_text(name)}</b>: {_text(" ".join(story(run)))}</p>'
        for i, (name, run) in enumerate(runs.items())
    )
    sections = {"differences": _differences(runs), "numbers": _last_numbers(runs)}
    return _write(path, " and ".join(runs), stories, {name: run.series for name, run in runs.items()}, sections)


def names_of(folders: Sequence[Path]) -> list[str]:
    """A name for each run: its folder's, or as much of its path as tells it from the others."""
    parts = [folder.resolve().parts for folder in folders]
    for depth in range(1, max(map(len, parts)) + 1):
        names = [os.sep.join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{folder} ({i})" for i, folder in enumerate(folders, 1)]  # one folder named twice


def differences(runs: Mapping[str, History]) -> dict[str, list[Any]]:
    """Option -> its value in each run, of those that are not the same in all; None where a run has none."""
    names = dict.fromkeys(name for run in runs.values() for name in run.settings)
    table = {name: [run.settings.get(name) for run in runs.values()] for name in names}
    return {name: values for name, values in table.items() if any(value != values[0] for value in values)}


def _write(
    path: Path, title: str, top: str, series: Mapping[str, Mapping[str, Any]], sections: Mapping[str, str]
) -> Path:
    """Put the page together and write it under another name first, so that a page is never half there."""
    charts = figures(series)
    kept = {"charts": _charts(charts), **{name: text for name, text in sections.items() if text}}
    links = " ".join(f'<a href="#{name}">{LINKS.get(name, name.capitalize())}</a>' for name in kept)
    bodies = "\n".join(f'<section id="{name}">{text}</section>' for name, text in kept.items())
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark"><meta http-equiv="Content-Security-Policy" content="{POLICY}">
<title>{_text(title)} - dsalign</title>
<style>{_asset("uPlot.min.css")}
{_asset("page.css")}</style></head><body>
<header><h1>{_text(title)}</h1>{top}<nav>{links}</nav></header>
<main>{bodies}</main>
<script type="application/json" id="figures">{_json(charts)}</script>
<script>{_asset("uPlot.iife.min.js")}</script>
<script>{_asset("page.js")}</script>
</body></html>
"""
    staging = path.with_name(f".{path.name}.{os.getpid()}")
    staging.write_text(page, encoding="utf-8", errors="backslashreplace")  # half a surrogate pair, in a sample
    staging.replace(path)
    return path


def _charts(charts: Sequence[Mapping[str, Any]]) -> str:
    """The frames of the charts, which page.js fills, each with its numbers in words."""
    if not charts:
        return "<h2>Charts</h2><p>No number was logged.</p>"
    parts = [
        '<div class="tools"><label>Smoothing <input type="range" id="smoothing" min="0" max="0.98" step="0.01"></label>'
        ' <output id="smoothed"></output> <span class="quiet">drag across a chart to enlarge, double-click for all'
        "</span></div><noscript><p>The charts need JavaScript; their numbers stand below each.</p></noscript>"
    ]
    section = None
    for i, chart in enumerate(charts):
        if chart["section"] != section:
            parts.append(("</div>" if section else "") + f'<h2>{_text(chart["section"])}</h2><div class="grid">')
            section = chart["section"]
        said = "<br>".join(_text(line) for line in chart["said"])
        parts.append(
            f'<figure><figcaption><b>{_text(chart["title"])}</b> <span class="quiet">{_text(chart["about"])}</span>'
            f'</figcaption><div class="chart" data-chart="{i}" role="img" aria-label="{_text(chart["title"])}"></div>'
            f'<div class="said">{said}</div></figure>'
        )
    return "\n".join(parts) + "</div>"


def _data(run: History) -> str:
    found = run.begin.get("data")
    if not isinstance(found, Mapping):
        return ""
    rows = [(name, value) for name, value in found.items() if not isinstance(value, Mapping)]
    parts = ["<h2>Data</h2>", _table(("", ""), rows)]
    lengths = found.get("lengths")
    if isinstance(lengths, Mapping) and lengths:
        head = ("tokens of", "median", "95 of 100 below", "longest", "how they are spread")
        body = (
            f"<tr><td>{_text(name)}<td>{of['p50']:,}<td>{of['p95']:,}<td>{of['largest']:,}<td>{_bars(of)}</tr>"
            for name, of in lengths.items()
        )
        parts.append(f'<div class="wide"><table><tr>{_head(head)}</tr>{"".join(body)}</table></div>')
    return "".join(parts)


def _bars(of: Mapping[str, Any]) -> str:
    """A histogram as an SVG of bars, with a title a bar."""
    counts = list(of["counts"])
    width, most = max(1, -(-(of["largest"] + 1) // len(counts))), max(counts) or 1
    bars = "".join(
        f'<rect x="{12 * i}" y="{28 * (1 - count / most):.1f}" width="10" height="{28 * count / most:.1f}">'
        f"<title>{i * width} to {(i + 1) * width - 1} tokens: {count}</title></rect>"
        for i, count in enumerate(counts)
    )
    return f'<svg class="bars" viewBox="0 0 {12 * len(counts)} 28" width="{12 * len(counts)}" height="28">{bars}</svg>'


def _warnings(run: History) -> str:
    items = "".join(
        f"<li>{_text(str(one.get('text', '')))}"
        + (f' <span class="quiet">at step {one["step"]}</span>' if one.get("step") else "")
        for one in run.warnings
    )
    return f"<h2>Warnings</h2><ul>{items}</ul>" if items else "<h2>Warnings</h2><p>None.</p>"


def _settings(run: History) -> str:
    """Command, then the settings with where each is from: those that somebody chose in the open, defaults folded."""
    parts = ["<h2>Settings</h2>"]
    if run.command:
        parts.append(f"<p>Command:</p><pre>{_text(run.command)}</pre>")
    origins = run.begin.get("origins")
    origins = origins if isinstance(origins, Mapping) else {}
    rows = [(name, _value(value), str(origins.get(name, ""))) for name, value in run.settings.items()]
    chosen = [row for row in rows if row[2] and not row[2].endswith("default")]
    rest = [row for row in rows if row not in chosen]
    head = ("option", "value", "from")
    if chosen:
        parts.append(_table(head, chosen))
    if rest:
        called = f"{len(rest)} defaults" if chosen else f"{len(rest)} options"
        shown = "" if chosen else " open"
        parts.append(f"<details{shown}><summary>{called}</summary>{_table(head, rest)}</details>")
    return "".join(parts)


def _environment(run: History) -> str:
    found = run.begin.get("environment")
    rows = [(_called(name), f"{size:.2f} GiB") for name, size in run.memory.items()]
    rows += list(found.items()) if isinstance(found, Mapping) else []
    return f"<h2>Environment</h2>{_table(('', ''), rows)}" if rows else ""


def _called(name: str) -> str:
    """What a row of `History.memory` is called."""
    return "memory, most of a rank" if name == "peak" else f"memory, {name} as loaded"


def _differences(runs: Mapping[str, History]) -> str:
    found = differences(runs)
    rows = [(name, *map(_value, values)) for name, values in found.items() if name != "output_dir"]
    table = _table(("option", *runs), rows) if rows else "<p>All settings are the same.</p>"
    return f"<h2>Settings that differ</h2>{table}"


def _last_numbers(runs: Mapping[str, History]) -> str:
    names = dict.fromkeys(name for run in runs.values() for name in run.series)
    rows: list[Sequence[Any]] = [
        ("steps", *(f"{run.step:,}" for run in runs.values())),
        ("time", *(duration(run.seconds) for run in runs.values())),
    ]
    rows += [
        (name, *(short(run.series[name][-1][1]) if name in run.series else "" for run in runs.values()))
        for name in names
    ]
    return f"<h2>Last numbers</h2>{_table(('', *runs), rows)}"


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    top = f"<tr>{_head(head)}</tr>" if any(head) else ""
    body = "".join(f"<tr>{''.join(f'<td>{_text(str(cell))}' for cell in row)}</tr>" for row in rows)
    return f'<div class="wide"><table>{top}{body}</table></div>'


def _head(names: Sequence[str]) -> str:
    return "".join(f"<th>{_text(name)}" for name in names)


def _value(value: Any) -> str:
    """A setting as it is written in YAML, on one line."""
    if isinstance(value, float):
        return number(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _text(text: str) -> str:
    return html.escape(redacted(text))


def _json(value: Any) -> str:
    """JSON that can stand in a script element: no character of it ends the element or opens a comment."""
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _asset(name: str) -> str:
    return resources.files("dsalign.assets").joinpath("report", name).read_text(encoding="utf-8")
