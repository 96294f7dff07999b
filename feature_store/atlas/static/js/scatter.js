// A scatter of up to a million dots on a 2-D canvas, drawn pixel by pixel: no graphics processor, no context to lose,
// and the same picture everywhere. Dots of up to SMOOTH are smooth at their edges; of more, edges cost more than they show.
//
//   const plot = new Scatter(element, {label, equal, axes: {x, y}, tip(i), onHover(i | null), onPick(i), onLasso(polygon | null), onView(view)})
//   plot.points(xs, ys)            numbers [n] of the data; NaN: not drawn
//   plot.colours(packed)           Uint32Array [n], see colour.js
//   plot.show(visible)             Uint8Array [n], or null for all
//   plot.order(indices)            who is drawn, in this order (the last lies on top); null: all, as they come
//   plot.mark(indices)             rings around these
//   plot.view = {x, y, zoom}       null: all dots fit;   plot.polygon = [[x, y], ...] or null: the lasso
//   plot.second = [[x, y], ...] or null: another polygon beside the lasso
//   plot.lines = [{axis: "x" | "y", at}]   guides across the axes
//   plot.inside(polygon)           indices of the visible dots within
//   plot.close()
// `equal`: one unit is as long in x as in y (a map); else each axis fits by itself, and `axes` names them. `tip(i)`: what is
// said beside the dot under the pointer, nodes or a promise of them. The wheel zooms with Ctrl, or once the map has the focus,
// so that a page that is scrolled over it goes on; one finger scrolls the page until the map was touched.

import { h, svg, clear } from "./dom.js";
import { linear, tickText } from "./axis.js";
import { cssOf } from "./colour.js";
import { dressed, saveButtons } from "./figure.js";

const SMOOTH = 50_000;
const REACH = 10;
const LEAST_STEP = 4;
const MOST_SHAPES = 5000;

export class Scatter {
  constructor(root, { label = "Scatter", equal = true, axes = null, tip = null, onHover, onPick, onLasso, onView } = {}) {
    Object.assign(this, { root, equal, axes, says: tip, onHover, onPick, onLasso, onView });
    this.label = label;
    this.n = 0;
    this.xs = this.ys = new Float32Array(0);
    this.ink = new Uint32Array(0);
    this.visible = this.sequence = this.grid = null;
    this.marked = [];
    this.chosen = null;
    this.lassoed = this.other = null;
    this.isLasso = false;
    this.frames = 0;
    this.margin = axes ? { left: 46, right: 8, top: 8, bottom: 38 } : { left: 8, right: 8, top: 8, bottom: 8 };
    this.canvas = h("canvas", { class: "dots", tabindex: 0, role: "application", "aria-label": `${label}. Arrow keys move, plus and minus zoom, 0 shows all.` });
    this.overlay = svg("svg", { class: "overlay", "aria-hidden": "true" });
    const tool = (text, name, act, pressed) => h("button", { type: "button", class: "tool", title: name, "aria-label": name, "aria-pressed": pressed, onclick: act }, text);
    this.lassoButton = onLasso ? tool(icon("M8 3.5c-4 0-6 1.6-6 3.6s2.4 3.6 6 3.6 6-1.6 6-3.6-2-3.6-6-3.6M5 10.4c-1 1-1.4 2.4-.2 3.1", "2.4 1.6"), "Lasso: draw around dots (or hold Shift)", () => this.lasso(!this.isLasso), "false") : null;
    this.tip = h("div", { class: "tip", hidden: true });
    this.hint = h("div", { class: "zoom-hint", "aria-hidden": "true", hidden: true }, "Ctrl and wheel zoom; without Ctrl after a click on the map");
    this.field = h("div", { class: "field" }, this.canvas, this.overlay, this.tip, this.hint);
    this.box = h("div", { class: "scatter" }, this.field, h("div", { class: "tools" },
      tool(icon("M8 3v10M3 8h10"), "Zoom in", () => this.zoom(1.5)), tool(icon("M3 8h10"), "Zoom out", () => this.zoom(1 / 1.5)), tool(icon("M3 6V3h3M10 3h3v3M13 10v3h-3M6 13H3v-3"), "Show all", () => this.look(null)), this.lassoButton, h("span", { class: "tools-rest" }), saveButtons(() => this.box, () => this.picture(), "tool figure-tool")));
    root.append(this.box);
    this.box.scatter = this;
    this.listen();
    this.observer = new ResizeObserver(() => this.invalidate());
    this.observer.observe(this.box);
    this.themes = new MutationObserver(() => this.invalidate());
    this.themes.observe(document.documentElement, { attributes: true, attributeFilter: ["data-theme"] });
  }

