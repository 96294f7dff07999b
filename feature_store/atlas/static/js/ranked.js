// The best features of a name, as a table with a bar for each figure; and the features that fire in a cell.

import { h, svg, count, csv, download, empty, fixed, fmt, ofPanel, percent, pvalue, smallTable, words, isKnown, DASH } from "./dom.js";
import { CLASS } from "./colour.js";
import { json, overview } from "./data.js";
import { geneLinks } from "./links_out.js";
import { href, labelHref } from "./state.js";
import { cell } from "./cells.js";

const ALPHA = 0.05;
const WIDTH = 84, HEIGHT = 14;
const log = (p) => (isKnown(p) ? Math.min(-Math.log10(Math.max(p, 1e-300)), 300) : null);

// What is told of each kind: how features were ranked, the figure in a bar, and further columns that the table may have.
const COLUMNS_OF_TYPE = {
  label: {
    key: "auroc", head: "AUROC", format: (x) => fixed(x, 3), figure: (x) => x, range: () => [0, 1], span: "0 to 1", zero: 0.5,
    how: "by the AUROC of their codes for its cells against all others (0.5 is chance, 0 is the reverse order)",
    more: [{ key: "n_agree", head: "agree", title: "Donors whose effect has the same sign; batches, where cells name no donor", cell: (at) => (isKnown(at("n_agree")) && isKnown(at("n_donors")) ? `${at("n_agree")} of ${at("n_donors")}` : DASH) }],
  },
  gene: {
    key: "pearson", head: "r", about: "Pearson correlation", format: (x) => fixed(x, 3), figure: (x) => x, range: () => [-1, 1], span: "−1 to 1", zero: 0,
    how: "by the correlation (r) of their code with its expression",
    more: [
      { key: "pearson_within_type", head: "within types", title: "Correlation within cell types", cell: (at) => fixed(at("pearson_within_type"), 3) },
      { key: "identity_precision", head: "on its token", title: "Of the tokens at which the feature fires, those of this gene", cell: (at) => percent(at("identity_precision")) },
    ],
  },
  gene_set: {
    key: "p", head: "p", format: pvalue, figure: log, range: (values) => [0, Math.max(3, ...values)], span: "−log₁₀ p", zero: 0,
    how: "by the p of the overlap between its genes and theirs",
    more: [
      { key: "overlap", head: "overlap", title: "Genes of the feature that are in the set, of the set", cell: (at) => (isKnown(at("overlap")) ? `${at("overlap")} of ${at("n_set") ?? "?"}` : DASH) },
      { key: "odds_ratio", head: "odds ratio", cell: (at) => fmt(at("odds_ratio")) },
    ],
  },
};

