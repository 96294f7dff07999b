// All features: a scatter and a table of the same ones, filtered, coloured and chosen together.

import { h, clear, empty, count, csv, download, fixed, fmt, later, ofPanel, percent, pvalue, redraw, words } from "../dom.js";
import { CLASS, byCategory, byNumber, colourOf, legend, rampLegend } from "../colour.js";
import { columns, overview } from "../data.js";
import { Features, MAPS } from "../features.js";
import { Scatter, polygonOf, polygonText, viewOf, viewText } from "../scatter.js";
import { go, href, parse, setParams } from "../state.js";
import { VirtualTable } from "../table.js";

const MOST_NAMED = 11;
const LEVEL = 0.05;
const DENSITIES = [["", "any density"], ["0~0.001", "below 0.1 %"], ["0.001~0.01", "0.1 to 1 %"], ["0.01~0.1", "1 to 10 %"], ["0.1~1", "above 10 %"]];
const NUMBERS = {
  density: { text: "density (share of tokens)", log: true, format: (x) => percent(x) },
  batch_effect: { text: "batch effect (within cell types)", format: (x) => fixed(x, 2) },
  context_effect: { text: "cell-context effect (within batches)", format: (x) => fixed(x, 2) },
  gene_effect: { text: "gene effect", format: (x) => fixed(x, 2) },
  class_confidence: { text: "confidence of the class", format: (x) => fixed(x, 2) },
};

// Columns of names that colour features, and their words.
const NAMES = { label: { column: "top_label", text: "best label", all: "Best labels" }, module: { column: "module", text: "module", all: "The largest modules of features that fire together" } };

export const title = () => "Atlas";

export async function show(root, state) {
  const about = await overview();
  if (!about.tables.includes("features")) {
    root.append(h("h1", {}, "Atlas"), empty({ table: "features", command: about.missing.features }, "This store has no associations yet, so it has no features to show."));
    return {};
  }
  const page = new Atlas(root, about, await Features.load());
  await page.update(state);
  return { update: (next) => page.update(next), close: () => page.close() };
}

class Atlas {
  constructor(root, about, features) {
    Object.assign(this, { about, features, params: {}, paints: new Map(), filtered: null });
    this.classes = features.column("class");
    const choice = (key, name, options, also = {}) => h("label", {}, name, h("select", { name: key, onchange: (event) => this.ask({ ...also, [key]: event.target.value }) }, options.map(([value, text]) => h("option", { value }, text))));
    this.text = h("input", { type: "search", name: "q", placeholder: "gene, label, id …", "aria-label": "Filter features by gene, label or id", size: 18, oninput: later((event) => this.ask({ q: event.target.value }, { replace: true }), 30) });
    this.colourBy = h("label", {}, "Colour", h("select", { name: "color", onchange: (event) => this.ask({ color: event.target.value }) },
      h("option", { value: "class" }, "class"), Object.entries(NAMES).filter(([, { column }]) => features.has(column)).map(([key, { text }]) => h("option", { value: key }, text)),
      Object.entries(NUMBERS).filter(([key]) => features.has(key)).map(([key, { text }]) => h("option", { value: key }, text)),
      groupsOf(about.labels).map(([kind, labels]) => h("optgroup", { label: `AUROC: ${words(kind)}` }, labels.map(({ id, label }) => h("option", { value: `auroc:${id}` }, label))))));
    this.maps = Object.keys(MAPS).filter((name) => about.tables.includes(MAPS[name].table));
    this.mapped = this.maps.length > 1 ? choice("map", "Map", this.maps.map((name) => [name, MAPS[name].text]), { lasso: null, view: null }) : null;
    this.labelled = choice("label", "Label", [["", "any"], ...frequent(features.column("top_label")).map(([name, n]) => [name, `${name} (${n})`])]);
    this.inModule = features.has("module") ? choice("module", "Module", [["", "any"], ...frequent(features.column("module")).map(([name, n]) => [name, `${name} (${n})`])]) : null;
    this.dense = choice("density", "Density", DENSITIES);
    this.key = h("div", { class: "map-key" });
    this.status = h("p", { class: "quiet map-status", role: "status", "aria-live": "polite" });
    this.csvButton = h("button", { type: "button", class: "primary", onclick: () => this.save() }, "CSV");
    this.clearButton = h("button", { type: "button", onclick: () => this.ask({ lasso: null, q: null, label: null, module: null, density: null, off: null, class: null }) }, "Clear filters");
    const map = h("div", { class: "map-plot" }), list = h("div", { class: "map-table" });
    this.ofPanel = about.panel ? `All figures are of cells${ofPanel(about)}.` : "";
    this.said = h("p", { class: "quiet map-said" }, this.ofPanel);
    root.append(h("h1", {}, `${count(features.n)} features of ${about.title}`),
      h("div", { class: "controls" }, this.colourBy, this.mapped, this.labelled, this.inModule, this.dense, this.text, this.clearButton, h("button", { type: "button", onclick: () => this.random() }, "Random feature")),
      h("div", { class: "map" }, h("div", { class: "map-left" }, this.key, map, this.said), h("div", { class: "map-right" }, h("div", { class: "map-list-head" }, this.status, this.csvButton), list)));
    this.plot = this.maps.length
      ? new Scatter(map, { label: "Map of features; the table lists the same features", tip: (row) => this.about_(row), onHover: (row) => this.mark(row), onPick: (row) => this.open(row), onView: later((view) => this.ask({ view: viewText(view) }, { replace: true }), 250), onLasso: (polygon) => this.ask({ lasso: polygonText(polygon) }) })
      : null;
    if (!this.plot) map.append(empty({ table: "feature_umap", command: about.missing.feature_umap }, "The features have no map yet. The table lists them all."));
    this.table = new VirtualTable(list, { label: "Features", columns: this.columnsOfTable(), onSort: (key) => this.sortBy(key), onOpen: (row) => this.open(row), onActive: (row) => this.mark(row) });
    this.csvButton.before(this.table.more);
  }

