// One feature: the cells and tokens on which it fires, its labels, genes and gene sets, similar features, and steering runs
// that used it. What is listed is chosen on `select` cells; figures are of `test` cells.

import { h, svg, clear, empty, smallTable, count, fixed, fmt, isKnown, later, ofPanel, percent, pvalue, words, DASH } from "../dom.js";
import { CLASS, QUIET, byCategory, byNumber, colourOf, cssOf, legend, packed, rampLegend } from "../colour.js";
import { fitted } from "../axis.js";
import { ALPHA, edgeGraph, forest, geneBars, violins } from "../charts_feature.js";
import { histogram } from "../charts_run.js";
import { columns, json, NotThere, overview } from "../data.js";
import { Kept } from "../kept.js";
import { geneLinks } from "../links_out.js";
import { Scatter, viewOf, viewText } from "../scatter.js";
import { go, href, labelHref, parse, setParams } from "../state.js";

const MEANS = {
  "gene-identity": () => "it responds to one gene or a family of genes, in whatever cell they are expressed",
  "cell-context": ({ context_kind }) => `the cells in which it fires differ by ${words(context_kind ?? "label")}, within batches`,
  batch: () => "the cells in which it fires differ by batch, within cell types; the cause is most likely technical",
  mixed: () => "neither its genes, nor a label of the cells, nor the batch explains it alone",
  dead: () => "it never fires",
};
const FIFTHS = ["strongest", "second", "middle", "fourth", "weakest"];
const MOST_NAMED = 11, FEW_LABELS = 20, FEW_ROWS = 8;

export const title = ({ id }) => `Feature ${id}`;

export async function show(root, { id, params }) {
  const about = await overview();
  if (!about.tables.includes("features")) {
    root.append(h("h1", {}, `Feature ${id}`), empty({ table: "features", command: about.missing.features }));
    return {};
  }
  if (!/^\d+$/.test(id ?? "") || Number(id) >= about.n_features) throw new NotThere(`There is no feature “${id ?? ""}”; they are 0 to ${about.n_features - 1}.`);
  if (about.n_on_map) for (const path of ["cells.cols", `codes/${id}.cols`]) columns(path); // asked for now, read later
  const known = await json(`features/${id}.json`);
  const page = new FeaturePage(root, about, known, params);
  await page.update({ params });
  return { update: (state) => page.update(state), close: () => page.plot?.close() };
}

class FeaturePage {
  constructor(root, about, known, params) {
    Object.assign(this, { root, about, known, params, panel: ofPanel(about), id: known.about.feature_id, cells: null, drawn: {} });
    this.kept = keptOf(params);
    this.pins = new Kept(about);
    this.map = panel("Where it fires");
    this.spread = panel("Its code by label");
    root.append(this.head(), h("div", { class: "feature-columns" },
      h("div", {}, this.map, this.labels(), this.top()),
      h("div", {}, this.spread, this.strength(), this.genes(), this.sets())),
    h("div", { class: "feature-rest" }, this.inOrder(), this.effects(), this.inputs(), this.edges(), this.alike(), this.together(), this.elsewhere(), this.steering(), this.provenance()));
  }

  head() {
    const { about } = this.known, { id } = this, last = this.about.n_features - 1;
    this.steps = h("nav", { class: "feature-steps", "aria-label": "Other features" });
    const confident = isKnown(about.class_confidence) ? [" ", h("span", { class: "quiet", title: "Share of resampled data sets in which it gets the same class" }, `(confidence ${fixed(about.class_confidence, 2)})`)] : null;
    const explained = [["gene_effect", "of its firing on tokens by their gene"], ["context_effect", `of its code in cells by ${words(about.context_kind ?? "a label")} (within batches)`], ["batch_effect", "by batch (within cell types)"]].filter(([key]) => isKnown(about[key])).map(([key, text]) => `${percent(about[key], 0).replace(" ", "\u00a0")} ${text}`);
    const fires = this.known.cells.splits;
    this.last = last;
    this.drawSteps();
    return h("div", { class: "feature-head" },
      h("div", {},
        h("h1", {}, `Feature ${id}${nameOf(about) ? `: ${nameOf(about)}` : ""}`),
        this.inWords(),
        h("p", {}, h("span", { class: "feature-class" }, h("span", { class: "swatch", style: { background: CLASS[about.class] ?? "var(--null)" } }), about.class ?? "no class"), confident, MEANS[about.class] ? `: ${MEANS[about.class](about)}.` : null),
        h("ul", { class: "facts" },
          h("li", {}, "fires on ", h("b", {}, percent(about.density, 2)), ` of ${this.panel ? "the panel's " : ""}tokens`),
          fires ? h("li", {}, "in ", h("b", {}, `${count(fires.test.n_firing)} of ${count(fires.test.n)}`), ` test cells${this.panel ? `, and in ${count(fires.all.n_firing)} of all ${count(fires.all.n)} cells with tokens` : ""}`) : null,
          isKnown(about.gene_precision) ? h("li", {}, h("b", {}, percent(about.gene_precision, 0)), " of its firing is on one gene") : null,
          about.dead ? null : h("li", {}, ...(about.top_label ? ["best label on select cells ", h("a", { href: labelHref(about.top_label_kind, about.top_label) }, about.top_label), ` (AUROC ${fixed(about.top_label_auroc, 2)} on test cells)`] : ["no label at q ≤ 0.05 on test cells"]))),
        explained.length ? h("p", { class: "quiet" }, `Variance explained: ${explained.join(", ")}.`) : null,
        this.panel ? h("p", { class: "quiet of-panel" }, `Figures are of cells${this.panel}; the cells and tokens on which it fires most, and the number of cells in which it fires, are of all cells.`) : null,
        about.dead ? h("p", { class: "empty", role: "note" }, "This feature is dead: it fires on no token of this data set, so there is nothing to show.") : null),
      this.steps);
  }

