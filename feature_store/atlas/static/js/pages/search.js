// Search: what is typed is looked for among all names, and the features of the best match are shown at once.
// The address holds the text (q), a kind to look among, and what was chosen (pick): typing replaces it, choosing goes on.

import { h, clear, count, empty, words } from "../dom.js";
import { findCells } from "../cells.js";
import { overview } from "../data.js";
import { Features } from "../features.js";
import { Names } from "../names.js";
import { cellPanel, featurePanel, rankedPanel } from "../ranked.js";
import { go, href, setParams } from "../state.js";

const PAUSE = 200;
const EXAMPLES = 12;
const CELL = { key: "cell", title: "cell", order: 99 };
const FEATURE = { key: "feature", title: "feature", order: -1 };

export const title = () => "Search";

export async function show(root, state) {
  const about = await overview();
  const [names, features] = await Promise.all([Names.load(), about.tables.includes("features") ? Features.load() : null]);
  const page = new Search(root, about, names, features);
  await page.update(state);
  if (!page.pick) page.input.focus({ preventScroll: true });
  names.warm();
  return { update: (next) => page.update(next), close: () => page.close() };
}

class Search {
  constructor(root, about, names, features) {
    Object.assign(this, { about, names, features, turn: 0, options: [], active: -1, q: null, kind: null, pick: null });
    this.input = h("input", {
      id: "search-input", type: "text", role: "combobox", autocomplete: "off", autocapitalize: "off", spellcheck: "false", placeholder: "CD79A, monocyte, ACGT…",
      "aria-label": "Search genes, labels, gene sets and cells", "aria-autocomplete": "list", "aria-controls": "search-matches", "aria-expanded": "false",
      oninput: () => this.typed(), onkeydown: (event) => this.key(event),
    });
    const kinds = [...names.kinds.values()].map(({ key, title: name, n }) => h("option", { value: key }, `${name} (${count(n)})`));
    this.among = h("select", { "aria-label": "Search among", onchange: () => this.ask({ kind: this.among.value || null, pick: null }, true) },
      h("option", { value: "" }, "everything"), kinds, names.nCells ? h("option", { value: CELL.key }, `cell (${count(names.nCells)})`) : null, features ? h("option", { value: FEATURE.key }, `feature (${count(features.n)})`) : null);
    this.list = h("div", { id: "search-matches", role: "listbox", "aria-label": "Matches", class: "matches" });
    this.status = h("p", { class: "quiet search-status", role: "status", "aria-live": "polite" });
    this.found = h("section", { class: "found", "aria-label": "Features of the match" });
    this.columns = h("div", { class: "search-columns" }, h("div", { class: "matches-side" }, this.status, this.list), this.found);
    root.append(h("h1", {}, "Search"), h("div", { class: "controls search-controls" }, this.input, this.among), this.columns);
  }

  close() {
    clearTimeout(this.waiting);
    this.turn++;
    this.showing = null;
  }

  // What is asked for becomes the address, at once or after a pause in typing.
  ask(patch, replace) {
    clearTimeout(this.waiting);
    setParams(patch, { replace });
  }

  typed() {
    clearTimeout(this.waiting);
    this.waiting = setTimeout(() => this.ask({ q: this.input.value, pick: null }, true), PAUSE);
    this.look(this.input.value, this.kind, null);
  }

  async update({ params }) {
    const { q = "", kind = null, pick = null } = params;
    if (q === this.q && kind === this.kind && pick === this.pick) return;
    if (this.input.value !== q) this.input.value = q;
    this.among.value = kind ?? "";
    await this.look(q, kind, pick);
  }

  // Look for a text among a kind; `pick` is the kind of what was chosen.
  async look(q, kind, pick) {
    Object.assign(this, { q, kind, pick });
    const turn = ++this.turn;
    try {
      await this.find(q, kind, turn);
    } catch (error) {
      if (turn === this.turn) this.fail(error);
    }
  }

  async find(q, kind, turn) {
    const groups = this.groups(q, kind);
    this.draw(groups);
    const shown = this.options.length ? this.settle() : null;
    const isCells = this.names.nCells > 0 && q.trim() && (!kind || kind === CELL.key);
    const cells = isCells ? await findCells(q, kind ? 50 : 8) : { hits: [] };
    if (turn !== this.turn) return;
    if (cells.hits.length) {
      const entries = cells.hits.map(({ id, idx }, i) => ({ kind: CELL.key, name: id, idx, isRepeated: cells.hits[i - 1]?.id === id || cells.hits[i + 1]?.id === id }));
      const group = { kind: CELL, hits: entries, n: entries.length, isMore: cells.isMore };
      const isExact = entries[0].name.toLowerCase() === q.trim().toLowerCase();
      this.draw(isExact && !groups.some(({ best }) => best <= 1) ? [group, ...groups] : [...groups, group]);
    }
    await shown;
    if (turn === this.turn && (!this.options.length || this.options[this.active] !== this.settled)) await this.settle();
    else this.status.textContent = this.summary();
  }