  close() {
    this.plot?.close();
    this.table.close();
  }

  // careful: a delayed change may arrive after the page was left
  ask(patch, options) { if (parse().page === "atlas") setParams(patch, options); }

  columnsOfTable() {
    const { features } = this, text = (key) => (row) => features.at(key, row) ?? "–";
    const number = (key, head, format, more = {}) => ({ key, head, numeric: true, width: 70, cell: (row) => format(features.at(key, row), row), ...more });
    const own = this.label === null || this.label === undefined ? [] : [
      number("own_auroc_select", "select", (x) => auroc(x, null), { title: `AUROC of ${this.about.labels[this.label].label} on select cells`, said: "AUROC on select cells", width: 60, spare: 2 }),
      number("own_auroc", "AUROC", (x, row) => auroc(x, features.at("own_q", row)), { title: `AUROC of ${this.about.labels[this.label].label} on test cells`, said: "AUROC on test cells", width: 72, spare: 1 }),
      number("own_q", "q", pvalue, { title: "Benjamini-Hochberg over all features and the labels of a kind", width: 72, spare: 3 }),
    ];
    return [
      { key: "feature_id", head: "id", numeric: true, width: 50, cell: (row) => h("a", { href: href("feature", features.ids[row]), tabindex: -1, onclick: (event) => event.stopPropagation() }, String(features.ids[row])) },
      ...own,
      { key: "top_label", head: "best label", title: "Best label on select cells, if q ≤ 0.05 on test cells", width: 102, cell: text("top_label") },
      ...(own.length ? [] : [
        number("top_label_auroc_select", "select", (x) => auroc(x, null), { title: "AUROC of the best label on select cells, where it was chosen", said: "AUROC on select cells", width: 60, spare: 2 }),
        number("top_label_auroc", "AUROC", (x, row) => auroc(x, features.at("top_label_q", row)), { title: "AUROC of the best label on test cells", said: "AUROC on test cells", width: 72, spare: 1 }),
        number("top_label_q", "q", pvalue, { title: "Benjamini-Hochberg over all features and the labels of a kind", width: 72, spare: 3 }),
      ]),
      { key: "top_genes", head: "genes", cell: (row) => features.genes(row, 4) || "–" },
      { key: "class", head: "class", width: 112, spare: 4, cell: (row) => h("span", {}, h("span", { class: "swatch", style: { background: CLASS[features.at("class", row)] ?? "var(--null)" } }), ` ${features.at("class", row) ?? "–"}`) },
      number("density", "density", (x) => percent(x), { title: "Share of tokens at which it fires", width: 74, spare: 5 }),
    ];
  }

  async update({ params }) {
    this.params = params;
    await this.takeLabel();
    const sort = params.sort ?? (this.label === null ? "-top_label_auroc_select" : "-own_auroc_select");
    [this.sortKey, this.descending] = sort.startsWith("-") ? [sort.slice(1), true] : [sort, false];
    for (const [field, value] of [[this.colourBy, this.colour], [this.labelled, params.label ?? ""], [this.inModule, params.module ?? ""], [this.dense, params.density ?? ""]]) if (field) field.querySelector("select").value = value;
    if (document.activeElement !== this.text) this.text.value = params.q ?? "";
    this.lay();
    this.paint();
    // a colour leaves the list as it is
    const filters = ["off", "class", "label", "module", "density", "q", "lasso", "map"].map((name) => params[name] ?? "").concat(sort, this.label).join("\n");
    if (filters !== this.filtered) this.filter();
    this.filtered = filters;
    this.look();
  }

