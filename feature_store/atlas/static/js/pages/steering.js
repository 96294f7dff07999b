// A steering run: its verdict, sliders over the measured points, the cells before and after, and figures beside nulls.

import { h, svg, clear, empty, fixed, fmt, count, ofPanel, pvalue, smallTable, words } from "../dom.js";
import { fitted, tickText } from "../axis.js";
import { CellMap, classOf, curve, forest, groups, shape, shapeOf } from "../charts_steering.js";
import { byCategory, colourOf, cssOf, legend, QUIET } from "../colour.js";
import { columns, json, NotThere, overview } from "../data.js";
import { boundsOf } from "../scatter.js";
import { go, href, setParams } from "../state.js";
import { ALL, hasDoses, pointText, ROLE, Run } from "../steering_run.js";

const TARGET = "#d55e00", TOWARD = "#0072b2";
const LEAST_CELLS = 10;
const MAPS = { pca: { text: "PCA", x: "pc1", y: "pc2", axes: { x: "PC 1", y: "PC 2" } }, umap: { text: "UMAP", x: "x", y: "y", axes: { x: "UMAP 1", y: "UMAP 2" } } };

export const title = () => "Steering";

export async function show(root, state) {
  const every = await json("steering.json");
  if (every.missing) {
    root.append(h("h1", {}, "Steering"), empty(every.missing, "This store has no steering run yet."));
    return {};
  }
  const own = state.id ?? every.runs[0].run;
  if (!every.runs.some(({ run }) => run === own)) throw new NotThere(`This atlas has no steering run “${own}”.`);
  const [document_, about] = await Promise.all([json(`steering/${own}.json`), overview()]);
  const page = new Steering(root, every.runs, new Run(document_), about);
  await page.update(state);
  return { update: (next) => page.update(next), close: () => page.close() };
}

class Steering {
  constructor(root, runs, run, about) {
    Object.assign(this, { runs, run, about, view: null, turn: 0 });
    this.counts = new Steps({ name: "n", label: "Features edited", onPick: (n) => setParams({ n, dose: null, after: null }, { replace: true }) });
    this.doses = new Steps({ name: "dose", label: "Dose", onPick: (dose) => setParams({ n: this.point.n_features, dose, after: null }, { replace: true }) });
    this.metric = h("select", { name: "metric", onchange: (event) => setParams({ metric: event.target.value }) }, run.metrics.map(({ name, words: said }) => h("option", { value: name }, said)));
    this.group = h("select", { name: "group", onchange: (event) => setParams({ group: event.target.value === ALL ? null : event.target.value }) }, [h("option", { value: ALL }, "all cells"), ...run.groupNames.map((name) => h("option", { value: name }, name))]);
    this.back = h("button", { type: "button", onclick: () => setParams({ n: null, dose: null, after: null }) }, "Back to the chosen point");
    this.verdict = h("section", { class: "verdict", "aria-live": "polite", "aria-label": "Verdict" });
    this.table = h("section", { class: "panel metric-table" });
    this.curves = h("section", { class: "panel" });
    this.forest = h("section", { class: "panel" });
    this.byGroup = h("section", { class: "panel" });
    this.more = h("section", { class: "panel" });
    // what figures of this page are of, for the files that they are saved to
    root.dataset.run = `steering ${run.run}`;
    root.append(this.head(), this.verdict, h("section", { class: "panel steer-controls", "aria-label": "Point and metric" }, this.picks(), this.counts.box, this.doses.box),
      this.mapPanel(), this.table, this.curves,
      h("div", { class: "steer-columns" }, h("div", {}, this.forest, this.featurePanel()), h("div", {}, this.byGroup, this.planPanel(), this.more)));
  }

  close() {
    this.before?.close();
    this.after?.close();
  }

  head() {
    const { run, runs } = this;
    const named = (one) => `${one.words}${one.chosen ? ` (${one.intervention}, ${pointText(one.chosen, hasDoses(one.points))})` : ""} · ${one.run.slice(0, 6)}`;
    const choose = h("select", { name: "run", onchange: (event) => go("steering", event.target.value) }, runs.map((one) => h("option", { value: one.run, selected: one.run === run.run }, named(one))));
    const chosen = run.chosen ? `${run.isSearched ? "Chosen on select cells" : "Requested"}: ${run.pointText(run.chosen)}. ` : "";
    return h("div", { class: "steer-head" },
      h("div", {}, h("h1", {}, run.words), h("p", { class: "quiet" }, `${chosen}All figures are of test cells${ofPanel(this.about)}.`)),
      h("label", {}, "Run", choose));
  }

