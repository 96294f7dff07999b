// The charts of one feature: violins of its code, a forest of its label scores, bars of its genes. Each is drawn for the
// width that it has, so that its text stays readable on a phone.

import { h, svg, fixed, pvalue, percent, count, words } from "./dom.js";
import { fitted, linear, tickText } from "./axis.js";

export const ALPHA = 0.05;
const FONT = "11px system-ui, 'DejaVu Sans', sans-serif";

let ruler = null;
function widthOf(text, font = FONT) {
  ruler ??= document.createElement("canvas").getContext("2d");
  ruler.font = font;
  return ruler.measureText(text).width;
}

// As much of a text as has room before its end, with all of it in a title.
function fit(text, room, attributes, end = "") {
  let shown = text;
  const font = attributes.class?.includes("gene") ? `italic ${FONT}` : FONT;
  while (shown.length > 3 && widthOf(`${shown}${end}`, font) > room) shown = `${shown.slice(0, shown.endsWith("…") ? -2 : -1).trimEnd()}…`;
  return svg("text", attributes, shown === text ? null : svg("title", {}, text), `${shown}${end}`);
}

// `role`: "group" where there are links inside, which an image would hide from a screen reader.
function drawing({ width, height, label, role = "img" }) {
  return svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, class: "chart feature-chart", role, "aria-label": label }, svg("title", {}, label));
}

function bottomAxis(root, scale, { from, to, y, title, n }) {
  for (const tick of scale.ticks(n)) root.append(svg("line", { x1: scale(tick), x2: scale(tick), y1: 4, y2: y, class: "grid" }), svg("text", { x: scale(tick), y: y + 14, "text-anchor": "middle", class: "tick-text" }, tickText(tick)));
  root.append(svg("line", { x1: from, x2: to, y1: y, y2: y, class: "axis" }), svg("text", { x: (from + to) / 2, y: y + 30, "text-anchor": "middle", class: "axis-title" }, title));
}

// Groups of a feature's document (feature_codes.py: violins): shape or dots of the firing cells, quartiles, and the share
// of cells that fire. `top`: the end of the axis, the same for every column.
export function violins(groups, { top, label, title }) {
  const row = 26;
  return fitted((width) => {
    const left = Math.min(190, Math.max(96, width * 0.34)), right = 52, head = 20, height = head + groups.length * row + 38;
    const x = linear([0, top || 1], [left, width - right]), base = head + groups.length * row;
    const root = drawing({ width, height, label });
    root.append(svg("text", { x: width, y: 12, "text-anchor": "end", class: "axis-title" }, "cells firing"));
    bottomAxis(root, x, { from: left, to: width - right, y: base, title, n: Math.max(2, Math.round((width - left - right) / 70)) });
    groups.forEach((group, i) => root.append(violin(group, { y: head + (i + 0.5) * row, x, left, width, half: row / 2 - 3 })));
    return root;
  });
}

function violin(group, { y, x, left, width, half }) {
  const { label, n, n_firing, mean, low, q25, median, q75, high, outline, dots } = group;
  const about = n_firing ? `median ${fixed(median, 2)} (quartiles ${fixed(q25, 2)} to ${fixed(q75, 2)}) where it fires, mean ${fixed(mean, 2)} of all` : "silent";
  const counted = ` (${count(n)})`, root = svg("g", {}, svg("title", {}, `${label}: fires in ${count(n_firing)} of ${count(n)} cells; ${about}`));
  root.append(svg("rect", { x: 0, y: y - half, width, height: 2 * half, class: "hit" }));
  root.append(fit(label, left - 8, { x: left - 8, y: y + 4, "text-anchor": "end" }, counted));
  if (outline) {
    const at = (j) => x(low + ((high - low) * j) / (outline.length - 1));
    const upper = outline.map((d, j) => `${at(j).toFixed(1)},${(y - d * half).toFixed(1)}`), lower = outline.map((d, j) => `${at(j).toFixed(1)},${(y + d * half).toFixed(1)}`).reverse();
    root.append(svg("polygon", { points: [...upper, ...lower].join(" "), class: "violin" }), svg("line", { x1: x(q25), x2: x(q75), y1: y, y2: y, class: "quartiles" }), svg("line", { x1: x(median), x2: x(median), y1: y - half + 2, y2: y + half - 2, class: "median" }));
  }
  for (const dot of dots ?? []) root.append(svg("circle", { cx: x(dot), cy: y, r: 3, class: "cell-dot" }));
  root.append(svg("text", { x: width, y: y + 4, "text-anchor": "end", class: n_firing ? null : "tick-text" }, percent(n_firing / n, 0)));
  return root;
}