  // Draw the map that the address names, or the first that there is.
  lay() {
    const name = this.maps.includes(this.params.map) ? this.params.map : this.maps[0];
    if (this.mapped) this.mapped.querySelector("select").value = name;
    if (!this.plot || name === this.map) return;
    this.map = name;
    this.plot.points(this.features.column(MAPS[name].x).values, this.features.column(MAPS[name].y).values);
    this.said.textContent = `${MAPS[name].said} ${this.ofPanel}`.trim();
  }

  // Take the colour that the address names, with the figures of a label where it is a label.
  async takeLabel() {
    const wanted = this.params.color ?? "class", id = wanted.startsWith("auroc:") ? Number(wanted.slice(6)) : null;
    const label = id !== null && this.about.labels[id] ? id : null;
    const isKnown = label !== null || wanted === "class" || (wanted in NAMES && this.features.has(NAMES[wanted].column)) || (wanted in NUMBERS && this.features.has(wanted));
    this.colour = isKnown ? wanted : "class";
    if (label !== this.label) {
      const found = label === null ? null : await columns(`labels/${label}.cols`);
      this.features.beside("own_auroc", found?.get("auroc") ?? null);
      this.features.beside("own_q", found?.get("q") ?? null);
      this.features.beside("own_auroc_select", found?.get("auroc_select") ?? null);
      this.label = label;
      this.table.heading(this.columnsOfTable());
    }
  }

  paint() {
    const { features, colour } = this;
    if (colour === "class" || colour in NAMES) this.paintNames();
    else {
      const { text, log, format } = this.label === null ? NUMBERS[colour] : { text: `AUROC of ${this.about.labels[this.label].label} (test)`, format: (x) => fixed(x, 2) };
      const kind = this.label === null ? "sequential" : "signed";
      const { values, range } = this.label === null ? this.painted(colour, log) : { values: features.column("own_auroc").values, range: [0, 1] };
      this.plot?.colours(byNumber(values, range, kind));
      redraw(this.key, rampLegend(range, (x) => format(log ? 10 ** x : x), { kind, label: text }), this.classKey());
    }
  }

  // A column as it is painted, and from where to where its colours go; found once.
  painted(key, log) {
    if (!this.paints.has(key)) {
      const { values } = this.features.column(key), drawn = log ? Float64Array.from(values, (x) => (x > 0 ? Math.log10(x) : NaN)) : values;
      this.paints.set(key, { values: drawn, range: rangeOf(drawn) });
    }
    return this.paints.get(key);
  }

  paintNames() {
    const { features, colour } = this;
    if (colour === "class") {
      this.plot?.colours(byCategory(this.classes.values, this.classes.categories.map((name) => CLASS[name] ?? null)));
      redraw(this.key, this.classKey());
      return;
    }
    const column = features.column(NAMES[colour].column), named = frequent(column).slice(0, MOST_NAMED).map(([name]) => name);
    const colours = column.categories.map((name) => (named.includes(name) ? colourOf(named.indexOf(name)) : null));
    this.plot?.colours(byCategory(column.values, colours));
    redraw(this.key, legend(named.map((name, i) => ({ name, colour: colourOf(i) })), { label: NAMES[colour].all }), this.classKey());
  }

  // The classes and how many there are; a click leaves one out.
  classKey() {
    const off = this.off, counts = this.classes.categories.map(() => 0);
    for (const code of this.classes.values) if (code < counts.length) counts[code] += 1;
    return legend(this.classes.categories.map((name, i) => ({ name, colour: this.colour === "class" ? CLASS[name] ?? "var(--null)" : null, n: counts[i] })), {
      label: "Classes; press to leave one out", off,
      onToggle: (name) => { const next = new Set(off); next.has(name) ? next.delete(name) : next.add(name); this.ask({ off: [...next].join(","), class: null }); },
    });
  }

  // Classes left out: those named `off`, or all but `class`.
  get off() {
    if (this.params.class) return new Set(this.classes.categories.filter((name) => !this.params.class.split(",").includes(name)));
    return new Set((this.params.off ?? "").split(",").filter(Boolean));
  }

