// Where the atlas comes from: data set, model, SAE, its training, and the runs behind every table.

import { h, count, empty, fixed, fmt, isKnown, percent, smallTable, words } from "../dom.js";
import { fitted } from "../axis.js";
import { CLASS, legend } from "../colour.js";
import { json } from "../data.js";
import { href } from "../state.js";
import { curve, histogram } from "../charts_run.js";

export const title = () => "Run";

export async function show(root) {
  const run = await json("run.json");
  root.append(h("h1", {}, `How this atlas was made: ${run.title}`),
    h("div", { class: "grid run-grid" }, dataPanel(run.data, run.sae), saePanel(run.sae), densityPanel(run.density, run.data), trainingPanel(run.training, run.sae)),
    provenancePanel(run));
  return {};
}

function panel(name, ...children) {
  return h("section", { class: "panel", "aria-label": name }, h("h2", {}, name), children);
}

// Names and values side by side; unknown values are left out.
function facts(entries) {
  return h("dl", { class: "run-facts" }, entries.filter(([, value]) => isKnown(value) && value !== "").map(([name, value, why]) => h("div", {}, h("dt", { title: why }, name), h("dd", {}, value))));
}

function dataPanel(data, sae) {
  if (data.missing) return panel("Data set", empty(data.missing, "No cells were read yet."));
  const kinds = [["n_cells", "cells"], ["donor", "donors"], ["batch", "batches"], ["cell_type", "cell types"]];
  const known = kinds.filter(([key]) => data.splits.at(-1)[key] > 0), drawnPanel = data.panel;
  const heads = [...(drawnPanel ? ["cells"] : []), ...known.map(([key, name]) => (drawnPanel && key === "n_cells" ? "panel" : name))];
  return panel("Data set",
    facts([["Name", data.dataset], ["Genes", count(data.n_genes)], ["Labels of cells", data.label_columns.map(words).join(", ")], ...(drawnPanel ? [["Cells", count(drawnPanel.n_cells)], ["Panel", `${count(drawnPanel.n_panel)} of ${count(drawnPanel.n_cells)} cells`, "The cells that have all their codes"]] : [])]),
    smallTable(["split", ...heads], data.splits.map((row) => [row.split, ...(drawnPanel ? [count(row.n_of_all)] : []), ...known.map(([key]) => count(row[key]))]), { numeric: heads.map((_, i) => i + 1), caption: drawnPanel ? "Cells of each split, those in the panel that have tokens, and how many donors, batches and types these are of" : "Cells of each split, and how many donors, batches and types they are of" }),
    drawnPanel ? h("p", { class: "quiet" }, `The panel was drawn at random${drawnPanel.drawn.strata.length ? ` inside strata of ${drawnPanel.drawn.strata.map(words).join(", ")}` : ""}, so that rare strata are in it too (seed ${drawnPanel.drawn.seed}). Associations, classes, maps and densities are of the panel. The cells and tokens with the largest codes of a feature, and the number of cells in which it fires, are of all cells; of a cell outside the panel the ${isKnown(drawnPanel.keep) ? `${count(drawnPanel.keep)} ` : ""}largest codes are kept.`) : null,
    h("p", { class: "quiet" }, sae.imported ? "The SAE was imported, and the cells of its training are not known; features are chosen on select cells; figures are of test cells." : "The SAE was trained on train cells; thresholds and features are chosen on select cells; figures are of test cells.", data.splits.at(-1).donor ? "" : " No donor is known, so batches are used in place of donors."));
}

function saePanel(sae) {
  if (sae.missing) return panel("Model and SAE", empty(sae.missing, "The SAE of these features is not in the store."));
  const { sae: shape = {}, train = {}, summary = {} } = sae;
  return panel("Model and SAE",
    facts([
      ["Model", sae.model], ["Site", sae.site, "The activation that the SAE reads"], ["Architecture", sae.control ? `baseline: ${sae.control}` : shape.arch],
      ["Features", count(shape.n_features)], ["Width of the model", isKnown(shape.d_model) ? `${count(shape.d_model)}` : null], ["k", shape.k, "Active features per token, as configured"],
      ["Steps", isKnown(train.n_steps) ? `${count(train.n_steps)} of ${count(train.batch_size)} tokens` : null], ["Seed", isKnown(train.seed) ? String(train.seed) : null],
      ["Imported from", sae.imported ? `${sae.imported.format}: ${[sae.imported.site, sae.imported.model].filter(Boolean).join(" of ") || "neither site nor model is named"}` : null, "The library that trained it, and what its files say"], ["Input", summary.imported?.input],
    ]),
    h("h3", {}, "Quality on held-out tokens"),
    facts([
      ["Unexplained variance (FVU)", isKnown(summary.test_fvu) ? `${percent(summary.test_fvu, 2)} on test, ${percent(summary.select_fvu, 2)} on select` : isKnown(summary.select_fvu) ? `${percent(summary.select_fvu, 2)} on select` : null, "0 is a perfect reconstruction"],
      ["Active features per token (L0)", isKnown(summary.select_l0) ? `${fixed(summary.select_l0, 1)} on select` : null],
      ["Embedding recovered", isKnown(summary.select_recovery) ? `${percent(summary.select_recovery)} of what ablation takes away${summary.recovery_cells ? `, on ${count(summary.recovery_cells)} cells of select` : ""}` : summary.missing?.select_recovery ?? summary.recovery_skipped, "1 - MSE of the cells' embeddings with the reconstruction in place of the activations / the same with zeros"],
      ["Model's loss", isKnown(summary.select_loss_x_hat) ? `${fmt(summary.select_loss_whole)} as it is, ${fmt(summary.select_loss_x_hat)} with the reconstruction, ${fmt(summary.select_loss_ablated)} ablated` : null, "The model's own pretraining loss on hidden genes of these cells"],
      ["Silent features", isKnown(summary.select_dead_fraction) ? silent(summary, shape.n_features) : null, "A feature that is silent on these tokens may fire on others; one that fires on no token of the data set is dead"],
      ["Threshold (theta)", isKnown(summary.theta) ? `${fmt(summary.theta)}, ${sae.imported ? "as it was imported" : "set on select"}` : null, "What a feature has to exceed to count as active, in units of the activations"],
    ]),
    (summary.findings ?? []).length ? [h("h3", {}, sae.imported ? "Warnings of the import" : "Warnings of the training"), h("ul", {}, summary.findings.map((one) => h("li", {}, one.message ?? String(one))))] : null);
}

