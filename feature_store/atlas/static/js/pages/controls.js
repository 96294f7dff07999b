// How far to trust the atlas: the SAE beside its baselines, the distribution of p-values, whether donors agree, and
// which features another SAE has too. Every section says what its figures mean and what would be worrying.

import { h, count, empty, fixed, fmt, isKnown, ofPanel, percent, pvalue, smallTable, words } from "../dom.js";
import { fitted } from "../axis.js";
import { legend } from "../colour.js";
import { json, overview } from "../data.js";
import { href, labelHref } from "../state.js";
import { bars, dotRows, histogram, representationLegend, scoreLines } from "../charts_run.js";
import { probeFeature } from "../probe_features.js";

const STATISTICS = { auroc: "AUROC", pearson: "Pearson r", identity_f1: "F1 of firing at its tokens" };
const MOST_LABELS = 40;
const BLUE = "#0072b2", GREY = "#7f8790", ORANGE = "#d55e00";
const AGREEMENT = ["none", "< ½", "≥ ½", "all but 1", "all"];

export const title = () => "Controls";

export async function show(root) {
  const [controls, about] = await Promise.all([json("controls.json"), overview()]);
  root.append(h("h1", {}, "How far to trust this atlas"),
    h("p", { class: "controls-lead" }, "A claim about a feature can be trusted if simpler representations do not support it as well, if its p-value is calibrated, if donors agree, and if another SAE has the same feature. Everything here was chosen on select cells and is reported on test cells.", about.panel ? ` The cells are those${ofPanel(about)}.` : ""),
    baselinesPanel(controls.baselines), significancePanel(controls.significance, controls), calibrationPanel(controls.calibration, controls),
    donorsPanel(controls.donors, controls), stabilityPanel(controls.stability, controls), probesPanel(controls.probes));
  return {};
}

function panel(id, name, finding, ...children) {
  return h("section", { class: "panel controls-panel", id: `controls-${id}`, "aria-label": name }, h("h2", {}, name), finding ? h("p", { class: "controls-finding" }, finding) : null, children);
}

const reading = (means, worrying) => h("p", { class: "controls-reading quiet" }, h("strong", {}, "What it means: "), means, " ", h("strong", {}, "Worrying: "), worrying);
const signed = (x) => (isKnown(x) ? `${x < 0 ? "−" : "+"}${fixed(Math.abs(x))}` : "–");
const range = (low, high) => (isKnown(low) && isKnown(high) ? `[${signed(low)}, ${signed(high)}]` : "");
const kinds = (name) => (name === "gene" ? "genes" : name.endsWith("batch") ? "batches" : `${words(name)} labels`);

function baselinesPanel(of) {
  const name = "1. Does the SAE say more than its baselines?";
  if (of.missing) return panel("baselines", name, null, empty(of.missing, "The SAE was not compared with baselines. Without that comparison no feature is a finding, because a single neuron or a random direction may separate cell types as well."));
  const names = of.representations.map(({ representation }) => representation);
  return panel("baselines", name, verdict(of.summary),
    smallTable(["targets", "figure", "n", "SAE", "best baseline", "excess [95 %]", "SAE better", "most often best"], of.summary.map((row) => [kinds(row.target_kind), STATISTICS[row.statistic] ?? row.statistic, count(row.n), fixed(row.reference), fixed(row.best_baseline), h("span", { class: row.low > 0 ? null : "quiet" }, `${signed(row.mean_excess)} ${range(row.low, row.high)}`), percent(row.share_better, 0), row.most_often]), { numeric: [2, 3, 4, 5, 6], caption: "Means over targets of the best feature of each representation. The interval is over targets, which share cells: it shows how much the excess varies, not how certain it is." }),
    reading("the best feature of each representation is chosen on select cells and evaluated on test cells; the excess is the value of the SAE minus that of the best baseline.", "an excess at or below 0, because a neuron, a component or a random direction then does as well as the feature."),
    groupsOf(of.targets).map(([key, targets]) => targetFigures(key, targets, names)),
    h("div", { class: "controls-pair" }, of.counted.map((one) => h("figure", {}, h("figcaption", {}, `Excess over the best baseline of ${count(one.n)} ${kinds(one.target_kind)}, ${STATISTICS[one.statistic] ?? one.statistic}`),
      fitted((width) => histogram(width, { edges: edges(one.counts.length, one.low, one.high), stacks: [{ name: "targets", colour: BLUE, counts: one.counts }], xTitle: "SAE minus best baseline", yTitle: "targets", at: { value: 0, name: "no excess" }, label: `Histogram of the excess of ${one.n} targets` }))))),
    h("details", {}, h("summary", {}, "The representations"), smallTable(["representation", "features", "dead", "FVU", "L0", "recovery", "separate a label", "separate a batch", "match a gene set"], of.representations.map((row) => [row.representation, count(row.n_features), count(row.n_dead), fixed(row.fvu), fixed(row.l0, 1), fixed(row.recovery), shareOf(row.n_label, row.n_features), shareOf(row.n_batch, row.n_features), shareOf(row.n_gene_set, row.n_features)]), { numeric: [1, 2, 3, 4, 5, 6, 7, 8], caption: "A feature separates a label or a batch if q <= 0.05 and |rank-biserial| > 0.5 on test cells; FVU, L0 and recovery are of select cells" })),
    of.summary.length ? null : h("p", { class: "quiet" }, "No target was measured on both select and test cells."));
}