  filter() {
    const { features, params } = this, { n } = features, visible = new Uint8Array(n).fill(1);
    const off = this.off, hidden = this.classes.categories.map((name) => off.has(name));
    if (off.size) for (let i = 0; i < n; i++) if (hidden[this.classes.values[i]]) visible[i] = 0;
    for (const [key, column] of [["label", features.column("top_label")], ["module", features.column("module")]]) {
      if (!params[key] || !column) continue;
      const code = column.categories.indexOf(params[key]);
      for (let i = 0; i < n; i++) if (column.values[i] !== code) visible[i] = 0;
    }
    if (params.density) {
      const [low, high] = params.density.split("~").map(Number), { values } = features.column("density");
      for (let i = 0; i < n; i++) if (!(values[i] >= low && (values[i] < high || high >= 1))) visible[i] = 0;
    }
    if (params.q) { const found = features.matching(params.q); for (let i = 0; i < n; i++) visible[i] &= found[i]; }
    this.plot?.show(visible);
    const polygon = polygonOf(params.lasso);
    let listed = visible;
    if (this.plot) this.plot.polygon = polygon;
    if (polygon && this.plot) { listed = new Uint8Array(n); for (const row of this.plot.inside(polygon)) listed[row] = 1; }
    this.rows = features.listed(listed, features.has(this.sortKey) ? this.sortKey : "feature_id", this.descending);
    this.table.sorted = { key: this.sortKey, descending: this.descending };
    this.table.rows(this.rows);
    const isAll = this.rows.length === n;
    this.status.textContent = `${count(this.rows.length)} ${polygon ? "in the lasso" : isAll ? "features" : `of ${count(n)} features`}, ${this.ranked()}`;
    this.csvButton.textContent = `CSV of ${count(this.rows.length)}`;
    this.csvButton.disabled = !this.rows.length;
    this.clearButton.disabled = !(params.lasso || params.q || params.label || params.module || params.density || params.off || params.class);
  }

  // How the list is ordered, in words.
  ranked() {
    if (this.sortKey.endsWith("_select") && this.descending) return "best on select cells first; AUROC and q are of test cells";
    const { said, head } = this.columnsOfTable().find(({ key }) => key === this.sortKey) ?? {};
    return `by ${said ?? head ?? words(this.sortKey)}`;
  }

  look() {
    if (!this.plot) return;
    this.plot.view = viewOf(this.params.view);
    this.mark(null);
  }

  sortBy(key) {
    const isSame = key === this.sortKey, descending = isSame ? !this.descending : !["feature_id", "top_label", "top_genes", "class", "own_q", "top_label_q"].includes(key);
    this.ask({ sort: `${descending ? "-" : ""}${key}` });
  }

  // Ring the dot of a row; without one, that of the address.
  mark(row) {
    const kept = this.features.rowOf.get(Number(this.params.mark));
    this.plot?.mark([row, this.params.mark ? kept : null].filter((i) => i !== null && i !== undefined));
  }

  // What is said of the feature under the pointer.
  about_(row) {
    const { features } = this, label = features.at("top_label", row), module = features.at("module", row);
    return [
      h("strong", {}, features.name(row)),
      h("div", {}, `${features.at("class", row) ?? "unclassified"} · ${label === null ? "no label at q ≤ 0.05" : `${label} (AUROC ${fixed(features.at("top_label_auroc", row), 2)}, q ${pvalue(features.at("top_label_q", row))}, test)`}`),
      h("div", { class: "quiet" }, `fires at ${percent(features.at("density", row))} of tokens${module === null ? "" : ` · module ${module}`}`),
    ];
  }

  open(row) { go("feature", this.features.ids[row]); }

  random() {
    const alive = this.rows.filter((row) => this.features.at("dead", row) !== true), from = alive.length ? alive : this.rows;
    if (from.length) this.open(from[Math.floor(Math.random() * from.length)]);
  }

  // What is listed, in its order, with every column of the store's table.
  save() {
    const { table } = this.features, names = table.names.filter((name) => !["x", "y", "px", "py"].includes(name));
    const rows = Array.from(this.rows, (row) => names.map((name) => table.get(name).at(row)));
    download(`features_${parse().params.lasso ? "lasso_" : ""}${this.rows.length}.csv`, csv(names, rows));
  }
}

// An AUROC; what is not significant is quiet.
const auroc = (value, q) => h("span", { class: q > LEVEL || q === null ? "quiet" : null }, fixed(value, 3));

function groupsOf(labels) {
  const groups = new Map();
  labels.forEach(({ label_kind, label }, id) => groups.set(label_kind, [...(groups.get(label_kind) ?? []), { id, label }]));
  return [...groups];
}

// The names in a column, the most frequent first, and how often each is there.
function frequent(column) {
  const counts = new Map();
  for (const code of column.values) if (code < column.categories.length) counts.set(column.categories[code], (counts.get(column.categories[code]) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1] || (a[0] < b[0] ? -1 : 1));
}

// From the least to the largest, less the outermost 0.5 %.
function rangeOf(values) {
  const known = Float64Array.from(values).filter((x) => x === x).sort();
  return known.length ? [known[Math.floor(0.005 * (known.length - 1))], known[Math.ceil(0.995 * (known.length - 1))]] : [0, 1];
}
