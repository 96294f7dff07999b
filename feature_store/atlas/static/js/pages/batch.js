// Batch or biology: every feature by its batch effect and its cell-context effect, and a recipe to steer with some of them.

import { h, clear, empty, count, csv, download, fixed, ofPanel, percent, pvalue } from "../dom.js";
import { CLASS, css, legend, packed, QUIET } from "../colour.js";
import { columns, json, overview } from "../data.js";
import { Features } from "../features.js";
import { Scatter, polygonOf, polygonText } from "../scatter.js";
import { go, href, setParams } from "../state.js";
import { VirtualTable } from "../table.js";

const QUADRANTS = {
  batch: { text: "batch, not cell context", has: (up, right) => up && !right },
  both: { text: "both", has: (up, right) => up && right },
  context: { text: "cell context, not batch", has: (up, right) => !up && right },
  neither: { text: "neither", has: (up, right) => !up && !right },
};
const LEAST_RANGE = 0.3;
const UNNAMED = "#7f7f7f";
const MOST_TYPED = 400; // features of a command; more are for a recipe
const ASCENDING = new Set(["feature_id", "top_genes", "batch", "batch_q"]);

export const title = () => "Batch";

export async function show(root, state) {
  const [about, facts] = await Promise.all([overview(), json("batch.json")]);
  if (facts.missing || !facts.n_measured) {
    const why = facts.missing ? facts.why : "No feature has both a batch effect and a cell-context effect. Both need cell types: run scsae associate again with them.";
    root.append(h("h1", {}, "Batch or biology?"), empty(facts.missing ?? { table: "features" }, why));
    return {};
  }
  const [features, best] = await Promise.all([Features.load(), columns("batch.cols")]);
  const page = new Batch(root, about, facts, features, best);
  page.update(state);
  return { update: (next) => page.update(next), close: () => page.close() };
}

class Batch {
  constructor(root, about, facts, features, best) {
    Object.assign(this, { about, facts, features, params: {}, chosen: new Uint32Array(0), off: new Set() });
    for (const [key, name] of [["batch", "batch"], ["batch_auroc", "auroc"], ["batch_q", "q"]]) features.beside(key, best.get(name));
    this.batch = features.column("batch_effect").values;
    this.context = features.column("context_effect").values;
    this.living = Uint8Array.from(this.batch, (_, row) => features.at("dead", row) !== true && features.at("density", row) > 0 && this.batch[row] === this.batch[row] && this.context[row] === this.context[row]);
    this.most = { x: Math.max(LEAST_RANGE, largest(this.context, this.living)), y: Math.max(LEAST_RANGE, largest(this.batch, this.living)) };
    this.fields = { y: this.threshold("y", "Batch effect from"), x: this.threshold("x", "Context effect from") };
    this.quadrant = h("select", { name: "quad", onchange: (event) => setParams({ quad: event.target.value, lasso: null, off: null }) }, Object.entries(QUADRANTS).map(([key, { text }]) => h("option", { value: key }, text)));
    this.classes = features.column("class");
    this.status = h("span", { role: "status", "aria-live": "polite" });
    this.clearLasso = h("button", { type: "button", onclick: () => setParams({ lasso: null, off: null }) }, "Clear lasso");
    this.restore = h("button", { type: "button", onclick: () => setParams({ off: null }) }, "Check all again");
    this.steering = h("section", { class: "panel batch-steer", "aria-label": "Steer with these features" });
    this.none = h("p", { class: "batch-none" }, "No feature lies in this part. Lower a threshold, choose another part, or draw a lasso around dots.");
    const plot = h("div", { class: "batch-plot" }), list = h("div", { class: "batch-table" }, this.none);
    root.append(...this.head(),
      h("div", { class: "controls" }, h("label", {}, "Explained by", this.quadrant), this.fields.y.label, this.fields.x.label,
        h("button", { type: "button", title: "The thresholds by which features are classed", onclick: () => setParams({ x: null, y: null, lasso: null, off: null, quad: null }) }, "As the classes")),
      h("div", { class: "batch" },
        h("div", { class: "batch-left" }, plot, this.classKey()),
        h("div", { class: "batch-right" }, h("div", { class: "batch-list-head" }, h("h2", {}, this.status), this.clearLasso, this.restore), list,
          h("p", { class: "quiet batch-note" }, this.note())),
        this.steering));
    this.plot = new Scatter(plot, { label: "Features by batch effect and cell-context effect", equal: false, axes: { x: "explained by cell context, within batches", y: "explained by batch, within cell types" }, tip: (row) => this.about_(row), onHover: (row) => this.mark(row), onPick: (row) => this.open(row), onLasso: (polygon) => setParams({ lasso: polygonText(polygon), off: null }) });
    this.plot.points(this.context, this.batch);
    this.plot.bounds = { x0: 0, x1: this.most.x, y0: 0, y1: this.most.y };
    this.table = new VirtualTable(list, { label: "Chosen features. Space checks or unchecks a row, Enter opens it", columns: this.columns(), onSort: (key) => this.sortBy(key), onOpen: (row) => this.open(row), onActive: (row) => this.mark(row) });
    this.clearLasso.before(this.table.more);
    this.table.scroller.addEventListener("keydown", (event) => {
      const row = this.table.indices[this.table.active];
      if (event.key !== " " || event.target !== this.table.scroller || row === undefined) return;
      event.preventDefault();
      this.toggle(features.ids[row]);
    });
  }