  close() {
    this.observer.disconnect();
    this.themes.disconnect();
    cancelAnimationFrame(this.waiting);
    clearTimeout(this.hinting);
    this.box.remove();
  }

  points(xs, ys) {
    Object.assign(this, { xs, ys, n: xs.length, grid: null, bounds: boundsOf(xs, ys) });
    if (this.ink.length !== this.n) this.ink = new Uint32Array(this.n).fill(0xff888888);
    this.invalidate();
  }

  colours(ink) { this.ink = ink; this.invalidate(); }
  show(visible) { this.visible = visible; this.invalidate(); }
  order(sequence) { this.sequence = sequence; this.invalidate(); }
  mark(indices) { this.marked = indices; this.invalidate(); }
  get view() { return this.chosen; }
  set view(view) { this.chosen = view; this.invalidate(); }
  get second() { return this.other; }
  set second(polygon) { this.other = polygon; this.invalidate(); }
  get polygon() { return this.lassoed; }
  set polygon(polygon) { this.lassoed = polygon; this.invalidate(); }

  lasso(on) {
    this.isLasso = on;
    this.lassoButton?.setAttribute("aria-pressed", String(on));
    this.box.classList.toggle("lassoing", on);
  }

  // How data become pixels of the page: {x(v), y(v), kx, ky} with inverses.
  get places() {
    const width = this.field.clientWidth, height = this.field.clientHeight;
    const { left, right, top, bottom } = this.margin;
    const inner = { width: Math.max(1, width - left - right), height: Math.max(1, height - top - bottom) };
    const { x0, x1, y0, y1 } = this.bounds ?? { x0: 0, x1: 1, y0: 0, y1: 1 };
    let kx = (0.96 * inner.width) / (x1 - x0 || 1), ky = (0.96 * inner.height) / (y1 - y0 || 1);
    if (this.equal) kx = ky = Math.min(kx, ky);
    const { x, y, zoom } = this.chosen ?? { x: (x0 + x1) / 2, y: (y0 + y1) / 2, zoom: 1 };
    kx *= zoom; ky *= zoom;
    const cx = left + inner.width / 2, cy = top + inner.height / 2;
    return { width, height, inner, kx, ky, x: (v) => cx + (v - x) * kx, y: (v) => cy - (v - y) * ky, toX: (p) => x + (p - cx) / kx, toY: (p) => y - (p - cy) / ky, cx, cy, zoom, atX: x, atY: y };
  }

  invalidate() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  draw() {
    if (this.axes) this.margin.left = this.leftMargin();
    const places = this.places, density = window.devicePixelRatio || 1;
    const width = Math.round(places.width * density), height = Math.round(places.height * density);
    if (!width || !height) return;
    const { canvas } = this;
    if (canvas.width !== width || canvas.height !== height) Object.assign(canvas, { width, height });
    const context = canvas.getContext("2d");
    if (this.image?.width !== width || this.image?.height !== height) this.image = context.createImageData(width, height);
    const pixels = new Uint32Array(this.image.data.buffer);
    pixels.fill(0);
    const shown = this.visible ? countOnes(this.visible) : this.n;
    // dots shrink as they get many, and grow slowly as one comes near
    this.radius = Math.max(1, Math.min(6, (110 / Math.sqrt(shown + 300)) * places.zoom ** 0.25));
    const radius = this.radius * density;
    const clip = this.axes ? { x0: this.margin.left * density, x1: width - this.margin.right * density, y0: this.margin.top * density, y1: height - this.margin.bottom * density } : { x0: 0, x1: width, y0: 0, y1: height };
    const stamp = shown <= SMOOTH ? smoothStamp(radius) : plainStamp(radius);
    const kx = places.kx * density, ky = places.ky * density, ox = places.x(0) * density, oy = places.y(0) * density;
    const { xs, ys, ink, visible, sequence } = this, m = sequence ? sequence.length : this.n;
    for (let j = 0; j < m; j++) {
      const i = sequence ? sequence[j] : j;
      if (visible && !visible[i]) continue;
      const px = ox + xs[i] * kx, py = oy - ys[i] * ky;
      if (px >= clip.x0 && px < clip.x1 && py >= clip.y0 && py < clip.y1) stamp(pixels, width, height, px, py, ink[i]);
    }
    context.putImageData(this.image, 0, 0);
    this.decorate(places);
    this.frames += 1;
    this.box.dataset.frames = this.frames;
    this.box.dataset.shown = shown;
  }

