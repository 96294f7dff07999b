// The features that somebody keeps, with notes: a list that this browser remembers for an SAE, if it is allowed to. The page
// Compare shows it, and holds it in its address.

import { href } from "./state.js";

const listeners = new Set();

export class Kept {
  constructor(about) {
    this.key = `scsae-kept-${about.runs.sae ?? about.title}`;
  }

  // [{id, note}] in the order in which they were kept.
  get list() {
    try {
      const found = JSON.parse(localStorage.getItem(this.key) ?? "[]");
      return found.filter(({ id }) => Number.isInteger(id)).map(({ id, note }) => ({ id, note: String(note ?? "") }));
    } catch {
      return this.forNow ?? [];
    }
  }

  set list(entries) {
    this.forNow = entries;
    try { localStorage.setItem(this.key, JSON.stringify(entries)); } catch { /* for now, then */ }
    for (const listener of listeners) listener();
  }

  has(id) { return this.list.some((entry) => entry.id === id); }

  toggle(id) { this.list = this.has(id) ? this.list.filter((entry) => entry.id !== id) : [...this.list, { id, note: "" }]; }
}

// Tell me when a list changes, here or in another window.
export function onKept(listener) { listeners.add(listener); }
window.addEventListener("storage", () => listeners.forEach((listener) => listener()));

// A list as the parameters of an address, and back: f=3.17, and the note of feature 3 as n3.
export const paramsOf = (entries) => Object.fromEntries([["f", entries.map(({ id }) => id).join(".")], ...entries.filter(({ note }) => note).map(({ id, note }) => [`n${id}`, note])]);
export const entriesOf = (params) => [...new Set((params.f ?? "").split(".").filter((text) => /^\d+$/.test(text)).map(Number))].map((id) => ({ id, note: params[`n${id}`] ?? "" }));
export const hrefOf = (entries) => href("compare", null, paramsOf(entries));
