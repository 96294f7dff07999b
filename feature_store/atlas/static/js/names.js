// Names that can be searched, and how a text is looked for among them: the name itself, then names of which it is a whole
// word, that begin with it, of which words do, that hold it, and at last those spelt like it.

import { json } from "./data.js";
import { words } from "./dom.js";

const LISTS = { label: ["labels", "label_features"], gene: ["genes", "genes"], gene_set: ["gene_sets", "gene_sets"] };
const FIRST = "label:cell_type";
const FEW = 8;
const UNLIKE = 99;

// Lower case, with one space where words part.
export const plain = (text) => text.toLowerCase().replace(/[\s_\-/,;:.()]+/g, " ").trim();

export class Names {
  static async load() {
    return new Names(await json("names.json"));
  }

  // entries: {type, kind, name, text, path}; kinds: key -> {key, type, title, n, order}, as they are shown. A kind is
  // "gene", "label:cell_type", "gene_set:hallmark", ...: what tells two names that are spelt alike apart.
  constructor(found) {
    this.missing = found.missing ?? {};
    this.quiet = new Set((found.quiet_genes ?? []).map(plain));
    this.nCells = found.n_cells ?? 0;
    this.kinds = new Map();
    this.entries = [];
    for (const [type, [list, folder]] of Object.entries(LISTS)) {
      (found[list] ?? []).forEach((row, place) => {
        const [of, name] = Array.isArray(row) ? row : [null, row];
        const kind = of === null ? type : `${type}:${of}`;
        if (!this.kinds.has(kind)) this.kinds.set(kind, { key: kind, type, title: TITLES[type](of), n: 0, order: kind === FIRST ? -1 : this.kinds.size });
        this.kinds.get(kind).n++;
        this.entries.push({ type, kind, name, text: plain(name), path: `${folder}/${place}.json` });
      });
    }
    this.kinds = new Map([...this.kinds].sort(([, a], [, b]) => a.order - b.order));
  }

  // Request one name of each type: a server ranks a whole table at the first request, which takes seconds for a large table.
  async warm() {
    for (const one of Object.keys(LISTS)) {
      const entry = this.entries.find(({ type }) => type === one);
      if (entry) await json(entry.path).catch(() => null);
    }
  }

  exactly(name, kind) {
    return this.entries.find((entry) => entry.kind === kind && entry.name === name) ?? null;
  }

  // Groups of matches, [{kind, hits: [entry], n}], the best first; `most` of each, n in all.
  find(query, { kind = null, most = FEW } = {}) {
    const wanted = plain(query);
    if (!wanted) return [];
    const among = kind ? this.entries.filter((entry) => entry.kind === kind) : this.entries;
    const parts = wanted.split(" ");
    let hits = [];
    for (const entry of among) {
      const score = scoreOf(entry, query, wanted, parts);
      if (score < UNLIKE) hits.push({ entry, score });
    }
    if (hits.length < FEW) hits = hits.concat(this.alike(wanted, among, new Set(hits.map(({ entry }) => entry))));
    const groups = new Map();
    for (const hit of hits) {
      if (!groups.has(hit.entry.kind)) groups.set(hit.entry.kind, []);
      groups.get(hit.entry.kind).push(hit);
    }
    const byRank = (a, b) => a.score - b.score || a.entry.text.length - b.entry.text.length || (a.entry.text < b.entry.text ? -1 : 1);
    return [...groups].map(([key, found]) => {
      found.sort(byRank);
      return { kind: this.kinds.get(key), best: found[0].score, n: found.length, hits: found.slice(0, most).map(({ entry }) => entry) };
    }).sort((a, b) => a.best - b.best || a.kind.order - b.kind.order);
  }

  // Names spelt like a text, or with a word that is; a letter too many, too few, wrong, or two swapped, is one step.
  alike(wanted, among, known) {
    const reach = wanted.length < 4 ? 0 : wanted.length < 6 ? 1 : 2, found = [];
    if (reach === 0) return found;
    for (const entry of among) {
      if (known.has(entry)) continue;
      const steps = stepsTo(wanted, entry.text, reach);
      if (steps <= reach) found.push({ entry, score: 10 + steps });
    }
    return found;
  }

  // The names most like a text, however far off: what is offered where nothing is found.
  nearest(query, { kind = null, n = 5 } = {}) {
    const wanted = plain(query);
    if (wanted.length < 2) return [];
    const reach = Math.max(2, Math.ceil(wanted.length / 2)), found = [];
    for (const entry of this.entries) {
      if (kind && entry.kind !== kind) continue;
      const steps = stepsTo(wanted, entry.text, reach);
      if (steps <= reach && steps < Math.max(wanted.length, 3)) found.push({ entry, steps });
    }
    return found.sort((a, b) => a.steps - b.steps || a.entry.text.length - b.entry.text.length).slice(0, n).map(({ entry }) => entry);
  }
}

const TITLES = { label: words, gene: () => "gene", gene_set: (of) => `${words(of)} gene set` };

function scoreOf(entry, query, wanted, parts) {
  const { text } = entry;
  if (text.length < wanted.length) return UNLIKE;
  if (text === wanted) return entry.name === query ? 0 : 1;
  const at = text.indexOf(wanted);
  if (at >= 0 && ` ${text} `.includes(` ${wanted} `)) return 2;
  if (at === 0) return 3;
  if (at > 0 && text.includes(` ${wanted}`)) return 4;
  if (parts.length > 1 && parts.every((part) => text.startsWith(part) || text.includes(` ${part}`))) return 5;
  return at > 0 ? 6 : UNLIKE;
}

function stepsTo(wanted, text, reach) {
  let least = distance(wanted, text, reach);
  if (least > 0 && text.includes(" ") && !wanted.includes(" ")) for (const word of text.split(" ")) least = Math.min(least, distance(wanted, word, reach));
  return least;
}

// Edits from one text to the other (optimal string alignment); UNLIKE where there are more than `most`.
export function distance(a, b, most) {
  if (Math.abs(a.length - b.length) > most) return UNLIKE;
  let before = [], last = Array.from({ length: b.length + 1 }, (_, j) => j);
  for (let i = 1; i <= a.length; i++) {
    const row = [i];
    let least = i;
    for (let j = 1; j <= b.length; j++) {
      const isSame = a[i - 1] === b[j - 1];
      let steps = Math.min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (isSame ? 0 : 1));
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) steps = Math.min(steps, before[j - 2] + 1);
      row.push(steps);
      if (steps < least) least = steps;
    }
    if (least > most) return UNLIKE;
    [before, last] = [last, row];
  }
  return last[b.length] > most ? UNLIKE : last[b.length];
}
