// Draws the charts of a report: reads the figures, smooths, and follows the width and the light or dark of the screen.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const slider = document.getElementById("smoothing");
  const HEIGHT = 210, FEW = 40, MANY = 60;
  const charts = [];
  const color = (i) => getComputedStyle(document.documentElement).getPropertyValue(`--c${i % 8}`).trim();
  const token = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
  const isNumber = (y) => y !== null && y !== undefined;

  // Four significant digits, as in the text below a chart.
  const short = (y) => !isNumber(y) ? "-" : Number.isInteger(y) && Math.abs(y) < 1e6 ? String(y) :
    (Math.abs(y) >= 1e5 || Math.abs(y) < 1e-3) ? y.toExponential(2) : String(Number(y.toPrecision(4)));

  // Exponential mean without the bias of its start; a gap stays a gap.
  const smooth = (values, weight) => {
    let mean = 0, steps = 0;
    return values.map((y) => {
      if (!isNumber(y)) return y;
      mean = weight * mean + (1 - weight) * y;
      steps += 1;
      return mean / (1 - Math.pow(weight, steps));
    });
  };

  // Points that no line reaches: all of a short curve, else those with a gap on both sides.
  const alone = (u, i) => {
    const y = u.data[i];
    const at = [];
    for (let k = 0; k < y.length; k++) if (isNumber(y[k])) at.push(k);
    if (at.length <= FEW) return at;
    // Over undefined, where another curve has its points, the line goes on; null is a gap.
    const side = (k, by) => { let j = k + by; while (j >= 0 && j < y.length && y[j] === undefined) j += by; return y[j]; };
    return at.filter((k) => !isNumber(side(k, -1)) && !isNumber(side(k, 1)));
  };

  const padded = (low, high) => {
    if (!isNumber(low) || !isNumber(high)) return [0, 1];
    const room = high > low ? (high - low) * 0.06 : Math.abs(high) * 0.1 || 1;
    return [low - room, high + room];
  };

  const curvesOf = (figure, weight) => figure.curves.flatMap((curve) => {
    const raw = {...curve, faint: false};
    if (weight <= 0 || curve.x.length < 3 || curve.held_out) return [raw];
    const x = curve.mx || curve.x, y = smooth(curve.m || curve.y, weight);
    return [{...curve, faint: true}, {...curve, x, y, faint: false}];
  });

  const seriesOf = (curve) => ({
    label: curve.label,
    class: curve.faint ? "faint" : undefined,  // the smoothed curve speaks for both in the legend
    stroke: () => color(curve.color) + (curve.faint ? "55" : ""),
    width: curve.faint ? 1 : 1.6,
    dash: curve.held_out ? [6, 4] : undefined,
    spanGaps: false,
    points: {show: !curve.faint, size: curve.held_out ? 7 : 5, filter: alone, fill: () => color(curve.color)},
    value: (u, y) => short(y),
  });

  const draw = (frame) => {
    const figure = figures[Number(frame.dataset.chart)];
    const weight = Number(slider.value);
    const curves = curvesOf(figure, weight);
    frame.textContent = "";
    if (!curves.some((c) => c.y.some(isNumber))) { frame.classList.add("empty"); return null; }
    const data = uPlot.join(curves.map((c) => [c.x, c.y]));
    const bounds = figure.bounds;
    const axis = (extra) => ({
      stroke: () => token("quiet"), font: "11px system-ui, sans-serif",
      grid: {stroke: () => token("grid"), width: 1}, ticks: {stroke: () => token("grid"), width: 1, size: 4}, ...extra,
    });
    const widthOf = (u, labels) => {  // in CSS pixels, so that the longest number is whole: -3.40e-10 has a minus
      u.ctx.font = "11px system-ui, sans-serif";
      return Math.max(58, ...(labels || []).map((text) => Math.ceil(u.ctx.measureText(text || "").width) + 14));
    };
    return new uPlot({
      width: Math.max(200, frame.clientWidth), height: HEIGHT,
      cursor: {sync: {key: "steps", setSeries: false}, y: false, points: {size: 6}},
      legend: {live: true, markers: {dash: (u, i) => curves[i - 1] && curves[i - 1].held_out ? "dashed" : "solid"}},
      scales: {
        x: {time: false, range: (u, low, high) => isNumber(low) ? (low === high ? [low - 1, high + 1] : [low, high]) : [0, 1]},
        y: {range: (u, low, high) => bounds ? [bounds[0] - 0.03, bounds[1] + 0.03] : padded(low, high)},
      },
      axes: [
        axis({space: 60, size: 30, values: (u, at) => at.map((v) => Number.isInteger(v) ? String(v) : "")}),
        axis({size: widthOf, space: 34, values: (u, at) => at.map(short)}),
      ],
      series: [{label: "step", value: (u, x) => isNumber(x) ? String(x) : "-"}, ...curves.map(seriesOf)],
    }, data, frame);
  };

  const drawAll = () => {
    const weight = Number(slider.value);
    document.getElementById("smoothed").textContent = weight > 0 ? weight.toFixed(2) : "off";
    for (const one of charts) { if (one.plot) one.plot.destroy(); one.plot = draw(one.frame); }
  };

  if (slider) {
    for (const frame of document.querySelectorAll(".chart")) charts.push({frame, plot: null});
    slider.value = figures.some((f) => f.curves.some((c) => !c.held_out && c.x.length > MANY)) ? 0.8 : 0;
    slider.addEventListener("input", drawAll);
    drawAll();
    let width = document.body.clientWidth;
    addEventListener("resize", () => {
      if (document.body.clientWidth === width) return;
      width = document.body.clientWidth;
      for (const {frame, plot} of charts) if (plot) plot.setSize({width: Math.max(200, frame.clientWidth), height: HEIGHT});
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  }
  document.documentElement.dataset.drawn = String(charts.filter((c) => c.plot).length);
})();