function verdict(summary) {
  const labels = summary.filter(({ statistic }) => statistic === "auroc");
  return labels.map((row) => {
    const isAbove = row.low > 0, isBelow = row.high < 0;
    const text = isAbove ? "is above" : isBelow ? "is below" : "is not clearly above";
    return `For ${count(row.n)} ${kinds(row.target_kind)} the SAE's best feature ${text} the best baseline: AUROC ${fixed(row.reference)} against ${fixed(row.best_baseline)}, excess ${signed(row.mean_excess)}${isKnown(row.low) ? ` ${range(row.low, row.high)}` : ""}. `;
  }).join("");
}

const shareOf = (n, all) => (isKnown(n) ? `${count(n)} (${percent(n / all, 0)})` : "–");

// Targets that are listed one by one, by kind and statistic.
function groupsOf(targets) {
  const groups = new Map();
  for (const target of targets) {
    const key = `${target.target_kind}\n${target.statistic}`;
    groups.set(key, [...(groups.get(key) ?? []), target]);
  }
  return [...groups];
}

function targetFigures(key, targets, names) {
  const [kind, statistic] = key.split("\n"), isLabel = statistic === "auroc", figure = STATISTICS[statistic] ?? statistic;
  const own = (target) => target.rows.find(({ excess, best }) => !isKnown(excess) && !best) ?? target.rows[0];
  const best = (target) => target.rows.find((row) => row.best);
  const sorted = [...targets].sort((a, b) => (own(b)?.test ?? 0) - (own(a)?.test ?? 0));
  const link = (target) => (isLabel ? labelHref(kind, target.target) : null);
  const dots = sorted.map((target) => ({ name: target.target, link: link(target), points: [...target.rows].reverse().map(({ representation, test }) => ({ of: representation, value: test })) }));
  const over = sorted.map((target) => { const row = best(target); return { name: target.target, link: link(target), points: row ? [{ of: row.representation, value: row.excess, low: row.low, high: row.high }] : [] }; });
  const values = dots.flatMap(({ points }) => points.map(({ value }) => value)).filter(isKnown);
  const reach = Math.max(0.1, ...over.flatMap(({ points }) => points.flatMap(({ value, low, high }) => [value, low, high].filter(isKnown).map(Math.abs)))) * 1.1;
  const least = Math.min(0.5, ...values), most = Math.max(statistic === "auroc" ? 1 : 0.5, ...values);
  return h("div", { class: "controls-targets" },
    h("h3", {}, `${kinds(kind)}: ${figure} on test cells`), representationLegend(names),
    h("div", { class: "controls-pair" },
      h("figure", {}, h("figcaption", { class: "quiet" }, "The best feature of each representation"), fitted((width) => dotRows(width, { rows: dots, domain: [Math.max(0, least - 0.03), most + 0.01], title: `${figure}, test cells`, zero: statistic === "auroc" ? 0.5 : null, label: `${figure} of the best feature of each representation for ${targets.length} ${kinds(kind)}; the same figures are in the table below` }))),
      h("figure", {}, h("figcaption", { class: "quiet" }, "SAE minus the best baseline (the marker shows which one), with the 95 % interval over donors where at least 3 can be compared"), fitted((width) => dotRows(width, { rows: over, domain: [-Math.min(1, reach), Math.min(1, reach)], title: "excess of the SAE", zero: 0, label: `Excess of the SAE over the best baseline for ${targets.length} ${kinds(kind)}` })))),
    h("details", {}, h("summary", {}, "The figures as a table"), smallTable(["label", "SAE feature", figure, "q", "best baseline", figure, "excess [95 %]", "donors better"], sorted.map((target) => {
      const mine = own(target), row = best(target);
      return [isLabel ? h("a", { href: labelHref(kind, target.target) }, target.target) : target.target, isKnown(mine?.feature_id) ? h("a", { href: href("feature", mine.feature_id) }, String(mine.feature_id)) : "–", fixed(mine?.test), mine && !(mine.q <= 0.05) ? h("span", { class: "quiet", title: "not significant" }, pvalue(mine.q)) : pvalue(mine?.q), row?.representation ?? "–", fixed(row?.test), row ? `${signed(row.excess)} ${range(row.low, row.high)}` : "–", row && row.n_units ? `${row.n_better} of ${row.n_units}` : "–"];
    }), { numeric: [2, 3, 5, 6, 7], caption: "Chosen on select cells, figures of test cells; a feature is named at q ≤ 0.05" })));
}

