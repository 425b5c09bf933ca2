"""The charts of a page as data: which curves stand in which, for one run or for several beside each other."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dsalign.report.history import Points
from dsalign.report.metric_names import EVAL, SECTIONS, Chart, charts_of, label
from dsalign.report.series import compact
from dsalign.report.story import short


def figures(runs: Mapping[str, Mapping[str, Points]]) -> list[dict[str, Any]]:
    """The charts of `runs`, name -> series by metric, in the order in which they are read.

    A chart: {"title", "section", "about", "bounds", "said", "curves"}, where said is what stands below it. A curve:
    {"label", "color": its number, "held_out": whether it is of evaluation, and the fields of `compact`}. In a chart of
    one run colours tell metrics apart, of several runs each metric has its own chart and colours tell runs apart.
    """
    names = {name for series in runs.values() for name in series}
    charts = [one for chart in charts_of(names) for one in (_split(chart) if len(runs) > 1 else [chart])]
    drawn = [_figure(chart, runs) for chart in charts]
    return sorted(drawn, key=lambda chart: SECTIONS.index(chart["section"]))


def _split(chart: Chart) -> Iterator[Chart]:
    for name in chart.names:
        title = chart.title if len(chart.names) == 1 else f"{chart.title}: {label(name)}"
        yield Chart(title, (name,), chart.section, chart.about, chart.bounds, chart.better)


def _figure(chart: Chart, runs: Mapping[str, Mapping[str, Points]]) -> dict[str, Any]:
    curves, said = [], []
    for which, (run, series) in enumerate(runs.items()):
        for i, name in enumerate(chart.names):
            for key, held_out in ((name, False), (f"{EVAL}{name}", True)):
                if not (points := series.get(key)):
                    continue
                called = run if len(runs) > 1 else label(name)
                if len(runs) == 1 and len(chart.names) == 1:
                    called = "held out" if held_out else "training"
                elif held_out:
                    called += ", held out"
                color = which if len(runs) > 1 else i
                curves.append({"label": called, "color": color, "held_out": held_out, **compact(points)})
                said.append(_said(called, points))
    return {
        "title": chart.title,
        "section": chart.section,
        "about": chart.about,
        "bounds": chart.bounds,
        "said": said,
        "curves": curves,
    }


def _said(called: str, points: Sequence[tuple[float, float]]) -> str:
    """The curve in words, for whoever sees no chart: first and last value, range, and where it is not finite."""
    finite = [point for point in points if math.isfinite(point[1])]
    if not finite:
        return f"{called}: no finite value"
    values = [y for _, y in finite]
    low, high = min(values), max(values)
    if low == high:
        text = f"{called}: {short(low)}" + (" throughout" if len(values) > 1 else "")
    else:
        between = f", between {short(low)} and {short(high)}" if len(values) > 2 else ""
        text = f"{called}: {short(values[0])} to {short(values[-1])}{between}"
    broken = [x for x, y in points if not math.isfinite(y)]
    if broken:
        more = f" and {len(broken) - 1} more" if len(broken) > 1 else ""
        text += f"; not a finite number at step {broken[0]:.0f}{more}"
    return text