  picks() {
    return h("div", { class: "picks" }, h("label", {}, "Metric", this.metric), this.run.groupNames.length ? h("label", {}, "Group", this.group) : null, this.back);
  }

  async update({ params }) {
    const { run } = this;
    Object.assign(this, { params, point: run.point(params), shownMetric: run.metric(params.metric), shownGroup: run.groupNames.includes(params.group) ? params.group : ALL });
    this.metric.value = this.shownMetric.name;
    this.group.value = this.shownGroup;
    this.back.disabled = !run.chosen || run.isChosen(this.point);
    if (this.point) this.drawSteps();
    this.drawVerdict();
    this.drawTable();
    this.drawCurves();
    this.drawForest();
    this.drawGroups();
    this.drawMore();
    await this.drawMaps();
  }

  drawSteps() {
    const { run, point, counts, doses } = this, own = run.doses(point.n_features), chosen = run.isSearched ? run.chosen : null;
    counts.set({ values: run.counts, value: point.n_features, chosen: chosen?.n_features, format: count, note: run.counts.length > 1 ? null : "One number of features was measured." });
    const alone = own.length === 1 && run.takesDose ? `With ${run.pointText({ ...point, dose: null })} only this dose was measured on test cells.` : null;
    doses.set({ values: own, value: point.dose, chosen: point.n_features === chosen?.n_features ? chosen.dose : undefined, format: tickText, note: run.takesDose ? alone : run.intervention === "ablate" ? "Ablation takes no dose." : "One dose was measured." });
    doses.box.hidden = run.intervention === "ablate";
  }

  drawVerdict() {
    const { kind, lines } = this.run.verdict(this.shownMetric, this.shownGroup, this.point);
    this.verdict.className = `verdict ${kind}`;
    clear(this.verdict, lines.map((line, i) => h("p", { class: i > 1 ? "quiet" : null }, line)));
  }

  // Every metric at the point, and the nulls where they were drawn.
  drawTable() {
    const { run, point, shownGroup, shownMetric } = this, isChosen = run.isChosen(point);
    const where = run.chosen ? run.pointText(run.chosen) : "the chosen point";
    const heads = ["Metric", "Better", "Before", "After", "Effect (95\u00a0%)", ...run.nulls.flatMap(({ name }) => [`${name} (95\u00a0%)`, "p"])];
    const rows = run.metrics.map((metric) => {
      const row = run.at(metric.name, shownGroup, point), beside = run.nullRows(metric.name, shownGroup), own = metric.name === shownMetric.name ? "current" : "";
      if (!row) return null;
      const link = h("a", { href: href("steering", run.run, { ...this.params, metric: metric.name }), "aria-current": own ? "true" : null }, metric.words);
      const nulls = run.nulls.flatMap(({ p }, i) => [{ text: beside[i] ? effectOf(beside[i]) : null, class: own }, { text: isChosen ? pvalue(row[p]) : null, class: `${own} ${isChosen && row[p] <= 0.05 ? "" : "quiet"}` }]);
      return [{ text: link, class: own }, { text: metric.better, class: `quiet ${own}` }, { text: fmt(row.effect === null ? null : row.value - row.effect), class: own }, { text: fmt(row.value), class: own }, { text: effectOf(row), class: own }, ...nulls];
    }).filter(Boolean);
    const draws = run.nulls.length ? `Nulls: mean of ${[...new Set(run.nulls.map((one) => one.n_draws))].join(" or ")} draws and its interval, at the chosen point only (${where})${isChosen ? "." : "; this is another point, so it has no p."}` : "No nulls were drawn.";
    const group = shownGroup === ALL ? "all cells together" : shownGroup;
    clear(this.table, h("h2", {}, `Every metric at ${point ? run.pointText(point) : "this run"}, ${group}`),
      h("p", { class: "quiet map-note" }, `${draws} A p above 0.05 is grey. No p is adjusted for the number of metrics.`),
      rows.length ? smallTable(heads, rows, { caption: "Metrics", numeric: heads.map((_, i) => i).filter((i) => i > 1) }) : h("p", { class: "quiet" }, "Nothing was measured here."));
  }