  // What it is in sentences, how sure that is, and the figures behind it.
  inWords() {
    const { text, grade, means, checks } = this.known.summary, signs = { true: "✓", false: "✗", null: "?" }, said = { true: "supports it", false: "does not support it", null: "could not be asked" };
    return h("section", { class: "panel in-words", "aria-label": "In words" }, h("p", { class: "in-words-text" }, text),
      h("p", {}, h("strong", { class: `grade ${grade.replace(" ", "-")}` }, grade), h("span", { class: "quiet" }, `: ${means}.`)),
      checks.length ? h("ul", { class: "checks" }, checks.map(({ text: figure, holds }) => h("li", { class: holds === null ? "quiet" : null }, h("span", { class: "sign", title: said[holds], "aria-label": said[holds], role: "img" }, signs[holds]), ` ${figure}`))) : null);
  }

  drawSteps() {
    const { id, last } = this;
    const step = (to, text) => (to < 0 || to > last ? h("a", { "aria-disabled": "true" }, text) : this.link(to, text));
    clear(this.steps, step(id - 1, "‹ Previous"), step(id + 1, "Next ›"), h("button", { type: "button", onclick: () => this.random() }, "Random"), this.pinButton(), h("a", { href: href("atlas", null, { mark: id }) }, "Show on the Atlas"));
  }

  // Keep it for Compare, or let it go.
  pinButton() {
    const isKept = this.pins.has(this.id);
    return h("button", { type: "button", name: "keep", "aria-pressed": String(isKept), title: "The page Compare shows what is kept side by side", onclick: () => { this.pins.toggle(this.id); this.drawSteps(); this.steps.querySelector("[name=keep]").focus(); } }, isKept ? "Kept" : "Keep");
  }

  // A link to another feature, seen as this one is.
  link(id, text = String(id)) { return h("a", { href: href("feature", id, this.kept), "data-feature": id }, text); }

  async random() {
    const table = await columns("features.cols"), dead = table.get("dead")?.values, ids = table.get("feature_id").values;
    const living = Array.from(ids).filter((id, row) => id !== this.id && dead?.[row] !== 1);
    if (living.length) go("feature", living[Math.floor(Math.random() * living.length)], this.kept);
  }

  async update({ params }) {
    const focused = document.activeElement, { name } = focused, box = name ? focused.closest("section") : null;
    this.params = params;
    this.kept = keptOf(params);
    this.split = params.split === "all" ? "all" : "test";
    for (const link of this.root.querySelectorAll("a[data-feature]")) link.setAttribute("href", href("feature", link.dataset.feature, this.kept));
    if (this.isNew("spread", [params.by, this.split])) this.drawSpread();
    if (this.isNew("strength", [this.split])) this.drawStrength();
    if (this.isNew("labels", [params.labels])) this.drawLabels();
    await this.drawMap();
    // the control that had the focus was drawn again: give the focus back
    if (box && document.activeElement === document.body) box.querySelector(`[name="${name}"]`)?.focus();
  }

  // Whether a panel was last drawn of other choices.
  isNew(panelName, choices) {
    const key = JSON.stringify(choices), was = this.drawn[panelName];
    this.drawn[panelName] = key;
    return key !== was;
  }

  // The choices of a panel, as selects that write into the address.
  choice(key, text, options, value) {
    return h("label", {}, text, h("select", { name: key, onchange: (event) => setParams({ [key]: event.target.value }) }, options.map(([of, name]) => h("option", { value: of, selected: of === value }, name))));
  }

  splitChoice(value) { return this.choice("split", "Cells", [["", "test cells"], ["all", "all cells"]], value === "all" ? "all" : ""); }

  async drawMap() {
    const { known, about } = this;
    if (known.cells.missing) return fill(this.map, empty(known.cells.missing));
    if (about.missing.umap || !about.n_on_map) return fill(this.map, empty({ table: "umap", command: about.missing.umap }, "The cells have no map yet."));
    if (!this.cells) {
      const [cells, codes] = await Promise.all([columns("cells.cols"), columns(`codes/${this.id}.cols`)]);
      this.openMap(cells, codes);
    }
    this.look();
    const column = this.about.label_columns.includes(this.params.color) ? this.params.color : null;
    if (!this.isNew("map", [column, this.split])) return;
    const inside = this.inSplit(), { values } = this;
    clear(this.controls, this.choice("color", "Colour", [["", "cell code"], ...this.about.label_columns.map((name) => [name, words(name)])], column ?? ""), this.splitChoice(this.split));
    const ink = column ? this.inkOf(column) : this.inkOfCode(inside);
    const pale = packed(getComputedStyle(document.documentElement).getPropertyValue("--faint").trim());
    for (let i = 0; i < ink.length; i++) if (!inside[i]) ink[i] = pale;
    this.plot.colours(ink);
    // other splits below, then silent cells, then the firing ones, the strongest on top
    const rank = Float64Array.from(values, (value, i) => (inside[i] ? value : -1));
    this.plot.order(Uint32Array.from(rank, (_, i) => i).sort((a, b) => rank[a] - rank[b]));
  }

  openMap(cells, codes) {
    this.cells = cells;
    this.values = new Float32Array(cells.n);
    const place = codes.get("place").values, value = codes.get("value").values;
    for (let j = 0; j < codes.n; j++) this.values[place[j]] = value[j];
    this.controls = h("div", { class: "controls" });
    this.key = h("div", { "aria-live": "polite" });
    this.picked = h("p", { class: "picked", "aria-live": "polite" });
    const box = h("div", { class: "cell-map" });
    fill(this.map, this.controls, box, this.key, this.picked);
    this.plot = new Scatter(box, { label: `Map of the cells, coloured by feature ${this.id}`, tip: (i) => this.says(i), onPick: (i) => setParams({ cell: cells.get("cell_idx").at(i) }), onView: later((view) => this.isHere() && setParams({ view: viewText(view) }, { replace: true }), 250) });
    this.plot.points(cells.get("x").values, cells.get("y").values);
  }

  // Whether the address is still that of this feature.
  isHere() {
    const { page, id } = parse();
    return page === "feature" && id === String(this.id);
  }

  // Which cells of the map are of the chosen split [n].
  inSplit() {
    const split = this.cells.get("split");
    if (this.split === "all" || !split) return new Uint8Array(this.cells.n).fill(1);
    const test = split.categories.indexOf("test");
    return Uint8Array.from(split.values, (code) => (code === test ? 1 : 0));
  }

