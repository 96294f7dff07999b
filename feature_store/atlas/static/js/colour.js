// Colours: those of names (Okabe and Ito's, which colour-blind readers tell apart), and ramps of numbers, for either
// theme. A colour of a dot is one number, 0xAABBGGRR, as a canvas holds it.

import { h } from "./dom.js";

export const NAMED = ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#b3a100", "#7f7f7f", "#a6611a", "#1b7837", "#c51b7d"];
export const CLASS = {
  "gene-identity": "#009e73", "cell-context": "#0072b2", batch: "#d55e00", mixed: "#e69f00", dead: "#8a8a8a",
};
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6ece58", "#b5de2b", "#fde725"];
// the darkest part of it could not be seen on dark paper
const VIRIDIS_ON_DARK = ["#6a54b0", "#5566b5", "#4a7cb4", "#3c92a8", ...VIRIDIS.slice(5)];
// careful: the middle is neither paper's colour, or dots about it could not be seen
const SIGNED = { light: ["#1b5ea6", "#5b9bd0", "#9cc0dd", "#bfc4ca", "#eeb79c", "#dd7350", "#a8142a"], dark: ["#4ea1f0", "#4a82b8", "#4f6a85", "#656b73", "#96685a", "#d0694d", "#ff6a55"] };
const STEPS = 256;

export const isDark = () => {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
};
// A variable of the style sheet, e.g. css("--ink").
export const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

export function packed(hex, alpha = 255) {
  const value = parseInt(hex.slice(1), 16);
  return ((alpha << 24) | ((value & 255) << 16) | (((value >> 8) & 255) << 8) | (value >> 16)) >>> 0;
}

export const QUIET = () => packed(isDark() ? "#6b737e" : "#c9cdd3");

// The colour of each of n names, the same in every picture: by its place.
export const colourOf = (i) => NAMED[i % NAMED.length];

function ramp(stops) {
  const colours = new Uint32Array(STEPS);
  const rgb = stops.map((hex) => parseInt(hex.slice(1), 16)).map((v) => [v >> 16, (v >> 8) & 255, v & 255]);
  for (let i = 0; i < STEPS; i++) {
    const place = (i / (STEPS - 1)) * (stops.length - 1);
    const low = Math.min(Math.floor(place), stops.length - 2);
    const [r, g, b] = rgb[low].map((value, j) => Math.round(value + (rgb[low + 1][j] - value) * (place - low)));
    colours[i] = ((255 << 24) | (b << 16) | (g << 8) | r) >>> 0;
  }
  return colours;
}

const ramps = {};
// 256 packed colours: "sequential" (dark to light on dark paper, light to dark on light), "signed" about its middle.
export function rampOf(kind) {
  const theme = isDark() ? "dark" : "light", key = `${kind}-${theme}`;
  ramps[key] ??= ramp(kind === "signed" ? SIGNED[theme] : theme === "dark" ? VIRIDIS_ON_DARK : [...VIRIDIS].reverse());
  return ramps[key];
}

export const cssOf = (colour) => `rgb(${colour & 255} ${(colour >> 8) & 255} ${(colour >> 16) & 255})`;

// Dots by category codes [n]; what is beyond the palette is quiet. `colours`: a CSS colour a category.
export function byCategory(codes, colours) {
  const table = new Uint32Array(colours.length + 1).fill(QUIET());
  colours.forEach((colour, i) => { table[i] = colour ? packed(colour) : QUIET(); });
  const found = new Uint32Array(codes.length);
  for (let i = 0; i < codes.length; i++) found[i] = table[Math.min(codes[i], colours.length)];
  return found;
}

// Dots by number [n]; unknown ones are quiet.
export function byNumber(values, [low, high], kind = "sequential") {
  const colours = rampOf(kind), quiet = QUIET(), span = high - low || 1;
  const found = new Uint32Array(values.length);
  for (let i = 0; i < values.length; i++) {
    const value = values[i];
    found[i] = Number.isNaN(value) ? quiet : colours[Math.max(0, Math.min(STEPS - 1, ((value - low) / span) * (STEPS - 1) | 0))];
  }
  return found;
}

// Names and their colours; `onToggle(name)` makes them buttons, `off` are those switched off.
export function legend(entries, { onToggle, off = new Set(), label = "Legend" } = {}) {
  return h("ul", { class: "legend", "aria-label": label }, entries.map(({ name, colour, n }) => {
    const inside = [colour ? h("span", { class: "swatch", style: { background: colour } }) : null, h("span", {}, name), n === undefined ? null : h("span", { class: "quiet" }, n.toLocaleString("en"))];
    return h("li", {}, onToggle
      ? h("button", { type: "button", class: "legend-entry", "aria-pressed": String(!off.has(name)), onclick: () => onToggle(name) }, inside)
      : h("span", { class: "legend-entry" }, inside));
  }));
}

// A bar of a ramp with its ends written beside it.
export function rampLegend([low, high], format, { kind = "sequential", label = "" } = {}) {
  const colours = rampOf(kind);
  const canvas = h("canvas", { width: STEPS, height: 1, class: "ramp", "aria-hidden": "true" });
  const context = canvas.getContext("2d");
  const image = context.createImageData(STEPS, 1);
  new Uint32Array(image.data.buffer).set(colours);
  context.putImageData(image, 0, 0);
  return h("div", { class: "ramp-legend" }, h("span", { class: "quiet" }, label), h("span", {}, format(low)), canvas, h("span", {}, format(high)));
}