  decorate(places) {
    const { overlay, radius } = this;
    overlay.setAttribute("viewBox", `0 0 ${places.width} ${places.height}`);
    const rings = this.marked.filter((i) => !Number.isNaN(this.xs[i])).map((i) => svg("circle", { cx: places.x(this.xs[i]), cy: places.y(this.ys[i]), r: radius + 4, class: "ring" }));
    const drawn = (polygon, own) => (polygon?.length ? svg("polygon", { points: polygon.map(([x, y]) => `${places.x(x).toFixed(1)},${places.y(y).toFixed(1)}`).join(" "), class: own }) : null);
    clear(overlay, this.axes ? this.drawAxes(places) : [], drawn(this.lassoed, "lasso"), drawn(this.other, "lasso second"), rings);
  }

  // What is drawn, for a file: dots as shapes, or as an image where there are very many.
  picture() {
    this.draw();
    const places = this.places, { width, height } = places, { xs, ys, ink, visible, sequence, radius } = this;
    const drawn = (sequence ? [...sequence] : Array.from({ length: this.n }, (_, i) => i)).filter((i) => (!visible || visible[i]) && !Number.isNaN(xs[i]) && !Number.isNaN(ys[i]));
    const inside = drawn.map((i) => [places.x(xs[i]), places.y(ys[i]), ink[i]]).filter(([x, y]) => x >= this.margin.left - 8 && x <= width && y >= 0 && y <= height - this.margin.bottom + 8);
    const dots = inside.length > MOST_SHAPES ? svg("image", { href: this.canvas.toDataURL(), width, height }) : inside.map(([x, y, colour]) => svg("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: radius.toFixed(1), fill: cssOf(colour), "fill-opacity": colour >>> 24 === 255 ? null : (colour >>> 24) / 255 }));
    return { label: this.label, width, height, shapes: [dots, [...this.overlay.children].map(dressed)] };
  }

  // Room for the longest number on the axis and for the name of the axis.
  leftMargin() {
    const { toY, inner } = this.places, { top } = this.margin;
    const up = linear([toY(top + inner.height), toY(top)], [0, 1]).ticks(Math.max(2, Math.round(inner.height / 80)));
    return Math.max(46, 26 + 6.4 * Math.max(...up.map((v) => tickText(v).length)));
  }

  drawAxes({ toX, toY, x, y, width, height, inner }) {
    const { left, top, bottom } = this.margin, base = height - bottom;
    const across = linear([toX(left), toX(left + inner.width)], [0, 1]).ticks(Math.max(2, Math.round(inner.width / 110)));
    const up = linear([toY(base), toY(top)], [0, 1]).ticks(Math.max(2, Math.round(inner.height / 80)));
    return [
      svg("line", { x1: left, x2: left + inner.width, y1: base, y2: base, class: "axis" }), svg("line", { x1: left, x2: left, y1: top, y2: base, class: "axis" }),
      across.map((v) => svg("text", { x: x(v), y: base + 14, "text-anchor": "middle", class: "tick-text" }, tickText(v))),
      up.map((v) => svg("text", { x: left - 5, y: y(v) + 3.5, "text-anchor": "end", class: "tick-text" }, tickText(v))),
      svg("text", { x: left + inner.width / 2, y: height - 6, "text-anchor": "middle", class: "axis-title" }, this.axes.x),
      svg("text", { transform: `translate(11 ${top + inner.height / 2}) rotate(-90)`, "text-anchor": "middle", class: "axis-title" }, this.axes.y),
      (this.lines ?? []).map(({ axis, at }) => axis === "x" ? svg("line", { x1: x(at), x2: x(at), y1: top, y2: base, class: "guide" }) : svg("line", { x1: left, x2: width - this.margin.right, y1: y(at), y2: y(at), class: "guide" })),
    ];
  }

  // The dot nearest to a point of the page, within reach; null if there is none.
  nearest(px, py) {
    const { toX, toY, kx, ky } = this.places;
    this.grid ??= gridOf(this.xs, this.ys, this.bounds);
    let best = null, least = (REACH + this.radius) ** 2;
    const reach = REACH + this.radius;
    this.grid.around(toX(px), toY(py), reach / kx, reach / ky, (i) => {
      if (this.visible && !this.visible[i]) return;
      const d = ((this.xs[i] - toX(px)) * kx) ** 2 + ((this.ys[i] - toY(py)) * ky) ** 2;
      if (d < least) { least = d; best = i; }
    });
    return best;
  }

  inside(polygon) {
    const found = [];
    for (let i = 0; i < this.n; i++) {
      if ((!this.visible || this.visible[i]) && isInside(this.xs[i], this.ys[i], polygon)) found.push(i);
    }
    return Uint32Array.from(found);
  }

  // Look elsewhere, and say so.
  look(view) {
    this.view = view;
    this.onView?.(view);
  }

  zoom(factor, px = null, py = null) {
    const at = this.places, zoom = Math.max(0.5, Math.min(2000, at.zoom * factor)), by = zoom / at.zoom;
    const x = px === null ? at.atX : at.toX(px), y = py === null ? at.atY : at.toY(py);
    this.look({ x: x + (at.atX - x) / by, y: y + (at.atY - y) / by, zoom });
  }

  pan(dx, dy) {
    const at = this.places;
    this.look({ x: at.atX - dx / at.kx, y: at.atY + dy / at.ky, zoom: at.zoom });
  }

  listen() {
    const { canvas } = this, fingers = new Map();
    let drawn = null, moved = 0, pinch = null;
    const at = (event) => { const box = canvas.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      fingers.set(event.pointerId, at(event));
      moved = 0;
      if (fingers.size === 2) { drawn = null; pinch = spread(fingers); }
      else if (this.onLasso && (this.isLasso || event.shiftKey)) drawn = [this.data(at(event))];
    });
    canvas.addEventListener("pointermove", (event) => {
      const [px, py] = at(event), last = fingers.get(event.pointerId);
      if (!last) { this.hover(px, py); return; }
      moved += Math.abs(px - last[0]) + Math.abs(py - last[1]);
      fingers.set(event.pointerId, [px, py]);
      if (fingers.size === 2) { const now = spread(fingers); this.zoom(now.size / pinch.size, now.x, now.y); pinch = now; }
      else if (drawn) { drawn.push(this.data([px, py])); this.polygon = drawn; }
      else if (moved > LEAST_STEP) this.pan(px - last[0], py - last[1]);
    });
    const up = (event) => {
      if (!fingers.delete(event.pointerId)) return;
      if (drawn) {
        const polygon = drawn.length > 2 ? thinned(drawn) : null;
        drawn = null;
        this.lasso(false);
        this.polygon = polygon;
        this.onLasso(polygon);
      } else if (moved <= LEAST_STEP && event.type === "pointerup") {
        const i = this.nearest(...at(event));
        if (i !== null) this.onPick?.(i);
      }
    };
    canvas.addEventListener("pointerup", up);
    canvas.addEventListener("pointercancel", up);
    canvas.addEventListener("pointerleave", () => { this.point(null); this.onHover?.(null); });
    canvas.addEventListener("wheel", (event) => {
      if (!event.ctrlKey && document.activeElement !== canvas) { this.hintAtZoom(); return; }
      event.preventDefault();
      this.zoom(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0015)), ...at(event));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const step = 40, acts = {
        ArrowLeft: () => this.pan(step, 0), ArrowRight: () => this.pan(-step, 0), ArrowUp: () => this.pan(0, step), ArrowDown: () => this.pan(0, -step),
        "+": () => this.zoom(1.3), "=": () => this.zoom(1.3), "-": () => this.zoom(1 / 1.3), 0: () => this.look(null),
        Escape: () => { if (this.lassoed) { this.polygon = null; this.onLasso?.(null); } },
      };
      if (acts[event.key] && !event.ctrlKey && !event.metaKey && !event.altKey) { event.preventDefault(); acts[event.key](); }
    });
  }

  data([px, py]) { const { toX, toY } = this.places; return [toX(px), toY(py)]; }

  hover(px, py) {
    const i = this.nearest(px, py);
    this.canvas.classList.toggle("over", i !== null);
    this.point(i, px, py);
    this.onHover?.(i, px, py);
  }

  // Say what the dot under the pointer is, beside it and inside the map.
  async point(i, px, py) {
    this.pointed = i;
    const said = i === null ? null : await this.says?.(i);
    if (this.pointed !== i) return;
    this.tip.hidden = !said;
    if (!said) return;
    clear(this.tip, said);
    const { clientWidth: width, clientHeight: height } = this.field, { offsetWidth: wide, offsetHeight: tall } = this.tip;
    const left = px + 14 + wide <= width - 4 ? px + 14 : px - 14 - wide, top = py + 14 + tall <= height - 4 ? py + 14 : py - 14 - tall;
    Object.assign(this.tip.style, { left: `${Math.max(4, Math.min(left, width - wide - 4))}px`, top: `${Math.max(4, Math.min(top, height - tall - 4))}px` });
  }

  hintAtZoom() {
    this.hint.hidden = false;
    clearTimeout(this.hinting);
    this.hinting = setTimeout(() => { this.hint.hidden = true; }, 1500);
  }
}