  drawCurves() {
    const { run, point, shownMetric, shownGroup } = this, drawn = [];
    const width0 = widthIn(this.curves), nulls = run.nullRows(shownMetric.name, shownGroup).filter(Boolean), unsteered = run.unsteered(shownMetric.name, shownGroup);
    for (const axis of point ? ["dose", "n_features"] : []) {
      const other = axis === "dose" ? "n_features" : "dose";
      let at = point, rows = run.section(shownMetric.name, shownGroup, at, axis);
      if (rows.length < 2 && run.chosen) { at = run.chosen; rows = run.section(shownMetric.name, shownGroup, at, axis); }
      if (rows.length < 2) continue;
      if (axis === "n_features" && unsteered !== null && rows[0].n_features > 0) rows = [{ ...rows[0], n_features: 0, value: unsteered, effect: 0, low: 0, high: 0 }, ...rows];
      const onCurve = at[other] === point[other], hasChosen = run.chosen !== null && at[other] === run.chosen[other];
      const held = axis === "dose" ? `with ${run.pointText({ ...at, dose: null })}` : run.takesDose ? `at dose ${tickText(at.dose)}` : "";
      const xTitle = axis === "dose" ? "dose" : "features edited";
      const inside = [h("h3", {}, `Over ${axis === "dose" ? "the dose" : "the number of features"} ${held}`),
        fitted((width) => curve(width, { rows, axis, unsteered, nulls: hasChosen ? nulls : [], now: onCurve ? point[axis] : null, chosen: hasChosen ? run.chosen[axis] : null, xTitle, yTitle: cut(shownMetric.words, 36), label: `${shownMetric.words} over ${xTitle} ${held}: ${rows.map((row) => `${fmt(row.value)} at ${tickText(row[axis])}`).join(", ")}` }), width0)];
      const trend = run.trends.find((one) => one.axis === axis);
      if (trend && shownMetric.name === run.headline && hasChosen && shownGroup === ALL) inside.push(h("p", { class: "quiet map-note" }, trendText(trend, xTitle)));
      drawn.push(h("div", {}, inside));
    }
    this.curves.hidden = !drawn.length;
    clear(this.curves, h("h2", {}, capital(shownMetric.words)), h("div", { class: "curves" }, drawn), this.curveKey(nulls));
  }

  curveKey(nulls) {
    const glyph = (...inside) => svg("svg", { class: "glyph chart", viewBox: "0 0 16 12", "aria-hidden": "true" }, inside);
    const entry = (mark, text) => h("li", {}, h("span", { class: "legend-entry" }, mark, h("span", {}, text)));
    return h("ul", { class: "legend", "aria-label": "Legend" },
      entry(glyph(svg("line", { x1: 0, x2: 16, y1: 6, y2: 6, class: "own-line" }), svg("circle", { cx: 8, cy: 6, r: 3.5, class: "own-dot" })), "steered, 95 % interval"),
      entry(glyph(svg("circle", { cx: 8, cy: 6, r: 5, class: "ring" })), "chosen on select cells"),
      entry(glyph(svg("line", { x1: 0, x2: 16, y1: 6, y2: 6, class: "guide" })), "unsteered"),
      nulls.map((row, i) => entry(glyph(svg("g", { class: "of-null" }, shape(shapeOf(i), 8, 6, 3.6, { class: "mark" }))), `${row.condition} (null, where it was drawn)`)));
  }

  // The point shown, the chosen one if it is another, and all that stands beside it.
  drawForest() {
    const { run, point, shownMetric, shownGroup } = this, rows = run.of(shownMetric.name, shownGroup).filter((row) => row.effect !== null);
    const own = rows.filter((row) => row.role === ROLE.grid).filter((row) => row.chosen || (point && row.n_features === point.n_features && row.dose === point.dose));
    const others = [ROLE.replace, ROLE.reconstruction, ROLE.baseline, ROLE.floor, ROLE.null].flatMap((role) => rows.filter((row) => row.role === role));
    const entries = [...own, ...others].map((row) => ({ ...row, name: this.nameOf(row), isNow: row.role === ROLE.grid && point !== null && row.n_features === point.n_features && row.dose === point.dose }));
    const about = [run.nulls.length ? "Nulls are grey squares; their interval is that of the mean over draws." : null, others.some((row) => row.role === ROLE.floor) ? "The floor is what sampling noise alone leaves." : null, others.some((row) => row.role === ROLE.baseline) ? "Baselines (diamonds) use the labels and no features." : null];
    clear(this.forest, h("h2", {}, "Comparison with nulls and baselines"),
      entries.length ? fitted((width) => forest(width, { rows: entries, title: `change in the ${cut(shownMetric.words, Math.floor((width - 150) / 8))}`, label: `Effect of each condition on the ${shownMetric.words}: ${entries.map((row) => `${row.name} ${fmt(row.effect)}`).join(", ")}` }), widthIn(this.forest)) : h("p", { class: "quiet" }, "No effect of this metric was measured here."),
      entries.length ? h("p", { class: "quiet map-note" }, about.filter(Boolean).join(" ")) : null);
  }

