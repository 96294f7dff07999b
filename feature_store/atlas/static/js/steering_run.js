// One steering run: the points of the grid that were measured on test cells, the rows of a metric, and its verdict in words.

import { fmt, pvalue } from "./dom.js";
import { tickText } from "./axis.js";

export const ALL = "all";
// What a condition of a run is for: the column `role`, as in feature_store/query/steering.py.
export const ROLE = Object.freeze({
  unsteered: "unsteered", grid: "grid", replace: "replace", reconstruction: "reconstruction", null: "null", baseline: "baseline", baseline_dose: "baseline_dose",
  floor: "floor",
});
const ALPHA = 0.05;
const LEAST_NULLS = 20;
const plural = (n, noun) => `${n.toLocaleString("en")} ${noun}${n === 1 ? "" : "s"}`;
const listed = (names, last = "and") => (names.length < 2 ? names.join("") : `${names.slice(0, -1).join(", ")} ${last} ${names.at(-1)}`);
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

export const hasDoses = (points) => new Set(points.map((point) => point.dose)).size > 1;

export function pointText({ n_features: n, dose }, takesDose) {
  return takesDose && dose !== null ? `${plural(n, "feature")}, dose ${tickText(dose)}` : plural(n, "feature");
}

export class Run {
  constructor(about) {
    Object.assign(this, about);
    const names = Object.keys(about.rows).filter((name) => about.rows[name] !== null);
    const n = about.rows.metric.length;
    this.rows = Array.from({ length: n }, (_, i) => ({ low: null, high: null, effect: null, group: ALL, role: ROLE.grid, ...Object.fromEntries(names.map((name) => [name, about.rows[name][i]])) }));
    this.counts = [...new Set(this.points.map((point) => point.n_features))].sort((a, b) => a - b);
    this.isSearched = this.grid.length > 1;
    this.takesDose = hasDoses(this.points);
    this.groupNames = this.groups.filter((name) => name !== "" && name !== ALL);
  }

  // The measured point nearest to that in the address; the chosen one where the address names none.
  point({ n, dose } = {}) {
    if (!this.points.length) return null;
    const count = this.counts.includes(Number(n)) ? Number(n) : this.chosen?.n_features ?? this.counts.at(-1);
    const doses = this.doses(count), wanted = dose === undefined || Number.isNaN(Number(dose)) ? this.chosen?.dose ?? doses.at(-1) : Number(dose);
    return { n_features: count, dose: doses.reduce((best, one) => (Math.abs(one - wanted) < Math.abs(best - wanted) ? one : best), doses[0]) };
  }

  doses(count) {
    return this.points.filter((point) => point.n_features === count).map((point) => point.dose).sort((a, b) => a - b);
  }

  isChosen(point) {
    return Boolean(point && this.chosen) && point.n_features === this.chosen.n_features && point.dose === this.chosen.dose;
  }

  metric(name) {
    return this.metrics.find((metric) => metric.name === name) ?? this.metrics.find((metric) => metric.name === this.headline) ?? this.metrics[0];
  }

  of(metric, group) {
    return this.rows.filter((row) => row.metric === metric && row.group === group && row.value !== null);
  }

  at(metric, group, point) {
    return point && this.of(metric, group).find((row) => row.role === ROLE.grid && row.n_features === point.n_features && row.dose === point.dose) || null;
  }

  unsteered(metric, group) {
    return this.of(metric, group).find((row) => row.role === ROLE.unsteered)?.value ?? null;
  }

  // Of each null in its order, its row of a metric, or undefined.
  nullRows(metric, group) {
    const rows = this.of(metric, group).filter((row) => row.role === ROLE.null);
    return this.nulls.map(({ name }) => rows.find((row) => row.condition === name));
  }

  // Points that differ from one of these along `axis` alone, ascending.
  section(metric, group, point, axis) {
    const other = axis === "dose" ? "n_features" : "dose";
    return this.of(metric, group).filter((row) => row.role === ROLE.grid && row[other] === point[other]).sort((a, b) => a[axis] - b[axis]);
  }

  variantAt(point) {
    return point && this.variants.find((variant) => variant.role === ROLE.grid && variant.n_features === point.n_features && variant.dose === point.dose) || null;
  }

  pointText(point) {
    return pointText(point, this.takesDose);
  }

  // The points that were not measured on test cells, and the command that measures more.
  notMeasured(point) {
    const tried = this.grid.filter(([n, dose]) => !this.points.some((one) => one.n_features === n && one.dose === dose));
    const here = tried.filter(([n]) => n === point.n_features).map(([, dose]) => dose).sort((a, b) => a - b);
    return { n: tried.length, doses: here, command: this.commandFor(point, here) };
  }

  commandFor(point, doses) {
    const own = this.doses(point.n_features), i = own.indexOf(point.dose);
    const beside = i + 1 < own.length ? (own[i] + own[i + 1]) / 2 : (point.dose ?? 1) * 1.5;
    const measured = this.intervention === "ablate" ? [] : doses.length ? [...new Set([...doses, point.dose])].sort((a, b) => a - b) : [beside || 0.5];
    const count = this.intervention === "ablate" ? 2 * this.counts.at(-1) : point.n_features;
    const n = this.features_given ? "" : ` --n-features ${count}`;
    return `${this.command}${n}${measured.map((dose) => ` --dose ${tickText(dose)}`).join("")}${this.nullsOption}`;
  }

  get nullsOption() {
    return ` --n-nulls ${Math.max(LEAST_NULLS, this.n_nulls ?? 0)}`;
  }

