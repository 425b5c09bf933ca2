"""report.html: the curves of a run, drawn from its metrics.jsonl as SVG, so that the page opens without a network."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path

WIDTH, HEIGHT, PAD = 420, 150, 8
LEFT_OUT = frozenset({"step", "epoch", "num_tokens"})


def read_metrics(path: Path) -> dict[str, list[tuple[float, float]]]:
    """Metric -> [(step, value), ...] from a metrics.jsonl, by step. A step that stands there twice, as a resumed run's
    may, counts with its last value."""
    found: dict[str, dict[float, float]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name not in LEFT_OUT:
                found.setdefault(name, {})[record["step"]] = value
    return {name: sorted(points.items()) for name, points in found.items()}


def write_report(output_dir: Path, title: str) -> Path:
    """Write output_dir/report.html: a curve for each metric of metrics.jsonl, and config.yaml below. Returns its
    path."""
    series = read_metrics(output_dir / "metrics.jsonl")
    first = [n for n in ("loss", "eval/loss") if n in series]
    names = first + sorted(n for n in series if n not in first)
    figures = "\n".join(_figure(name, series[name]) for name in names)
    config = output_dir / "config.yaml"
    settings = html.escape(config.read_text(encoding="utf-8")) if config.exists() else ""
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>
<style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 2rem auto; max-width: 960px; color: #222 }}
figure {{ display: inline-block; margin: 0 1rem 1rem 0 }} figcaption {{ font-weight: 600 }}
svg, pre {{ background: #f7f7f7 }} pre {{ padding: 1rem }}
polyline {{ fill: none; stroke: #2457a6; stroke-width: 1.5; stroke-linecap: round }}
</style></head><body>
<h1>{html.escape(title)}</h1>
{figures}
<h2>Configuration</h2>
<pre>{settings}</pre>
</body></html>
"""
    path = output_dir / "report.html"
    path.write_text(page, encoding="utf-8")
    return path


def _figure(name: str, points: Sequence[tuple[float, float]]) -> str:
    low, high = min(y for _, y in points), max(y for _, y in points)
    label = html.escape(name)
    return (
        f'<figure><figcaption>{label}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'role="img" aria-label="{label}"><polyline points="{_polyline(points, low, high)}"/></svg>'
        f"<br><small>{low:.4g} to {high:.4g}, last {points[-1][1]:.4g} at step {points[-1][0]:.0f}</small></figure>"
    )


def _polyline(points: Sequence[tuple[float, float]], low: float, high: float) -> str:
    """Points as SVG coordinates: y grows downwards there, and a flat curve lies in the middle."""
    first, last = points[0][0], points[-1][0]

    def place(x: float, y: float) -> str:
        across = (x - first) / (last - first) if last > first else 0.5
        up = (y - low) / (high - low) if high > low else 0.5
        return f"{PAD + across * (WIDTH - 2 * PAD):.1f},{HEIGHT - PAD - up * (HEIGHT - 2 * PAD):.1f}"

    return " ".join(place(x, y) for x, y in points)
