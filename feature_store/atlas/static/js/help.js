// A short tour of the pages, and the glossary: what opens with "?".

import { h, clear } from "./dom.js";
import { href } from "./state.js";

const TOUR = [
  ["atlas", "Atlas", "All features, on a map and in a table. Colour them by class, label or module, draw a lasso, and open one."],
  ["cells", "Cells", "The map of the cells. Colour it by a gene, a label or a feature, draw a lasso, and see which features distinguish the group."],
  ["modules", "Modules", "Groups of features that fire together, with the gene sets that they share."],
  ["search", "Search", "Type a gene, a label, a gene set or the id of a cell, from anywhere with the key /."],
  ["compare", "Compare", "What you keep on the page of a feature, side by side, with your notes; the address and a file hold the list."],
  ["batch", "Batch", "Which features tell batches apart and not cell types, and the command that steers with them."],
  ["steering", "Steering", "What happened to the cells when features were changed inside the model, beside random changes."],
  ["controls", "Controls", "How far to trust all this: simpler representations, calibration, donors, other SAEs."],
  ["run", "Run", "The data, the model, the autoencoder, its training, and where every table comes from."],
];
const KEYS = [["/", "search"], ["?", "this page"], ["arrows, + and −, 0", "on a map: move, zoom, show all"], ["Shift and drag", "on a map: a lasso"], ["Ctrl and wheel", "on a map: zoom; without Ctrl after a click on it"], ["arrows, Enter", "in a table: choose a row, open it"]];
const TERMS = [
  ["feature", "One unit of the autoencoder. It fires on some tokens and is silent on others. It is never a gene."],
  ["token", "The position of one gene in the input of one cell. A model reads a cell as its tokens."],
  ["cell code", "How strongly a feature fires in a cell: its value on the cell's tokens, pooled as the codes say."],
  ["density", "The share of tokens on which a feature fires."],
  ["dead feature", "A feature that fires on no token of the data set."],
  ["train, select, test", "The three parts of the cells, apart by donor where donors are known. The autoencoder saw train cells; everything is chosen on select cells; every figure is of test cells, unless it says otherwise."],
  ["AUROC", "How often a cell with a label has a larger code than a cell without it. 0.5 is chance, 1 is always, 0 is never."],
  ["rank-biserial", "The same on a scale from −1 to 1: twice the AUROC, minus 1."],
  ["p, q", "p of one test; q is p corrected for the number of tests (Benjamini and Hochberg). A feature is named only at q ≤ 0.05 on test cells."],
  ["null", "What the same figure is where nothing is there to be found: permuted labels, random features, random directions."],
  ["lower bound", "The lower end of the interval over donors. Labels are ranked by it and not by the point estimate, because rare labels have large estimates by chance."],
  ["class of a feature", "gene-identity: it fires on tokens of some genes. cell-context: it follows a label of the cells. batch: it follows batches within cell types. mixed: none of these alone. dead: it never fires."],
  ["by expression, by identity", "A gene goes with a feature by expression if cells that express it have larger codes, and by identity if the feature fires on its tokens."],
  ["module", "Features that fire together beyond their rates, inside cell types and donors."],
  ["probe", "A logistic regression that tells the cells of a label with as few features as possible. A feature with a negative weight says that a cell is of another label."],
  ["panel", "Of a large data set, the cells that all statistics are of."],
  ["steering", "Features are changed while the model reads the cells, and what becomes of the cells is compared with random changes."],
  ["FVU, L0", "Of the autoencoder: the share of variance that its reconstruction misses, and the number of features that fire on a token."],
];

let dialog = null;

export function help() {
  dialog ??= make();
  if (!dialog.open) dialog.showModal();
}

function make() {
  const terms = h("dl", { class: "terms" }), close = () => made.close();
  const draw = (text) => clear(terms, TERMS.filter((term) => term.join(" ").toLowerCase().includes(text.trim().toLowerCase())).map(([term, means]) => h("div", {}, h("dt", {}, term), h("dd", {}, means))));
  const made = h("dialog", { class: "help", "aria-label": "Help" },
    h("div", { class: "help-head" }, h("h2", {}, "A short tour"), h("button", { type: "button", class: "tool", "aria-label": "Close the help", onclick: close }, "×")),
    h("p", {}, "A foundation model turns each gene of a cell into numbers. An autoencoder writes these numbers as a sum of a few features out of many. This atlas says what each feature goes with, how sure that is, and what happens when it is changed."),
    h("ol", { class: "tour" }, TOUR.map(([page, name, text]) => h("li", {}, h("a", { href: href(page), onclick: close }, name), ` ${text}`))),
    h("h2", {}, "Keys"), h("dl", { class: "keys" }, KEYS.map(([key, does]) => h("div", {}, h("dt", {}, h("kbd", {}, key)), h("dd", {}, does)))),
    h("h2", {}, "Glossary"), h("input", { type: "text", "aria-label": "Find a term in the glossary", placeholder: "find a term", oninput: (event) => draw(event.target.value) }), terms);
  draw("");
  document.body.append(made);
  return made;
}
