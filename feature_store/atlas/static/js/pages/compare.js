// Features side by side, with notes. The address holds the list and its notes; a browser remembers its own list; a file
// takes both to another browser.

import { h, clear, count, csv, download, empty, fixed, isKnown, later, percent, pvalue, words, DASH } from "../dom.js";
import { byNumber, CLASS, rampLegend } from "../colour.js";
import { violins } from "../charts_feature.js";
import { columns, json, overview } from "../data.js";
import { Kept, entriesOf, paramsOf } from "../kept.js";
import { Scatter } from "../scatter.js";
import { href, labelHref, parse, setParams } from "../state.js";

const MOST_SHOWN = 8, ALPHA = 0.05;
const KIND = "features kept in scsae";

export const title = () => "Compare";

export async function show(root, state) {
  const about = await overview();
  if (!about.tables.includes("features")) {
    root.append(h("h1", {}, "Compare"), empty({ table: "features", command: about.missing.features }, "There are no features to compare yet."));
    return {};
  }
  const page = new Compare(root, about);
  await page.update(state);
  return { update: (next) => page.update(next), close: () => page.close() };
}

class Compare {
  constructor(root, about) {
    Object.assign(this, { about, kept: new Kept(about), plots: [], turn: 0, shown: null });
    this.add = h("input", { type: "text", inputmode: "numeric", name: "add", size: 8, placeholder: "number", "aria-label": "Number of a feature to add" });
    this.said = h("span", { class: "quiet", role: "status", "aria-live": "polite" });
    this.foreign = h("div", { class: "empty compare-foreign", role: "note", hidden: true });
    this.file = h("input", { type: "file", accept: ".json,application/json", hidden: true, "aria-label": "File of kept features", onchange: () => this.read() });
    this.by = h("select", { name: "by", onchange: (event) => setParams({ by: event.target.value }, { replace: true }) }, about.label_columns.map((name) => h("option", { value: name }, words(name))));
    const button = (text, act) => h("button", { type: "button", onclick: act }, text);
    this.body = h("div", { class: "compare-body" });
    root.append(h("h1", {}, "Compare and keep"),
      h("form", { class: "controls", onsubmit: (event) => { event.preventDefault(); this.take(); } }, h("label", {}, "Add a feature", this.add), h("button", { type: "submit" }, "Add"), about.label_columns.length ? h("label", {}, "Code by", this.by) : null,
        button("Save to a file", () => this.save()), button("Load a file", () => this.file.click()), this.file, button("CSV", () => this.csv()), button("Empty the list", () => this.change([])), this.said),
      this.foreign, this.body);
  }

  close() {
    this.turn++;
    for (const plot of this.plots) plot.close();
  }

  get entries() { return this.list; }

  async update({ params }) {
    const own = this.kept.list, isNamed = params.f !== undefined, known = (entry) => entry.id < this.about.n_features;
    this.list = (isNamed ? entriesOf(params) : own).filter(known);
    // what somebody sent is shown, and kept only when asked for
    this.isForeign = isNamed && !isSame(this.list, own) && own.length > 0 && !this.isMine;
    this.foreign.hidden = !this.isForeign;
    if (this.isForeign) clear(this.foreign, h("p", {}, `This address names ${count(this.list.length)} features; you keep ${count(own.length)} others. `, h("button", { type: "button", onclick: () => { this.isMine = true; this.kept.list = this.list; this.update(parse()); } }, "Keep these instead"), " ", h("button", { type: "button", onclick: () => this.change(own) }, "Show mine")));
    else if (isNamed && !isSame(this.list, own)) this.kept.list = this.list;
    const by = this.about.label_columns.includes(params.by) ? params.by : this.about.label_columns[0];
    if (by) this.by.value = by;
    const key = JSON.stringify([this.list.map(({ id }) => id), by]);
    if (key !== this.shown) { this.shown = key; await this.draw(by); }
  }

  // Another list, in the address, and in memory unless it is somebody else's.
  change(entries) {
    const wasForeign = this.isForeign;
    const { params } = parse(), rest = Object.fromEntries(Object.keys(params).filter((name) => /^n\d+$/.test(name)).map((name) => [name, null]));
    if (!wasForeign || isSame(entries, this.kept.list)) this.kept.list = entries;
    setParams({ ...rest, ...paramsOf(entries) }, { replace: true });
    this.update(parse());
  }

  take() {
    const id = Number(this.add.value.trim()), isNumber = /^\d+$/.test(this.add.value.trim());
    if (!isNumber || id >= this.about.n_features) this.said.textContent = `Features are numbered 0 to ${this.about.n_features - 1}.`;
    else if (this.list.some((entry) => entry.id === id)) this.said.textContent = `Feature ${id} is in the list.`;
    else { this.said.textContent = ""; this.add.value = ""; this.change([...this.list, { id, note: "" }]); }
  }