  inkOfCode(inside) {
    let top = 0, n = 0, fires = 0;
    this.values.forEach((value, i) => { if (inside[i]) { n += 1; fires += value !== 0; top = Math.max(top, value); } });
    const known = Float32Array.from(this.values, (value) => (value === 0 ? NaN : value));
    clear(this.key, rampLegend([0, top], (x) => fmt(x), { label: "cell code" }), legend([{ name: "silent", colour: cssOf(QUIET()) }, ...(this.split === "all" ? [] : [{ name: "other splits", colour: "var(--faint)" }])], { label: "Without a code" }),
      h("p", { class: "quiet" }, `Fires in ${count(fires)} of ${count(n)} ${this.split === "all" ? "cells" : "test cells"}${this.panel} on the map.${this.split === "all" ? " The autoencoder was trained on some of them." : ""}`));
    return byNumber(known, [0, top]);
  }

  inkOf(name) {
    const column = this.cells.get(name), inside = this.inSplit(), n = column.categories.map(() => 0);
    column.values.forEach((code, i) => { if (inside[i] && code < n.length) n[code] += 1; });
    const named = n.map((_, code) => code).sort((a, b) => n[b] - n[a]).slice(0, MOST_NAMED).filter((code) => n[code]).sort((a, b) => a - b);
    const colours = n.map((_, code) => (named.includes(code) ? colourOf(named.indexOf(code)) : null));
    const rest = n.reduce((sum, size) => sum + (size > 0), 0) - named.length;
    clear(this.key, legend([...named.map((code) => ({ name: column.categories[code], colour: colours[code], n: n[code] })), ...(rest > 0 ? [{ name: `${rest} more`, colour: cssOf(QUIET()) }] : [])], { label: words(name) }));
    return byCategory(column.values, colours);
  }

  // What the tip and the line below the map say of a cell.
  about_(i, name) {
    const labels = this.about.label_columns.map((column) => this.cells.get(column)?.at(i)).filter(isKnown);
    return [name, ...new Set(labels), `${this.cells.get("split")?.at(i) ?? ""} cell`, this.values[i] ? `code ${fmt(this.values[i])}` : "silent"];
  }

  async name(i) {
    this.names ??= (await columns("cell_names.cols")).get("cell_id");
    return this.names.at(i) ?? `cell ${this.cells.get("cell_idx").at(i)}`;
  }

  // What is said of the cell under the pointer.
  async says(i) {
    const [name, ...rest] = this.about_(i, await this.name(i));
    return [h("b", {}, name), rest.map((text) => h("div", {}, text))];
  }

  // Take the part of the map and the cell that the address names.
  look() {
    this.plot.view = viewOf(this.params.view);
    const place = this.params.cell ? this.cells.get("cell_idx").values.indexOf(Number(this.params.cell)) : -1;
    this.plot.mark(place < 0 ? [] : [place]);
    if (place >= 0) this.pick(place);
    else clear(this.picked, h("span", { class: "quiet" }, "Point at a cell to see which it is; click to keep it."));
  }

  async pick(i) {
    const name = await this.name(i), [, ...rest] = this.about_(i, name);
    clear(this.picked, h("a", { href: href("search", null, { kind: "cell", q: name }) }, name), ` · ${rest.join(" · ")}`);
  }

  drawSpread() {
    const { cells } = this.known, columnsOf = this.about.label_columns;
    if (cells.missing) return fill(this.spread, empty(cells.missing));
    const found = cells.violins[this.split], best = this.known.about.top_label_kind, both = ["cell_type", "batch"].filter((name) => found[name]?.groups.length), own = found[this.params.by] ? this.params.by : null;
    // without a choice: the labels of the best significant one
    const first = found[best]?.groups.length ? [best] : both.length ? both : columnsOf.slice(0, 1), shown = own ? [own] : first;
    if (!shown.length) return fill(this.spread, empty({ table: "cells" }, "The cell table has no column of labels; name some when you extract: scsae extract DATA --cell-type COLUMN --batch COLUMN --label COLUMN."));
    const of = `${this.split !== "all" ? "test cells" : this.panel ? "cells" : "all cells"}${this.panel ? " of the panel" : ""}`, groups = shown.flatMap((name) => found[name].groups), top = Math.max(0, ...groups.map(({ high }) => high ?? 0));
    const options = [["", `${first.map(words).join(" and ")}${first[0] === best ? " (best label)" : ""}`], ...columnsOf.map((name) => [name, words(name)])];
    fill(this.spread, h("div", { class: "controls" }, this.choice("by", "By", options, own ?? ""), this.splitChoice(this.split)),
      shown.map((name) => {
        const { groups: mine, n_unknown, n_left_out } = found[name];
        return [h("h3", {}, `By ${words(name)}`), mine.length ? violins(mine, { top, label: `Code of feature ${this.id} by ${words(name)}, ${of}`, title: `cell code where it fires, ${of}` }) : h("p", { class: "quiet" }, `No ${of.replace("cells", "cell")} has a ${words(name)}.`),
          n_unknown || n_left_out ? h("p", { class: "quiet" }, [n_left_out ? `${n_left_out} labels of lower mean are left out. ` : "", n_unknown ? `${count(n_unknown)} cells have no ${words(name)}.` : ""]) : null];
      }),
      h("p", { class: "quiet" }, "A violin shows the cells in which the feature fires (dots for 20 cells or fewer), with the median as a line and the quartiles as a bar. The label with the highest mean over all its cells comes first.", this.panel ? ` The cells are those${this.panel}.` : ""));
  }

  labels() {
    this.scores = panel("Labels it separates");
    return this.scores;
  }

