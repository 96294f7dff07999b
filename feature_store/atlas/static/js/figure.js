// Figures as files: any chart or map of a page as SVG or PNG, with its title and its key, in the colours that are shown. The
// metadata name the store, the run, when that was made, and the address of the page.

import { h, svg } from "./dom.js";
import { css } from "./colour.js";
import { overview } from "./data.js";
import { parse } from "./state.js";

const SHOWN = ["fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-opacity", "stroke-linecap", "stroke-linejoin", "opacity", "font-family", "font-size", "font-style", "font-weight", "text-anchor"];
const FONT = "system-ui, 'DejaVu Sans', sans-serif";
const MARGIN = 14, LINE = 17, SWATCH = 14, GAP = 12;
const SCALE = 3;
const NAMESPACES = { "xmlns:rdf": "http://www.w3.org/1999/02/22-rdf-syntax-ns#", "xmlns:dc": "http://purl.org/dc/elements/1.1/" };

// Two buttons that save a figure. `picture()` returns {label, width, height, shapes}: a title, a size, and SVG elements; `box`
// is the element whose key is looked for.
export function saveButtons(box, picture, style = "figure-save") {
  const button = (kind, make) => h("button", { type: "button", class: style, title: `Save this figure as ${kind}`, "aria-label": `Save this figure as ${kind}`, onclick: async () => make(await drawing(box(), picture())) }, kind);
  return [button("SVG", saveSvg), button("PNG", savePng)];
}

// A chart of axis.js or charts_feature.js as a picture.
export function ofChart(chart) {
  const { width, height } = chart.viewBox.baseVal;
  return { label: chart.getAttribute("aria-label"), width, height, shapes: [...chart.children].filter((child) => child.tagName !== "title").map(dressed) };
}

// A copy of an SVG element that looks the same without a style sheet; links of the page lead nowhere from a file.
export function dressed(element) {
  const copy = element.cloneNode(true), pairs = [[element, copy], ...[...element.querySelectorAll("*")].map((one, i) => [one, copy.querySelectorAll("*")[i]])];
  for (const [from, to] of pairs) {
    const style = getComputedStyle(from);
    for (const name of SHOWN) if (from.tagName !== "title" && style.getPropertyValue(name)) to.setAttribute(name, style.getPropertyValue(name));
    to.removeAttribute("class");
    to.removeAttribute("href");
  }
  return copy;
}

