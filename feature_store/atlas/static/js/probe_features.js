// The features of a label's probe in words: "+ 772 (CD79A MS4A1), − 12 (CD3D)".

import { fixed, h } from "./dom.js";
import { href } from "./state.js";

export const signed = (x) => (x === null || x === undefined ? "–" : `${x < 0 ? "−" : "+"}${fixed(Math.abs(x))}`);

// One of the features, a link to its page; the first one has no comma before it.
export function probeFeature({ feature_id: id, name, weight }, i) {
  const genes = (name ?? "").split(" ").slice(0, 3).join(" ");
  return [i ? ", " : "", h("a", { href: href("feature", id), title: `weight ${signed(weight)} in logits per standard deviation` }, `${weight < 0 ? "−" : "+"} ${id}${genes ? ` (${genes})` : ""}`)];
}