function significancePanel(of, { alpha, strong }) {
  const name = "2. How often is a random direction significant?";
  if (of.missing) return panel("significance", name, null, empty(of.missing));
  const shares = new Map(of.of.map(({ representation, rows }) => [representation, rows]));
  const own = shares.get("sae"), random = shares.get("random");
  const kindsOf = [...new Set(own.map(({ label_kind }) => label_kind))];
  const drawn = kindsOf.map((kind) => {
    const labels = own.filter(({ label_kind }) => label_kind === kind).sort((a, b) => b.significant - a.significant);
    const rows = labels.slice(0, MOST_LABELS).map(({ label }) => ({ name: label, link: labelHref(kind, label), points: ["random", "sae"].filter((one) => shares.has(one)).map((one) => ({ of: one, value: shares.get(one).find((row) => row.label_kind === kind && row.label === label)?.significant })) }));
    return h("figure", {}, h("figcaption", {}, words(kind), labels.length > MOST_LABELS ? ` (the first ${MOST_LABELS} of ${labels.length})` : ""), fitted((width) => dotRows(width, { rows, domain: [0, Math.max(alpha * 2, ...rows.flatMap(({ points }) => points.map(({ value }) => value ?? 0))) * 1.05], title: `share of features with q ≤ ${alpha}`, zero: alpha, label: `Share of features that are significant for each ${words(kind)}, in the SAE${random ? " and among random directions" : ""}` })));
  });
  const kind = kindsOf.find((one) => one !== "batch") ?? kindsOf[0];
  const mean = (rows, key) => { const known = rows.filter(({ label_kind }) => label_kind === kind).map((row) => row[key]); return known.reduce((a, b) => a + b, 0) / known.length; };
  const finding = kind && random ? `Of the SAE's features ${percent(mean(own, "significant"), 0)} are significant for a ${words(kind)} label on average, of random directions ${percent(mean(random, "significant"), 0)}; with an effect above ${strong} too (|rank-biserial|) ${percent(mean(own, "strong"), 1)} and ${percent(mean(random, "strong"), 1)}.`
    : kind ? `Of the SAE's features ${percent(mean(own, "significant"), 0)} are significant for a ${words(kind)} label on average.` : null;
  return panel("significance", name, finding,
    random ? representationLegend(["sae", "random"]) : empty({ command: of.command }, "Random directions were not tested, so it is not known how often any direction would be significant."),
    h("div", { class: "controls-pair" }, drawn),
    reading(`activations differ between cell types in nearly every direction, so a random direction differs too. Significance says that the code differs between cells with and without a label, not that the feature encodes the label. The dashed line is at ${alpha}.`, "random directions are significant as often as features. The effect size and section 1 then say more than q."));
}

