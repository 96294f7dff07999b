// The cells: their map, coloured by a label, a gene, a feature or a number of each cell; one or two groups of them, drawn or
// chosen by a label; and what tells the groups apart. The address holds it all: color, a, b, next, view.

import { h, clear, count, csv, download, empty, fixed, fmt, isKnown, later, ofPanel, pvalue, redraw, smallTable, words } from "../dom.js";
import { QUIET, byCategory, byNumber, colourOf, cssOf, legend, rampLegend } from "../colour.js";
import { columns, json, NotThere, overview } from "../data.js";
import { Features } from "../features.js";
import { bar, classOf, featureLink, nameOf } from "../ranked.js";
import { Scatter, isInside, viewOf, viewText } from "../scatter.js";
import { href, parse, setParams } from "../state.js";

const MOST_NAMED = 11;
const REST = "rest";
const KINDS = { label: "label", measure: "number of the cells", gene: "gene", feature: "feature" };
const TITLES = { n_tokens: "tokens (genes that the model reads)" };

export const title = () => "Cells";

export async function show(root, state) {
  const about = await overview();
  if (!about.n_on_map) {
    root.append(h("h1", {}, "Cells"), empty({ table: "umap", command: about.missing.umap ?? about.missing.cells }, "The cells have no map yet."));
    return {};
  }
  const [cells, features, expression] = await Promise.all([columns("cells.cols"), about.tables.includes("features") ? Features.load() : null, json("expression.json")]);
  const page = new Cells(root, { about, cells, features, expression });
  await page.update(state);
  return { update: (next) => page.update(next), close: () => page.close() };
}

// A group as it stands in the address and in a path of the server: "l3", "p0_0_1_0_1_1", "rest"; null for anything else.
const groupOf = (text) => (/^(l\d+|p[-\d.e_]+|rest)$/.test(text ?? "") ? text : null);
const polygonIn = (group) => {
  if (!group?.startsWith("p")) return null;
  const numbers = group.slice(1).split("_").map(Number);
  return Array.from({ length: numbers.length >> 1 }, (_, i) => [numbers[2 * i], numbers[2 * i + 1]]);
};
const groupText = (polygon) => `p${polygon.flat().map((v) => Number(v.toPrecision(5))).join("_")}`;

class Cells {
  constructor(root, known) {
    Object.assign(this, known, { root, turn: 0, compared: undefined });
    const { about, cells } = this, columnsOf = about.label_columns;
    const option = (kind, name, text) => h("option", { value: `${kind}:${name}` }, text);
    this.by = h("select", { name: "color", onchange: () => this.choose() },
      h("optgroup", { label: "Label" }, columnsOf.map((name) => option("label", name, words(name)))),
      about.measures.length ? h("optgroup", { label: "Number of the cells" }, about.measures.map(({ name }) => option("measure", name, TITLES[name] ?? words(name)))) : null,
      h("optgroup", { label: "Gene or feature" }, this.expression.missing ? null : h("option", { value: "gene:" }, "gene …"), this.features ? h("option", { value: "feature:" }, "feature …") : null));
    this.named = h("input", { type: "text", name: "of", size: 14, autocomplete: "off", spellcheck: "false", list: "genes-known", onchange: () => this.typed() });
    this.namedField = h("label", { hidden: true }, h("span", {}), this.named);
    this.genes = h("datalist", { id: "genes-known" });
    this.said = h("span", { class: "quiet", role: "status" });
    this.key = h("div", { class: "cells-key", "aria-live": "polite" });
    const box = h("div", { class: "cells-map" });
    this.recipeSaid = h("span", { class: "quiet", role: "status" });
    this.groups = h("section", { class: "panel", "aria-label": "Groups" });
    this.result = h("section", { class: "panel cells-result", "aria-label": "What tells them apart", "aria-live": "polite" });
    root.append(h("h1", {}, `${count(cells.n)} cells of ${about.title}`),
      h("div", { class: "controls" }, h("label", {}, "Colour", this.by), this.namedField, this.genes, this.said),
      h("div", { class: "cells-columns" }, h("div", {}, box, this.key), this.groups), this.result);
    this.plot = new Scatter(box, {
      label: "Map of the cells", tip: (i) => this.says(i), onView: later((view) => this.ask({ view: viewText(view) }, { replace: true }), 250),
      onLasso: (polygon) => this.ask({ [this.next]: polygon ? groupText(polygon) : null }),
    });
    this.plot.points(cells.get("x").values, cells.get("y").values);
  }

