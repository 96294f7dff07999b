// The address says all that is shown: #/PAGE/ID?name=value. Whoever opens the address sees the same.

const listeners = new Set();

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

// Go to a page. `replace`: without a step of its own in the history (a map that is moved, a text that is typed).
export function go(page, id = null, params = {}, { replace = false } = {}) {
  const target = href(page, id, params);
  if (target === location.hash) return;
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

window.addEventListener("popstate", tell);