  async draw(by) {
    const own = ++this.turn, shown = this.list.slice(0, MOST_SHOWN);
    for (const plot of this.plots) plot.close();
    this.plots = [];
    if (!this.list.length) return clear(this.body, h("p", { class: "quiet" }, "No feature is kept yet. Press Keep on the page of a feature, or add one by its number."));
    const found = await Promise.all(shown.map(({ id }) => json(`features/${id}.json`)));
    const hasMap = this.about.n_on_map > 0 && this.about.tables.includes("codes");
    const [cells, ...codes] = hasMap ? await Promise.all([columns("cells.cols"), ...shown.map(({ id }) => columns(`codes/${id}.cols`))]) : [null];
    if (own !== this.turn) return null;
    this.found = found;
    const values = codes.map((column) => valuesOf(column, cells.n)), maps = shown.map(() => h("div", { class: "compare-map" })), keys = shown.map(() => h("div", {}));
    const row = (name, cell, title = null) => h("tr", {}, h("th", { scope: "row", title }, name), shown.map((entry, i) => h("td", {}, cell(found[i], i, entry))));
    const table = h("table", { class: "compare" }, h("caption", { class: "quiet" }, this.list.length > shown.length ? `The first ${shown.length} of ${count(this.list.length)}; remove some to see the others.` : `${count(shown.length)} side by side`),
      h("thead", {}, h("tr", {}, h("td", {}), shown.map((entry, i) => h("th", { scope: "col" }, this.head(entry, i))))),
      h("tbody", {},
        row("Note", (_, i, entry) => this.note(entry)),
        row("In words", ({ summary }) => [h("p", {}, summary.text), h("p", { class: "quiet", title: summary.means }, summary.grade)]),
        row("Class", ({ about }) => [h("span", { class: "swatch", style: { background: CLASS[about.class] ?? "var(--null)" } }), ` ${about.class ?? DASH}`, isKnown(about.class_confidence) ? h("span", { class: "quiet" }, ` (confidence ${fixed(about.class_confidence, 2)})`) : null]),
        row("Fires on", ({ about, cells: of }) => `${percent(about.density, 2)} of tokens${of.splits ? `, ${count(of.splits.test.n_firing)} of ${count(of.splits.test.n)} test cells` : ""}`),
        row("Best label", (one) => labelOf(one), "Chosen on select cells; AUROC and q of test cells"),
        row("Genes by expression", ({ genes }) => genesOf(genes.expression, "pearson", (x) => fixed(x, 2)), "Correlation with expression, test cells; grey: q > 0.05"),
        row("Genes by identity", ({ genes }) => genesOf(genes.identity, "identity_precision", (x) => percent(x, 0)), "Share of its firing, test cells"),
        row("Gene sets", ({ gene_sets: sets }) => setsOf(sets)),
        row("Other SAEs", ({ matches }) => matchesOf(matches), "Nearest features in other SAEs: mutual and p ≤ 0.05"),
        shown.length > 1 && cells ? row("r with the others", (_, i) => alikeOf(values, shown, i), "Pearson correlation of the codes over all cells on the map") : null,
        cells ? row("Where it fires", (_, i) => [maps[i], keys[i]]) : null,
        by ? row(`Code by ${words(by)}`, (one, i, entry) => spreadOf(one, by, entry.id), "Test cells in which it fires") : null));
    clear(this.body, h("div", { class: "scroll-x", tabindex: 0, role: "region", "aria-label": "Features side by side" }, table));
    if (cells) this.plots = maps.map((box, i) => this.map(box, keys[i], cells, values[i], shown[i].id));
    return null;
  }

  head({ id }, i) {
    const n = Math.min(this.list.length, MOST_SHOWN), move = (by) => { const next = [...this.list]; [next[i], next[i + by]] = [next[i + by], next[i]]; this.change(next); };
    const act = (text, name, f, isOff = false) => h("button", { type: "button", class: "tool", "aria-label": name, title: name, disabled: isOff, onclick: f }, text);
    return h("div", { class: "compare-head" }, h("a", { href: href("feature", id) }, `Feature ${id}`), h("span", {}, act("‹", `Move feature ${id} to the left`, () => move(-1), i === 0), act("›", `Move feature ${id} to the right`, () => move(1), i === n - 1), act("×", `Remove feature ${id}`, () => this.change(this.list.filter((entry) => entry.id !== id)))));
  }

  note(entry) {
    const keep = later((text) => this.change(this.list.map((one) => (one.id === entry.id ? { ...one, note: text } : one))), 300);
    return h("textarea", { rows: 2, "aria-label": `Note on feature ${entry.id}`, placeholder: "a note", value: entry.note, oninput: (event) => keep(event.target.value) });
  }

  map(box, key, cells, values, id) {
    const plot = new Scatter(box, { label: `Map of the cells, coloured by feature ${id}` }), known = Float32Array.from(values, (v) => (v === 0 ? NaN : v)), top = values.reduce((most, v) => Math.max(most, v), 0);
    plot.points(cells.get("x").values, cells.get("y").values);
    plot.colours(byNumber(known, [0, top]));
    plot.order(Uint32Array.from(values, (_, i) => i).sort((a, b) => values[a] - values[b]));
    clear(key, rampLegend([0, top], (x) => fixed(x, 2), { label: "code" }));
    return plot;
  }