  close() { this.plot.close(); }

  // careful: a delayed change may arrive after the page was left
  ask(patch, options) { if (parse().page === "cells") setParams(patch, options); }

  async update({ params }) {
    this.params = params;
    this.next = params.next === "b" ? "b" : "a";
    this.a = groupOf(params.a);
    this.b = this.a ? groupOf(params.b) ?? REST : null;
    this.plot.view = viewOf(params.view);
    await this.paint();
    this.drawGroups();
    await this.compare();
  }

  // What colours the cells: {kind, name}.
  get colour() {
    const { about, params } = this, at = (params.color ?? "").indexOf(":"), kind = (params.color ?? "").slice(0, at), name = (params.color ?? "").slice(at + 1);
    const isThere = { label: () => about.label_columns.includes(name), measure: () => about.measures.some((one) => one.name === name), gene: () => !this.expression.missing, feature: () => this.features !== null };
    if (at > 0 && isThere[kind]?.()) return { kind, name };
    return about.label_columns.length ? { kind: "label", name: about.label_columns[0] } : { kind: "measure", name: about.measures[0]?.name };
  }

  choose() { this.ask({ color: this.by.value }); if (this.by.value.endsWith(":")) this.named.focus(); }

  typed() { this.ask({ color: `${this.colour.kind}:${this.named.value.trim()}` }); }

  async paint() {
    const { colour } = this, own = ++this.turn, isNamed = colour.kind === "gene" || colour.kind === "feature";
    this.by.value = isNamed ? `${colour.kind}:` : `${colour.kind}:${colour.name}`;
    this.namedField.hidden = !isNamed;
    this.namedField.firstElementChild.textContent = colour.kind === "gene" ? "Symbol" : "Number";
    if (document.activeElement !== this.named) this.named.value = isNamed ? colour.name : "";
    if (isNamed) this.named.setAttribute("list", colour.kind === "gene" ? "genes-known" : "");
    if (colour.kind === "gene" && !this.genes.childElementCount) clear(this.genes, this.expression.genes.map((name) => h("option", { value: name })));
    this.said.textContent = "";
    if (colour.kind === "label") return this.paintLabel(colour.name);
    const values = await this.values(colour);
    if (own !== this.turn) return;
    this.paintNumber(colour, values);
  }

  // The number of each cell [n]; null where a gene or feature of that name is not known.
  async values({ kind, name }) {
    const { cells, about } = this;
    if (kind === "measure") return (await columns(`measures/${about.measures.findIndex((one) => one.name === name)}.cols`)).get("value").values;
    const place = kind === "gene" ? this.geneAt(name) : /^\d+$/.test(name) && this.features.rowOf.has(Number(name)) ? Number(name) : -1;
    if (place < 0) {
      this.said.textContent = !name ? `Type ${kind === "gene" ? "the symbol of a gene" : "the number of a feature"}.` : `No ${kind} is called “${name}” here.`;
      return null;
    }
    const found = await columns(kind === "gene" ? `expression/${place}.cols` : `codes/${place}.cols`), values = new Float32Array(cells.n);
    const at = found.get("place").values, value = found.get("value").values;
    for (let j = 0; j < found.n; j++) values[at[j]] = value[j];
    return values;
  }

  // The place of a gene, whatever its case.
  geneAt(name) {
    const { genes } = this.expression, exact = genes.indexOf(name);
    return exact >= 0 ? exact : genes.findIndex((one) => one.toLowerCase() === name.toLowerCase());
  }

  paintNumber({ kind, name }, values) {
    const { cells, plot } = this;
    this.shown = values;
    if (!values) { plot.colours(new Uint32Array(cells.n).fill(QUIET())); plot.order(null); redraw(this.key); return; }
    const isSparse = kind === "gene" || kind === "feature", known = isSparse ? Float32Array.from(values, (v) => (v === 0 ? NaN : v)) : values;
    const sorted = Float64Array.from(known).filter((v) => v === v).sort(), range = [isSparse ? 0 : sorted[0] ?? 0, sorted[Math.floor(0.995 * (sorted.length - 1))] ?? 1];
    plot.colours(byNumber(known, range));
    plot.order(Uint32Array.from(values, (_, i) => i).sort((i, j) => (values[i] === values[i] ? values[i] : -1) - (values[j] === values[j] ? values[j] : -1)));
    const text = kind === "gene" ? `${name}, log1p of counts per 10,000` : kind === "feature" ? `code of feature ${this.features.name(this.features.rowOf.get(Number(name)))}` : TITLES[name] ?? words(name);
    const without = isSparse ? "zero" : "unknown", missing = cells.n - sorted.length;
    redraw(this.key, rampLegend(range, (x) => fmt(x), { label: text }), missing ? legend([{ name: without, colour: cssOf(QUIET()), n: missing }], { label: "Without a value" }) : null,
      kind === "feature" ? h("p", {}, h("a", { href: href("feature", Number(name)) }, `The page of feature ${Number(name)}`)) : kind === "gene" ? h("p", {}, h("a", { href: href("search", null, { q: name, pick: "gene" }) }, `Features of ${name}`)) : null);
  }