  groups(q, kind) {
    const limit = kind ? 100 : 8;
    const found = kind === CELL.key || kind === FEATURE.key ? [] : this.names.find(q, { kind, most: limit });
    const number = /^\s*(?:feature\s*)?(\d+)\s*$/i.exec(q);
    const id = number ? Number(number[1]) : null;
    if (id === null || !this.features?.rowOf.has(id) || (kind && kind !== FEATURE.key)) return found;
    const own = { kind: FEATURE, best: 0, n: 1, hits: [{ kind: FEATURE.key, name: `Feature ${id}`, id }] };
    return found[0]?.best === 0 ? [found[0], own, ...found.slice(1)] : [own, ...found];
  }

  draw(groups) {
    this.options = groups.flatMap(({ hits }) => hits);
    let place = 0;
    clear(this.list, groups.map(({ kind, hits, n, isMore }, i) => h("div", { role: "group", "aria-labelledby": `search-group-${i}` },
      h("div", { class: "matches-head", id: `search-group-${i}` }, words(kind.title), " ", h("span", { class: "quiet" }, isMore ? `${n} or more` : n > hits.length ? `${hits.length} of ${count(n)}` : "")),
      hits.map((entry) => this.option(entry, place++)))));
    const ofKind = (is) => this.options.findIndex((entry) => entry.kind === this.pick && is(entry));
    const exact = ofKind(({ name }) => name === this.q), chosen = exact >= 0 ? exact : ofKind((entry) => this.isOf(entry));
    this.activate(chosen >= 0 ? chosen : this.options.length ? 0 : -1, { quietly: true });
    this.columns.classList.toggle("picked", Boolean(this.pick));
    this.columns.classList.toggle("nothing", !this.options.length);
    this.expand();
  }

  isOf(entry) {
    return entry.name.toLowerCase() === this.q.trim().toLowerCase() || (entry.kind === FEATURE.key && String(entry.id) === this.q.trim());
  }

  option(entry, place) {
    return h("div", {
      role: "option", id: `search-option-${place}`, class: "match", "aria-selected": "false", onpointerdown: (event) => event.preventDefault(), onclick: () => this.choose(place),
    }, marked(entry.name, this.q));
  }

  expand() {
    this.input.setAttribute("aria-expanded", String(this.options.length > 0 && this.list.offsetParent !== null));
  }

  activate(place, { quietly = false } = {}) {
    this.list.querySelector('[aria-selected="true"]')?.setAttribute("aria-selected", "false");
    this.active = place;
    const option = place < 0 ? null : document.getElementById(`search-option-${place}`);
    if (!option) { this.input.removeAttribute("aria-activedescendant"); return; }
    option.setAttribute("aria-selected", "true");
    this.input.setAttribute("aria-activedescendant", option.id);
    const top = option.offsetTop - this.list.offsetTop;
    if (top < this.list.scrollTop || top + option.offsetHeight > this.list.scrollTop + this.list.clientHeight) this.list.scrollTop = top - this.list.clientHeight / 2;
    if (!quietly) this.settle().catch((error) => this.fail(error));
  }

  key(event) {
    const { length } = this.options;
    if ((event.key === "ArrowDown" || event.key === "ArrowUp") && length) {
      event.preventDefault();
      this.columns.classList.remove("picked");
      this.expand();
      this.activate((this.active + (event.key === "ArrowDown" ? 1 : length - 1)) % length);
    } else if (event.key === "Enter" && this.active >= 0) {
      event.preventDefault();
      this.choose(this.active);
    } else if (event.key === "Escape" && this.input.value) {
      event.preventDefault();
      this.input.value = "";
      this.typed();
    }
  }

  choose(place) {
    const entry = this.options[place];
    clearTimeout(this.waiting);
    // what was typed is what "back" comes back to
    if (!this.pick) setParams({ q: this.input.value, pick: null }, { replace: true });
    if (entry.kind === FEATURE.key) go("feature", entry.id);
    else this.ask({ q: entry.kind === CELL.key && entry.isRepeated ? `#${entry.idx}` : entry.name, pick: entry.kind }, false);
  }

