// The address says all that is shown: #/PAGE/ID?name=value. Whoever opens the address sees the same.

const listeners = new Set();
const FOCUSABLE = "a[href], button, input, select, textarea, [tabindex='0']";

export function parse(hash = location.hash) {
  const [path, query = ""] = hash.replace(/^#\/?/, "").split("?");
  const [page = "", id = ""] = path.split("/").map(decode);
  return { page: page || "atlas", id: id || null, params: Object.fromEntries(new URLSearchParams(query)) };
}

function decode(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return "";
  }
}

// The address of a page; parameters that are null, undefined or "" are left out.
export function href(page, id = null, params = {}) {
  const kept = Object.entries(params).filter(([, value]) => value !== null && value !== undefined && value !== "");
  const query = new URLSearchParams(kept.map(([key, value]) => [key, String(value)])).toString();
  return `#/${page}${id === null ? "" : `/${encodeURIComponent(id)}`}${query ? `?${query}` : ""}`;
}

// The address of the page of a label, for example of the cell type B cells.
export const labelHref = (kind, label) => href("label", `${kind}:${label}`);

// Go to a page. `replace`: without a step of its own in the history (a map that is moved, a text that is typed).
export function go(page, id = null, params = {}, { replace = false } = {}) {
  const target = href(page, id, params);
  if (target === location.hash) return;
  if (!replace) leave();
  history[replace ? "replaceState" : "pushState"](null, "", target);
  tell();
}

// Change some parameters of the page that is shown.
export function setParams(patch, { replace = false } = {}) {
  const { page, id, params } = parse();
  go(page, id, { ...params, ...patch }, { replace });
}

export function onChange(listener) {
  listeners.add(listener);
  return () => listeners.delete(listener);
}

function tell() {
  for (const listener of listeners) listener(parse());
}

// Note where a reader is, for when "back" returns here: the control with the focus, the row of a table, and the scroll.
function leave() {
  const focused = document.activeElement, place = [...document.querySelectorAll(FOCUSABLE)].indexOf(focused);
  history.replaceState({ place, row: focused?.getAttribute("aria-activedescendant") ?? null, scroll: scrollY }, "");
}

// Be there again. False where this entry of the history was never left.
export function comeBack() {
  const at = history.state;
  if (!at) return false;
  const element = document.querySelectorAll(FOCUSABLE)[at.place];
  scrollTo(0, at.scroll);
  element?.focus({ preventScroll: true });
  if (at.row) element?.closest(".vt")?.table?.select(Number(at.row.replace("row-", "")));
  return Boolean(element);
}

document.addEventListener("click", (event) => { if (event.target.closest?.("a[href^='#']") && !event.ctrlKey && !event.metaKey) leave(); }, { capture: true });
window.addEventListener("popstate", tell);