  close() {
    this.plot.close();
    this.table.close();
  }

  head() {
    const { facts } = this, n = facts.batches.length;
    return [h("h1", {}, "Batch or biology?"),
      h("p", { class: "batch-lead" }, `Each dot is a feature that fires. The vertical axis is the share of the rank variance of its code that the ${count(n)} batches explain within cell types; the horizontal axis is the share that cell type or another label explains within batches. Both are measured on train and select cells${ofPanel(this.about)}, as the classes are.`)];
  }

  note() {
    const { facts } = this;
    return facts.n_in_both > 1
      ? `A feature “goes with” the batch of its largest effect on select cells; AUROC and q are of test cells${this.about.panel ? " of the panel" : ""}, within cell types. A grey q is not significant.`
      : "No batch has both select and test cells, so no batch can be chosen on the former and tested on the latter.";
  }

  threshold(key, name) {
    const ask = (event) => setParams({ [key]: event.target.value, lasso: null, off: null }, { replace: true });
    const most = (Math.ceil(this.most[key] * 20) / 20).toFixed(2);
    const slider = h("input", { type: "range", min: 0, max: most, step: 0.01, "aria-label": `${name}, slider`, oninput: ask });
    const field = h("input", { type: "number", min: 0, max: 1, step: 0.01, name: key, onchange: ask });
    return { label: h("span", { class: "batch-threshold" }, h("label", {}, name, field), slider), set: (value) => { slider.value = value; if (document.activeElement !== field) field.value = value; } };
  }

  columns() {
    const { features } = this;
    const number = (key, head, title, format, more = {}) => ({ key, head, title, numeric: true, width: 70, cell: (row) => format(features.at(key, row)), ...more });
    const known = this.facts.n_in_both > 1;
    return [
      { key: "on", head: "use", width: 38, sortable: false, cell: (row) => this.box(features.ids[row]) },
      { key: "feature_id", head: "id", width: this.features.n > 9999 ? 66 : 54, numeric: true, cell: (row) => h("a", { href: href("feature", features.ids[row]), tabindex: -1, onclick: (event) => event.stopPropagation() }, String(features.ids[row])) },
      { key: "top_genes", head: "genes", cell: (row) => features.genes(row, 4) || "–" },
      number("batch_effect", "batch", "Share of the rank variance of the code that batch explains within cell types", (x) => fixed(x, 3), { width: 58 }),
      number("context_effect", "context", "Share that cell context explains within batches", (x) => fixed(x, 3), { width: 78 }),
      ...(known ? [
        { key: "batch", head: "goes with", title: "The batch that it goes with most on select cells, if q ≤ 0.05 on test cells", width: 92, spare: 2, cell: (row) => features.at("batch", row) ?? "–" },
        number("batch_auroc", "AUROC", "For the batch that it goes with most on select cells, on test cells, within cell types", (x) => fixed(x, 3), { spare: 4 }),
        { ...number("batch_q", "q", "Benjamini-Hochberg over all features and batches", pvalue, { spare: 3, width: 66 }), cell: (row) => significant(features.at("batch_q", row)) },
      ] : []),
      number("density", "density", "Share of tokens at which it fires", (x) => percent(x), { spare: 5, width: 74 }),
    ];
  }

