// The frame around every page: navigation, theme, and which page is shown.

import { isDark } from "./colour.js";
import { h, clear } from "./dom.js";
import { overview, NotThere, watch } from "./data.js";
import { help } from "./help.js";
import { Kept, hrefOf, onKept } from "./kept.js";
import { comeBack, go, href, onChange, parse } from "./state.js";

const PAGES = [
  ["atlas", "Atlas"], ["cells", "Cells"], ["modules", "Modules"], ["search", "Search"], ["compare", "Compare"], ["batch", "Batch"], ["steering", "Steering"], ["controls", "Controls"], ["run", "Run"],
];
const KNOWN = new Set([...PAGES.map(([name]) => name), "feature", "label"]);
const root = document.getElementById("app");
let main = h("main", { id: "main", tabindex: -1 });
const links = PAGES.map(([name, text]) => h("a", { href: href(name), "data-page": name }, text));
let shown = null, turn = 0;

// What a browser remembers for next time, if it is allowed to.
const memory = {
  get: (name) => { try { return localStorage.getItem(name); } catch { return null; } },
  set: (name, value) => { try { localStorage.setItem(name, value); } catch { /* for now, then */ } },
};

function themeSwitch() {
  const kept = memory.get("scsae-theme");
  if (kept) document.documentElement.dataset.theme = kept;
  // colours of dots are numbers, which do not follow a style sheet
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => show(parse(), { anew: true }));
  return h("button", {
    type: "button", class: "tool theme", "aria-label": "Switch between light and dark", title: "Light or dark",
    onclick: () => {
      const theme = isDark() ? "light" : "dark";
      document.documentElement.dataset.theme = theme;
      memory.set("scsae-theme", theme);
      show(parse(), { anew: true });
    },
  }, "◐");
}

// The link to Compare says how many features are kept, and carries them along.
async function countKept() {
  const about = await overview().catch(() => null), link = links.find((one) => one.dataset.page === "compare");
  if (!about) return;
  const { list } = new Kept(about);
  link.textContent = list.length ? `Compare (${list.length})` : "Compare";
  link.setAttribute("href", list.length ? hrefOf(list) : href("compare"));
}

// Runs that are committed while a page is open are announced; the page stays as it is until somebody wants the new ones.
const news = h("div", { class: "news", role: "status", hidden: true }, h("span", {}, "There are new results in this store."), " ", h("button", { type: "button", onclick: () => location.reload() }, "Reload"));

clear(root,
  h("a", { class: "skip", href: "#main", onclick: (event) => { event.preventDefault(); main.focus(); } }, "Skip to content"),
  h("header", {}, h("a", { class: "brand", href: href("atlas") }, h("img", { src: "static/icon.svg", alt: "", width: 24, height: 24 }), h("span", {}, "scsae atlas")),
    h("nav", { "aria-label": "Pages" }, links), h("span", { class: "dataset" }, root.dataset.title), h("button", { type: "button", class: "tool help-open", "aria-label": "Help: a short tour and the glossary", title: "Help (?)", onclick: () => help() }, "?"), themeSwitch()),
  news, main);

async function show(state, { anew = false } = {}) {
  const own = ++turn;
  const key = `${state.page}/${state.id ?? ""}`;
  for (const link of links) link.dataset.page === state.page ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  try {
    if (shown?.key === key && shown.update && !anew) { await shown.update(state); return; }
    if (!KNOWN.has(state.page)) throw new NotThere(`This atlas has no page “${state.page}”.`);
    const page = await import(`./pages/${state.page}.js`);
    await overview();
    if (own !== turn) return;
    shown?.close?.();
    shown = null;
    // a page of its own element: one that is still being read when its turn is over draws where nobody looks
    const fresh = h("main", { id: "main", tabindex: -1, class: `page page-${state.page}`, "aria-busy": "true" });
    main.replaceWith(fresh);
    main = fresh;
    if (own > 1 && !anew) { fresh.focus({ preventScroll: true }); scrollTo(0, 0); }
    document.title = `${page.title(state)} · ${root.dataset.title} · scsae atlas`;
    // careful: whoever goes on before this is done must find something to close
    const made = { key };
    shown = made;
    Object.assign(made, await page.show(fresh, state));
    if (shown !== made) made.close?.();
    fresh.removeAttribute("aria-busy");
    // "back" returns to the control that was left; whoever went on since stays where they are
    if (own > 1 && !anew && document.activeElement === fresh) comeBack();
    fresh.dataset.ready = key;
  } catch (error) {
    if (own !== turn) return;
    shown?.close?.();
    shown = null;
    main.removeAttribute("aria-busy");
    main.dataset.ready = "error";
    clear(main, h("div", { class: "empty", role: "alert" }, h("p", {}, error.message), h("p", {}, h("a", { href: href("atlas") }, "Back to the atlas"))));
    if (!(error instanceof NotThere)) throw error;
  }
}

// "/" searches, wherever one is
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  event.preventDefault();
  const input = document.getElementById("search-input");
  input ? input.focus() : go("search");
});
// "?" explains
document.addEventListener("keydown", (event) => {
  if (event.key !== "?" || event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
  event.preventDefault();
  help();
});

onKept(countKept);
countKept();
watch(() => { news.hidden = false; });
onChange((state) => show(state));
show(parse());
