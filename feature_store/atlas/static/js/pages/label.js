// One label, for example the cell type B cells: which features stand for it, how few of them tell its cells, and which
// labels have a similar profile. Features are ranked on `select` cells; figures are of `test` cells.

import { h, count, csv, download, empty, fixed, isKnown, ofPanel, pvalue, smallTable, words } from "../dom.js";
import { fitted } from "../axis.js";
import { histogram, representationLegend, scoreLines } from "../charts_run.js";
import { legend } from "../colour.js";
import { json, NotThere, overview } from "../data.js";
import { Features } from "../features.js";
import { probeFeature, signed } from "../probe_features.js";
import { bar, classOf, featureLink, nameOf } from "../ranked.js";
import { href, labelHref } from "../state.js";

const BLUE = "#0072b2", GREY = "#7f8790", ALPHA = 0.05;

const nameIn = (id) => (id ?? "").slice((id ?? "").indexOf(":") + 1);
export const title = ({ id }) => nameIn(id) || "Labels";

export async function show(root, { id }) {
  const about = await overview();
  if (!about.labels.length) {
    root.append(h("h1", {}, "Labels"), empty({ table: "feature_label", command: about.missing.feature_label }, "No feature was tested for a label yet."));
    return {};
  }
  const place = about.labels.findIndex(({ label_kind: kind, label }) => `${kind}:${label}` === id);
  if (!id) { root.append(h("h1", {}, "Labels"), every(about.labels)); return {}; }
  if (place < 0) throw new NotThere(`No feature was tested for a label “${nameIn(id)}”; Search lists the labels that there are.`);
  const [found, features] = await Promise.all([json(`label_pages/${place}.json`), Features.load()]);
  const panelOf = ofPanel(about);
  root.append(head(found, place, panelOf), h("div", { class: "label-columns" },
    h("div", {}, probePanel(found, panelOf), listPanel(found, features, "above")),
    h("div", {}, profilePanel(found, panelOf), alikePanel(found), listPanel(found, features, "below"))));
  return {};
}

// Every label, by its kind.
function every(labels) {
  const kinds = [...new Set(labels.map(({ label_kind: kind }) => kind))];
  return kinds.map((kind) => [h("h2", {}, words(kind)), h("ul", { class: "examples" }, labels.filter((one) => one.label_kind === kind).map(({ label }) => h("li", {}, h("a", { href: labelHref(kind, label) }, label))))]);
}

const panel = (name, ...content) => h("section", { class: "panel", "aria-label": name }, h("h2", {}, name), content);

function head({ label_kind: kind, label, cells, n_tested: n, above, below }, place, panelOf) {
  const of = (split) => (cells?.[split] ? `${count(cells[split].n)} of ${count(cells[split].n_all)} ${split} cells` : null);
  const donors = cells?.test?.n_donors;
  const parts = [["train", "select", "test"].map(of).filter(Boolean).join(", "), donors ? `its test cells are of ${count(donors)} ${donors === 1 ? "donor" : "donors"}` : null].filter(Boolean);
  return h("div", { class: "label-head" },
    h("h1", {}, label, " ", h("span", { class: "tag" }, words(kind))),
    h("p", {}, `Of ${count(n)} features, ${count(above.n)} have significantly larger codes in these cells than in others, and ${count(below.n)} smaller ones (q ≤ ${ALPHA} on test cells).`),
    parts.length ? h("p", { class: "quiet" }, `${parts.join("; ")}${panelOf}.`) : null,
    h("p", {}, h("a", { href: href("atlas", null, { color: `auroc:${place}` }) }, "Colour the Atlas by it"), " · ", h("a", { href: href("cells", null, { color: `label:${kind}`, a: `l${place}` }) }, "Its cells on the map"), " · ", h("a", { href: href("search", null, { q: label, pick: `label:${kind}` }) }, "All features, whether significant or not")));
}

function probePanel({ label, label_kind: kind, probe }, panelOf) {
  const name = "How few features tell it";
  if (probe.missing) return panel(name, empty(probe.missing, `No probe of ${words(kind)} was fitted yet: a probe says which few features, taken together and with signs, tell the cells of a label from the others.`));
  if (probe.too_few) return panel(name, h("p", { class: "quiet" }, `Too few cells have the label ${label} in one of the splits, so it was not probed.`));
  const { k, series, features } = probe, own = series.find(({ of }) => of === "sae")?.points ?? [], at = own.find((point) => point.k === k);
  const ks = [...new Set(series.flatMap(({ points }) => points.map((point) => point.k)))].sort((a, b) => a - b);
  const between = (low, high) => (isKnown(low) && isKnown(high) ? ` (95 % ${fixed(low, 3)} to ${fixed(high, 3)})` : "");
  return panel(name,
    h("p", { class: "label-probe" }, h("strong", {}, `${label} = `), features.map(probeFeature)),
    at ? h("p", {}, `These ${count(features.length)} features together: AUROC ${fixed(at.auroc, 3)}${between(at.auroc_low, at.auroc_high)} on test cells, balanced accuracy ${fixed(at.balanced_accuracy, 3)}.`) : null,
    smallTable(["feature", "genes", { text: "weight", class: "number", title: "In logits per standard deviation; below 0 the feature says that a cell is of another label" }, { text: "gain", class: "number", title: "AUROC on test cells that it adds to the features before it" }],
      features.map((row) => [featureLink(row.feature_id), row.name || null, signed(row.weight), signed(row.gain)]), { numeric: [2, 3], caption: "In the order in which a lasso lets them in; + more of it, − less of it" }),
    representationLegend(series.map(({ of }) => of)),
    fitted((width) => scoreLines(width, { ks, series: series.map(({ of, points }) => ({ of, points: points.map((point) => ({ k: point.k, value: point.auroc, low: point.auroc_low, high: point.auroc_high })) })), xTitle: "features", yTitle: "AUROC, test cells", label: `AUROC of probes of ${label} by number of features: ${own.map((point) => `${fixed(point.auroc, 3)} with ${point.k}`).join(", ")}` })),
    h("p", { class: "quiet" }, `The features are chosen on train cells and tuned on select cells${panelOf}. Permuted labels show what chance gives.`));
}