  save() {
    const { about } = this, text = JSON.stringify({ kind: KIND, dataset: about.title, sae: about.runs.sae, features: this.list }, null, 2);
    download("features-kept.json", `${text}\n`, "application/json");
  }

  async read() {
    const [file] = this.file.files, { about } = this;
    this.file.value = "";
    let found;
    try { found = JSON.parse(await file.text()); } catch { found = null; }
    if (found?.kind !== KIND || !Array.isArray(found.features)) { this.said.textContent = `${file.name} is no file of kept features; “Save to a file” writes one.`; return; }
    if (found.sae !== about.runs.sae) { this.said.textContent = `${file.name} is about the features of SAE ${found.sae}, and this atlas about those of ${about.runs.sae}: their numbers mean other features.`; return; }
    const own = new Map(this.list.map((entry) => [entry.id, entry]));
    for (const { id, note } of found.features) if (Number.isInteger(id) && id >= 0 && id < about.n_features) own.set(id, { id, note: String(note || own.get(id)?.note || "") });
    this.said.textContent = `${count(found.features.length)} features read from ${file.name}.`;
    this.change([...own.values()]);
  }

  async csv() {
    const found = await Promise.all(this.list.map(({ id }) => json(`features/${id}.json`))), names = ["class", "class_confidence", "density", "top_label", "top_label_kind", "top_label_auroc_select", "top_label_auroc", "top_genes", "top_identity_genes"];
    download("features-kept.csv", csv(["feature_id", "note", "in_words", "grade", ...names], found.map(({ about, summary }, i) => [this.list[i].id, this.list[i].note, summary.text, summary.grade, ...names.map((name) => about[name])])));
  }
}

const isSame = (a, b) => JSON.stringify(a) === JSON.stringify(b);

function valuesOf(codes, n) {
  const values = new Float32Array(n), place = codes.get("place").values, value = codes.get("value").values;
  for (let j = 0; j < codes.n; j++) values[place[j]] = value[j];
  return values;
}

function labelOf({ about, labels }) {
  if (!about.top_label) return h("span", { class: "quiet" }, "none at q ≤ 0.05");
  const row = (labels.rows ?? []).find(({ label, label_kind: kind }) => label === about.top_label && kind === about.top_label_kind);
  return [h("a", { href: labelHref(about.top_label_kind, about.top_label) }, about.top_label), ` AUROC ${fixed(about.top_label_auroc, 3)}${row ? `, q ${pvalue(row.q)}` : ""}`];
}

function genesOf(rows, key, format) {
  const shown = (rows ?? []).filter((row) => isKnown(row[key])).slice(0, 6);
  return shown.length ? shown.map((row, i) => [i ? ", " : "", h("span", { class: row.q > ALPHA && key === "pearson" ? "quiet" : null }, h("i", {}, row.gene), ` ${format(row[key])}`)]) : DASH;
}

function setsOf(sets) {
  const shown = (sets.rows ?? []).filter(({ q }) => q <= ALPHA).slice(0, 4);
  return shown.length ? h("ul", { class: "compare-list" }, shown.map((row) => h("li", {}, `${words(row.gene_set)} (q ${pvalue(row.q)})`))) : h("span", { class: "quiet" }, sets.missing ? DASH : "none at q ≤ 0.05");
}

function matchesOf(matches) {
  if (matches.missing) return h("span", { class: "quiet" }, "not matched");
  const found = matches.rows.filter(({ mutual, p }) => mutual && p <= ALPHA);
  return `${count(found.length)} of ${count(matches.rows.length)}`;
}

function alikeOf(values, shown, i) {
  return h("ul", { class: "compare-list" }, shown.map(({ id }, j) => (j === i ? null : h("li", {}, `${id}: ${fixed(correlation(values[i], values[j]), 2)}`))).filter(Boolean));
}

function correlation(a, b) {
  const n = a.length, mean = (v) => v.reduce((sum, x) => sum + x, 0) / n, ma = mean(a), mb = mean(b);
  let ab = 0, aa = 0, bb = 0;
  for (let i = 0; i < n; i++) { ab += (a[i] - ma) * (b[i] - mb); aa += (a[i] - ma) ** 2; bb += (b[i] - mb) ** 2; }
  return aa && bb ? ab / Math.sqrt(aa * bb) : null;
}

function spreadOf({ cells }, by, id) {
  const found = cells.violins?.test?.[by];
  if (!found?.groups.length) return DASH;
  const top = Math.max(0, ...found.groups.map(({ high }) => high ?? 0));
  return violins(found.groups, { top, label: `Code of feature ${id} by ${words(by)}, test cells`, title: "cell code where it fires" });
}