  box(id) {
    return h("input", { type: "checkbox", tabindex: -1, checked: !this.off.has(id), "aria-label": `Use feature ${id}`, onclick: (event) => event.stopPropagation(), onchange: () => this.toggle(id) });
  }

  toggle(id) {
    const off = new Set(this.off);
    if (!off.delete(id)) off.add(id);
    this.table.scroller.focus({ preventScroll: true }); // the rows are drawn anew
    setParams({ off: [...off].join(".") }, { replace: true });
  }

  update({ params }) {
    const before = JSON.stringify([this.params.x, this.params.y, this.params.quad, this.params.lasso, this.params.sort]);
    this.params = params;
    this.x = share(params.x, this.facts.threshold);
    this.y = share(params.y, this.facts.threshold);
    this.quad = QUADRANTS[params.quad] ? params.quad : "batch";
    this.polygon = polygonOf(params.lasso);
    this.off = new Set((params.off ?? "").split(".").filter(Boolean).map(Number));
    this.fields.x.set(this.x);
    this.fields.y.set(this.y);
    this.quadrant.value = this.quad;
    const isSame = this.drawn && before === JSON.stringify([params.x, params.y, params.quad, params.lasso, params.sort]);
    if (!isSame) this.choose();
    this.drawn = true;
    this.table.invalidate();
    this.told();
  }

  choose() {
    const { features, living, plot } = this, inside = new Uint8Array(features.n);
    plot.show(living);
    plot.polygon = this.polygon;
    if (this.polygon) for (const row of plot.inside(this.polygon)) inside[row] = 1;
    else {
      const { has } = QUADRANTS[this.quad];
      for (let row = 0; row < features.n; row++) inside[row] = living[row] && has(this.batch[row] >= this.y, this.context[row] >= this.x) ? 1 : 0;
    }
    const sort = this.params.sort ?? "-batch_effect";
    [this.sortKey, this.descending] = sort.startsWith("-") ? [sort.slice(1), true] : [sort, false];
    if (!this.columns().some(({ key, sortable }) => key === this.sortKey && sortable !== false)) [this.sortKey, this.descending] = ["batch_effect", true];
    this.chosen = features.listed(inside, this.sortKey, this.descending);
    this.table.sorted = { key: this.sortKey, descending: this.descending };
    this.table.rows(this.chosen);
    this.paint(inside);
    plot.lines = this.polygon ? [] : [{ axis: "x", at: this.x }, { axis: "y", at: this.y }];
    plot.invalidate();
  }

  // Chosen dots in the colour of their class, on top; the others pale.
  paint(inside) {
    const { values, categories } = this.classes, paper = css("--paper"), n = this.features.n;
    const full = [...categories.map((name) => packed(CLASS[name] ?? UNNAMED)), QUIET()], pale = [...categories.map((name) => packed(mixed(CLASS[name] ?? UNNAMED, paper, 0.62))), QUIET()];
    const ink = new Uint32Array(n), order = new Uint32Array(n);
    let low = 0, high = n;
    for (let row = n - 1; row >= 0; row--) {
      ink[row] = (inside[row] ? full : pale)[Math.min(values[row], categories.length)];
      if (inside[row]) order[--high] = row;
      else order[low++] = row;
    }
    this.plot.colours(ink);
    this.plot.order(order);
  }