const icon = (path, dashes) => svg("svg", { viewBox: "0 0 16 16", class: "icon", "aria-hidden": "true" }, svg("path", { d: path, "stroke-dasharray": dashes }));

function spread(fingers) {
  const [[ax, ay], [bx, by]] = fingers.values();
  return { size: Math.hypot(ax - bx, ay - by) || 1, x: (ax + bx) / 2, y: (ay + by) / 2 };
}

export function boundsOf(xs, ys) {
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (let i = 0; i < xs.length; i++) {
    const x = xs[i], y = ys[i];
    if (x !== x || y !== y) continue;
    if (x < x0) x0 = x; if (x > x1) x1 = x;
    if (y < y0) y0 = y; if (y > y1) y1 = y;
  }
  return x0 <= x1 ? { x0, x1, y0, y1 } : { x0: 0, x1: 1, y0: 0, y1: 1 };
}

function countOnes(mask) {
  let n = 0;
  for (let i = 0; i < mask.length; i++) n += mask[i];
  return n;
}

// Even-odd rule.
export function isInside(x, y, polygon) {
  let inside = false;
  for (let i = 0, j = polygon.length - 1; i < polygon.length; j = i++) {
    const [ax, ay] = polygon[i], [bx, by] = polygon[j];
    if (ay > y !== by > y && x < ((bx - ax) * (y - ay)) / (by - ay) + ax) inside = !inside;
  }
  return inside;
}