  // The best baseline of a metric, if it does better than the row: better by the metric, or a larger change where the
  // metric has no better direction.
  rival(metric, group, row) {
    const gain = ({ value, effect }) => (metric.better === "lower" ? -value : metric.better === "higher" ? value : Math.abs(effect ?? 0));
    const others = this.of(metric.name, group).filter((one) => one.role === ROLE.baseline && one.value !== null);
    const best = others.sort((a, b) => gain(b) - gain(a))[0];
    return best && gain(best) > gain(row) ? best : null;
  }

  // The other metrics that became worse at a point, beyond the 95 % interval of their change.
  worsened(metric, group, point) {
    return this.metrics.filter((one) => one.name !== metric.name && one.better).map((one) => [one, this.at(one.name, group, point)])
      .filter(([one, row]) => row && row.low !== null && row.high !== null && (one.better === "lower" ? row.low > 0 : row.high < 0));
  }

  // The verdict on a metric at a point: {kind: "beats" | "fails" | "", lines}. It beats only what does no better.
  verdict(metric, group, point) {
    if (!point) return { kind: "", lines: ["This run stored no figures of single points; run `scsae steer` again."] };
    const row = this.at(metric.name, group, point);
    const byGroup = group === ALL && this.groupNames.some((name) => this.at(metric.name, name, point));
    if (!row) return { kind: "", lines: [byGroup ? `The ${metric.words} was measured by group only; choose a group.` : `The ${metric.words} was not measured at this point${group === ALL ? "" : ` for ${group}`}.`] };
    const lines = [this.change(metric, row)];
    if (!this.isChosen(point)) {
      lines.push(`This point has no p, because the nulls were drawn only at the point that was chosen on select cells (${this.chosen ? this.pointText(this.chosen) : "none was"}).`);
      return { kind: "", lines };
    }
    const known = this.nulls.map((one) => ({ ...one, pValue: row[one.p] ?? null })).filter(({ pValue }) => pValue !== null);
    if (!known.length) return { kind: "", lines: [...lines, "No null was measured, so it is not known whether this is more than chance."] };
    const { kind, text } = this.beside(row, known);
    const isWorse = row.effect !== null && (metric.better === "lower" ? row.effect > 0 : metric.better === "higher" && row.effect < 0);
    lines.push(isWorse ? `${text} The change is for the worse.` : text);
    lines.push(metric.better === null ? "This metric has no better direction: p is the share of a null's draws, this result counted as one, that change it as much." : "p is the share of a null's draws, this result counted as one, that do at least as well. It is not adjusted for the number of metrics.");
    const rival = this.rival(metric, group, row), worsened = this.worsened(metric, group, point);
    if (rival) lines.splice(2, 0, `${capital(rival.condition)}, which needs no features, does better: ${fmt(rival.value)}.`);
    if (worsened.length) lines.splice(2, 0, `What became worse: ${listed(worsened.map(([one, { value, effect }]) => `${one.words} (${fmt(value - effect)} to ${fmt(value)})`))}.`);
    return { kind: isWorse ? "fails" : kind === "beats" && (rival || worsened.length) ? "" : kind, lines };
  }

  change(metric, row) {
    const { value, effect, low, high, n_cells } = row, before = effect === null ? null : value - effect;
    const head = `At ${this.pointText(row)}, the ${metric.words}`, cells = n_cells ? `; ${plural(n_cells, "test cell")}` : "";
    if (effect === null) return `${head} is ${fmt(value)}${cells}.`;
    if (effect === 0) return `${head} stays at ${fmt(value)}${cells}.`;
    const interval = low === null || high === null ? "no interval" : `95 % interval ${fmt(low)} to ${fmt(high)}${low <= 0 && high >= 0 ? ", which includes 0" : ""}`;
    const better = metric.better ? ` ${capital(metric.better)} is better.` : "";
    return `${head} ${effect < 0 ? "falls" : "rises"} from ${fmt(before)} to ${fmt(value)} (${effect > 0 ? "+" : ""}${fmt(effect)}, ${interval}${cells}).${better}`;
  }

  beside(row, known) {
    const fewest = known.reduce((least, one) => (one.n_draws < least.n_draws ? one : least)), draws = fewest.n_draws;
    const said = (ones) => listed(ones.map(({ name, pValue }) => `${name} (p ${pvalue(pValue)})`));
    if (row.effect === 0) return { kind: "fails", text: `Nothing changed, so it does not beat its nulls: ${said(known)}.` };
    const beaten = known.filter(({ pValue }) => pValue <= ALPHA), others = known.filter(({ pValue }) => pValue > ALPHA);
    if (!others.length) return { kind: "beats", text: `It beats its nulls: ${said(beaten)}, ${plural(draws, "draw")} of each.` };
    if (!beaten.length && fewest.too_few) {
      const ahead = known.filter(({ pValue }) => pValue <= fewest.least_p + 1e-9), behind = known.filter((one) => !ahead.includes(one));
      const better = ahead.length ? ` It is ahead of every draw of ${listed(ahead.map(({ name }) => name))}${behind.length ? `, and not of ${said(behind)}` : ""}.` : ` It is not ahead of ${said(behind)}.`;
      return { kind: ahead.length ? "" : "fails", text: `It cannot be said that it beats its nulls: ${fewest.too_few}.${better}` };
    }
    if (!beaten.length) return { kind: "fails", text: `It does not beat its nulls: ${said(others)}, ${plural(draws, "draw")} of each.` };
    return { kind: "fails", text: `It does not beat all its nulls: not ${said(others)}; it beats ${said(beaten)}, ${plural(draws, "draw")} of each.` };
  }
}