// Label scores of a feature's document, by kind: point and interval of the rank-biserial, the band that permuted labels
// give, q, cells and donors. `link(row)`: where a label leads.
export function forest(rows, { link, label, units }) {
  const kinds = [...new Set(rows.map((row) => row.label_kind))];
  return fitted((width) => {
    const isWide = width >= 560, step = isWide ? 24 : 36, heading = 24;
    const left = Math.min(200, Math.max(104, width * 0.32)), right = isWide ? 176 : 58, head = 22;
    const height = head + rows.length * step + kinds.length * heading + 38, base = height - 38;
    const x = linear([-1, 1], [left, width - right]), root = drawing({ width, height, label, role: "group" });
    const columns = isWide ? [[width - 112, "q"], [width - 52, "cells"], [width, units]] : [[width, "q"]];
    for (const [at, text] of columns) root.append(svg("text", { x: at, y: 12, "text-anchor": "end", class: "axis-title" }, text));
    bottomAxis(root, x, { from: left, to: width - right, y: base, title: "rank-biserial, test cells", n: 4 });
    let y = head;
    for (const kind of kinds) {
      root.append(svg("text", { x: 0, y: y + 15, class: "kind" }, words(kind)));
      y += heading;
      const mine = rows.filter((row) => row.label_kind === kind).sort((a, b) => b.rank_biserial - a.rank_biserial);
      for (const row of mine) {
        root.append(score(row, { y: y + (isWide ? step / 2 : 12), x, left, width, columns, isWide, link, units }));
        y += step;
      }
    }
    root.append(svg("line", { x1: x(0), x2: x(0), y1: head, y2: base, class: "zero" }));
    return root;
  });
}

const donors = ({ n_donors, n_agree }) => (n_donors === null ? "–" : n_agree === null ? String(n_donors) : `${n_agree} of ${n_donors}`);

function score(row, { y, x, left, width, columns, isWide, link, units }) {
  const isClear = row.q !== null && row.q <= ALPHA, cells = `${count(row.n_label)} of ${count(row.n)}`, root = svg("g", { class: isClear ? "score" : "score weak" });
  const band = row.null ? `; permuted labels ${fixed(row.null[0], 2)} to ${fixed(row.null[1], 2)}` : "", between = row.low === null ? "" : `; 95 % across ${units} ${fixed(row.low, 2)} to ${fixed(row.high, 2)}`;
  root.append(svg("title", {}, `${row.label}: rank-biserial ${fixed(row.rank_biserial, 3)} (AUROC ${fixed(row.auroc, 3)})${between}${band}; q ${pvalue(row.q)}, p ${pvalue(row.p)}, across ${units} ${pvalue(row.p_donor)}, as the best of all features ${pvalue(row.p_max)}; ${row.method ?? ""}`));
  root.append(svg("rect", { x: 0, y: y - 11, width, height: 22, class: "hit" }));
  root.append(svg("a", { href: link(row) }, fit(row.label, left - 8, { x: left - 8, y: y + 4, "text-anchor": "end", class: "link" })));
  if (row.null) root.append(svg("rect", { x: x(row.null[0]), y: y - 8, width: Math.max(1, x(row.null[1]) - x(row.null[0])), height: 16, class: "null-band" }));
  if (row.low !== null) root.append(svg("line", { x1: x(row.low), x2: x(row.high), y1: y, y2: y, class: "interval" }));
  root.append(svg("circle", { cx: x(row.rank_biserial), cy: y, r: 4.5, class: "point" }));
  const texts = [pvalue(row.q), cells.replace(" of ", "/"), donors(row)];
  columns.forEach(([at], i) => root.append(svg("text", { x: at, y: y + 4, "text-anchor": "end", class: isClear ? null : "tick-text" }, texts[i])));
  if (!isWide) root.append(svg("text", { x: left - 8, y: y + 17, "text-anchor": "end", class: "tick-text" }, `${texts[1]} cells`));
  return root;
}