  paintLabel(name) {
    const { cells, plot } = this, column = cells.get(name), n = column.categories.map(() => 0);
    this.shown = null;
    for (const code of column.values) if (code < n.length) n[code] += 1;
    const named = n.map((_, code) => code).sort((a, b) => n[b] - n[a]).slice(0, MOST_NAMED).filter((code) => n[code]).sort((a, b) => a - b);
    const colours = n.map((_, code) => (named.includes(code) ? colourOf(named.indexOf(code)) : null)), rest = n.filter(Boolean).length - named.length, unknown = cells.n - n.reduce((sum, size) => sum + size, 0);
    plot.colours(byCategory(column.values, colours));
    plot.order(null);
    const entry = (code) => {
      const id = this.labelId(name, column.categories[code]), inside = [h("span", { class: "swatch", style: { background: colours[code] } }), h("span", {}, column.categories[code]), h("span", { class: "quiet" }, count(n[code]))];
      return h("li", {}, id < 0 ? h("span", { class: "legend-entry" }, inside) : h("button", { type: "button", class: "legend-entry", title: `Take these cells as group ${this.next.toUpperCase()}`, onclick: () => this.ask({ [this.next]: `l${id}` }) }, inside));
    };
    redraw(this.key, h("ul", { class: "legend", "aria-label": words(name) }, named.map(entry)), rest > 0 || unknown ? legend([...(rest > 0 ? [{ name: `${rest} more`, colour: cssOf(QUIET()) }] : []), ...(unknown ? [{ name: "unknown", colour: cssOf(QUIET()), n: unknown }] : [])], { label: "Others" }) : null);
  }

  labelId(kind, label) { return this.about.labels.findIndex((one) => one.label_kind === kind && one.label === label); }

  async says(i) {
    const { cells, about, colour } = this, labels = about.label_columns.map((column) => cells.get(column)?.at(i)).filter(isKnown);
    this.names ??= (await columns("cell_names.cols")).get("cell_id");
    const value = this.shown && isKnown(this.shown[i]) ? `${words(colour.name)}: ${fmt(this.shown[i])}` : null;
    return [h("b", {}, this.names.at(i) ?? `cell ${cells.get("cell_idx").at(i)}`), [...new Set(labels), `${cells.get("split")?.at(i) ?? ""} cell`, value].filter(Boolean).map((text) => h("div", {}, text))];
  }

  // Which cells of the map are in a group [n]; null where there is no such group.
  inside(group) {
    const { cells, about } = this;
    if (!group || group === REST) return null;
    const polygon = polygonIn(group);
    if (polygon) { const { xs, ys } = this.plot; return Uint8Array.from(xs, (x, i) => (isInside(x, ys[i], polygon) ? 1 : 0)); }
    const of = about.labels[Number(group.slice(1))], column = of && cells.get(of.label_kind), code = column ? column.categories.indexOf(of.label) : -1;
    return code < 0 ? null : Uint8Array.from(column.values, (one) => (one === code ? 1 : 0));
  }

  nameOf(group) {
    if (group === REST) return "all other cells";
    const of = group.startsWith("l") ? this.about.labels[Number(group.slice(1))] : null;
    return of ? `${of.label} (${words(of.label_kind)})` : "the cells in the lasso";
  }