  // The classes of what fires, and of how many features each is.
  classKey() {
    const { values, categories } = this.classes, n = categories.map(() => 0);
    for (let row = 0; row < values.length; row++) if (this.living[row] && values[row] < n.length) n[values[row]] += 1;
    return legend(categories.map((name, i) => ({ name, colour: CLASS[name] ?? UNNAMED, n: n[i] })).filter((one) => one.n), { label: "Classes of the features that fire" });
  }

  // The number of chosen features, and the panel to steer with them.
  told() {
    const ids = this.used, n = this.chosen.length;
    this.status.textContent = `${count(n)} ${n === 1 ? "feature" : "features"} ${this.polygon ? "in the lasso" : "chosen"}${ids.length < n ? `, ${count(ids.length)} checked` : ""}`;
    this.none.hidden = n > 0;
    this.clearLasso.hidden = !this.polygon;
    this.restore.hidden = ids.length === n;
    const isAsked = this.steering.contains(document.activeElement) && document.activeElement.name === "how";
    clear(this.steering, steerPanel(this, ids));
    if (isAsked) this.steering.querySelector("input[name=how]:checked").focus();
  }

  // Ids that are chosen and checked, in the order of the table.
  get used() {
    return Array.from(this.chosen, (row) => this.features.ids[row]).filter((id) => !this.off.has(id));
  }

  sortBy(key) {
    const descending = key === this.sortKey ? !this.descending : !ASCENDING.has(key);
    setParams({ sort: `${descending ? "-" : ""}${key}` }, { replace: true });
  }

  mark(row) { this.plot.mark(row === null ? [] : [row]); }

  // What is said of the feature under the pointer.
  about_(row) {
    const { features } = this;
    return [h("strong", {}, features.name(row)), h("div", {}, `${features.at("class", row) ?? "unclassified"} · ${features.at("top_label", row) ?? "no label at q ≤ 0.05"}`), h("div", { class: "quiet" }, `batch ${fixed(this.batch[row])} · context ${fixed(this.context[row])}`)];
  }

  open(row) { go("feature", this.features.ids[row]); }
}

// The steering run as a recipe and as a command.
function steerPanel(page, ids) {
  const { facts, about, params } = page;
  const inTest = facts.batches.filter(({ test }) => test > 0), known = inTest.filter(({ train, select }) => train + select > 0);
  const how = params.how === "shift" && known.length ? "shift" : "ablate";
  const question = { ids, how, run: facts.run, store: about.store, x: page.x, y: page.y, quad: page.quad, isLasso: page.polygon !== null };
  const isTooMany = ids.length > facts.most, isTyped = ids.length > 0 && ids.length <= Math.min(MOST_TYPED, facts.most);
  const choice = (value, name, text, disabled = false) => h("label", { class: "batch-choice" }, h("input", { type: "radio", name: "how", value, checked: how === value, disabled, onchange: () => setParams({ how: value }, { replace: true }) }), h("span", {}, h("strong", {}, name), ` ${text}`));
  const command = h("code", {}, isTyped ? commandOf(question) : "");
  const copied = h("span", { class: "quiet", role: "status" });
  return [
    h("h2", {}, !ids.length ? "Steer with what is chosen" : `Steer with ${ids.length === 1 ? "this feature" : `these ${count(ids.length)} features`}`),
    h("fieldset", {}, h("legend", { class: "quiet" }, "Intervention on these features, in all cells"),
      choice("ablate", "Ablate:", "set their codes to 0."),
      choice("shift", "Shift:", "add the difference between the mean code over batches and that of the cell's own batch.", !known.length)),
    h("p", { class: "quiet" }, "The run measures how well the batches mix and how well labels are conserved, beside its nulls. ", h("a", { href: href("steering") }, about.runs.steering.length ? "The Steering page shows the runs of this store." : "The Steering page will show the result.")),
    inTest.length < 2 ? h("p", { class: "batch-warning" }, `The test cells are of ${inTest.length} batch${inTest.length === 1 ? "" : "es"}, so scsae steer has no batches to mix. Extract the data with --split COLUMN, a column that puts cells of each batch into all splits.`) : null,
    inTest.length > 1 && known.length < inTest.length ? h("p", { class: "batch-warning" }, `${known.length ? `${count(inTest.length - known.length)} of ${count(inTest.length)}` : "None of the"} test batches ${known.length ? "have no" : "has"} train or select cells${known.length ? ", so their cells are not shifted" : ": shift has no mean codes to go by"}. Extract the data with --split COLUMN, a column that puts cells of each batch into all splits.`) : null,
    isTooMany ? h("p", { class: "batch-warning" }, `At most ${count(facts.most)} of the ${count(facts.n_firing)} features that fire can be steered, because the null needs as many other features. Raise a threshold.`) : null,
    h("div", { class: "controls" },
      h("button", { type: "button", class: "primary", disabled: !ids.length || isTooMany, onclick: () => download("batch-recipe.yaml", recipeOf(question), "application/yaml") }, "Export as steering recipe"),
      h("button", { type: "button", disabled: !isTyped, onclick: () => copy(command, copied) }, "Copy command"),
      h("button", { type: "button", disabled: !ids.length, onclick: () => save(page, ids) }, "CSV"), copied),
    ids.length && !isTooMany ? h("p", { class: "quiet" }, "Run the recipe with ", h("code", {}, `scsae run batch-recipe.yaml --store ${quoted(about.store)}`), isTyped ? ", or the same command in one line:" : ".") : null,
    isTyped ? h("pre", { class: "batch-command", tabindex: 0, "aria-label": "The equivalent command" }, command) : null,
  ];
}

