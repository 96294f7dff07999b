import { h } from "../dom.js";

export const title = () => "Atlas";

export async function show(root) {
  root.append(h("p", {}, "being written"));
  return {};
}
