// The pictures of a steering run: its cells on a map with the way that each type went, a metric along the doses, and
// every condition beside the others.

import { svg, fmt, fixed } from "./dom.js";
import { frame, linear, tickText, xAxis, yAxis } from "./axis.js";
import { Scatter } from "./scatter.js";
import { ROLE } from "./steering_run.js";

const LETTER = 6.2, BOLD = 7.4;
const ROW = 26;
const SHAPES = ["square", "triangle", "diamond", "circle"];
const CLASS_OF_ROLE = { [ROLE.null]: "of-null", [ROLE.baseline]: "of-baseline", [ROLE.floor]: "of-baseline", [ROLE.grid]: "of-own" };
export const classOf = (role) => CLASS_OF_ROLE[role] ?? "of-other";

// A scatter with arrows [{from, to, name}] and crosses [{at, name}] over its dots.
export class CellMap extends Scatter {
  arrows = [];
  crosses = [];

  constructor(root, options) {
    super(root, options);
    this.canvas.setAttribute("aria-label", `${options.label}. Arrow keys move, plus and minus zoom, 0 shows all.`);
  }

  over(arrows, crosses) {
    Object.assign(this, { arrows, crosses });
    this.invalidate();
  }

  decorate(places) {
    super.decorate(places);
    const at = ([x, y]) => [places.x(x), places.y(y)];
    for (const { at: where } of this.crosses) {
      const [x, y] = at(where), d = `M${x - 6} ${y - 6}l12 12m0 -12l-12 12`;
      this.overlay.append(svg("path", { d, class: "cross halo" }), svg("path", { d, class: "cross" }));
    }
    for (const { from, to } of this.arrows) {
      const d = arrow(at(from), at(to));
      if (d) this.overlay.append(svg("path", { d, class: "arrow halo" }), svg("path", { d, class: "arrow" }));
    }
  }
}

// A line with a head; nothing where the ends are one.
function arrow([x0, y0], [x1, y1]) {
  const length = Math.hypot(x1 - x0, y1 - y0);
  if (!(length > 3)) return null;
  const [ux, uy] = [(x1 - x0) / length, (y1 - y0) / length], head = Math.min(9, length * 0.6);
  const wing = (side) => `L${x1} ${y1}L${x1 - head * ux + side * head * 0.5 * uy} ${y1 - head * uy - side * head * 0.5 * ux}`;
  return `M${x0} ${y0}L${x1} ${y1}M${x1} ${y1}${wing(1)}M${x1} ${y1}${wing(-1)}`;
}

export function shape(kind, x, y, size, attributes) {
  if (kind === "circle") return svg("circle", { cx: x, cy: y, r: size, ...attributes });
  const d = { square: `M${x - size} ${y - size}h${2 * size}v${2 * size}h${-2 * size}z`, triangle: `M${x} ${y - size * 1.2}l${size * 1.2} ${size * 2.2}h${-size * 2.4}z`, diamond: `M${x} ${y - size * 1.4}l${size * 1.4} ${size * 1.4}l${-size * 1.4} ${size * 1.4}l${-size * 1.4} ${-size * 1.4}z` }[kind];
  return svg("path", { d, ...attributes });
}

export const shapeOf = (i) => SHAPES[i % SHAPES.length];

// The interval of a value, from that of its effect.
export const bounds = ({ value, effect, low, high }) => (low === null || high === null || effect === null ? [value, value] : [low + value - effect, high + value - effect]);

function spanOf(values, share = 0.08) {
  const known = values.filter((v) => v !== null && Number.isFinite(v)), low = Math.min(...known), high = Math.max(...known);
  const margin = (high - low || Math.abs(high) || 1) * share;
  return [low - margin, high + margin];
}