// The panel of a name of `Names`.
export async function rankedPanel(entry, kind, features) {
  const [found, about] = await Promise.all([json(entry.path), overview()]);
  const title = h("h2", { class: "found-title" }, entry.name, " ", h("span", { class: "tag" }, kind.title));
  if (found.missing) return [title, empty(found.missing)];
  const told = COLUMNS_OF_TYPE[entry.type], { columns, key } = found, ids = columns.feature_id;
  if (!ids.length) return [title, h("div", { class: "empty", role: "note" }, h("p", {}, `No feature was tested for ${entry.name} on test cells, because too few of them have it.`))];
  const chosenBy = key === told.key ? null : key;
  const drawn = [...columns[told.key], ...(chosenBy ? columns[chosenBy] : [])].map(told.figure).filter(isKnown);
  const range = told.range(drawn);
  const more = told.more.filter((one) => columns[one.key]);
  const heads = [{ text: "id", class: "number", title: "Feature" }, "genes, best label", { text: "class", class: "wide" }, chosenBy ? { text: "select", class: "number wide", title: `${told.about ?? told.head} on select cells, by which features are ranked` } : null,
    { text: told.head, class: "number", title: `${told.about ?? told.head} on test cells` }, { text: told.span, class: "bar-head", title: "Bar: test cells; line: select cells" }, { text: "q", class: "number", title: "Benjamini-Hochberg over all tests of this kind" }, { text: `q ≤ ${ALPHA}`, class: "wide" }, ...more.map(({ head, title }) => ({ text: head, class: "number wide", title }))];
  const isSignificant = (at) => isKnown(at("q")) && at("q") <= ALPHA;
  const isTurned = (at) => chosenBy !== null && [chosenBy, told.key].map((name) => told.figure(at(name)) - told.zero).reduce((one, other) => one * other) < 0;
  const figures = ids.map((_, i) => (name) => columns[name]?.[i] ?? null);
  const rows = ids.map((id, i) => {
    const at = figures[i];
    const isSure = isSignificant(at) && !isTurned(at), quiet = isSure ? "number" : "number quiet";
    return [
      { text: featureLink(id), class: "number" }, { text: nameOf(id, features), class: "found-name" }, { text: classOf(id, features), class: "wide nowrap" },
      chosenBy ? { text: told.format(at(chosenBy)), class: "number quiet wide" } : null, { text: told.format(at(told.key)), class: quiet },
      bar(told.figure(at(told.key)), { range, zero: told.zero, mark: chosenBy ? told.figure(at(chosenBy)) : null, isSure }),
      { text: pvalue(at("q")), class: quiet }, { text: isSure ? "significant" : isSignificant(at) ? "reversed" : "not significant", title: isSure || !isSignificant(at) ? null : "On test cells the association has the other direction than on select cells", class: `wide nowrap${isSure ? "" : " quiet"}` },
      ...more.map(({ cell: told }) => ({ text: told(at), class: "number wide" })),
    ].filter((value) => value !== null);
  });
  const nSure = figures.filter((at) => isSignificant(at) && !isTurned(at)).length;
  const shown = found.n > ids.length ? `the best ${count(ids.length)} of ${count(found.n)} features` : found.n === 1 ? "the only feature with figures" : `all ${count(found.n)} features with figures`;
  return [
    title,
    entry.type === "gene" ? h("p", {}, "Described elsewhere: ", geneLinks(entry.name)) : null,
    h("p", { class: "quiet" }, `${shown[0].toUpperCase()}${shown.slice(1)}, ranked on select cells ${told.how}. The other figures are of test cells, which were not used for the ranking${about.panel ? `; all cells are those${ofPanel(about)}` : ""}; ${nSure ? `${count(nSure)} of the listed features are significant (q ≤ ${ALPHA})` : `none of the listed features is significant: there is no feature of ${entry.name} at q ≤ ${ALPHA}`}. In a bar, the line marks the value on select cells.`),
    smallTable(heads.filter((head) => head !== null), rows, { caption: `Features that go with ${entry.name}, best first` }),
    h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => save(entry, columns, features) }, "CSV"), entry.type === "label" ? [" ", h("a", { href: labelHref(entry.kind.slice("label:".length), entry.name) }, `The page of ${entry.name}`)] : null),
    entry.type === "gene" ? changers(entry, found.changed_by, features) : null,
  ];
}

// The features that change the model's prediction of a gene, as far as effects were measured.
function changers(entry, rows, features) {
  if (!rows) return null;
  const head = h("h3", {}, `Features that change the model's prediction of ${entry.name}`);
  if (!rows.length) return [head, h("p", { class: "quiet" }, "In no measured feature's cells was it hidden often enough.")];
  const nSure = new Set(rows.filter(({ q }) => q <= ALPHA).map((row) => row.feature_id)).size, weak = (text, q) => ({ text, class: q <= ALPHA ? "number" : "number quiet" });
  return [
    head,
    h("p", { class: "quiet" }, `${nSure ? `${count(nSure)} of the listed features ${nSure === 1 ? "changes" : "change"} it` : "No feature changes it"} at q ≤ ${ALPHA}, beside steps of the same length in other directions. Listed are those with the smallest p.`),
    smallTable([{ text: "id", class: "number", title: "Feature" }, "genes, best label", "done", { text: "effect", class: "number", title: "Mean change of the prediction of the hidden gene, in the unit of the model's head" }, { text: "null", class: "number wide", title: "Mean ± standard deviation of the harder null" }, { text: "q", class: "number" }],
      rows.map((row) => [{ text: featureLink(row.feature_id), class: "number" }, { text: nameOf(row.feature_id, features), class: "found-name" }, row.intervention, weak(fixed(row.effect, 3), row.q), { text: `${fixed(row.null_mean, 3)} ± ${fixed(row.null_sd, 3)}`, class: "number wide" }, weak(pvalue(row.q), row.q)]),
      { caption: `Features that change the prediction of ${entry.name}` }),
  ];
}

