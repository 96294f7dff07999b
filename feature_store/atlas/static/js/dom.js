// Elements from names, attributes and texts. Names of the data become text nodes, never HTML.

const SVG = "http://www.w3.org/2000/svg";

// h("button", {class: "quiet", onclick: f, "aria-label": "Zoom in"}, "+"): children are elements, texts, or nothing.
export function h(tag, attributes = {}, ...children) {
  return dress(document.createElement(tag), attributes, children);
}

// The same for SVG.
export function svg(tag, attributes = {}, ...children) {
  return dress(document.createElementNS(SVG, tag), attributes, children);
}

function dress(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "style") Object.assign(element.style, value);
    else if (name in element && (name === "value" || name === "checked" || name === "disabled" || name === "selected")) element[name] = value;
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function clear(node, ...children) {
  node.replaceChildren(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// The same where somebody may be at a control inside: who was at the third is at the third again.
export function redraw(node, ...children) {
  const controls = () => [...node.querySelectorAll("button, a, input, select")];
  const at = controls().indexOf(document.activeElement);
  clear(node, ...children);
  if (at >= 0) controls()[at]?.focus({ preventScroll: true });
}

// Numbers as people read them. Three significant digits unless `digits` says otherwise; a dash for what is unknown.
export const DASH = "–";
export const isKnown = (x) => x !== null && x !== undefined && !Number.isNaN(x);

export function fmt(x, digits = 3) {
  if (!isKnown(x)) return DASH;
  if (x === 0) return "0";
  const size = Math.abs(x);
  if (Number.isInteger(x) && size < 1e6) return x.toLocaleString("en");
  if (size >= 1e5 || size < 1e-3) return x.toExponential(digits - 1);
  return Number(x.toPrecision(digits)).toString();
}

export const fixed = (x, digits = 3) => (isKnown(x) ? x.toFixed(digits) : DASH);
export const percent = (x, digits = 1) => (isKnown(x) ? `${(100 * x).toFixed(x !== 0 && Math.abs(x) < 0.001 ? 3 : digits)} %` : DASH);
export const pvalue = (p) => (!isKnown(p) ? DASH : p < 1e-300 ? "< 1e-300" : p < 0.001 ? p.toExponential(1) : p.toFixed(3));
export const count = (n) => (isKnown(n) ? n.toLocaleString("en") : DASH);
// The columns of the table of cells that are not of obs; a column of obs with such a name is called obs_NAME there.
const OWN = ["cell_idx", "cell_id", "dataset", "split", "panel", "donor", "batch", "cell_type"];
const ofObs = (name) => (name.startsWith("obs_") && !OWN.includes(name.slice(4)) ? name.slice(4) : name);
export const words = (name) => ofObs(String(name)).replaceAll("_", " ");

// The panel beside a figure of it, as " of the panel (n of N cells)"; nothing where the panel is all cells.
export const ofPanel = ({ panel }) => (panel ? ` of the panel (${count(panel.n_panel)} of ${count(panel.n_cells)} cells)` : "");

// What stands where a table is missing: why, and the command that makes it.
export function empty(missing, why) {
  return h("div", { class: "empty", role: "note" },
    h("p", {}, why ?? `This store has no table ${missing.table}.`),
    missing.command ? [h("p", {}, "This command makes it:"), h("pre", {}, h("code", {}, missing.command))] : null);
}

// A table of a few rows: heads and cells, each a text, a node or {text, title, class}.
export function smallTable(heads, rows, { caption, numeric = [] } = {}) {
  const cell = (tag, value, i) => {
    const isPlain = value === null || typeof value !== "object" || value instanceof Node;
    const { text, title, class: own } = isPlain ? { text: value } : value;
    return h(tag, { class: [numeric.includes(i) ? "number" : null, own].filter(Boolean).join(" ") || null, title, scope: tag === "th" ? "col" : null }, text ?? DASH);
  };
  return h("div", { class: "scroll-x", tabindex: 0, role: "region", "aria-label": caption ?? "table" }, h("table", { class: "small" },
    caption ? h("caption", {}, caption) : null,
    h("thead", {}, h("tr", {}, heads.map((head, i) => cell("th", head, i)))),
    h("tbody", {}, rows.map((row) => h("tr", {}, row.map((value, i) => cell("td", value, i)))))));
}

export function download(name, text, type = "text/csv;charset=utf-8") {
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type })), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

// Rows as CSV; a text that holds a comma, a quote or a line break is quoted.
export function csv(heads, rows) {
  const field = (value) => {
    if (!isKnown(value)) return "";
    const text = String(value);
    return /[",\r\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  return [heads, ...rows].map((row) => row.map(field).join(",")).join("\n") + "\n";
}

// The last call of many, after a pause.
export function later(f, milliseconds = 150) {
  let timer = null;
  return (...given) => {
    clearTimeout(timer);
    timer = setTimeout(() => f(...given), milliseconds);
  };
}