function calibrationPanel(of, { alpha }) {
  const name = "3. Are the p-values calibrated?";
  if (of.missing) return panel("calibration", name, null, empty(of.missing));
  const figures = of.kinds.map((kind) => h("figure", {},
    h("figcaption", {}, h("strong", {}, words(kind.label_kind)), `: ${count(kind.n)} tests (features × ${count(kind.n_labels)} labels); p ≤ ${alpha} in ${count(kind.n_small)}, ${count(Math.round(alpha * kind.n))} expected without any effect; q ≤ ${alpha} in ${count(kind.n_claimed)}.`),
    fitted((width) => histogram(width, { edges: edges(of.bins, 0, 1), stacks: [{ name: "tests", colour: BLUE, counts: kind.counts }], xTitle: "p on test cells", yTitle: "tests", line: kind.n / of.bins, height: 190, label: `Histogram of ${kind.n} p-values of ${words(kind.label_kind)}; ${kind.n_small} are at most ${alpha}, ${Math.round(alpha * kind.n)} expected by chance` }))));
  return panel("calibration", name, null,
    h("div", { class: "controls-pair" }, figures.length ? figures : h("p", { class: "quiet" }, "No label was tested on test cells.")),
    reading("without any effect p is uniform (the dashed line). A peak at 0 above a flat distribution comes from real effects; a peak at 1 comes from features that rarely fire, for which no test can decide.", "a hump in the middle, a slope without a flat part, or a peak at 0 where no effect is possible."));
}

function donorsPanel(of, { alpha }) {
  const name = "4. Do donors agree?";
  if (of.missing) return panel("donors", name, null, empty(of.missing));
  const unit = of.unit === "batch" ? "batches" : "donors", n = of.units.test ?? 0;
  const finding = of.limit ?? `The test cells are of ${count(n)} ${unit}${of.unit === "batch" ? " (no donor is known, so batches are used)" : ""}. No p across them can be below ${fmt(2 ** (1 - n), 2)}.`;
  const figures = of.kinds.map((kind) => {
    const rows = of.agree.filter(({ label_kind }) => label_kind === kind.label_kind);
    const series = [[true, `q ≤ ${alpha}`, BLUE], [false, "not significant", GREY]].map(([claimed, text, colour]) => ({ name: text, colour, shares: agreement(rows.filter((row) => row.claimed === claimed)) }));
    return h("figure", {}, h("figcaption", {}, h("strong", {}, words(kind.label_kind)), `: all ${unit} agree in ${percent(kind.n_unanimous / kind.n_claimed, 0)} of ${count(kind.n_claimed)} claims; p across ${unit} is at most ${alpha} in ${count(kind.n_held)}.`),
      legend(series, { label: "Tests" }), fitted((width) => bars(width, { groups: AGREEMENT, series, yTitle: "share of tests", label: `Share of ${unit} that agree in sign, ${words(kind.label_kind)}` })));
  });
  return panel("donors", name, finding,
    figures.length ? h("div", { class: "controls-pair" }, figures) : h("p", { class: "quiet" }, `No claim can be checked in single ${unit}: none of them has cells with and without a label, or nothing is significant.`),
    of.unit ? reading(`whether the effect has the same sign in each of the ${unit} that have cells with and without a label; noise agrees as often as coin tosses do. p treats the cells of these ${unit} as exchangeable; p across ${unit} treats the ${unit} as the sample.`, `${unit} that agree on significant tests no more often than on the others. An effect of one donor alone is significant in p as well.`) : null);
}

// Shares of tests by how many units agree.
function agreement(rows) {
  const counts = AGREEMENT.map(() => 0);
  let all = 0;
  for (const { n_agree: k, n_donors: n, n: tests } of rows) {
    counts[k === n ? 4 : k === 0 ? 0 : k === n - 1 ? 3 : 2 * k < n ? 1 : 2] += tests;
    all += tests;
  }
  return counts.map((tests) => tests / Math.max(1, all));
}

function stabilityPanel(of, { stable }) {
  const name = "5. Does another SAE find the same features?";
  if (of.missing) return panel("stability", name, null, empty(of.missing, "No other SAE was matched with this one. Train an SAE with another seed and match the two: a feature that only one of them has is a product of its training."));
  const figures = of.others.map((other) => h("figure", {},
    h("figcaption", {}, h("strong", {}, other.other), ` by ${other.method}, ${count(other.compared)} features: ${percent(other.mutual, 0)} are mutual nearest, median similarity ${fixed(other.tested ? other.similarity_test : other.similarity, 2)}${other.tested ? " on test cells" : ""} (chance: ${fixed(other.null, 2)}); ${percent(other["beyond null"], 0)} beyond chance, ${percent(other.stable, 0)} mutual and at least ${stable}.`),
    legend([{ name: "mutual nearest", colour: BLUE }, { name: "one way only", colour: ORANGE }]),
    fitted((width) => histogram(width, { edges: edges(of.bins, 0, 1), stacks: [{ name: "mutual nearest", colour: BLUE, counts: other.counts.mutual }, { name: "one way only", colour: ORANGE, counts: other.counts["one way"] }], xTitle: "similarity with the nearest feature", yTitle: "features", at: { value: other.null_95, name: "95 % of chance" }, label: `Similarity of ${other.compared} features with their nearest in ${other.other}` }))));
  return panel("stability", name, null, h("div", { class: "controls-pair" }, figures),
    reading("the similarity of each feature with the nearest feature of the other SAE; chance is that with the nearest of directions (or permuted codes) without a counterpart. A feature with a mutual match far beyond chance does not depend on the seed.", "most similarities below the dashed line, or few mutual matches: such features are one of many possible decompositions of the same activations."));
}

