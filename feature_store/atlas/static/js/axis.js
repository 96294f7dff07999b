// Scales and ticks, and the frame of a chart.

import { clear, h, svg } from "./dom.js";
import { ofChart, saveButtons } from "./figure.js";

// Round numbers between low and high, about n of them.
export function ticks(low, high, n = 5) {
  if (!(high > low)) return [low];
  const rough = (high - low) / n;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const steps = [0.1, 0.2, 0.5, 1, 2, 5, 10].map((m) => m * unit), first = steps.findIndex((s) => s >= unit && (high - low) / s <= n);
  const every = (step) => {
    const found = [];
    for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(Number((i * step).toPrecision(12)));
    return found;
  };
  // a single number on an axis gives no scale
  for (let place = first < 0 ? steps.length - 1 : first; place > 0; place--) if (every(steps[place]).length > 1) return every(steps[place]);
  return every(steps[0]);
}

export function linear([low, high], [from, to]) {
  const span = high - low || 1;
  const scale = (x) => from + ((x - low) / span) * (to - from);
  scale.invert = (p) => low + ((p - from) / (to - from)) * span;
  scale.ticks = (n) => ticks(low, high, n);
  return scale;
}

export function logarithmic([low, high], [from, to]) {
  const inner = linear([Math.log10(low), Math.log10(high)], [from, to]);
  const scale = (x) => inner(Math.log10(x));
  scale.invert = (p) => 10 ** inner.invert(p);
  scale.ticks = (n) => ticks(Math.log10(low), Math.log10(high), n).filter(Number.isInteger).map((e) => 10 ** e);
  return scale;
}

export const tickText = (x) => (x !== 0 && (Math.abs(x) < 1e-3 || Math.abs(x) >= 1e5) ? x.toExponential(0) : Number(x.toPrecision(6)).toString());

// An SVG with room for axes; `draw` puts shapes into {plot, width, height}: the inner size. It scales with its column. `role`:
// "group" where there are links inside, which an image would hide from a screen reader.
export function frame({ width = 480, height = 240, left = 48, right = 12, top = 10, bottom = 34, label, role = "img" }, draw) {
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, class: "chart", role, "aria-label": label });
  const plot = svg("g", { transform: `translate(${left} ${top})` });
  root.append(svg("title", {}, label), plot);
  draw({ plot, width: width - left - right, height: height - top - bottom });
  return root;
}

export function xAxis(plot, scale, height, { n = 5, title, width, format = tickText } = {}) {
  for (const tick of scale.ticks(n)) {
    const x = scale(tick);
    plot.append(svg("line", { x1: x, x2: x, y1: height, y2: height + 4, class: "tick" }), svg("text", { x, y: height + 15, "text-anchor": "middle", class: "tick-text" }, format(tick)));
  }
  plot.append(svg("line", { x1: 0, x2: width, y1: height, y2: height, class: "axis" }));
  if (title) plot.append(svg("text", { x: width / 2, y: height + 30, "text-anchor": "middle", class: "axis-title" }, title));
}

export function yAxis(plot, scale, { n = 5, title, width, height, format = tickText } = {}) {
  for (const tick of scale.ticks(n)) {
    const y = scale(tick);
    plot.append(svg("line", { x1: 0, x2: width, y1: y, y2: y, class: "grid" }), svg("text", { x: -6, y: y + 3.5, "text-anchor": "end", class: "tick-text" }, format(tick)));
  }
  // beyond the longest number
  const beside = Math.max(38, 14 + 6.3 * Math.max(0, ...scale.ticks(n).map((tick) => format(tick).length)));
  if (title) plot.append(svg("text", { transform: `translate(${-beside} ${height / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis-title" }, title));
}

// A box whose chart, `draw(width)`, is drawn anew where its width changes, so that its text keeps its size on a phone, and
// buttons that save it.
export function fitted(draw, first = 480) {
  let width = first;
  const chart = h("div", {}, draw(width));
  const box = h("div", { class: "fitted" }, chart, h("div", { class: "figure-foot" }, saveButtons(() => box, () => ofChart(chart.firstChild))));
  // a frame later: what changes its own height must not answer the observer at once
  new ResizeObserver(() => requestAnimationFrame(() => {
    const now = Math.round(box.clientWidth);
    if (now && now !== width) { width = now; clear(chart, draw(width)); }
  })).observe(box);
  return box;
}