function listPanel({ label, units, above, below }, features, side) {
  const { n, rows } = side === "above" ? above : below, name = side === "above" ? "Features that stand for it" : "Features that are weaker in it";
  if (!rows.length) return panel(name, h("p", { class: "quiet" }, `No feature has ${side === "above" ? "larger" : "smaller"} codes in cells with ${label} at q ≤ ${ALPHA} on test cells.`));
  const heads = [{ text: "id", class: "number", title: "Feature" }, "genes, best label", { text: "class", class: "wide" }, { text: "AUROC", class: "number", title: "On test cells" }, { text: "0 to 1", class: "bar-head", title: "Bar: test cells; line: select cells" }, { text: "95 %", class: "number wide", title: `Interval of the AUROC across ${units}, on test cells` }, { text: "q", class: "number", title: "Benjamini-Hochberg over all features and the labels of a kind" }, { text: "agree", class: "number wide", title: `Of the ${units} that can be compared, those whose effect has the same sign` }];
  const cells = rows.map((row) => [
    { text: featureLink(row.feature_id), class: "number" }, { text: nameOf(row.feature_id, features), class: "found-name" }, { text: classOf(row.feature_id, features), class: "wide nowrap" },
    { text: fixed(row.auroc, 3), class: "number" }, bar(row.auroc, { range: [0, 1], zero: 0.5, mark: row.auroc_select, isSure: true }),
    { text: isKnown(row.low) ? `${fixed((1 + row.low) / 2, 2)} to ${fixed((1 + row.high) / 2, 2)}` : "–", class: "number wide" }, { text: pvalue(row.q), class: "number" },
    { text: isKnown(row.n_agree) && isKnown(row.n_donors) ? `${row.n_agree} of ${row.n_donors}` : "–", class: "number wide" },
  ]);
  const shown = n > rows.length ? `The best ${count(rows.length)} of ${count(n)}` : n === 1 ? "The only one" : `All ${count(n)}`;
  return panel(name,
    h("p", { class: "quiet" }, `${shown}, at q ≤ ${ALPHA} on test cells. They are ranked on select cells: significant ones first, then by the bound of the interval over ${units} that lies nearer to chance, and by AUROC where too few ${units} give an interval.`),
    smallTable(heads, cells, { caption: `${name}: ${label}` }),
    h("p", { class: "found-save" }, h("button", { type: "button", onclick: () => download(`features-${label.replace(/[^\w.+-]+/g, "_")}-${side}.csv`, csv(Object.keys(rows[0]), rows.map(Object.values))) }, "CSV")));
}

function profilePanel({ label, profile }, panelOf) {
  const n = profile.significant.length, edges = Array.from({ length: n + 1 }, (_, i) => profile.low + ((profile.high - profile.low) * i) / n);
  const stacks = [{ name: `q ≤ ${ALPHA}`, colour: BLUE, counts: profile.significant }, { name: "not significant", colour: GREY, counts: profile.other }];
  return panel("Its profile over all features", legend(stacks.map(({ name, colour }) => ({ name, colour })), { label: "Features" }),
    fitted((width) => histogram(width, { edges, stacks, xTitle: `AUROC for ${label}, test cells`, yTitle: "features", at: { value: 0.5, name: "chance" }, label: `Histogram of the AUROC of all features for ${label}` })),
    h("p", { class: "quiet" }, `Above 0.5 the code of a feature is larger in cells with the label than in others${panelOf}.`));
}

function alikePanel({ label, label_kind: kind, alike }) {
  const name = "Labels with a similar profile";
  if (!alike.length) return panel(name, h("p", { class: "quiet" }, `No other ${words(kind)} was tested on test cells.`));
  return panel(name, smallTable([words(kind), { text: "r", title: "Pearson correlation of the AUROCs of all features, test cells" }], alike.map((row) => [h("a", { href: labelHref(kind, row.label) }, row.label), fixed(row.r, 2)]), { numeric: [1] }),
    h("p", { class: "quiet" }, `To the features, cells with these labels differ from the rest much as cells with ${label} do. Labels of a kind exclude each other, so most correlations are below 0.`));
}