// A polygon and a view as they stand in an address, and back; null where there is none.
export const polygonText = (polygon) => polygon && polygon.map((at) => at.map((v) => Number(v.toPrecision(5))).join(",")).join(";");
export const viewText = (view) => view && [view.x, view.y, view.zoom].map((v) => Number(v.toPrecision(6))).join(",");

export function polygonOf(text) {
  const found = (text ?? "").split(";").map((at) => at.split(",").map(Number)).filter((at) => at.length === 2 && at.every(Number.isFinite));
  return found.length > 2 ? found : null;
}

export function viewOf(text) {
  const [x, y, zoom] = (text ?? "").split(",").map(Number);
  return text && Number.isFinite(x) && Number.isFinite(y) && zoom > 0 ? { x, y, zoom } : null;
}

// At most 60 corners, evenly taken: what fits into an address. The picture is of the same corners that choose.
function thinned(polygon) {
  const most = 60;
  if (polygon.length <= most) return polygon;
  return Array.from({ length: most }, (_, i) => polygon[Math.floor((i * polygon.length) / most)]);
}

// Dots by cell of a grid, so that the nearest is found among a few.
function gridOf(xs, ys, { x0, x1, y0, y1 }) {
  const side = Math.max(1, Math.min(512, Math.ceil(Math.sqrt(xs.length / 2))));
  const kx = side / (x1 - x0 || 1), ky = side / (y1 - y0 || 1);
  const column = (x) => Math.max(0, Math.min(side - 1, Math.floor((x - x0) * kx)));
  const row = (y) => Math.max(0, Math.min(side - 1, Math.floor((y - y0) * ky)));
  const starts = new Uint32Array(side * side + 1), place = new Int32Array(xs.length).fill(-1);
  for (let i = 0; i < xs.length; i++) {
    if (Number.isNaN(xs[i]) || Number.isNaN(ys[i])) continue;
    place[i] = row(ys[i]) * side + column(xs[i]);
    starts[place[i] + 1] += 1;
  }
  for (let c = 0; c < side * side; c++) starts[c + 1] += starts[c];
  const next = starts.slice(0, -1), members = new Uint32Array(starts[side * side]);
  for (let i = 0; i < xs.length; i++) if (place[i] >= 0) members[next[place[i]]++] = i;
  return {
    around(x, y, rx, ry, visit) {
      for (let r = row(y - ry); r <= row(y + ry); r++) {
        for (let c = column(x - rx); c <= column(x + rx); c++) {
          const cell = r * side + c;
          for (let j = starts[cell]; j < starts[cell + 1]; j++) visit(members[j]);
        }
      }
    },
  };
}

