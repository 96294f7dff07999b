// A table of any length of which only the rows in sight exist.
//
//   new VirtualTable(element, {label, columns: [{key, head, title, width, numeric, spare, cell(i) -> text or node, sortable}], onSort(key), onOpen(i), onActive(i)})
//   table.rows(indices)      what is listed, in this order;   table.heading(columns)  other columns
//     table.sorted = {key, descending}: the mark in the heads
//   table.select(i)          scroll to the row of an index;   table.close()
//   table.more               a button that shows every column; it is there while some have no room
// Where there is no room, columns with `spare` are left out, the largest first, but never the one with the mark; those
// with `spare` 1 only where the columns without a width would have hardly any.

import { h, clear, redraw } from "./dom.js";

const ROW = 30;
const SPARE = 6;
// The width of a column that takes what is left, as long as others can be left out, and the least that it has.
const FLEXIBLE = 110, LEAST = 60;
// What the mark of the order adds to the width of a column.
const MARK = 14;

export class VirtualTable {
  constructor(root, { label = "Table", columns, onSort, onOpen, onActive }) {
    Object.assign(this, { columns, shown: columns, onSort, onOpen, onActive, indices: new Uint32Array(0), active: -1, mark: {} });
    this.heads = h("div", { class: "vt-heads", role: "row" });
    this.body = h("div", { class: "vt-body", role: "rowgroup" });
    this.scroller = h("div", { class: "vt-scroll", tabindex: 0, role: "grid", "aria-label": label, onscroll: () => this.invalidate(), onkeydown: (event) => this.key(event) },
      h("div", { role: "rowgroup", class: "vt-headgroup" }, this.heads), this.body);
    this.box = h("div", { class: "vt" }, this.scroller);
    this.box.table = this;
    this.more = h("button", { type: "button", class: "vt-more", hidden: true, "aria-pressed": "false", onclick: () => this.showAll(!this.all) }, "All columns");
    root.append(this.box);
    this.observer = new ResizeObserver(() => this.fit());
    this.observer.observe(this.scroller);
    this.fit();
  }

  close() {
    this.observer.disconnect();
    cancelAnimationFrame(this.waiting);
    this.box.remove();
  }

  rows(indices) {
    this.indices = indices;
    this.active = -1;
    this.scroller.setAttribute("aria-rowcount", String(indices.length + 1));
    this.scroller.removeAttribute("aria-activedescendant");
    this.body.style.height = `${indices.length * ROW}px`;
    this.scroller.scrollTop = 0;
    this.invalidate();
  }

  // Which columns there is room for; what is wider than the box scrolls.
  fit() {
    const spare = this.columns.filter(({ spare, key }) => spare && key !== this.mark.key).sort((a, b) => a.spare - b.spare);
    const left = new Set(), kept = () => this.columns.filter((one) => !left.has(one));
    const sum = (columns, flexible) => columns.reduce((sum, one) => sum + (this.widthOf(one) ?? flexible), 0);
    while (spare.length && sum(kept(), spare.at(-1).spare > 1 ? FLEXIBLE : LEAST) > this.scroller.clientWidth) left.add(spare.pop());
    this.shown = this.all ? this.columns : kept();
    this.more.hidden = !left.size;
    this.more.title = `There is no room for ${[...left].map(({ head }) => head).join(", ")}; with all columns the table scrolls sideways`;
    for (const part of [this.heads.parentElement, this.body]) part.style.minWidth = `${sum(this.shown, this.all ? FLEXIBLE : LEAST)}px`;
    this.drawHeads();
    this.draw();
  }

  widthOf({ key, width }) { return width && key === this.mark.key ? width + MARK : width; }

  showAll(isWanted) {
    this.all = isWanted;
    this.more.setAttribute("aria-pressed", String(isWanted));
    this.fit();
  }

  set sorted(mark) { this.mark = mark; this.fit(); }

  heading(columns) { this.columns = columns; this.fit(); }

  drawHeads() {
    redraw(this.heads, this.shown.map((column) => {
      const { key, head, title, numeric, sortable = true } = column;
      const isSorted = this.mark.key === key, arrow = isSorted ? (this.mark.descending ? " ▾" : " ▴") : "";
      const inside = sortable && this.onSort ? h("button", { type: "button", onclick: () => this.onSort(key) }, `${head}${arrow}`) : head;
      return h("div", { role: "columnheader", class: classOf(numeric), title, style: { flex: flexOf(this.widthOf(column)) }, "aria-sort": isSorted ? (this.mark.descending ? "descending" : "ascending") : null }, inside);
    }));
  }

  invalidate() {
    if (this.waiting) return;
    this.waiting = requestAnimationFrame(() => { this.waiting = null; this.draw(); });
  }

  draw() {
    const top = this.scroller.scrollTop, height = this.scroller.clientHeight;
    const from = Math.max(0, Math.floor(top / ROW) - SPARE), to = Math.min(this.indices.length, Math.ceil((top + height) / ROW) + SPARE);
    const rows = [];
    for (let place = from; place < to; place++) rows.push(this.row(place));
    clear(this.body, rows);
    if (this.active >= 0) this.scroller.setAttribute("aria-activedescendant", this.idOf(this.active));
  }

  idOf(place) { return `row-${this.indices[place]}`; }

  row(place) {
    const i = this.indices[place], isActive = place === this.active;
    return h("div", {
      role: "row", id: this.idOf(place), class: `vt-row${isActive ? " active" : ""}`, "aria-rowindex": place + 2, "aria-selected": isActive ? "true" : null,
      style: { transform: `translateY(${place * ROW}px)` }, onclick: () => this.onOpen?.(i), onpointerenter: () => this.onActive?.(i), onpointerleave: () => this.onActive?.(null),
    }, this.shown.map((column) => {
      const { cell, numeric } = column, value = cell(i);
      return h("div", { role: "gridcell", class: classOf(numeric), style: { flex: flexOf(this.widthOf(column)) }, title: typeof value === "string" ? value : null }, value);
    }));
  }

  select(i) {
    const place = this.indices.indexOf(i);
    if (place >= 0) this.activate(place);
  }

  activate(place) {
    if (!this.indices.length) return;
    this.active = Math.max(0, Math.min(this.indices.length - 1, place));
    const top = this.active * ROW, room = this.scroller.clientHeight - ROW * 2;
    if (top < this.scroller.scrollTop) this.scroller.scrollTop = top;
    else if (top > this.scroller.scrollTop + room) this.scroller.scrollTop = top - room;
    this.draw();
    this.onActive?.(this.indices[this.active]);
  }

  key(event) {
    if (event.target !== this.scroller) return;
    const page = Math.max(1, Math.floor(this.scroller.clientHeight / ROW) - 2);
    const to = { ArrowDown: this.active + 1, ArrowUp: this.active - 1, PageDown: this.active + page, PageUp: this.active - page, Home: 0, End: this.indices.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); this.activate(to); }
    else if (event.key === "Enter" && this.active >= 0) { event.preventDefault(); this.onOpen?.(this.indices[this.active]); }
  }
}

const classOf = (numeric) => (numeric ? "vt-cell number" : "vt-cell");
const flexOf = (width) => (width ? `0 0 ${width}px` : `1 1 ${LEAST}px`);