  drawLabels() {
    const { labels } = this.known;
    if (labels.missing) return fill(this.scores, empty(labels.missing));
    if (!labels.rows.length) return fill(this.scores, empty({}, this.known.about.dead ? "A dead feature separates no label." : "No label was tested on test cells."));
    const isAll = this.params.labels === "all", rows = isAll ? labels.rows : labels.rows.slice(0, FEW_LABELS), hasBand = rows.some((row) => row.null), hasDonors = rows.some((row) => row.low !== null);
    const link = (row) => labelHref(row.label_kind, row.label), n = rows.filter((row) => row.q !== null && row.q <= ALPHA).length;
    const more = labels.rows.length > FEW_LABELS ? h("button", { type: "button", name: "labels", class: "more", onclick: () => setParams({ labels: isAll ? null : "all" }) }, isAll ? "Show the strongest" : `Show ${labels.rows.length}`) : null;
    fill(this.scores, h("ul", { class: "key" }, mark("point", "q ≤ 0.05"), mark("weak", "not significant"), hasBand ? mark("band", "95 % of permuted labels") : null, hasDonors ? mark("interval", `95 % across ${labels.units}`) : null),
      forest(rows, { link, units: labels.units, label: `Rank-biserial of feature ${this.id} with ${rows.length} labels, test cells${this.panel}` }), more,
      h("p", { class: "quiet" }, `${n} of ${rows.length} have q ≤ 0.05 (Benjamini-Hochberg over all features and the labels of a kind). A rank-biserial of 1 means that the code of every cell with the label is above that of every other cell; below 0 it is smaller in cells with the label. Batches are compared within cell types.${this.panel ? ` Figures are of test cells${this.panel}.` : ""}`,
        labels.n_labels > labels.rows.length ? ` Shown are the ${labels.rows.length} strongest of ${labels.n_labels} on select cells.` : "", labels.n_unseen ? ` ${labels.n_unseen} more ${labels.n_unseen > 1 ? "are" : "is"} not on test cells.` : ""),
      hasBand ? h("p", { class: "quiet" }, "The band is that of the same statistic for labels permuted within donors (or batches; batches themselves within cell types). It is not centred on 0 where donors with more cells of a label have larger codes in general.") : h("p", { class: "quiet" }, "There is no null band, because these labels were tested by permuting whole donors, or by a method that has none."),
      hasDonors ? null : h("p", { class: "quiet" }, "There is no interval, because it needs three donors or batches that have cells with and without the label."));
  }

  genes() {
    const { genes } = this.known, box = panel("Genes");
    if (genes.missing) return fill(box, empty(genes.missing));
    const link = ({ gene }) => href("search", null, { kind: "gene", q: gene });
    const { expression, identity } = genes;
    if (!expression.length && !identity.length) return fill(box, empty({}, "No gene stands out for this feature."));
    const bars = (rows, options) => (rows.length ? geneBars(rows, { ...options, link }) : h("p", { class: "quiet" }, "None."));
    const within = expression.some((row) => isKnown(row.pearson_within_type));
    const range = [Math.min(0, ...expression.flatMap((row) => [row.pearson ?? 0, row.pearson_within_type ?? 0])), Math.max(0.05, ...expression.flatMap((row) => [row.pearson ?? 0, row.pearson_within_type ?? 0]))];
    return fill(box, h("h3", {}, "By expression: does the cell's code correlate with the gene's expression?"),
      h("ul", { class: "key" }, mark("bar", "Pearson"), mark("bar negative", "negative"), mark("bar weak", "q > 0.05"), within ? mark("within", "within cell types") : null),
      bars(expression.map((row) => ({ gene: row.gene, value: row.pearson, mark: row.pearson_within_type, q: row.q, note: isKnown(row.pearson) ? pvalue(row.q) : "not on test", title: `${row.gene}: Pearson ${fixed(row.pearson, 3)} on test cells (${fixed(row.select_pearson, 3)} on select), within cell types ${fixed(row.pearson_within_type, 3)}; q ${pvalue(row.q)}; n ${count(row.n)}, both in ${count(row.nnz)}` })), { range, title: "Pearson with log1p(CP10k), test cells", label: `Genes of feature ${this.id} by expression`, noted: "q" }),
      h("h3", {}, "By identity: on which gene's tokens does it fire?"),
      bars(identity.map((row) => ({ gene: row.gene, value: row.identity_precision, note: isKnown(row.lift) ? `× ${fmt(row.lift, 2)}` : "not on test", title: `${row.gene}: ${percent(row.identity_precision)} of its firing on test cells (${percent(row.select_identity_precision)} on select); it fires on ${percent(row.identity_recall)} of the gene's tokens; ${fmt(row.lift)} times the gene's share of all tokens` })), { range: [0, Math.max(0.05, ...identity.map((row) => row.identity_precision ?? 0))], title: "share of its firing, test cells", label: `Genes of feature ${this.id} by identity`, noted: "times chance" }),
      h("details", {}, h("summary", {}, "These genes at other sites"), h("ul", { class: "checks" }, [...new Set([...expression, ...identity].map(({ gene }) => gene))].slice(0, 8).map((gene) => h("li", {}, h("i", {}, gene), ": ", geneLinks(gene))))),
      h("p", { class: "quiet" }, `The genes are the strongest on select cells; their figures are of test cells${this.panel}.${expression.some((row) => isKnown(row.q) && row.q <= ALPHA) ? "" : " No gene has q ≤ 0.05 by expression."} Identity is a share; the feature is named after its gene where the excess over chance is significant on test cells.`));
  }

  sets() {
    const { gene_sets: sets } = this.known, box = panel("Gene sets");
    if (sets.missing) return fill(box, empty(sets.missing));
    if (!sets.rows.length) return fill(box, empty({}, "It shares no gene with any gene set on select cells."));
    const several = new Set(sets.rows.map((row) => row.collection)).size > 1;
    const rows = sets.rows.map((row) => [
      breaks(h("a", { href: href("search", null, { kind: `gene_set:${row.collection}`, q: row.gene_set }), title: row.collection }, several ? `${row.gene_set} (${row.collection})` : row.gene_set)),
      isKnown(row.overlap) ? `${row.overlap}/${row.n_set}` : DASH, fmt(row.odds_ratio, 2), weak(pvalue(row.q), row.q), weak(pvalue(row.q_matched), row.q_matched), { text: pvalue(row.q_rank), class: quietly(row.q_rank, "wide") },
    ]);
    const title = (text, more, own) => ({ text, title: more, class: own });
    return fill(box, smallTable(["gene set", title("shared", "Genes of the feature that are in the set, of the set's detected genes"), title("odds", "Odds ratio"), title("q", "Over-representation against all detected genes"), title("q matched", "Against genes detected in as many cells"), title("q ranks", "Rank test over all detected genes", "wide")], rows, { numeric: [1, 2, 3, 4, 5] }),
      h("p", { class: "quiet" }, `Over-representation of its ${sets.rows[0].n_genes ?? ""} genes on test cells${this.panel}; the sets have the smallest p on select cells. Grey: q > 0.05.${sets.rows.some((row) => isKnown(row.q) && row.q <= ALPHA) ? "" : " No gene set has q ≤ 0.05."}`));
  }