// Writes a disc row by row.
function plainStamp(radius) {
  const r = Math.max(0, Math.round(radius - 0.5)), halves = [];
  for (let dy = -r; dy <= r; dy++) halves.push(Math.floor(Math.sqrt((r + 0.3) ** 2 - dy * dy)));
  return (pixels, width, height, px, py, colour) => {
    const cx = px | 0, cy = py | 0;
    for (let dy = -r; dy <= r; dy++) {
      const y = cy + dy;
      if (y < 0 || y >= height) continue;
      const half = halves[dy + r], from = cx - half < 0 ? 0 : cx - half, to = cx + half >= width ? width - 1 : cx + half;
      for (let x = from, at = y * width + from; x <= to; x++, at++) pixels[at] = colour;
    }
  };
}

// Writes a disc whose edge is as opaque as it covers its pixels.
function smoothStamp(radius) {
  const r = Math.ceil(radius);
  return (pixels, width, height, px, py, colour) => {
    const x0 = Math.max(0, Math.floor(px - radius - 0.5)), x1 = Math.min(width - 1, Math.floor(px + radius + 0.5));
    const y0 = Math.max(0, Math.floor(py - radius - 0.5)), y1 = Math.min(height - 1, Math.floor(py + radius + 0.5));
    const inner = (radius - 0.5) ** 2, outer = (radius + 0.5) ** 2;
    for (let y = y0; y <= y1; y++) {
      const dy = y + 0.5 - py;
      for (let x = x0, at = y * width + x0; x <= x1; x++, at++) {
        const dx = x + 0.5 - px, d = dx * dx + dy * dy;
        if (d <= inner) pixels[at] = colour;
        else if (d < outer) pixels[at] = over(colour, radius + 0.5 - Math.sqrt(d), pixels[at]);
      }
    }
  };
}

// A colour laid over another with a share of its opacity.
function over(colour, share, below) {
  const belowAlpha = (below >>> 24) / 255, alpha = share + belowAlpha * (1 - share);
  if (alpha <= 0) return 0;
  const mix = (shift) => Math.round((((colour >>> shift) & 255) * share + ((below >>> shift) & 255) * belowAlpha * (1 - share)) / alpha);
  return ((Math.round(alpha * 255) << 24) | (mix(16) << 16) | (mix(8) << 8) | mix(0)) >>> 0;
}