// A recipe that `scsae run` takes: numbers and the run's id, no name of the data.
function recipeOf({ ids, how, run, x, y, quad, isLasso }) {
  const chosen = isLasso ? "drawn around on the batch page of the atlas" : `explained by ${QUADRANTS[quad].text}; from batch effect ${y}, cell-context effect ${x} on`;
  return [
    `# ${ids.length} features: ${chosen}`, "# scsae run batch-recipe.yaml --store ROOT",
    "steer:", ...(run ? [`  - associations: ${JSON.stringify(run)}`, "    kind: batch"] : ["  - kind: batch"]),
    "    target: all", `    intervention: ${how}`, `    feature: [${ids.join(", ")}]`, "",
  ].join("\n");
}

function commandOf({ ids, how, run, store }) {
  return ["scsae steer --store", quoted(store), ...(run ? ["--associations", run] : []), "--kind batch --target all --intervention", how, ...ids.map((id) => `--feature ${id}`)].join(" ");
}

// A word of a shell.
const quoted = (text) => (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

async function copy(code, said) {
  try {
    await navigator.clipboard.writeText(code.textContent);
    said.textContent = "copied";
  } catch {
    getSelection().selectAllChildren(code); // no clipboard without HTTPS: leave it selected
    said.textContent = "selected; copy it with Ctrl+C";
  }
}

function save({ features }, ids) {
  const names = ["feature_id", "class", "top_genes", "top_label", "batch_effect", "context_effect", "batch", "batch_auroc", "batch_q", "density"].filter((name) => features.has(name));
  download("batch_features.csv", csv(names, ids.map((id) => names.map((name) => features.at(name, features.rowOf.get(id))))));
}

function significant(q) {
  const isNot = q === null || q > 0.05;
  return h("span", { class: isNot ? "quiet" : null, title: q === null ? null : isNot ? "not significant (q > 0.05)" : null }, pvalue(q));
}

function share(text, otherwise) {
  const value = Number(text);
  return text !== undefined && text !== "" && value >= 0 && value <= 1 ? value : otherwise;
}

function largest(values, living) {
  let most = 0;
  for (let i = 0; i < values.length; i++) if (living[i] && values[i] > most) most = values[i];
  return most;
}

// A colour on its way to another, both "#rrggbb".
function mixed(from, to, share) {
  const parts = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const target = parts(to);
  return `#${parts(from).map((v, i) => Math.round(v + (target[i] - v) * share).toString(16).padStart(2, "0")).join("")}`;
}