// Bars of genes: {gene, value, mark (a second figure, as a tick), q, note, title}; `range` is that of the axis.
export function geneBars(rows, { range, title, label, link, noted }) {
  const step = 21;
  return fitted((width) => {
    const left = 92, right = 64, head = noted ? 20 : 6, base = head + rows.length * step, root = drawing({ width, height: base + 38, label, role: "group" });
    const x = linear(range, [left, width - right]);
    if (noted) root.append(svg("text", { x: width, y: 12, "text-anchor": "end", class: "axis-title" }, noted));
    bottomAxis(root, x, { from: left, to: width - right, y: base, title, n: Math.max(2, Math.round((width - left - right) / 70)) });
    rows.forEach((row, i) => {
      const y = head + (i + 0.5) * step, isClear = row.q === undefined || (row.q !== null && row.q <= ALPHA), group = svg("g", { class: isClear ? "bar-row" : "bar-row weak" }, svg("title", {}, row.title));
      group.append(svg("rect", { x: 0, y: y - step / 2, width, height: step, class: "hit" }), svg("a", { href: link(row) }, fit(row.gene, left - 8, { x: left - 8, y: y + 4, "text-anchor": "end", class: "gene link" })));
      if (row.value !== null) group.append(svg("rect", { x: x(Math.min(0, row.value)), y: y - 7, width: Math.max(1, Math.abs(x(row.value) - x(0))), height: 14, class: row.value < 0 ? "bar negative" : "bar" }));
      if (row.mark !== null && row.mark !== undefined) group.append(svg("line", { x1: x(row.mark), x2: x(row.mark), y1: y - 9, y2: y + 9, class: "within" }));
      group.append(svg("text", { x: width, y: y + 4, "text-anchor": "end", class: isClear ? null : "tick-text" }, row.note));
      root.append(group);
    });
    root.append(svg("line", { x1: x(0), x2: x(0), y1: head, y2: base, class: "zero" }));
    return root;
  });
}

// Features that change this one on the left, this one in the middle, those that it changes on the right. A line is as wide
// as |z| is large, orange where one inhibits the other, and dashed where q > ALPHA. `named(row)`: the text of a feature.
export function edgeGraph({ upstream, downstream, me, named, label }) {
  const step = 24, most = Math.max(upstream.length, downstream.length, 1);
  return fitted((width) => {
    const height = most * step + 8, side = Math.min(220, width * 0.32), middle = Math.min(170, width * 0.24), root = drawing({ width, height, label });
    const largest = Math.max(...[...upstream, ...downstream].map(({ z }) => Math.abs(z ?? 0)), 1), centre = height / 2;
    const line = (row, [x1, y1], [x2, y2]) => {
      const isClear = row.q <= ALPHA, bend = (x1 + x2) / 2;
      root.append(svg("path", { d: `M${x1},${y1} C${bend},${y1} ${bend},${y2} ${x2},${y2}`, class: `edge${row.relation === "inhibits" ? " inhibits" : ""}${isClear ? "" : " weak"}`, "stroke-width": (0.8 + (3.2 * Math.abs(row.z ?? 0)) / largest).toFixed(2) },
        svg("title", {}, `${named(row)}: ${row.relation}, z ${fixed(row.z, 1)}, q ${pvalue(row.q)}`)));
    };
    const place = (i, n) => centre + (i - (n - 1) / 2) * step;
    upstream.forEach((row, i) => {
      const y = place(i, upstream.length);
      line(row, [side, y], [(width - middle) / 2, centre]);
      root.append(fit(named(row), side - 6, { x: side - 6, y: y + 4, "text-anchor": "end", class: row.q <= ALPHA ? null : "tick-text" }));
    });
    downstream.forEach((row, i) => {
      const y = place(i, downstream.length);
      line(row, [(width + middle) / 2, centre], [width - side, y]);
      root.append(fit(named(row), side - 6, { x: width - side + 6, y: y + 4, class: row.q <= ALPHA ? null : "tick-text" }));
    });
    root.append(svg("rect", { x: (width - middle) / 2, y: centre - 12, width: middle, height: 24, rx: 6, class: "edge-me" }), fit(me, middle - 10, { x: width / 2, y: centre + 4, "text-anchor": "middle" }));
    return root;
  });
}