  nameOf(row) {
    if (row.role === ROLE.grid) return this.run.pointText(row);
    return row.role === ROLE.null ? `${row.condition} (${row.n_draws})` : row.condition;
  }

  drawGroups() {
    const { run, point, shownMetric } = this;
    const rows = run.groupNames.map((group) => {
      const row = run.at(shownMetric.name, group, point);
      return row && { group, before: run.unsteered(shownMetric.name, group), after: row.value, nulls: run.nullRows(shownMetric.name, group).map((one) => one?.value ?? null) };
    }).filter(Boolean).sort((a, b) => (b.before ?? 0) - (a.before ?? 0));
    this.byGroup.hidden = !rows.length;
    if (!rows.length) return;
    const of = run.question === "mix" ? words(run.kind) : "cell type";
    clear(this.byGroup, h("h2", {}, `By ${of} at ${run.pointText(point)}`),
      fitted((width) => groups(width, { rows, title: shownMetric.words, label: `${shownMetric.words} by ${of}, before and after: ${rows.map((row) => `${row.group} ${fmt(row.before)} to ${fmt(row.after)}`).join(", ")}` }), widthIn(this.byGroup)),
      h("p", { class: "quiet map-note" }, "Open circles are before steering, filled circles after. Grey marks are the means of the nulls at the chosen point."));
  }

  drawMore() {
    const { run, point } = this;
    if (!point) return clear(this.more, h("h2", {}, "Other points"), h("p", {}, "This run measured no point on test cells. Run it again:"), h("pre", {}, h("code", {}, run.command)));
    const { n, doses, command } = run.notMeasured(point), here = run.doses(point.n_features);
    const measured = run.takesDose ? `On test cells, ${run.pointText({ ...point, dose: null })} ${point.n_features === 1 ? "was" : "were"} measured at dose ${here.map(tickText).join(", ")}.` : `On test cells, ${run.counts.map(count).join(", ")} features were measured.`;
    const rest = n ? ` ${n} more ${n === 1 ? "point" : "points"} of the grid ${n === 1 ? "was" : "were"} tried on select cells, to choose one, and not measured on test cells.` : "";
    return clear(this.more, h("h2", {}, "What was not measured"), h("p", {}, `${measured}${rest}${run.counts.length > 1 || here.length > 1 ? " The sliders cover the measured points." : ""} ${doses.length ? "This command measures these doses too" : "Another point needs another run, for example"}:`), h("pre", {}, h("code", {}, command)));
  }

  featurePanel() {
    const { run } = this, hasScore = run.features.some((feature) => "score" in feature && feature.score !== null);
    const heads = ["", "Feature", ...(hasScore ? ["Score"] : []), "Top genes", "Top label", "Class"];
    const rows = run.features.map((feature, i) => [String(i + 1), h("a", { href: href("feature", feature.feature_id) }, String(feature.feature_id)), ...(hasScore ? [fmt(feature.score)] : []), (feature.top_genes ?? "").split(" ").slice(0, 3).join(" ") || null, feature.top_label ?? null, feature.class ?? null]);
    const why = run.features_given ? "given by hand" : "the best on select cells first; a smaller number uses the first of them";
    return h("section", { class: "panel" }, h("h2", {}, "Features used"), h("p", { class: "quiet map-note" }, `${count(rows.length)} features, ${why}.${hasScore ? " The score is of select cells, in units of the feature's code, or the rank-biserial where features of one label are edited." : ""}`),
      h("div", { class: "features-used" }, smallTable(heads, rows, { numeric: hasScore ? [0, 2] : [0] })));
  }