async function drawing(box, { label, width, height, shapes }) {
  const about = await overview(), { page, id } = parse();
  const run = document.querySelector("main").dataset.run ?? Object.keys(about.created)[0] ?? "no run";
  const facts = { title: label, creator: "scsae", source: `store ${about.name}, ${run}`, date: about.created[run] ?? null, relation: location.hash || "#/" };
  const wide = width + 2 * MARGIN, heads = lines(label, width), entries = keyOf(box), ink = css("--ink");
  const top = MARGIN + heads.length * LINE + 4, { rows, tall } = placed(entries, width, ink);
  const whole = top + height + (tall ? tall + GAP : 0) + MARGIN;
  const root = svg("svg", { xmlns: "http://www.w3.org/2000/svg", width: wide, height: whole, viewBox: `0 0 ${wide} ${whole}`, "font-family": FONT, "font-size": 12 });
  root.append(svg("title", {}, label), metadata(facts), svg("rect", { width: wide, height: whole, fill: css("--paper") }),
    ...heads.map((text, i) => svg("text", { x: MARGIN, y: MARGIN + (i + 0.7) * LINE, fill: ink, "font-size": 13 }, text)),
    svg("g", { transform: `translate(${MARGIN} ${top})` }, shapes), svg("g", { transform: `translate(${MARGIN} ${top + height + GAP})` }, rows));
  return { root, facts, name: [page, id, label.split(/[.;:,(]/)[0]].filter(Boolean).join("-").replace(/[^\w-]+/g, "_").slice(0, 80) };
}

function metadata(facts) {
  const document = new DOMParser().parseFromString(`<metadata xmlns="http://www.w3.org/2000/svg" ${Object.entries(NAMESPACES).map(([name, at]) => `${name}="${at}"`).join(" ")}><rdf:RDF><rdf:Description/></rdf:RDF></metadata>`, "text/xml");
  const described = document.documentElement.firstChild.firstChild;
  for (const [name, value] of Object.entries(facts)) if (value !== null) described.appendChild(document.createElementNS(NAMESPACES["xmlns:dc"], `dc:${name}`)).textContent = value;
  return document.documentElement;
}

// The entries of the keys that belong to a figure: those of the nearest element around it that has any, within its panel.
function keyOf(box) {
  const last = box.closest("section, .panel, .controls-targets") ?? box.closest("main > *");
  for (let around = box; around; around = around.parentElement) {
    const found = [...around.querySelectorAll(".legend li, .key li, .ramp-legend, .steer-key > :not(ul)")];
    if (found.length) return found.filter((one) => one.offsetParent !== null || one.getClientRects().length);
    if (around === last) return [];
  }
  return [];
}

// Entries side by side, in as many rows as the width makes needed: what each shows, and its text.
function placed(entries, width, ink) {
  const rows = [];
  let x = 0, y = 0;
  for (const entry of entries) {
    const ramp = entry.querySelector("canvas"), text = (ramp ? [...entry.children].map((one) => (one === ramp ? "→" : one.textContent)).filter(Boolean).join(" ") : [...entry.querySelectorAll("span")].filter((one) => !one.children.length && one.textContent).map((one) => one.textContent).join(" ") || entry.textContent).trim();
    const mark = ramp ? 90 : SWATCH, wide = mark + 6 + widthOf(text);
    if (x && x + wide > width) { x = 0; y += LINE + 2; }
    rows.push(svg("g", { transform: `translate(${x} ${y})` }, shownBy(entry, ramp), svg("text", { x: mark + 6, y: 11, fill: ink, opacity: entry.querySelector("[aria-pressed=false]") ? 0.5 : null }, text)));
    x += wide + 2 * GAP;
  }
  return { rows, tall: entries.length ? y + LINE : 0 };
}

function shownBy(entry, ramp) {
  if (ramp) return svg("image", { href: ramp.toDataURL(), width: 90, height: 11, y: 2, preserveAspectRatio: "none" });
  const swatch = entry.querySelector(".swatch"), glyph = entry.querySelector("svg");
  if (swatch) return svg("circle", { cx: SWATCH / 2, cy: 7, r: 5, fill: getComputedStyle(swatch).backgroundColor });
  if (!glyph) return null;
  const { width, height } = glyph.viewBox.baseVal, by = Math.min(SWATCH / width, 14 / height);
  return svg("g", { transform: `scale(${by})` }, [...glyph.children].map(dressed));
}

let ruler = null;
function widthOf(text, font = `12px ${FONT}`) {
  ruler ??= document.createElement("canvas").getContext("2d");
  ruler.font = font;
  return ruler.measureText(text).width;
}

function lines(text, width) {
  const found = [];
  for (const word of text.split(/\s+/)) {
    const longer = found.length ? `${found.at(-1)} ${word}` : word;
    if (found.length && widthOf(longer, `13px ${FONT}`) <= width) found[found.length - 1] = longer;
    else found.push(word);
  }
  return found.length > 4 ? [...found.slice(0, 3), `${found[3]} …`] : found;
}

function save(blob, name) {
  const link = h("a", { href: URL.createObjectURL(blob), download: name });
  document.body.append(link);
  link.click();
  link.remove();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const asBlob = (root) => new Blob([new XMLSerializer().serializeToString(root)], { type: "image/svg+xml" });

function saveSvg({ root, name }) { save(asBlob(root), `${name}.svg`); }

async function savePng({ root, facts, name }) {
  const image = new Image(), { width, height } = root.viewBox.baseVal, url = URL.createObjectURL(asBlob(root));
  image.src = url;
  await image.decode();
  URL.revokeObjectURL(url);
  const canvas = h("canvas", { width: Math.round(width * SCALE), height: Math.round(height * SCALE) });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  const blob = await new Promise((done) => canvas.toBlob(done, "image/png"));
  const texts = { Title: facts.title, Software: facts.creator, Source: facts.source, "Creation Time": facts.date, Comment: facts.relation };
  save(new Blob(withTexts(new Uint8Array(await blob.arrayBuffer()), texts), { type: "image/png" }), `${name}.png`);
}

// The parts of a PNG with text chunks behind its header, which is 33 bytes long.
function withTexts(png, texts) {
  const known = Object.entries(texts).filter(([, value]) => value !== null);
  return [png.slice(0, 33), ...known.map(([name, value]) => textChunk(name, value)), png.slice(33)];
}

// tEXt holds Latin-1; other texts are iTXt, which is UTF-8.
function textChunk(name, value) {
  const isLatin = [...value].every((letter) => letter.charCodeAt(0) < 256), head = isLatin ? "tEXt" : "iTXt";
  const bytes = (text) => Uint8Array.from(text, (letter) => letter.charCodeAt(0));
  const body = [...bytes(head + name), 0, ...(isLatin ? bytes(value) : [0, 0, 0, 0, ...new TextEncoder().encode(value)])];
  const chunk = new Uint8Array(body.length + 8), view = new DataView(chunk.buffer);
  view.setUint32(0, body.length - 4);
  chunk.set(body, 4);
  view.setUint32(body.length + 4, crc(chunk.subarray(4, body.length + 4)));
  return chunk;
}

// The check sum of PNG (CRC-32, ISO 3309).
function crc(bytes) {
  let sum = 0xffffffff;
  for (const byte of bytes) {
    sum ^= byte;
    for (let bit = 0; bit < 8; bit++) sum = sum & 1 ? (sum >>> 1) ^ 0xedb88320 : sum >>> 1;
  }
  return (sum ^ 0xffffffff) >>> 0;
}
