// Modules: groups of features that fire together beyond their rates. A map of them, a list, and one of them in full.

import { h, svg, clear, count, csv, download, empty, fixed, isKnown, ofPanel, pvalue, smallTable, words } from "../dom.js";
import { byCategory, colourOf, legend } from "../colour.js";
import { json, overview } from "../data.js";
import { Features, MAPS } from "../features.js";
import { classOf, featureLink, nameOf } from "../ranked.js";
import { Scatter } from "../scatter.js";
import { go, href, labelHref } from "../state.js";

const ALPHA = 0.05, MOST_NAMED = 11;
const WIDTH = 110, HEIGHT = 14;

export const title = ({ id }) => (id ? `Module ${id}` : "Modules");

export async function show(root, { id }) {
  const [found, about] = await Promise.all([json("modules.json"), overview()]);
  if (found.missing) {
    root.append(h("h1", {}, "Modules"), empty(found.missing, "Which features fire together was not measured yet."));
    return {};
  }
  if (!found.modules.length) {
    root.append(h("h1", {}, "Modules"), h("p", {}, `No group of features fires together beyond its rates; shuffled codes give ${count(found.shuffled.length)}.`));
    return {};
  }
  const features = await Features.load(), shown = found.modules.find(({ module }) => String(module) === id) ?? found.modules[0];
  const plot = draw(root, found, shown, features, about);
  return { close: () => plot?.close() };
}

function draw(root, found, shown, features, about) {
  const { modules, shuffled } = found, nMembers = modules.reduce((sum, { n_features: n }) => sum + n, 0), nSure = modules.filter(({ q }) => q <= ALPHA).length;
  const largest = [...modules].sort((a, b) => b.n_features - a.n_features).slice(0, MOST_NAMED), colours = new Map(largest.map(({ name }, i) => [name, colourOf(i)]));
  const box = h("div", { class: "modules-map" });
  root.append(h("h1", {}, `${count(modules.length)} modules of features that fire together`),
    h("p", { class: "modules-lead" }, `${count(nMembers)} of ${count(features.n)} features are in a module. ${count(nSure)} ${nSure === 1 ? "module holds" : "modules hold"} together on test cells at q ≤ ${ALPHA}, compared with as many features that fire as often. ${shuffledWords(shuffled)} Modules were found on train and select cells${ofPanel(about)}, inside cell types and donors.`),
    h("p", {}, h("a", { href: href("atlas", null, { color: "module" }) }, "Colour the Atlas by module")),
    h("div", { class: "modules-columns" },
      h("section", { class: "panel", "aria-label": "Map of modules" }, h("h2", {}, "Map"), box, legend(largest.map(({ name }) => ({ name, colour: colours.get(name) })), { label: "The largest modules" }), h("p", { class: "quiet" }, "Each dot is a feature; grey ones are in no module or in a smaller one. A click on a dot opens its module, whose features have rings.")),
      listPanel(modules, shown)),
    ownPanel(shown, features));
  return map(box, shown, modules, features, about, colours);
}

function shuffledWords(shuffled) {
  if (!shuffled.length) return "Shuffled codes give no module.";
  const most = Math.max(...shuffled.map(({ stability }) => stability));
  return `Shuffled codes give ${count(shuffled.length)}, of a stability of ${fixed(most, 2)} at most.`;
}

// The features on the first map that there is.
function map(box, shown, modules, features, about, colours) {
  const of = Object.values(MAPS).find(({ table }) => about.tables.includes(table)), column = features.column("module");
  if (!of) { box.append(empty({ table: "feature_umap", command: about.missing.feature_umap }, "The features have no map yet.")); return null; }
  const byName = new Map(modules.map((one) => [one.name, one]));
  const plot = new Scatter(box, { label: "Map of features, coloured by module", tip: (row) => [h("strong", {}, features.name(row)), h("div", {}, column.at(row) ? `module ${column.at(row)}` : "in no module")], onPick: (row) => byName.has(column.at(row)) && go("modules", byName.get(column.at(row)).module) });
  plot.points(features.column(of.x).values, features.column(of.y).values);
  plot.colours(byCategory(column.values, column.categories.map((name) => colours.get(name) ?? null)));
  const isNamed = Array.from({ length: features.n }, (_, row) => colours.has(column.at(row)) ? 1 : 0);
  plot.order(Uint32Array.from(isNamed, (_, row) => row).sort((a, b) => isNamed[a] - isNamed[b] || a - b));
  plot.mark(shown.features.map((row) => features.rowOf.get(row.feature_id)));
  return plot;
}

// A bar from 0 to 1.
function share(value) {
  return svg("svg", { class: "rank-bar", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, preserveAspectRatio: "none", "aria-hidden": "true" },
    svg("line", { class: "bar-zero", x1: 0.5, x2: 0.5, y1: 0, y2: HEIGHT }), svg("rect", { class: "bar-value", x: 1, y: 3, width: Math.max(1, value * (WIDTH - 2)), height: HEIGHT - 6, rx: 1 }));
}