  planPanel() {
    return h("section", { class: "panel" }, h("h2", {}, "What was done"), h("dl", { class: "steer-plan" }, this.run.plan.map(({ name, text }) => [h("dt", {}, name), h("dd", {}, text)]), h("dt", {}, "Run"), h("dd", {}, h("code", {}, this.run.run))));
  }

  mapPanel() {
    const { run } = this, panel = h("section", { class: "panel", "aria-label": "Cells before and after" });
    if (run.map.missing) {
      panel.append(h("h2", {}, "Cells before and after"), empty(run.map.missing, "This run has no map of its cells yet, or fewer than 10 test cells have a label."));
      return panel;
    }
    const segment = (key) => h("button", { type: "button", "data-map": key, onclick: () => setParams({ map: key === "pca" ? null : key }) }, MAPS[key].text);
    this.mapButtons = ["pca", "umap"].map(segment);
    this.colouring = h("select", { name: "colour", onchange: (event) => setParams({ colour: event.target.value === "label" ? null : event.target.value }) });
    this.which = h("select", { name: "after", onchange: (event) => setParams({ after: event.target.value || null }) });
    this.captions = [h("figcaption", {}, "Before: unsteered"), h("figcaption", {})];
    this.boxes = [h("div", { class: "steer-map" }), h("div", { class: "steer-map" })];
    this.key = h("div", { class: "steer-key" });
    this.aboutCell = h("span", { class: "about-cell quiet" });
    this.mapNote = h("p", { class: "quiet map-note" });
    panel.append(h("h2", {}, "Cells before and after"),
      h("div", { class: "controls" }, h("span", { class: "segmented", role: "group", "aria-label": "Map" }, this.mapButtons), h("label", {}, "Colour", this.colouring), h("label", {}, "After", this.which)),
      h("div", { class: "maps" }, this.boxes.map((box, i) => h("figure", {}, this.captions[i], box))), h("div", { class: "map-foot" }, this.key, this.aboutCell), this.mapNote);
    return panel;
  }

  async drawMaps() {
    const { run, params, point } = this, own = ++this.turn;
    if (run.map.missing) return;
    this.cells ??= await columns(`steering/${run.run}/map.cols`);
    const shown = run.variants.filter((variant) => variant.on_map), here = run.variantAt(point);
    const variant = shown.find((one) => String(one.variant) === params.after) ?? (here?.on_map ? here : shown.find((one) => one.chosen) ?? shown[0]);
    const places = await columns(`steering/${run.run}/variants/${variant.variant}.cols`);
    if (own !== this.turn) return;
    this.startMaps();
    const kind = MAPS[params.map === "umap" ? "umap" : "pca"], { x0, x1, y0, y1 } = this.boundsFor(kind, places);
    for (const button of this.mapButtons) button.setAttribute("aria-pressed", String(MAPS[button.dataset.map] === kind));
    if (this.kind !== kind) { this.kind = kind; this.look(null); }
    [this.cells, places].forEach((table, i) => {
      const map = [this.before, this.after][i];
      map.points(table.get(kind.x).values, table.get(kind.y).values);
      Object.assign(map, { axes: kind.axes, bounds: { x0, x1, y0, y1 } });
    });
    this.places = places;
    this.fillChoices(shown, here, variant);
    this.captions[1].textContent = `After: ${variant.role === ROLE.grid ? `${run.intervention}, ${this.nameOf(variant)}` : variantName(variant)}`;
    const { arrows, crosses } = this.moves(kind, places);
    this.after.over(arrows, crosses);
    this.before.over([], crosses);
    this.colour();
    this.mapNote.textContent = this.noteOn(kind, places, variant);
    this.fetchBeside();
  }

  // The other doses of this number of features, before the slider gets there.
  fetchBeside() {
    const { run, point } = this;
    for (const dose of point ? run.doses(point.n_features) : []) {
      const variant = run.variantAt({ ...point, dose });
      if (variant?.on_map) columns(`steering/${run.run}/variants/${variant.variant}.cols`).catch(() => null);
    }
  }

  startMaps() {
    if (this.before) return;
    const onHover = (i) => this.hover(i), onView = (view) => this.look(view);
    [this.before, this.after] = this.boxes.map((box, i) => new CellMap(box, { label: `Test cells ${i ? "after" : "before"} steering`, axes: MAPS.pca.axes, onHover, onPick: onHover, onView }));
  }

  look(view) {
    this.before.view = view;
    this.after.view = view;
  }