  // How strongly it fires, and cells from every fifth of those in which it does.
  strength() {
    this.force = panel("How strongly it fires");
    return this.force;
  }

  drawStrength() {
    const { cells } = this.known;
    if (cells.missing) return fill(this.force, empty(cells.missing));
    const { n, n_firing: fires, high, counts, quartiles } = cells.histograms[this.split], of = `${this.split === "all" ? "cells" : "test cells"}${this.panel}`;
    if (!fires) return fill(this.force, h("p", { class: "quiet" }, `It fires in none of ${count(n)} ${of}.`));
    const edges = Array.from({ length: counts.length + 1 }, (_, i) => (high * i) / counts.length), label = this.about.label_columns.includes("cell_type") ? "cell_type" : this.about.label_columns[0];
    const rows = cells.quantiles.map((row) => [`${FIFTHS[row.fifth - 1]}`, breaks(row.cell_id ? h("a", { href: href("search", null, { kind: "cell", q: row.cell_id }) }, row.cell_id) : String(row.cell_idx)), ...(label ? [breaks(row[label] ?? DASH)] : []), row.split ?? DASH, fixed(row.value, 2)]);
    return fill(this.force, h("p", {}, `It is silent in ${count(n - fires)} of ${count(n)} ${of}. Where it fires, half of its codes lie between ${fixed(quartiles[0], 2)} and ${fixed(quartiles[2], 2)} (median ${fixed(quartiles[1], 2)}, largest ${fixed(high, 2)}).`),
      fitted((width) => histogram(width, { edges, stacks: [{ name: "cells", colour: "#0072b2", counts }], xTitle: "cell code where it fires", yTitle: this.split === "all" ? "cells" : "test cells", at: { value: quartiles[1], name: "median" }, height: 180, label: `Histogram of the code of feature ${this.id} in ${count(fires)} ${of}` })),
      h("h3", {}, "Cells from every fifth of those in which it fires"), smallTable(["fifth", "cell", ...(label ? [words(label)] : []), "split", "code"], rows, { numeric: [label ? 4 : 3], caption: "Of all splits; taken at even ranks, so that weak firing is seen as well as the strongest" }));
  }

  top() {
    const { cells, tokens } = this.known, box = panel("Where it fires most");
    const cell = (row) => breaks(row.cell_id ? h("a", { href: href("search", null, { kind: "cell", q: row.cell_id }) }, row.cell_id) : String(row.cell_idx));
    const label = this.about.label_columns.includes("cell_type") ? "cell_type" : this.about.label_columns[0], second = this.about.label_columns.includes("batch") ? "batch" : null;
    const named = label ? [words(label)] : [], batch = second && second !== label ? [{ text: words(second), class: "wide" }] : [];
    const labels = (row) => [...(label ? [breaks(row[label] ?? DASH)] : []), ...(batch.length ? [{ text: row[second] ?? DASH, class: "wide" }] : [])];
    const tokenRows = (tokens.rows ?? []).map((row) => [h("a", { href: href("search", null, { kind: "gene", q: row.gene }) }, h("i", {}, row.gene)), cell(row), ...labels(row), row.split ?? DASH, fixed(row.value, 2)]);
    const cellRows = (cells.top ?? []).map((row) => [cell(row), ...labels(row), row.split, fixed(row.value, 2)]);
    const listed = (rows, heads, none) => (rows.length ? longTable(heads, rows) : h("p", { class: "quiet" }, none));
    return fill(box, h("h3", {}, "Tokens"), tokens.missing ? empty(tokens.missing) : listed(tokenRows, ["gene", "cell", ...named, ...batch, "split", "value"], "It fires on no token of a gene."),
      h("h3", {}, "Cells"), cells.missing ? empty(cells.missing) : listed(cellRows, ["cell", ...named, ...batch, "split", "code"], "It fires in no cell."),
      h("p", { class: "quiet" }, this.panel ? `Of all ${count(this.about.panel.n_cells)} cells, in the panel or not, and of all splits, strongest first.` : "Of all splits, strongest first."));
  }

  // The genes of one cell in the order of the model's input, each with the feature's code at its token.
  inOrder() {
    const { cell, tokens, missing } = this.known.in_order, box = panel("One cell, token by token", "whole");
    if (missing) return fill(box, empty(missing, "The tokens of single cells were not kept."));
    if (!cell) return fill(box, h("p", { class: "quiet" }, "It fires in no cell."));
    const { position, gene, value } = tokens, top = Math.max(...value), n_firing = value.filter((code) => code > 0).length;
    const name = cell.cell_id ? h("a", { href: href("search", null, { kind: "cell", q: cell.cell_id }) }, cell.cell_id) : String(cell.cell_idx);
    const labels = [...new Set(this.about.label_columns.map((column) => cell[column]).filter(isKnown))], called = (i) => gene[i] ?? "special token";
    const fires = position.map((_, i) => i).filter((i) => value[i] > 0);
    return fill(box, h("p", {}, "The cell in which it fires most: ", name, labels.length ? `, ${labels.join(", ")}` : "", `, ${cell.split ?? "no"} cell. It fires on ${count(n_firing)} of ${count(position.length)} tokens.`),
      chips(position.map((at, i) => ({ text: called(i), value: value[i], says: `${called(i)}, position ${at}: ${value[i] > 0 ? fmt(value[i]) : "silent"}` })), top, "Genes of the cell in the order of the model's input"),
      fires.length ? h("details", {}, h("summary", {}, "The tokens on which it fires, as a table"), smallTable(["position", "gene", "code"], fires.map((i) => [String(position[i]), h("i", {}, called(i)), fmt(value[i])]), { numeric: [0, 2] })) : null,
      h("p", { class: "quiet" }, "The stronger the colour, the larger the code at this token. Of other cells the codes of single tokens are not kept, except those listed above."));
  }

