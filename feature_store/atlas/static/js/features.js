// The table of all features in memory: sorted orders, filters, and names.

import { columns } from "./data.js";

// The maps of the features: their columns, the table behind each, and how far to trust it.
export const MAPS = {
  labels: { x: "px", y: "py", table: "profile_umap", text: "label profiles", said: "Features that are associated with the same labels on select cells lie together, by construction of the map." },
  directions: { x: "x", y: "y", table: "feature_umap", text: "decoder directions", said: "Features whose decoder directions have a large cosine lie together. Most directions in a space of many dimensions are nearly orthogonal, so a short distance on this map is weak evidence." },
};

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
    const column = this.column(key), keys = new Float64Array(this.n).fill(NaN);
    if (column?.kind === "text") {
      const texts = Array.from({ length: this.n }, (_, i) => column.text(i).toLowerCase());
      const places = new Map([...new Set(texts)].sort().map((text, i) => [text, i]));
      texts.forEach((text, i) => { if (text) keys[i] = places.get(text); });
    } else if (column?.kind === "f64" || column?.kind === "f32") {
      keys.set(column.values);
    } else if (column) {
      for (let i = 0; i < this.n; i++) if (column.at(i) !== null) keys[i] = column.values[i];
    }
    return ascending(keys);
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

// The places of numbers in ascending order, those without one last, and how many have one. Equal ones stay in order.
//
// A comparison in JavaScript costs 60 ns: sorting 100,000 numbers with one takes a tenth of a second. Numbers of 52 bits
// sort by themselves: 32 of the value, in the order of its float32, and 20 of its place. What is equal as float32 is
// then put in order with a comparison.
export function ascending(keys) {
  const n = keys.length, packed = new Float64Array(n), rows = new Uint32Array(n);
  const single = new Float32Array(1), bits = new Uint32Array(single.buffer);
  if (n > 2 ** 20) throw new RangeError(`${n} rows are too many to sort`);
  let known = 0;
  for (let i = 0; i < n; i++) {
    if (keys[i] !== keys[i]) continue;
    single[0] = keys[i];
    const ordered = bits[0] >>> 31 ? ~bits[0] >>> 0 : (bits[0] | 0x80000000) >>> 0;
    packed[known++] = ordered * 2 ** 20 + i;
  }
  packed.subarray(0, known).sort();
  for (let j = 0; j < known; j++) rows[j] = packed[j] % 2 ** 20;
  for (let from = 0; from < known; ) {
    let to = from + 1;
    while (to < known && Math.floor(packed[to] / 2 ** 20) === Math.floor(packed[from] / 2 ** 20)) to += 1;
    if (to - from > 1) rows.subarray(from, to).sort((a, b) => keys[a] - keys[b] || a - b);
    from = to;
  }
  for (let i = 0, j = known; i < n; i++) if (keys[i] !== keys[i]) rows[j++] = i;
  return { rows, known };
}