  hover(i) {
    const { cells, places } = this;
    this.before.mark(i === null ? [] : [i]);
    this.after.mark(i === null ? [] : [i]);
    const gap = i === null ? null : places.get("gap")?.at(i);
    this.aboutCell.textContent = i === null ? "" : [`cell ${cells.get("cell_idx").at(i)}`, `${words(this.run.kind)} ${cells.get("label").at(i) ?? "unknown"}`, this.run.kind === "cell_type" ? null : `type ${cells.get("cell_type").at(i) ?? "unknown"}`, gap === null || gap === undefined ? null : `gap ${fixed(gap, 2)}`].filter(Boolean).join(" · ");
  }

  boundsFor(kind, places) {
    const [a0, a1, b0, b1] = this.run.map.bounds[kind === MAPS.umap ? "umap" : "pca"], own = boundsOf(places.get(kind.x).values, places.get(kind.y).values);
    return { x0: Math.min(a0, own.x0), x1: Math.max(a1, own.x1), y0: Math.min(b0, own.y0), y1: Math.max(b1, own.y1) };
  }

  fillChoices(shown, here, variant) {
    const others = shown.filter((one) => one.role !== ROLE.grid && one.role !== ROLE.unsteered);
    clear(this.which, here?.on_map ? h("option", { value: "" }, "this point") : null, others.map((one) => h("option", { value: String(one.variant) }, variantName(one))));
    this.which.value = variant === here ? "" : String(variant.variant);
    const sameColumn = this.run.kind === "cell_type";
    clear(this.colouring, h("option", { value: "label" }, words(this.run.kind)), sameColumn ? null : h("option", { value: "cell_type" }, "cell type"));
    this.colouring.value = this.params.colour === "cell_type" && !sameColumn ? "cell_type" : "label";
  }

  // Mean of each type of moved cells before, and after; the mean of the cells that they are moved toward.
  moves(kind, places) {
    const { cells, run } = this, moved = cells.get("moved").values, types = cells.get("cell_type"), labels = cells.get("label");
    const from = [cells.get(kind.x).values, cells.get(kind.y).values], to = [places.get(kind.x).values, places.get(kind.y).values];
    const isToward = (i) => run.toward !== null && labels.at(i) === run.toward, arrows = [], crosses = [];
    const toward = rowsWhere(cells.n, isToward), typeNames = new Set(rowsWhere(cells.n, (i) => moved[i] === 1).map((i) => types.at(i)));
    for (const name of typeNames) {
      const own = rowsWhere(cells.n, (i) => moved[i] === 1 && types.at(i) === name);
      if (own.length < LEAST_CELLS) continue;
      arrows.push({ name, from: meanOf(from, own), to: meanOf(to, own) });
      const same = toward.filter((i) => types.at(i) === name);
      if (same.length >= LEAST_CELLS) crosses.push({ name, at: meanOf(from, same) });
    }
    if (arrows.length && !crosses.length && toward.length >= LEAST_CELLS) crosses.push({ name: run.toward, at: meanOf(from, toward) });
    return { arrows, crosses };
  }

  colour() {
    if (!this.before || !this.places) return;
    const { run, cells } = this, column = cells.get(this.colouring.value), names = column.categories;
    const colourFor = (name, i) => (column.name === "label" && names.includes(run.target) ? { [run.target]: TARGET, [run.toward]: TOWARD }[name] ?? null : colourOf(i));
    const colours = names.map(colourFor), ink = byCategory(column.values, colours);
    const order = rowsWhere(cells.n, (i) => !colours[column.values[i]]).concat(rowsWhere(cells.n, (i) => Boolean(colours[column.values[i]])));
    for (const map of [this.before, this.after]) { map.colours(ink); map.order(order); }
    const counts = names.map((_, i) => rowsWhere(cells.n, (row) => column.values[row] === i).length);
    const entries = names.map((name, i) => ({ name, colour: colours[i], n: counts[i] })).filter(({ colour, n }) => colour && n);
    const rest = cells.n - entries.reduce((sum, { n }) => sum + n, 0);
    const glyph = (d, kind) => svg("svg", { class: "glyph", viewBox: "0 0 16 12", "aria-hidden": "true" }, svg("path", { d, class: kind }));
    const entry = (mark, text) => h("span", { class: "legend-entry" }, mark, h("span", {}, text));
    clear(this.key, legend(rest ? [...entries, { name: "others", colour: cssOf(QUIET()), n: rest }] : entries),
      this.after.arrows.length ? entry(glyph("M1 6L14 6M14 6L10 3M14 6L10 9", "arrow"), "mean of a cell type, before to after") : null,
      this.after.crosses.length ? entry(glyph("M3 1l10 10m0 -10l-10 10", "cross"), `mean of ${run.toward}`) : null);
  }