  // A table of features: `figures` are the heads and cells of what makes them alike.
  likes(rows, heads, figures) {
    const known = (row) => [this.link(row.feature_id), breaks(row.top_label ?? DASH), h("i", {}, genesOf(row.top_genes).slice(0, 3).join(" ") || DASH), { text: row.class ?? DASH, class: "wide" }];
    return smallTable(["feature", "best label", "genes", { text: "class", class: "wide" }, ...heads], rows.map((row) => [...known(row), ...figures(row)]), { numeric: [4, 5] });
  }

  // What ablating and boosting it does to the model's predictions of hidden genes, beside the harder of two nulls.
  effects() {
    const { effects } = this.known, box = panel("What it does", "whole");
    if (effects.missing) return fill(box, empty(effects.missing, "What it does to the model's predictions was not measured yet."));
    const ways = [["ablate", "Ablated, its code set to 0 where it fires"], ["boost", "Boosted to its 99th percentile where it fires"]].filter(([way]) => effects.rows[way]?.length);
    if (!ways.length) return fill(box, empty({}, "No gene was hidden in enough test cells in which it fires."));
    const title = (text, more, own) => ({ text, title: more, class: own });
    const row = (one) => [h("a", { href: href("search", null, { kind: "gene", q: one.gene }) }, h("i", {}, one.gene)), weak(fixed(one.effect, 3), one.q), `${fixed(one.null_mean, 3)} ± ${fixed(one.null_sd, 3)}`, { text: one.null, class: "wide" }, { text: fixed(one.direct, 3), class: "wide" }, weak(pvalue(one.q), one.q), { text: count(one.n_cells), class: "wide" }];
    const said = ({ n_genes, n_up, n_down, strength_ratio, specificity, specificity_null, direct_spearman }) => `${count(n_genes)} genes: ${n_up} up and ${n_down} down at q ≤ 0.05. Its steps change predictions ${fixed(strength_ratio, 2)} times as much as those of the harder null.${isKnown(specificity) ? ` Its own genes change ${fixed(specificity, 1)} times as much as others hidden in as many cells (nulls: ${fixed(specificity_null, 1)}).` : ""}${isKnown(direct_spearman) ? ` The direct path ranks genes with a correlation of ${fixed(direct_spearman, 2)} to the effect.` : ""}`;
    return fill(box, h("div", { class: "feature-effects" }, ways.map(([way, text]) => h("div", {}, h("h3", {}, text),
      smallTable(["gene", title("effect", "Mean change of the prediction of the hidden gene, in the unit of the model's head"), title("null", "Mean ± standard deviation of what other directions do with steps of the same length"), title("of", "The harder of the two nulls: random directions, or mixtures of other features", "wide"), title("direct", "The same step after the last block, less its mean over genes", "wide"), title("q", "Over all features, genes and interventions of the run"), title("cells", "Test cells in which the gene was hidden and the feature fires", "wide")], effects.rows[way].map(row), { numeric: [1, 2, 4, 5, 6] }),
      effects.summary[way] ? h("p", { class: "quiet" }, said(effects.summary[way])) : null))),
      h("p", { class: "quiet" }, `Part of the genes of test cells${this.panel} are hidden, and the model predicts them. Shown are the genes with the smallest p. Grey: q > 0.05.`));
  }

  // Which genes drive it: what its code loses when their token is left out, on the token itself and on all others.
  inputs() {
    const { inputs } = this.known, box = panel("What makes it fire", "whole");
    if (inputs.missing) return fill(box, empty(inputs.missing, "Which genes make it fire was not measured yet."));
    if (!inputs.rows.length) return fill(box, empty({}, "No gene was in enough select and test cells in which it fires."));
    const path = (one) => (one ? [weak(percent(one.share), one.q), weak(pvalue(one.q), one.q)] : [DASH, DASH]);
    const row = ({ gene, paths: { "own token": own, "other tokens": other } }) => [h("a", { href: href("search", null, { kind: "gene", q: gene }) }, h("i", {}, gene)), ...path(own), ...path(other), { text: fixed((own ?? other).gradient, 3), class: "wide" }, { text: count((own ?? other).n_cells), class: "wide" }];
    return fill(box, smallTable(["gene", { text: "own token", title: "Share of the feature's code in the cell that lies on the token of the gene, and goes with it" }, "q", { text: "other tokens", title: "Share of the code that other tokens lose when the token of the gene is left out" }, "q", { text: "gradient", title: "Gradient times input of the token, by which genes are chosen on select cells", class: "wide" }, { text: "cells", title: "Test cells that have the gene and in which the feature fires", class: "wide" }], inputs.rows.map(row), { numeric: [1, 2, 3, 4, 5, 6] }),
      h("p", { class: "quiet" }, `The token of a gene is left out of test cells${this.panel}, and the code of the cell is measured again. Null: genes of like value in the same cells. Grey: q > 0.05.`));
  }