// Values of a metric along an axis: rows of the grid, the unsteered value, the nulls at the chosen point; `now` and
// `chosen` are places on the axis, or null.
export function curve(width, { rows, axis, unsteered, nulls, now, chosen, xTitle, yTitle, label }) {
  const places = rows.map((row) => row[axis]), far = Math.max(...places), near = Math.min(0, ...places);
  const domain = spanOf([...rows, ...nulls].flatMap(bounds).concat(unsteered ?? []));
  return frame({ width, height: 250, left: 54, right: 14, top: 12, bottom: 40, label }, ({ plot, width: inner, height }) => {
    const x = linear([near, far + (far - near) * 0.04], [4, inner - 4]), y = linear(domain, [height, 0]);
    yAxis(plot, y, { title: null, width: inner, height });
    plot.append(svg("line", { x1: 0, x2: inner, y1: height, y2: height, class: "axis" }));
    places.forEach((place, i) => {
      const isClose = i > 0 && x(place) - x(places[i - 1]) < LETTER * 4 && i < places.length - 1;
      plot.append(svg("line", { x1: x(place), x2: x(place), y1: height, y2: height + 4, class: "tick" }));
      if (!isClose) plot.append(svg("text", { x: x(place), y: height + 15, "text-anchor": "middle", class: "tick-text" }, tickText(place)));
    });
    plot.append(svg("text", { x: inner / 2, y: height + 33, "text-anchor": "middle", class: "axis-title" }, xTitle), svg("text", { transform: `translate(-44 ${height / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis-title" }, yTitle));
    if (unsteered !== null) plot.append(svg("line", { x1: 0, x2: inner, y1: y(unsteered), y2: y(unsteered), class: "guide" }));
    if (now !== null) plot.append(svg("line", { x1: x(now), x2: x(now), y1: 0, y2: height, class: "now" }));
    const band = [...rows.map((row) => `${x(row[axis])},${y(bounds(row)[1])}`), ...[...rows].reverse().map((row) => `${x(row[axis])},${y(bounds(row)[0])}`)];
    plot.append(svg("polygon", { points: band.join(" "), class: "band" }), svg("polyline", { points: rows.map((row) => `${x(row[axis])},${y(row.value)}`).join(" "), class: "own-line" }));
    nulls.forEach((row, i) => {
      if (chosen === null) return;
      const at = x(chosen) + 11 * (i + 1) * (x(chosen) > inner / 2 ? -1 : 1), [low, high] = bounds(row).map(y);
      plot.append(svg("g", { class: "of-null" }, svg("title", {}, `${row.condition}: ${fmt(row.value)}, mean of ${row.n_draws} draws`), svg("line", { x1: at, x2: at, y1: low, y2: high, class: "whisker" }), shape(shapeOf(i), at, y(row.value), 3.6, { class: "mark" })));
    });
    for (const row of rows) {
      plot.append(svg("g", {}, svg("title", {}, `${tickText(row[axis])}: ${fmt(row.value)}`), svg("circle", { cx: x(row[axis]), cy: y(row.value), r: row[axis] === now ? 5.5 : 3.5, class: "own-dot" })));
      if (row[axis] === chosen) plot.append(svg("circle", { cx: x(row[axis]), cy: y(row.value), r: 9, class: "ring" }));
    }
  });
}

// Effects with their intervals, a row a condition: [{name, role, effect, low, high, value, isNow}].
export function forest(width, { rows, title, label }) {
  const left = Math.round(Math.min(230, Math.max(156, width * 0.34))), right = width > 520 ? 168 : 58, height = rows.length * ROW + 44;
  const domain = spanOf(rows.flatMap(({ effect, low, high }) => [effect, low, high]).concat(0), 0.05);
  return frame({ width, height: height + 18, left, right, top: 18, bottom: 44, label }, ({ plot, width: inner, height: inside }) => {
    const x = linear(domain, [0, inner]);
    for (const tick of x.ticks(Math.max(3, Math.round(inner / 75)))) plot.append(svg("line", { x1: x(tick), x2: x(tick), y1: 0, y2: inside, class: "grid" }));
    xAxis(plot, x, inside, { n: Math.max(3, Math.round(inner / 75)), title, width: inner });
    plot.append(svg("line", { x1: x(0), x2: x(0), y1: 0, y2: inside, class: "zero" }), svg("text", { x: inner + right, y: -6, "text-anchor": "end", class: "axis-title" }, right > 100 ? "effect (95 %)" : "effect"));
    rows.forEach(({ name, role, effect, low, high, isNow }, i) => {
      const y = (i + 0.5) * ROW, letters = Math.floor((left - 10) / (isNow ? BOLD : LETTER)), row = svg("g", { class: `${classOf(role)}${isNow ? " is-now" : ""}` });
      if (isNow) row.append(svg("rect", { x: -left, y: y - ROW / 2 + 1, width, height: ROW - 2, class: "row-now" }));
      row.append(svg("title", {}, `${name}: ${fmt(effect)}${low === null ? "" : ` (${fmt(low)} to ${fmt(high)})`}`));
      row.append(svg("text", { x: -8, y: y + 4, "text-anchor": "end" }, name.length > letters ? `${name.slice(0, letters - 1)}…` : name));
      if (low !== null && high !== null) row.append(svg("line", { x1: x(low), x2: x(high), y1: y, y2: y, class: "whisker" }));
      row.append(shape(role === ROLE.null ? "square" : role === ROLE.grid ? "circle" : "diamond", x(effect), y, role === ROLE.grid ? 5 : 4, { class: "mark" }));
      const figures = low === null || right <= 100 ? signed(effect) : `${signed(effect)} (${fixed(low)}, ${fixed(high)})`;
      row.append(svg("text", { x: inner + right, y: y + 4, "text-anchor": "end" }, figures));
      plot.append(row);
    });
  });
}

const signed = (x) => (x === null ? "–" : `${x > 0 ? "+" : ""}${Math.abs(x) < 1e-4 && x !== 0 ? x.toExponential(1) : x.toFixed(3)}`);

// Before and after in each group: [{group, before, after, nulls: [value]}].
export function groups(width, { rows, title, label }) {
  const left = Math.round(Math.min(200, Math.max(110, width * 0.34))), height = rows.length * ROW + 46;
  const domain = spanOf(rows.flatMap(({ before, after, nulls }) => [before, after, ...nulls]), 0.06);
  return frame({ width, height, left, right: 14, top: 4, bottom: 42, label }, ({ plot, width: inner, height: inside }) => {
    const x = linear(domain, [0, inner]);
    for (const tick of x.ticks(Math.max(3, Math.round(inner / 75)))) plot.append(svg("line", { x1: x(tick), x2: x(tick), y1: 0, y2: inside, class: "grid" }));
    xAxis(plot, x, inside, { n: Math.max(3, Math.round(inner / 75)), title, width: inner });
    rows.forEach(({ group, before, after, nulls }, i) => {
      const y = (i + 0.5) * ROW, letters = Math.floor((left - 10) / LETTER);
      plot.append(svg("text", { x: -8, y: y + 4, "text-anchor": "end" }, svg("title", {}, group), group.length > letters ? `${group.slice(0, letters - 1)}…` : group));
      nulls.forEach((value, j) => { if (value !== null) plot.append(svg("g", { class: "of-null" }, shape(shapeOf(j), x(value), y, 3, { class: "mark" }))); });
      if (before !== null && after !== null) plot.append(svg("line", { x1: x(before), x2: x(after), y1: y, y2: y, class: "own-line" }));
      if (before !== null) plot.append(svg("circle", { cx: x(before), cy: y, r: 4.5, class: "before-dot" }));
      if (after !== null) plot.append(svg("circle", { cx: x(after), cy: y, r: 4.5, class: "own-dot" }));
    });
  });
}