function listPanel(modules, shown) {
  const rows = modules.map((one) => {
    const isSure = one.q <= ALPHA, quiet = isSure ? "number" : "number quiet", set = one.gene_sets.find(({ q }) => q <= ALPHA);
    return [
      { text: h("a", { href: href("modules", one.module), "aria-current": one === shown ? "true" : null }, one.name) }, { text: count(one.n_features), class: "number" },
      { text: fixed(one.stability, 2), class: "number" }, { text: share(one.stability ?? 0), class: "wide" }, { text: fixed(one.r_test, 3), class: quiet }, { text: `${fixed(one.null_mean, 3)} ± ${fixed(one.null_sd, 3)}`, class: "number wide" },
      { text: pvalue(one.q), class: quiet }, { text: set ? words(set.gene_set) : "–", class: `wide${set ? "" : " quiet"}`, title: set ? `q ${pvalue(set.q)}` : "no gene set at q ≤ 0.05" },
    ];
  });
  const heads = ["module", { text: "features", class: "number" }, { text: "stability", class: "number", title: "How often its features stay together when the donors (or cells) are drawn again: 1 is always" }, { text: "", class: "wide" }, { text: "r", class: "number", title: "Mean partial correlation of its pairs on test cells" }, { text: "null", class: "number wide", title: "Mean ± standard deviation of as many features that fire as often" }, { text: "q", class: "number", title: "Benjamini-Hochberg over modules" }, { text: "first gene set", class: "wide" }];
  return h("section", { class: "panel", "aria-label": "List of modules" }, h("h2", {}, "List"), h("div", { class: "modules-list" }, smallTable(heads, rows, { caption: "The largest first" })),
    h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => save(modules) }, "CSV of all modules and their features")));
}

function save(modules) {
  const heads = ["module", "feature_id", "r", "class", "top_label", "top_genes", "module_stability", "module_r_test", "module_q"];
  const rows = modules.flatMap((one) => one.features.map((row) => [one.module, row.feature_id, row.r, row.class, row.top_label, row.top_genes, one.stability, one.r_test, one.q]));
  download("modules.csv", csv(heads, rows));
}

function ownPanel(one, features) {
  const labels = new Map();
  for (const { top_label: label, top_label_kind: kind } of one.features) if (isKnown(label)) labels.set(label, { kind, n: (labels.get(label)?.n ?? 0) + 1 });
  const ordered = [...labels].sort((a, b) => b[1].n - a[1].n || (a[0] < b[0] ? -1 : 1));
  const sets = one.gene_sets.map((row) => { const quiet = row.q <= ALPHA ? null : "quiet"; return [h("a", { href: href("search", null, { q: row.gene_set, pick: `gene_set:${row.collection}` }), class: quiet }, words(row.gene_set)), { text: words(row.collection), class: "wide" }, { text: `${row.n_features} of ${row.n_known}`, class: quiet }, { text: `${row.n_with_set} of ${row.n_all}`, class: "wide" }, { text: pvalue(row.q), class: quiet }]; });
  const body = h("div", {});
  clear(body,
    h("p", {}, `It ${one.q <= ALPHA ? "holds together" : "does not clearly hold together"} on test cells: the mean partial correlation of its ${count(one.n_features)} features is ${fixed(one.r_test, 3)} (${fixed(one.r, 3)} on train and select cells), that of features that fire as often ${fixed(one.null_mean, 3)} ± ${fixed(one.null_sd, 3)}; q ${pvalue(one.q)}. Stability ${fixed(one.stability, 2)}.`),
    ordered.length ? h("p", {}, "Best labels of its features: ", ordered.map(([label, { kind, n }], i) => [i ? ", " : "", h("a", { href: labelHref(kind, label) }, label), ` (${n})`])) : h("p", { class: "quiet" }, "None of its features has a label at q ≤ 0.05."),
    h("p", {}, h("a", { href: href("atlas", null, { color: "module", module: one.name }) }, "Its features on the Atlas"), " · ", h("a", { href: href("compare", null, { f: one.features.slice(0, 4).map((row) => row.feature_id).join(".") }) }, `Compare ${one.features.length > 4 ? "the first 4" : "them"} side by side`)),
    h("div", { class: "modules-own" },
      h("div", {}, h("h3", {}, "Features"), smallTable([{ text: "id", class: "number" }, "genes, best label", { text: "class", class: "wide" }, { text: "r", class: "number", title: "Mean partial correlation with the other features of the module, train and select cells" }], one.features.map((row) => [{ text: featureLink(row.feature_id), class: "number" }, nameOf(row.feature_id, features), { text: classOf(row.feature_id, features), class: "wide nowrap" }, { text: fixed(row.r, 3), class: "number" }]))),
      h("div", {}, h("h3", {}, "Gene sets"), sets.length ? [smallTable(["gene set", { text: "from", class: "wide" }, { text: "features", title: "Features of the module that go with the gene set, of those with associations" }, { text: "of all", title: "The same among all features", class: "wide" }, "q"], sets, { numeric: [2, 3, 4] }), h("p", { class: "quiet" }, `${count(one.n_significant)} of ${count(one.n_sets)} gene sets that a feature of it goes with have q ≤ ${ALPHA}: more of its features go with them than chance gives. Grey: q > ${ALPHA}.`)] : h("p", { class: "quiet" }, "None of its features goes with a gene set at q ≤ 0.05."))));
  return h("section", { class: "panel", id: "own-module", "aria-label": `Module ${one.name}` }, h("h2", {}, `Module ${one.name}`), body);
}