  // The features of earlier layers whose ablation changes it, and those of later layers that its ablation changes.
  edges() {
    const { edges } = this.known, box = panel("Upstream and downstream", "whole");
    if (edges.missing) return fill(box, empty(edges.missing, "How it hangs together with features of other layers was not measured yet."));
    const { upstream, downstream } = edges;
    if (!upstream.length && !downstream.length) return fill(box, empty({}, "No pair of it and a feature of another layer was measured."));
    const named = (row) => `${row.other_feature_id}${row.top_label || row.top_genes ? ` ${row.top_label ?? genesOf(row.top_genes).slice(0, 2).join(" ")}` : ""}`;
    const table = (rows, text) => rows.length ? h("div", {}, h("h3", {}, text, " ", h("span", { class: "quiet" }, [...new Set(rows.map(({ other_sae, site }) => [other_sae, site].filter(Boolean).join(", ")))].join("; "))),
      smallTable(["feature", { text: "best label, genes", class: "wide" }, { text: "change", title: "Of the mean code of the later feature when the earlier one is ablated, in units of that code" }, "relation", { text: "z", title: "Against steps of the same length in other directions, the harder of two nulls" }, "q", { text: "donors", title: "Donors in which the change has the same sign", class: "wide" }],
        rows.map((row) => [String(row.other_feature_id), { text: [row.top_label, genesOf(row.top_genes ?? "").slice(0, 3).join(" ")].filter(Boolean).join(": ") || DASH, class: "wide" }, weak(isKnown(row.share) ? percent(row.share, 0) : fixed(row.effect, 3), row.q), weak(row.relation, row.q), weak(fixed(row.z, 1), row.q), weak(pvalue(row.q), row.q), { text: `${row.n_agree} of ${row.n_donors}`, class: "wide" }]), { numeric: [2, 4, 5, 6] })) : h("div", {}, h("h3", {}, text), h("p", { class: "quiet" }, "None was measured."));
    return fill(box, edgeGraph({ upstream, downstream, me: `${this.id}${nameOf(this.known.about) ? ` ${nameOf(this.known.about)}` : ""}`, named, label: `Features that change feature ${this.id}, and that it changes` }),
      h("div", { class: "feature-effects" }, table(upstream, "Upstream: ablated, they change it"), table(downstream, "Downstream: its ablation changes them")),
      h("p", { class: "quiet" }, `Earlier features are ablated in test cells${this.panel}. Shown are the pairs with the smallest p. Grey: q > 0.05. A page of a feature of another SAE is in the atlas of that SAE: `, h("code", {}, "scsae serve --associations RUN"), "."));
  }

  alike() {
    const { neighbours } = this.known, box = panel("Nearest in direction");
    if (neighbours.missing) return fill(box, empty(neighbours.missing, "The features were not compared with each other yet."));
    if (!neighbours.rows.length) return fill(box, empty({}, "It has no neighbours."));
    const null_95 = neighbours.null_95;
    return fill(box, this.likes(neighbours.rows, ["cosine"], (row) => [{ text: fixed(row.cosine, 2), class: isKnown(null_95) && row.cosine <= null_95 ? "quiet" : null }]),
      h("p", { class: "quiet" }, "By the cosine of decoder rows of this SAE.", isKnown(null_95) ? ` The nearest of as many random directions exceeds ${fixed(null_95, 2)} in one case of twenty; a smaller cosine is grey.` : ""));
  }

  together() {
    const { cells } = this.known, box = panel("In the same cells");
    if (cells.missing) return fill(box, empty(cells.missing));
    if (!cells.together?.length) return fill(box, empty({}, cells.together ? `No other feature's code correlates with its code on select cells${this.panel}.` : `Not computed for more than 20,000 select and test cells${this.panel}.`));
    return fill(box, this.likes(cells.together, [{ text: "r", title: "Pearson correlation of the two codes on test cells" }, { text: "r select", title: "By which they were chosen", class: "wide" }], (row) => [fixed(row.pearson, 2), { text: fixed(row.pearson_select, 2), class: "wide" }]),
      h("p", { class: "quiet" }, `The features are chosen by the correlation of codes across select cells${this.panel}; r is that across test cells. Cells with many genes have large codes of many features, so a small r is weak evidence.`));
  }

  elsewhere() {
    const { matches } = this.known, box = panel("Similar features in other SAEs", "whole");
    if (matches.missing) return fill(box, empty(matches.missing, "This SAE was not matched with another one yet."));
    if (!matches.rows.length) return fill(box, empty({}, "No other SAE was matched on this feature."));
    const rows = matches.rows.map((row) => {
      const where = [row.model, row.site, isKnown(row.seed) ? `seed ${row.seed}` : null, row.control ? `control: ${row.control}` : null].filter(Boolean).join(", ");
      return [{ text: h("span", {}, h("code", {}, row.other), where ? h("span", { class: "quiet" }, ` ${where}`) : null), title: row.method, class: "breaks" }, isKnown(row.other_feature_id) ? String(row.other_feature_id) : DASH,
        { text: h("span", {}, fixed(row.similarity_test ?? row.similarity, 2), h("span", { class: "quiet" }, ` (${fixed(row.null_95, 2)})`)), class: quietly(row.p), title: `${words(row.method)}; chosen at ${fixed(row.similarity, 2)}` }, weak(pvalue(row.p), row.p), { text: row.mutual ? "yes" : "no", class: "wide" }];
    });
    return fill(box, smallTable(["SAE", "feature", { text: "similarity (null)", title: "Cosine of decoder rows, or correlation of cell codes on test cells; in brackets what the similarity of a feature without a counterpart exceeds in one case of twenty" }, "p", { text: "mutual", title: "Each is the other's nearest", class: "wide" }], rows, { numeric: [1, 2, 3] }),
      h("p", { class: "quiet" }, "p is of this feature alone and is not corrected for the number of features. Grey: p > 0.05."));
  }

  steering() {
    const { steering } = this.known, box = panel("Steering with this feature", "whole");
    if (steering.missing) return fill(box, empty(steering.missing, "This store has no steering run yet."));
    if (!steering.runs.length) return fill(box, h("p", { class: "quiet" }, `None of the ${count(steering.n_runs)} steering runs of this SAE used or ranked this feature.`));
    const some = steering.runs.map(({ run, title: name, used, place, rank, headline }) => h("div", { class: "run-of" },
      h("p", {}, h("a", { href: href("steering", run) }, name), used && headline ? ` used it: ${words(headline.condition)}, place ${place} of ${headline.n_features ?? "its"} features.` : used ? " used it." : " did not use it.",
        rank ? ` Ranked ${count(rank.rank)} of ${count(rank.n_ranked)} on select cells (score ${fixed(rank.score, 3)}).` : null),
      used && headline ? h("ul", { class: "facts" }, h("li", {}, `change in the ${headline.words}: `, h("b", {}, signed(headline.effect)), isKnown(headline.low) ? ` (95 % ${signed(headline.low)} to ${signed(headline.high)})` : null),
        Object.entries(headline.p).map(([of, p]) => h("li", { class: quietly(p) }, `p ${pvalue(p)} against ${words(of)}`))) : null));
    return fill(box, some, !steering.runs.some(({ used }) => used) ? null : h("p", { class: "quiet" }, "An effect is that of all features of the run together, minus the unsteered value, and not of this feature alone. Grey: p > 0.05."));
  }