const CURVES = [
  ["mse", "Reconstruction error", "Mean squared error of the reconstruction; it should fall and level off."],
  ["loss", "Loss", "The sum of all terms; it jumps where the auxiliary loss revives dead features."],
  ["l0", "Active features a token (L0)", "Topk and batchtopk hold it at k; the other architectures learn it."],
  ["n_dead", "Dead features", "Features that have not fired for many tokens; a rising curve means lost capacity."],
  ["theta", "Threshold (theta)", "Running estimate of the smallest active value, in the units of training; the threshold in use is calibrated on select tokens."],
];

function trainingPanel(training, sae) {
  if (training.missing) return panel("Training", empty(training.missing, "There is no SAE, so no training to show."));
  const xs = training.step ?? [];
  if (!xs.length) return panel("Training", h("p", { class: "quiet" }, sae.imported ? "It was imported, and its training is not known here." : sae.control ? `A baseline (${sae.control}) is fitted without steps.` : "The training recorded no figures."));
  const drawn = CURVES.filter(([key]) => training[key]?.some(isKnown));
  return h("section", { class: "panel run-training", "aria-label": "Training" }, h("h2", {}, "Training"),
    h("div", { class: "run-curves" }, drawn.map(([key, name, why]) => h("figure", {},
      h("figcaption", {}, h("strong", {}, name), `, at the end ${fmt(training[key].at(-1))}`, h("div", { class: "quiet" }, why)),
      fitted((width) => curve(width, { xs, ys: training[key], label: `${name} over ${count(xs.at(-1))} steps, at the end ${fmt(training[key].at(-1))}` }))))));
}

// Features that fire on none of the select tokens on which the SAE was measured.
function silent({ select_dead_fraction: fraction, select_tokens: tokens }, n) {
  const counted = isKnown(n) ? `${count(Math.round(fraction * n))} of ${count(n)}` : percent(fraction);
  return `${counted} on ${isKnown(tokens) ? `the ${count(tokens)} select tokens measured` : "select tokens"}`;
}

function densityPanel(density, { panel: drawnPanel }) {
  if (density.missing) return panel("How often features fire", empty(density.missing, "There are no associations yet."));
  const stacks = density.classes.map(({ class: name, counts }) => ({ name, counts, colour: CLASS[name] ?? "#8a8a8a", n: counts.reduce((a, b) => a + b, 0) }));
  const dead = density.n_dead ? h("a", { href: href("atlas", null, { class: "dead" }) }, `${count(density.n_dead)} ${density.n_dead === 1 ? "is" : "are"} dead`) : "none is dead, as each fires on some token of the data set";
  return panel("How often features fire",
    h("p", {}, `Of ${count(density.n_features)} features `, dead, density.quartiles ? `; half of ${density.n_dead ? "the others" : "them"} fire on ${percent(density.quartiles[0], 2)} to ${percent(density.quartiles[2], 2)} of ${drawnPanel ? "the panel's" : "all"} tokens.` : "."),
    density.edges.length ? [
      fitted((width) => histogram(width, { edges: density.edges, stacks, xTitle: "log10 of density (share of tokens on which a feature fires)", yTitle: "features", label: `Histogram of the density of ${count(density.n_features - density.n_dead)} features by class`, height: 230 })),
      legend(stacks.map(({ name, colour, n }) => ({ name, colour, n })), { label: "Classes" }),
      h("p", { class: "quiet" }, "A second peak near 0 would be features that are always active; a peak far to the left, features that are too rare to be tested."),
    ] : h("p", { class: "quiet" }, "No feature fires."));
}

function provenancePanel(run) {
  const kinds = Object.entries(run.runs);
  return h("section", { class: "panel run-provenance", "aria-label": "Provenance" }, h("h2", {}, "Provenance"),
    h("div", { class: "grid" },
      h("div", {}, smallTable(["what", "run"], kinds.map(([kind, ids]) => [words(kind), h("code", {}, [ids].flat().join(", "))]), { caption: "Runs that this atlas reads" }),
        h("h3", {}, "Verify the hashes of these runs"), h("pre", {}, h("code", {}, run.verify.join("\n"))),
        h("p", { class: "quiet" }, "The id of a run is a hash of what determines its content (data, model, options, seed), so the same commands on the same data make runs with the same ids.")),
      h("div", {}, smallTable(["table", "manifest (SHA-256)"], Object.entries(run.manifests).map(([table, sha]) => [table, h("code", { title: sha }, sha.slice(0, 16))]), { caption: "The manifest of each table lists the hashes of its files" }))),
    h("h3", {}, "Plans: all options of every run"),
    Object.entries(run.plans).map(([kind, plan]) => h("details", {}, h("summary", {}, words(kind)), h("pre", {}, h("code", {}, JSON.stringify(plan, null, 2))))));
}