  noteOn(kind, places, variant) {
    const { run, cells } = this, moved = rowsWhere(cells.n, (i) => cells.get("moved").values[i] === 1);
    const limits = kind === MAPS.umap
      ? "The UMAP is computed from the unsteered cells, and a steered cell is placed among the nearest of them, so it cannot show a cell that moved away from all of them. The principal components can, as far as the cell moved along the first two."
      : "The principal components are those of the unsteered cells, and the steered cells are projected onto them. Movement off the first two is not visible.";
    const sampled = run.map.n_cells ? `${count(run.map.n_cells)} test cells, ${count(moved.length)} of them steered; both maps share their axes. ` : "";
    const gaps = places.get("gap");
    if (!gaps || variant.role === ROLE.unsteered || !moved.length) return `${sampled}${limits}`;
    return `${sampled}${limits} In all dimensions, the median steered cell lies ${fixed(medianOf(moved.map((i) => gaps.values[i])), 2)} times as far from its nearest unsteered cell as unsteered cells lie from each other (0: at the place of one of them).`;
  }
}

// A slider over a few values: labels below its stops, a mark at the one that was chosen on select cells.
class Steps {
  constructor({ name, label, onPick }) {
    this.said = h("output", { for: `step-${name}` });
    this.input = h("input", { type: "range", id: `step-${name}`, name, min: 0, step: 1, oninput: () => onPick(this.values[Number(this.input.value)]) });
    this.stops = h("div", { class: "stops", "aria-hidden": "true" });
    this.note = h("p", { class: "note quiet" });
    this.box = h("div", { class: "step" }, h("div", { class: "step-head" }, h("label", { for: `step-${name}` }, label), this.said), this.input, this.stops, this.note);
  }

  set({ values, value, chosen, format, note }) {
    const { input } = this, place = values.indexOf(value);
    this.values = values;
    Object.assign(input, { max: String(Math.max(values.length - 1, 0)), disabled: values.length < 2, hidden: values.length < 2 });
    input.value = String(place);
    const text = value === null ? "none" : format(value);
    input.setAttribute("aria-valuetext", value === chosen ? `${text}, chosen on select cells` : text);
    this.said.textContent = value === chosen ? `${text} · chosen` : text;
    this.note.textContent = note ?? "";
    clear(this.stops, values.length < 2 ? [] : values.map((one, i) => h("span", { class: `stop${one === chosen ? " chosen" : ""}`, style: { left: `calc(${i / (values.length - 1)} * (100% - 16px) + 8px)` } }, format(one))));
    this.stops.hidden = values.length < 2;
  }
}

// The width at which a chart of a panel was drawn last.
const widthIn = (panel) => panel.querySelector(".fitted")?.clientWidth || undefined;
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const cut = (text, most) => (text.length > most ? `${text.slice(0, Math.max(most, 8) - 1)}…` : text);
const variantName = ({ name, role }) => (role === ROLE.null ? `${name} (null, first draw)` : name);
const TINY = 1e-12;
const effectOf = ({ effect, low, high }) => [fmt(Math.abs(effect) < TINY ? 0 : effect), low === null || high === null ? null : h("span", { class: "range" }, ` (${fmt(low)} to ${fmt(high)})`)];

function trendText({ spearman, p, n_units: n }, axis) {
  return `Trend with ${axis}: Spearman ${fmt(spearman)}, ${p === null ? "no p" : `Page's p ${pvalue(p)}`}${n ? `, ${n === 1 ? "one unit" : `${count(n)} units (types, or types of a donor)`}` : ""}.`;
}

function rowsWhere(n, isOne) {
  const found = [];
  for (let i = 0; i < n; i++) if (isOne(i)) found.push(i);
  return found;
}

const meanOf = (columnsOf, rows) => columnsOf.map((values) => rows.reduce((sum, i) => sum + values[i], 0) / rows.length);

function medianOf(values) {
  const sorted = values.filter((x) => !Number.isNaN(x)).sort((a, b) => a - b), middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}