  provenance() {
    const inside = h("div", {}), said = h("span", { class: "quiet", role: "status" });
    const box = h("details", { class: "panel provenance whole", ontoggle: async () => {
      if (!box.open || inside.childElementCount) return;
      const found = await json("provenance.json"), text = h("pre", { tabindex: 0 }, JSON.stringify(found, null, 2));
      inside.append(h("p", {}, h("button", { type: "button", onclick: () => copy(text, said) }, "Copy as JSON"), " ", said),
        smallTable(["run of", "id"], Object.entries(found.runs).map(([kind, run]) => [words(kind), h("code", {}, run)])), h("h3", {}, "Manifests"),
        smallTable(["table", "sha of its manifest"], Object.entries(found.manifests).map(([table, sha]) => [h("code", {}, table), h("code", {}, sha)])), h("h3", {}, "Runs, manifests and plans as JSON"), text);
    } }, h("summary", {}, "Provenance: the runs behind this page, down to the sha of each manifest"), inside);
    return box;
  }
}

// What it is called: the label for a feature of the cells' context, else its genes.
const nameOf = (about) => (about.class === "cell-context" ? about.top_label : null) ?? genesOf(about.class === "gene-identity" ? about.top_identity_genes ?? about.top_genes : about.top_genes).slice(0, 2).join(" ");
// What of the address goes along to the next feature.
const keptOf = ({ color, split, by, view, cell }) => ({ color, split, by, view, cell });
const genesOf = (text) => (text ?? "").split(/[\s,]+/).filter(Boolean);
const panel = (name, own) => h("section", { class: own ? `panel ${own}` : "panel", "aria-label": name }, h("h2", {}, name));
const quietly = (q, own) => [isKnown(q) && q <= ALPHA ? null : "quiet", own].filter(Boolean).join(" ") || null;
const breaks = (text) => ({ text, class: "breaks" });
const weak = (text, q) => ({ text, class: quietly(q) });
const signed = (x) => (isKnown(x) ? `${x > 0 ? "+" : ""}${fixed(x, 3)}` : DASH);

// A panel's content below its head, anew.
function fill(box, ...content) {
  clear(box, box.firstElementChild, ...content);
  return box;
}

// An entry of a chart's key, drawn as in the chart.
function mark(kind, text) {
  const shape = {
    point: () => svg("circle", { cx: 11, cy: 7, r: 4.5, class: "point" }),
    weak: () => svg("g", { class: "weak" }, svg("circle", { cx: 11, cy: 7, r: 4.5, class: "point" })),
    band: () => svg("rect", { x: 0, y: 0, width: 22, height: 14, class: "null-band" }),
    interval: () => svg("line", { x1: 0, x2: 22, y1: 7, y2: 7, class: "interval" }),
    bar: () => svg("rect", { x: 2, y: 1, width: 18, height: 12, class: "bar" }),
    "bar negative": () => svg("rect", { x: 2, y: 1, width: 18, height: 12, class: "bar negative" }),
    "bar weak": () => svg("g", { class: "weak" }, svg("rect", { x: 2, y: 1, width: 18, height: 12, class: "bar" })),
    within: () => svg("line", { x1: 11, x2: 11, y1: 0, y2: 14, class: "within" }),
  }[kind];
  return h("li", {}, svg("svg", { viewBox: "0 0 22 14", "aria-hidden": "true" }, shape()), text);
}

// The darkest is light enough for text on it, and a line below tells shades apart.
const shade = (share) => ({ background: `color-mix(in srgb, var(--accent) ${Math.round(4 + 32 * share)}%, var(--paper))`, borderBottomColor: `color-mix(in srgb, var(--accent) ${Math.round(20 + 80 * share)}%, var(--paper))` });

// Texts in order, coloured by their value; the one under the pointer, or that the arrow keys reach, is said below.
function chips(items, top, label) {
  const said = h("p", { class: "chip-said quiet", "aria-live": "polite" }, "Point at a token, or move with the arrow keys, to see its code.");
  const shown = items.map(({ text, value }) => h("li", { class: value > 0 ? "chip fires" : "chip", style: value > 0 ? shade(value / top) : null }, text));
  let at = -1;
  const move = (to, isKey) => {
    if (to < 0 || to >= items.length) return;
    shown[at]?.classList.remove("here");
    at = to;
    shown[at].classList.add("here");
    said.textContent = items[at].says;
    if (isKey) shown[at].scrollIntoView({ block: "nearest" });
  };
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const list = h("ol", { class: "chips", tabindex: 0, "aria-label": label,
    onpointerover: ({ target }) => move(shown.indexOf(target), false),
    onkeydown: (event) => {
      const to = event.key === "Home" ? 0 : event.key === "End" ? items.length - 1 : event.key in steps ? at + steps[event.key] : null;
      if (to === null) return;
      event.preventDefault();
      move(Math.max(0, to), true);
    } }, shown);
  return h("div", {}, list, said);
}

// The first rows of a table, and the others when asked for.
function longTable(heads, rows) {
  const box = h("div", {}), numeric = [heads.length - 1];
  const draw = (isAll) => clear(box, smallTable(heads, isAll ? rows : rows.slice(0, FEW_ROWS), { numeric }),
    rows.length > FEW_ROWS ? h("button", { type: "button", class: "more", "aria-expanded": String(isAll), onclick: () => { draw(!isAll); box.querySelector("button").focus(); } }, isAll ? "Show fewer" : `Show all ${rows.length}`) : null);
  draw(false);
  return box;
}

async function copy(text, said) {
  try {
    await navigator.clipboard.writeText(text.textContent);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(text); // without HTTPS there is no clipboard
    said.textContent = "selected below; copy it with Ctrl+C";
  }
}
