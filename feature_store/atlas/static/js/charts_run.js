// Charts of the pages of controls and of the run, each at a width: dots in rows, histograms, bars, curves.

import { h, svg } from "./dom.js";
import { frame, linear, logarithmic, tickText, xAxis, yAxis } from "./axis.js";

const ROW = 24;
const LETTER = 7.2;

// How the representations look: by shape and colour.
const LOOKS = {
  sae: ["#0072b2", "circle"], neurons: ["#d55e00", "square"], pca: ["#009e73", "triangle"], ica: ["#cc79a7", "diamond"],
  random: ["#7f8790", "cross"], "random-model": ["#e69f00", "plus"], genes: ["#56b4e9", "square"], "permuted labels": ["#7f8790", "circle"],
};
const lookOf = (name) => LOOKS[name] ?? ["#8c6bb1", "diamond"];

function mark(name, x, y, size = 5) {
  const [colour, shape] = lookOf(name), s = size;
  if (shape === "circle") return svg("circle", { cx: x, cy: y, r: s, fill: colour });
  const paths = {
    square: `M${x - s * 0.85} ${y - s * 0.85}h${s * 1.7}v${s * 1.7}h${-s * 1.7}z`, triangle: `M${x} ${y - s}l${s} ${s * 1.8}h${-2 * s}z`,
    diamond: `M${x} ${y - s * 1.15}l${s} ${s * 1.15}l${-s} ${s * 1.15}l${-s} ${-s * 1.15}z`,
    cross: `M${x - s * 0.8} ${y - s * 0.8}l${s * 1.6} ${s * 1.6}m0 ${-s * 1.6}l${-s * 1.6} ${s * 1.6}`, plus: `M${x - s} ${y}h${2 * s}M${x} ${y - s}v${2 * s}`,
  };
  const isLine = shape === "cross" || shape === "plus";
  return svg("path", { d: paths[shape], fill: isLine ? "none" : colour, stroke: isLine ? colour : "none", "stroke-width": isLine ? 2.2 : null });
}

export function representationLegend(names) {
  return h("ul", { class: "legend", "aria-label": "Representations" }, names.map((name) => h("li", {}, h("span", { class: "legend-entry" },
    svg("svg", { width: 14, height: 14, viewBox: "0 0 14 14", "aria-hidden": "true" }, mark(name, 7, 7)), h("span", {}, name)))));
}

// Rows of dots: rows [{name, link, points: [{of, value, low, high}]}]; `link` is where a name leads, or null; `zero`: a line to be held against; null values are left out.
export function dotRows(width, { rows, domain, title, label, zero = null }) {
  const left = Math.round(Math.min(210, width * 0.36)), letters = Math.floor((left - 12) / LETTER);
  return frame({ width, height: rows.length * ROW + 52, left, right: 14, top: 6, bottom: 40, label, role: rows.some(({ link }) => link) ? "group" : "img" }, ({ plot, width: inner, height }) => {
    const x = linear(domain, [0, inner]), inside = (value) => Math.max(-3, Math.min(inner + 3, x(value)));
    rows.forEach(({ name, link, points }, i) => {
      const y = (i + 0.5) * ROW, text = svg("text", { x: -8, y: y + 4, "text-anchor": "end", class: link ? "link" : null }, svg("title", {}, name), cut(name, letters));
      plot.append(svg("line", { x1: 0, x2: inner, y1: y, y2: y, class: "grid" }), link ? svg("a", { href: link }, text) : text);
      for (const { of, value, low, high } of points) {
        if (value === null || value === undefined) continue;
        if (low !== null && low !== undefined && high !== null) plot.append(svg("line", { x1: inside(low), x2: inside(high), y1: y, y2: y, class: "whisker", stroke: lookOf(of)[0] }));
        plot.append(mark(of, inside(value), y, of === "sae" ? 5.5 : 4.5));
      }
    });
    if (zero !== null) plot.append(svg("line", { x1: x(zero), x2: x(zero), y1: 0, y2: height, class: "held" }));
    xAxis(plot, x, height, { n: Math.max(2, Math.round(inner / 80)), title, width: inner });
  });
}

const cut = (text, n) => (text.length > n ? `${text.slice(0, Math.max(1, n - 1))}…` : text);

// Counts between edges [n + 1], one list of counts a class on top of each other. `line`: a height to be held against;
// `at`: a place on the x axis, with its name.
export function histogram(width, { edges, stacks, xTitle, yTitle, label, line = null, at = null, height = 210, format = tickText }) {
  return frame({ width, height, left: 56, right: 14, top: 14, bottom: 40, label }, ({ plot, width: inner, height: tall }) => {
    const totals = edges.slice(1).map((_, i) => stacks.reduce((sum, { counts }) => sum + counts[i], 0));
    const x = linear([edges[0], edges.at(-1)], [0, inner]), y = linear([0, Math.max(1, ...totals, line ?? 0) * 1.05], [tall, 0]);
    yAxis(plot, y, { n: 4, title: yTitle, width: inner, height: tall });
    const below = totals.map(() => 0);
    for (const { name, colour, counts } of stacks) counts.forEach((n, i) => {
      if (!n) return;
      const x0 = x(edges[i]), x1 = x(edges[i + 1]);
      plot.append(svg("rect", { x: x0 + 0.5, width: Math.max(0.8, x1 - x0 - 1), y: y(below[i] + n), height: y(below[i]) - y(below[i] + n), fill: colour }, svg("title", {}, `${name}: ${n}`)));
      below[i] += n;
    });
    if (line !== null) plot.append(svg("line", { x1: 0, x2: inner, y1: y(line), y2: y(line), class: "held" }));
    if (at && at.value !== null) {
      const isLate = x(at.value) > inner / 2;
      plot.append(svg("line", { x1: x(at.value), x2: x(at.value), y1: -4, y2: tall, class: "held" }),
        svg("text", { x: x(at.value) + (isLate ? -5 : 5), y: 5, "text-anchor": isLate ? "end" : "start", class: "tick-text" }, at.name));
    }
    xAxis(plot, x, tall, { n: Math.max(2, Math.round(inner / 70)), title: xTitle, width: inner, format });
  });
}