function probesPanel(of) {
  const name = "6. How few features tell a label?";
  if (of.missing) return panel("probes", name, null, empty(of.missing, "It was not measured how many features it takes to tell the cells of a label from the others, nor how many neurons, components or genes."));
  return panel("probes", name, of.kinds.map(probeVerdict).join(" "),
    of.kinds.map((kind) => h("div", { class: "controls-targets" }, h("h3", {}, words(kind.label_kind)), representationLegend(kind.series.map((one) => one.of)),
      h("figure", { class: "controls-narrow" }, h("figcaption", { class: "quiet" }, "Macro-F1 on test cells against the number of features of each label's probe, with the 95 % interval over donors"),
        fitted((width) => scoreLines(width, { ks: kind.ks, series: kind.series.map(({ of: one, points }) => ({ of: one, points: points.map((row) => ({ k: row.k, value: row.macro_f1, low: row.macro_f1_low, high: row.macro_f1_high })) })), xTitle: "features", yTitle: "macro-F1, test cells", label: `Macro-F1 of probes of ${words(kind.label_kind)} with ${kind.ks.join(", ")} features; the same figures are in the table below` }))),
      h("details", {}, h("summary", {}, "The figures as a table"), smallTable(["representation", ...kind.ks.map((k) => `${k}`)], kind.series.map(({ of: one, points }) => [one, ...points.map((row) => `${fixed(row.macro_f1, 2)} ${isKnown(row.macro_f1_low) ? `[${fixed(row.macro_f1_low, 2)}, ${fixed(row.macro_f1_high, 2)}]` : ""}`)]), { numeric: kind.ks.map((_, i) => i + 1), caption: "Macro-F1 on test cells by number of features" })),
      smallTable(["label", `the ${count(kind.k)} features of its probe: more of it (+), less of it (−)`, "AUROC [95 %]", "balanced accuracy"], kind.labels.map((row) => [h("a", { href: labelHref(kind.label_kind, row.label) }, row.label), h("span", {}, row.features.map(probeFeature)), `${fixed(row.auroc)} ${isKnown(row.auroc_low) ? `[${fixed(row.auroc_low)}, ${fixed(row.auroc_high)}]` : ""}`, fixed(row.balanced_accuracy)]), { numeric: [2, 3], caption: `Features in the order in which a lasso lets them in; figures of test cells` }))),
    reading("for each label, a sparse logistic regression chooses features on train cells, is tuned on select cells and evaluated on test cells; every representation is treated alike. Permuted labels show what chance gives.", "neurons, components or genes that reach the same score with as few features, or permuted labels that do."));
}

// Where the SAE needs fewer features than each of the others, and where not.
function probeVerdict({ label_kind: kind, ks, series }) {
  const at = (of, k) => series.find((one) => one.of === of)?.points.find((row) => row.k === k);
  const rivals = series.map(({ of }) => of).filter((of) => of !== "sae" && of !== "permuted labels");
  const first = ks[0], own = at("sae", first);
  if (!rivals.length || !own) return `No other representation was probed for ${words(kind)}.`;
  const best = rivals.map((of) => [of, at(of, first)?.macro_f1 ?? -1]).sort((a, b) => b[1] - a[1])[0];
  return `With ${first === 1 ? "one feature" : `${first} features`} a label, ${words(kind)} is told with macro-F1 ${fixed(own.macro_f1, 2)} by the SAE and ${fixed(best[1], 2)} by ${best[0]}.`;
}

const edges = (n, low, high) => Array.from({ length: n + 1 }, (_, i) => low + ((high - low) * i) / n);