  drawGroups() {
    const { a, b, plot, cells } = this, inA = this.inside(a), inB = b === REST && inA ? Uint8Array.from(inA, (flag) => 1 - flag) : this.inside(b);
    plot.polygon = polygonIn(a);
    plot.second = polygonIn(b);
    const lines = [["a", a, inA], ["b", b, inB]].map(([key, group, flags]) => h("div", { class: `cells-group ${key}` },
      h("label", {}, h("input", { type: "radio", name: "next", value: key, checked: this.next === key, onchange: () => this.ask({ next: key === "b" ? "b" : null }, { replace: true }) }), h("strong", {}, `Group ${key.toUpperCase()}`)),
      h("span", {}, group ? `${this.nameOf(group)}: ${count(sum(flags))} of ${count(cells.n)} cells${splitWords(cells, flags)}` : key === "a" ? "no cells yet" : "all other cells"),
      group && group !== REST ? h("button", { type: "button", onclick: () => this.ask({ [key]: null }) }, `Clear ${key.toUpperCase()}`) : null));
    redraw(this.groups, h("h2", {}, "Groups of cells"),
      h("p", { class: "quiet" }, "Draw a lasso on the map (its tool, or hold Shift), or press a name in the legend. What you draw next becomes the group that is marked here. Without a group B, group A is compared with all other cells."),
      lines, a ? h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => this.save(inA, inB) }, "CSV of the groups"), " ", h("button", { type: "button", onclick: () => this.saveIds(inA) }, "Ids of A"), " ", h("span", { class: "quiet" }, "one cell_id a line, as AnnData's obs_names: adata[ids]")) : null,
      a ? h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => this.saveRecipe("recipe") }, "Recipe of the groups"), " ", h("button", { type: "button", onclick: () => this.saveRecipe("table") }, "Its table"), " ", this.recipeSaid) : null);
  }

  // A recipe that makes the groups a label of the cells, tests it and steers with it, and the table that it joins.
  async saveRecipe(part) {
    const names = { recipe: "selection-recipe.yaml", table: "selection.csv" };
    let found;
    try {
      found = await json(`selection_recipes/${this.a}/${this.b}.json`);
    } catch (error) {
      if (!(error instanceof NotThere)) throw error;
      found = { why_not: "An exported atlas makes no recipes of groups; a served one does." };
    }
    if (found[part]) download(names[part], found[part], part === "table" ? "text/csv;charset=utf-8" : "application/yaml");
    clear(this.recipeSaid, ...(found[part] ? ["Put ", h("code", {}, names.recipe), " and ", h("code", {}, names.table), " into one folder, and run there ", h("code", {}, `scsae run ${names.recipe} --store ${this.about.store}`), ". It encodes the cells again with the group as a label, tests every feature for it, and steers with those of A."] : [found.why_not ?? "The cells have no map yet."]));
  }

  async save(inA, inB) {
    const { cells, about } = this, names = (await columns("cell_names.cols")).get("cell_id"), shown = about.label_columns, rows = [];
    for (let i = 0; i < cells.n; i++) if (inA?.[i] || (this.b !== REST && inB?.[i])) rows.push([inA[i] ? "A" : "B", names.at(i), cells.get("cell_idx").at(i), cells.get("split").at(i), ...shown.map((name) => cells.get(name).at(i)), ...(this.shown ? [this.shown[i]] : [])]);
    download(`cells_${rows.length}.csv`, csv(["group", "cell_id", "cell_idx", "split", ...shown, ...(this.shown ? [`${this.colour.kind} ${this.colour.name}`] : [])], rows));
  }

  async saveIds(inA) {
    const names = (await columns("cell_names.cols")).get("cell_id"), ids = [];
    inA?.forEach((flag, i) => { if (flag) ids.push(names.at(i)); });
    download(`cells_${ids.length}.txt`, `${ids.join("\n")}\n`, "text/plain;charset=utf-8");
  }

  // Ask the server what tells the groups apart.
  async compare() {
    const { a, b, result } = this, key = a ? `selections/${a}/${b}.json` : null;
    if (key === this.compared) return;
    this.compared = key;
    if (!a) { clear(result, h("h2", {}, "What tells them apart"), h("p", { class: "quiet" }, "Choose a group of cells, and the features and genes that distinguish it are listed here.")); return; }
    clear(result, h("h2", {}, "What tells them apart"), h("p", { class: "quiet" }, "Comparing …"));
    let found;
    try {
      found = await json(key);
    } catch (error) {
      if (!(error instanceof NotThere)) throw error;
      found = null;
    }
    if (this.compared !== key) return;
    clear(result, h("h2", {}, "What tells them apart"), found ? this.told(found) : h("div", { class: "empty", role: "note" }, h("p", {}, "This group cannot be compared here. An exported atlas holds no comparison of cells; a served one does:"), h("pre", {}, h("code", {}, `scsae serve --store ${this.about.store}`))));
  }

  told(found) {
    if (found.missing) return empty(found.missing);
    const { n, least, unit } = found, counted = (split) => `${count(n[split].a)} and ${count(n[split].b)} ${split} cells`;
    if (found.too_few) return h("p", {}, `The groups have ${counted("select")} and ${counted("test")}. A comparison needs ${least} cells of each group in both splits: features are ranked on select cells, and figures are of test cells.`);
    const sampled = found.n_compared < found.n_all ? ` ${count(found.n_compared)} of ${count(found.n_all)} select and test cells were drawn for this comparison.` : "";
    const units = unit === "donor" ? "Cells are permuted within donors, or whole donors where a group is made of them" : unit === "batch" ? "No donor is known, so cells are permuted within batches, or whole batches where a group is made of them" : "Neither donors nor batches are known, so cells count as independent, and q is too small where they are not";
    return [
      h("p", {}, `A (${this.nameOf(this.a)}) against B (${this.nameOf(this.b)}): ${counted("select")}, ${counted("test")}${ofPanel(this.about)}.${found.n_both ? ` ${count(found.n_both)} cells are in both, and count as A.` : ""}${sampled}`),
      polygonIn(this.a) || polygonIn(this.b) ? h("p", { class: "cells-warning" }, "A lasso is a choice made after looking. The map is made of the same codes, so cells that lie apart on it differ in some features by construction: q says how well the difference repeats on test cells, and not that the group is more than a part of the map.") : null,
      h("div", { class: "cells-told" }, this.side(found, "features", "a"), this.side(found, "features", "b"), ...(found.genes ? [this.side(found, "genes", "a"), this.side(found, "genes", "b")] : [])),
      h("p", { class: "quiet" }, `${units}. Ranked on select cells, with figures of test cells; q is Benjamini-Hochberg over all ${count(found.features.n_tested)} features${found.genes ? `, and over all ${count(found.genes.n_tested)} genes` : ""}. Only what has q ≤ ${found.alpha} is listed.`),
    ];
  }

  side(found, what, key) {
    const { n, rows } = found[what][key], isFeature = what === "features", head = h("h3", {}, `${isFeature ? "Features" : "Genes"} that are ${isFeature ? "stronger" : "higher"} in ${key.toUpperCase()} `, h("span", { class: "quiet" }, count(n)));
    if (!rows.length) return h("div", {}, head, h("p", { class: "quiet" }, "None is significant."));
    const heads = [...(isFeature ? [{ text: "id", class: "number" }, "genes, best label", { text: "class", class: "wide" }] : ["gene"]), { text: "AUROC", class: "number", title: "Of A against B, on test cells" }, { text: "0 to 1", class: "bar-head", title: "Bar: test cells; line: select cells" }, { text: "q", class: "number" }, { text: "agree", class: "number wide", title: "Donors (or batches) whose difference has the same sign" }];
    const cells = rows.map((row) => [
      ...(isFeature ? [{ text: featureLink(row.feature_id), class: "number" }, { text: nameOf(row.feature_id, this.features), class: "found-name" }, { text: classOf(row.feature_id, this.features), class: "wide nowrap" }] : [h("a", { href: href("search", null, { q: row.gene, pick: "gene" }) }, h("i", {}, row.gene))]),
      { text: fixed(row.auroc, 3), class: "number" }, bar(row.auroc, { range: [0, 1], zero: 0.5, mark: row.auroc_select, isSure: true }), { text: pvalue(row.q), class: "number" },
      { text: isKnown(row.n_agree) && isKnown(row.n_donors) ? `${row.n_agree} of ${row.n_donors}` : "–", class: "number wide" },
    ]);
    return h("div", {}, head, smallTable(heads, cells), h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => download(`${what}-${key}.csv`, csv(Object.keys(rows[0]), rows.map(Object.values))) }, "CSV"), n > rows.length ? h("span", { class: "quiet" }, ` the best ${count(rows.length)} of ${count(n)}`) : null));
  }
}

const sum = (flags) => (flags ? flags.reduce((total, flag) => total + flag, 0) : 0);

// How many of a group's cells are of each split, in words.
function splitWords(cells, flags) {
  const split = cells.get("split");
  if (!split || !flags) return "";
  const n = split.categories.map(() => 0);
  split.values.forEach((code, i) => { if (flags[i] && code < n.length) n[code] += 1; });
  return ` (${split.categories.map((name, i) => `${count(n[i])} ${name}`).join(", ")})`;
}