// The panel of a cell.
export async function cellPanel(idx, names, features) {
  const found = await cell(idx);
  const title = h("h2", { class: "found-title" }, found.id, " ", h("span", { class: "tag" }, "cell"));
  const labels = [["place in the data set", `#${found.idx}`], ["split", found.split], ...Object.entries(found.labels)].filter(([, value]) => isKnown(value));
  const facts = h("dl", { class: "found-facts" }, labels.map(([name, value]) => h("div", {}, h("dt", {}, words(name)), h("dd", {}, labelLink(name, value, names)))));
  if (found.missing) return [title, facts, empty(found.missing)];
  if (!found.features.length) return [title, facts, h("p", { class: "empty" }, "No feature fires in this cell.")];
  const largest = Math.max(...found.values), digits = largest >= 100 ? 0 : largest >= 1 ? 2 : 4;
  const rows = found.features.map((id, i) => [
    { text: featureLink(id), class: "number" }, { text: nameOf(id, features), class: "found-name" }, { text: classOf(id, features), class: "wide nowrap" },
    { text: fixed(found.values[i], digits), class: "number" }, { text: percent(found.percentiles[i]), class: "number" }, bar(found.percentiles[i], { range: [0, 1], zero: 0, isSure: true }),
  ]);
  const heads = [{ text: "id", class: "number", title: "Feature" }, "genes, best label", { text: "class", class: "wide" }, { text: "code", class: "number", title: "The largest activation among the cell's tokens, or their mean: as the codes were pooled" }, { text: "above", class: "number", title: "Share of other cells whose code of the same feature is smaller; equal ones count half" }, { text: "0 to 100 %", class: "bar-head" }];
  const kept = found.isCut === null ? "" : found.inPanel ? " All its codes are kept, because it is in the panel." : " It is outside the panel, but has no more codes than are kept of such a cell.";
  const all = found.nActive > rows.length ? `The ${rows.length} that stand out most of ${count(found.nActive)} features that fire in this cell.` : `All ${count(found.nActive)} features that fire in this cell.`;
  const shown = found.isCut ? `This cell is outside the panel, so only its ${count(found.keep)} largest codes are kept; shown are the ${rows.length} of them that stand out most.` : `${all}${kept}`;
  return [title, facts, h("p", { class: "quiet" }, `${shown} Features differ in the size of their codes, so they are ranked by how many other cells have a smaller code of the same feature.`), smallTable(heads, rows, { caption: `Features of cell ${found.id}, the most unusual code first` })];
}

// The panel of one feature, which is a way to its own page.
export function featurePanel(id, features) {
  const row = features.rowOf.get(id), label = features.at("top_label", row);
  return [
    h("h2", { class: "found-title" }, `Feature ${id} `, h("span", { class: "tag" }, "feature")),
    h("p", {}, classOf(id, features), h("span", {}, label ? ` · best label ${label}` : " · no label at q ≤ 0.05")),
    h("p", { class: "quiet" }, features.genes(row, 10)),
    h("p", {}, h("a", { href: href("feature", id) }, `Open feature ${id}`)),
  ];
}

function labelLink(column, value, names) {
  return names.exactly(String(value), `label:${column}`) ? h("a", { href: labelHref(column, value) }, String(value)) : String(value);
}

export const featureLink = (id) => h("a", { href: href("feature", id), "aria-label": `Feature ${id}` }, String(id));

export function nameOf(id, features) {
  const row = features.rowOf.get(id);
  if (row === undefined) return DASH;
  const label = features.at("top_label", row);
  return h("span", {}, features.genes(row, 3) || "no gene at q ≤ 0.05", label ? h("span", { class: "quiet" }, ` · ${label}`) : null);
}

export function classOf(id, features) {
  const name = features.at("class", features.rowOf.get(id));
  return name ? h("span", { class: "nowrap" }, h("span", { class: "swatch", style: { background: CLASS[name] ?? "" } }), " ", name) : DASH;
}

// A bar from `zero` to a value, and a line at another.
export function bar(value, { range: [low, high], zero, mark = null, isSure }) {
  const place = (x) => 1 + ((Math.max(low, Math.min(high, x)) - low) / (high - low || 1)) * (WIDTH - 2);
  const from = place(zero), root = svg("svg", { class: `rank-bar${isSure ? "" : " unsure"}`, viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, preserveAspectRatio: "none", "aria-hidden": "true" });
  root.append(svg("line", { class: "bar-zero", x1: from, x2: from, y1: 0, y2: HEIGHT }));
  if (isKnown(value)) root.append(svg("rect", { class: "bar-value", x: Math.min(from, place(value)), y: 3, width: Math.abs(place(value) - from), height: HEIGHT - 6, rx: 1 }));
  if (isKnown(mark)) root.append(svg("line", { class: "bar-mark", x1: place(mark), x2: place(mark), y1: 1, y2: HEIGHT - 1 }));
  return root;
}

function save(entry, columns, features) {
  const names = Object.keys(columns), about = ["class", "top_label", "top_genes"].filter((name) => features.has(name));
  const rows = columns.feature_id.map((id, i) => [...names.map((name) => columns[name][i]), ...about.map((name) => features.at(name, features.rowOf.get(id)))]);
  download(`features-${entry.name.replace(/[^\w.+-]+/g, "_")}.csv`, csv([...names, ...about], rows));
}
