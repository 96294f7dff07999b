// Where a gene is described elsewhere. Following a link tells the symbol to that site; nothing is asked of it before.

import { h } from "./dom.js";

const SITES = {
  "NCBI Gene": (symbol) => `https://www.ncbi.nlm.nih.gov/gene/?term=${symbol}`,
  Ensembl: (symbol) => `https://www.ensembl.org/Multi/Search/Results?q=${symbol}`,
  "Human Protein Atlas": (symbol) => `https://www.proteinatlas.org/search/${symbol}`,
};

export function geneLinks(symbol) {
  return h("span", { class: "links-out" }, Object.entries(SITES).map(([name, address], i) => [i ? " · " : "", h("a", { href: address(encodeURIComponent(symbol)), target: "_blank", rel: "noreferrer noopener", "aria-label": `${symbol} at ${name} (another site)` }, `${name} ↗`)]));
}