  // Show what goes with the match that is marked.
  async settle() {
    const entry = this.options[this.active] ?? null, request = (this.showing = {});
    this.settled = entry;
    this.found.setAttribute("aria-busy", "true");
    this.status.textContent = this.summary();
    const panel = entry ? await this.panel(entry) : this.q.trim() ? this.nothing() : this.start();
    if (request === this.showing) this.put(panel, entry ? `${entry.kind}/${entry.name}` : "");
  }

  fail(error) {
    this.put(h("div", { class: "empty", role: "alert" }, h("p", {}, error.message)), "");
  }

  put(panel, of) {
    clear(this.found, panel);
    this.found.dataset.of = of;
    this.found.removeAttribute("aria-busy");
  }

  panel(entry) {
    if (entry.kind === CELL.key) return cellPanel(entry.idx, this.names, this.features ?? NONE);
    if (entry.kind === FEATURE.key) return featurePanel(entry.id, this.features);
    return rankedPanel(entry, this.names.kinds.get(entry.kind), this.features ?? NONE);
  }

  summary() {
    if (!this.options.length) return "";
    return this.options.length === 1 ? "1 match" : `${count(this.options.length)} matches · ↑ ↓ move, Enter chooses`;
  }

  searched() {
    const kinds = [...this.names.kinds.values()].map(({ title: name, n }) => `${name} (${count(n)})`);
    return [...kinds, this.names.nCells ? `cell id (${count(this.names.nCells)}, by the beginning)` : null, this.features ? "number of a feature" : null].filter(Boolean).join(", ");
  }

  nothing() {
    const { q, kind, names } = this, near = kind === CELL.key ? [] : names.nearest(q, { kind });
    const elsewhere = kind ? names.find(q).reduce((n, group) => n + group.n, 0) : 0;
    const among = kind === CELL.key ? `${count(names.nCells)} cell ids (by their beginning; #12 is the cell at place 12 of the data set)` : kind ? words(names.kinds.get(kind)?.title ?? kind) : this.searched();
    return [
      h("h2", { class: "found-title" }, `Nothing is called “${q}”`),
      names.quiet.has(q.trim().toLowerCase()) ? h("p", {}, `${q.trim()} is a gene of this data set, but no feature is associated with it strongly enough to be kept, on any split.`) : null,
      h("p", { class: "quiet" }, `Searched: ${among || "nothing, as the store has no names yet"}.`),
      near.length ? [h("p", {}, "Similar names:"), h("ul", { class: "examples" }, near.map((entry) => h("li", {}, this.link(entry))))] : null,
      elsewhere ? h("p", {}, h("a", { href: href("search", null, { q }) }, `Search everything (${count(elsewhere)})`)) : null,
      this.lacking(),
    ];
  }

  start() {
    const kinds = [...this.names.kinds.values()].filter(({ key }) => !this.kind || key === this.kind);
    const examples = (key) => this.names.entries.filter((entry) => entry.kind === key).slice(0, kinds.length === 1 ? 200 : EXAMPLES);
    return [
      h("p", {}, "Type a gene, a label such as a cell type, a gene set, the beginning of a cell id, ", h("code", {}, "#12"), " for the cell at place 12 of the data set, or the number of a feature."),
      kinds.map(({ key, title: name, n }) => h("div", {}, h("h3", {}, words(name), " ", h("span", { class: "quiet" }, count(n))), h("ul", { class: "examples" }, examples(key).map((entry) => h("li", {}, this.link(entry)))))),
      this.lacking(),
    ];
  }

  lacking() {
    const tables = { labels: "labels", genes: "genes", gene_sets: "gene sets" };
    const lists = Object.entries(this.names.missing), command = lists[0]?.[1].command;
    return lists.length ? empty({ command }, `This store knows no features of ${lists.map(([list]) => tables[list]).join(", ")} yet.`) : null;
  }

  link(entry) {
    return h("a", { href: href("search", null, { q: entry.name, kind: this.kind, pick: entry.kind }) }, entry.name);
  }
}

// Where a store has no table of features, nothing is known of one.
const NONE = { rowOf: new Map(), at: () => null, genes: () => "", has: () => false };

// A name with the text that was typed marked in it.
function marked(name, q) {
  const wanted = q.trim(), at = wanted ? name.toLowerCase().indexOf(wanted.toLowerCase()) : -1;
  if (at < 0) return h("span", {}, name);
  return h("span", {}, name.slice(0, at), h("mark", {}, name.slice(at, at + wanted.length)), name.slice(at + wanted.length));
}
