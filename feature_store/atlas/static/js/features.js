// The table of all features in memory: sorted orders, filters, and names.

import { columns } from "./data.js";

export class Features {
  static async load() {
    return new Features(await columns("features.cols"));
  }

  constructor(table) {
    this.table = table;
    this.n = table.n;
    this.orders = new Map();
    this.extra = new Map();
    this.ids = table.get("feature_id").values;
    this.rowOf = new Map(Array.from(this.ids, (id, row) => [id, row]));
  }

  // A column of the table, or one that was laid beside it (`beside`).
  column(key) { return this.extra.get(key) ?? this.table.get(key); }
  at(key, row) { return this.column(key)?.at(row) ?? null; }
  has(key) { return this.column(key) !== null; }

  // Lay columns of another table of the same rows beside these, or take them away (null).
  beside(key, column) {
    this.orders.delete(key);
    column ? this.extra.set(key, column) : this.extra.delete(key);
  }

  // Its first genes: what tells a feature from others at a glance.
  genes(row, n = 3) {
    return (this.at("top_genes", row) ?? "").split(/[\s,]+/).filter(Boolean).slice(0, n).join(" ");
  }

  name(row) {
    const genes = this.genes(row);
    return genes ? `${this.ids[row]}: ${genes}` : String(this.ids[row]);
  }

  // All rows by a column, ascending, what is unknown last; sorted once.
  order(key) {
    if (!this.orders.has(key)) this.orders.set(key, this.sorted(key));
    return this.orders.get(key);
  }

  sorted(key) {
    const column = this.column(key), rows = Uint32Array.from({ length: this.n }, (_, i) => i);
    if (!column) return { rows, known: 0 };
    const keys = new Float64Array(this.n);
    if (column.kind === "text") {
      const texts = Array.from(rows, (i) => column.text(i).toLowerCase());
      const places = new Map([...new Set(texts)].sort().map((text, i) => [text, i]));
      texts.forEach((text, i) => { keys[i] = text ? places.get(text) : NaN; });
    } else {
      for (let i = 0; i < this.n; i++) {
        const isKnown = column.kind !== "category" || column.values[i] < column.categories.length;
        keys[i] = isKnown && column.at(i) !== null ? Number(column.values[i]) : NaN;
      }
    }
    let known = 0;
    for (let i = 0; i < this.n; i++) known += keys[i] === keys[i];
    rows.sort((a, b) => (keys[a] === keys[b] || (keys[a] !== keys[a] && keys[b] !== keys[b]) ? a - b : keys[a] !== keys[a] ? 1 : keys[b] !== keys[b] ? -1 : keys[a] - keys[b]));
    return { rows, known };
  }

  // The rows that are `visible`, by a column; descending ones are reversed, what is unknown stays last.
  listed(visible, key, descending) {
    const { rows, known } = this.order(key), found = new Uint32Array(this.n);
    let n = 0;
    const take = (row) => { if (!visible || visible[row]) found[n++] = row; };
    if (descending) for (let i = known - 1; i >= 0; i--) take(rows[i]);
    else for (let i = 0; i < known; i++) take(rows[i]);
    for (let i = known; i < this.n; i++) take(rows[i]);
    return found.slice(0, n);
  }

  // Which rows have a text in their id, label, genes or class [n].
  matching(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    this.texts ??= Array.from({ length: this.n }, (_, i) => `${this.ids[i]} ${this.at("class", i) ?? ""} ${this.at("top_label", i) ?? ""} ${this.at("top_genes", i) ?? ""} ${this.at("top_identity_genes", i) ?? ""}`.toLowerCase());
    return Uint8Array.from(this.texts, (known) => (words.every((word) => known.includes(word)) ? 1 : 0));
  }
}