// A score against a number of features, which are evenly spaced: series [{of, points: [{k, value, low, high}]}].
export function scoreLines(width, { ks, series, xTitle, yTitle, label, height = 260 }) {
  return frame({ width, height, left: 56, right: 14, top: 12, bottom: 42, label }, ({ plot, width: inner, height: tall }) => {
    const values = series.flatMap(({ points }) => points.flatMap(({ value, low, high }) => [value, low, high])).filter((v) => v !== null && v !== undefined);
    const y = linear([Math.max(0, Math.min(...values) - 0.03), Math.min(1, Math.max(...values) + 0.03)], [tall, 0]), room = inner / ks.length;
    yAxis(plot, y, { n: 5, title: yTitle, width: inner, height: tall });
    plot.append(svg("line", { x1: 0, x2: inner, y1: tall, y2: tall, class: "axis" }), svg("text", { x: inner / 2, y: tall + 34, "text-anchor": "middle", class: "axis-title" }, xTitle));
    ks.forEach((k, i) => plot.append(svg("text", { x: (i + 0.5) * room, y: tall + 16, "text-anchor": "middle", class: "tick-text" }, String(k))));
    [...series].reverse().forEach(({ of, points }, j) => {
      // beside each other, so that no interval hides another
      const x = (k) => (ks.indexOf(k) + 0.5 + 0.06 * (series.length - 1 - j - (series.length - 1) / 2)) * room, known = points.filter(({ value }) => value !== null && value !== undefined), colour = lookOf(of)[0];
      plot.append(svg("polyline", { points: known.map(({ k, value }) => `${x(k)},${y(value)}`).join(" "), fill: "none", stroke: colour, "stroke-width": of === "sae" ? 2.4 : 1.4, "stroke-dasharray": of === "permuted labels" ? "5 4" : null }));
      for (const { k, value, low, high } of known) {
        if (low !== null && low !== undefined) plot.append(svg("line", { x1: x(k), x2: x(k), y1: y(low), y2: y(high), class: "whisker", stroke: colour }));
        plot.append(svg("g", {}, svg("title", {}, `${of}, ${k}: ${value.toFixed(3)}`), mark(of, x(k), y(value), of === "sae" ? 5 : 4)));
      }
    });
  });
}

// Pairs of bars a group: groups [name], series [{name, colour, shares}] of 0 to 1.
export function bars(width, { groups, series, yTitle, label, height = 200 }) {
  return frame({ width, height, left: 50, right: 10, top: 10, bottom: 26, label }, ({ plot, width: inner, height: tall }) => {
    const most = Math.max(0.05, ...series.flatMap(({ shares }) => shares)), y = linear([0, most * 1.05], [tall, 0]);
    yAxis(plot, y, { n: 4, title: yTitle, width: inner, height: tall, format: (v) => `${Math.round(100 * v)} %` });
    const room = inner / groups.length, wide = Math.min(34, (room * 0.8) / series.length);
    groups.forEach((group, i) => {
      const middle = (i + 0.5) * room;
      series.forEach(({ name, colour, shares }, j) => plot.append(svg("rect", { x: middle + (j - series.length / 2) * wide, width: wide - 1, y: y(shares[i]), height: tall - y(shares[i]), fill: colour }, svg("title", {}, `${name}, ${group}: ${(100 * shares[i]).toFixed(1)} %`))));
      plot.append(svg("text", { x: middle, y: tall + 15, "text-anchor": "middle", class: "tick-text" }, group));
    });
    plot.append(svg("line", { x1: 0, x2: inner, y1: tall, y2: tall, class: "axis" }));
  });
}

// A curve over steps; `log` where all values are above 0 and span more than a factor of 10.
export function curve(width, { xs, ys, label, height = 160 }) {
  const known = ys.filter((v) => v !== null), low = Math.min(...known), high = Math.max(...known), isLog = low > 0 && high / low > 10;
  return frame({ width, height, left: 44, right: 12, top: 8, bottom: 36, label }, ({ plot, width: inner, height: tall }) => {
    const margin = 0.08 * (high - low) || Math.abs(high) * 0.1 || 1;
    const x = linear([0, Math.max(...xs)], [0, inner]);
    const y = isLog ? logarithmic([low * 0.9, high * 1.1], [tall, 0]) : linear([low >= 0 ? Math.max(0, low - margin) : low - margin, high + margin], [tall, 0]);
    if (isLog && y.ticks(4).length < 2) y.ticks = () => [low, Math.sqrt(low * high), high].map((v) => Number(v.toPrecision(2)));
    yAxis(plot, y, { n: 5, width: inner, height: tall });
    const path = xs.map((v, i) => (ys[i] === null ? null : `${x(v).toFixed(1)},${y(ys[i]).toFixed(1)}`)).filter(Boolean);
    plot.append(svg("polyline", { points: path.join(" "), class: "curve" }));
    xAxis(plot, x, tall, { n: Math.max(2, Math.round(inner / 90)), title: "step", width: inner });
  });
}
