// Reads resources below data/, each once, and keeps the most recently used.

const MOST_KEPT = 200;
const MOST_BUNDLES = 12;
const kept = new Map(), unpacked = new Map(), decoder = new TextDecoder();
const isBundled = document.getElementById("app").dataset.bundled !== undefined;
let places = null;
let stored = null;

export class NotThere extends Error {}

export const json = (path) => keep(path, async () => JSON.parse(decoder.decode(await bytesOf(path))));
export const columns = (path) => keep(path, async () => new Columns(await bytesOf(path)));
export const overview = () => json("atlas.json");

function keep(path, read) {
  const found = kept.get(path) ?? read();
  kept.delete(path);
  kept.set(path, found);
  found.catch(() => kept.delete(path));
  if (kept.size > MOST_KEPT) kept.delete(kept.keys().next().value);
  return found;
}

// The bytes of a resource: at its own path from a server, in a bundle of an export (feature_store/atlas/bundles.py).
async function bytesOf(path) {
  if (!isBundled) return (await fetched(path)).arrayBuffer();
  places ??= await placesOf();
  if (!places.has(path)) throw new NotThere(`This atlas has no ${path}.`);
  const bundle = await bundleOf(places.get(path));
  return bundle.get(path);
}

async function placesOf() {
  const { bundles } = JSON.parse(decoder.decode(await unzipped("index.gz")));
  return new Map(bundles.flatMap(({ file, paths }) => paths.map((one) => [one, file])));
}

function bundleOf(file) {
  const found = unpacked.get(file) ?? unzipped(file).then((buffer) => {
    const size = new DataView(buffer).getUint32(0, true), inside = new Map();
    let at = 4 + size;
    for (const [path, n] of JSON.parse(decoder.decode(new Uint8Array(buffer, 4, size)))) { inside.set(path, buffer.slice(at, at + n)); at += n; }
    return inside;
  });
  unpacked.delete(file);
  unpacked.set(file, found);
  found.catch(() => unpacked.delete(file));
  if (unpacked.size > MOST_BUNDLES) unpacked.delete(unpacked.keys().next().value);
  return found;
}

async function unzipped(file) {
  const buffer = await (await fetched(file)).arrayBuffer(), [first, second] = new Uint8Array(buffer, 0, 2);
  // some hosts name the encoding of such a file, and the browser has unpacked it already
  if (first !== 0x1f || second !== 0x8b) return buffer;
  return new Response(new Blob([buffer]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function fetched(path) {
  let response;
  try {
    response = await fetch(`data/${path}`);
  } catch {
    throw new Error("The server of this atlas does not answer; start it again with `scsae serve`.");
  }
  if (response.status === 404) throw new NotThere(`This atlas has no ${path}.`);
  if (!response.ok) {
    const said = await response.json().catch(() => ({}));
    throw new Error(said.error ?? `${path} cannot be read (${response.status}).`);
  }
  const now = response.headers.get("Atlas-State");
  stored ??= now;
  // another run was committed: what this page has read is of the store before
  if (now !== null && now !== stored) {
    location.reload();
    return new Promise(() => {});
  }
  return response;
}

const LOOK_EVERY = 15_000;

// Call back once, when runs were committed since this page was read. A folder of files names no state, and never changes.
export function watch(tell) {
  const timer = setInterval(async () => {
    if (stored === null || document.hidden) return;
    const response = await fetch("data/atlas.json", { method: "HEAD" }).catch(() => null), now = response?.headers.get("Atlas-State") ?? stored;
    if (now === stored) return;
    clearInterval(timer);
    tell();
  }, LOOK_EVERY);
}

const ARRAYS = { f64: Float64Array, f32: Float32Array, i32: Int32Array, u32: Uint32Array, u16: Uint16Array, u8: Uint8Array };
const NULL_I32 = -2147483648;

// A .cols file: see feature_store/atlas/columns.py.
export class Columns {
  constructor(buffer) {
    const size = new DataView(buffer).getUint32(0, true);
    const header = JSON.parse(decoder.decode(new Uint8Array(buffer, 4, size)));
    this.n = header.n;
    this.names = header.columns.map((about) => about.name);
    this.columns = new Map(header.columns.map((about) => [about.name, new Column(about, buffer, 4 + size + about.at, header.n)]));
  }

  has(name) {
    return this.columns.has(name);
  }

  get(name) {
    return this.columns.get(name) ?? null;
  }
}

class Column {
  constructor({ name, kind, codes, categories, bytes }, buffer, at, n) {
    Object.assign(this, { name, kind, n, categories: categories ?? null });
    if (kind === "text") {
      this.offsets = new Uint32Array(buffer, at, n + 1);
      this.bytes = new Uint8Array(buffer, at + 4 * (n + 1), bytes - 4 * (n + 1));
    } else {
      this.values = new ARRAYS[codes ?? kind](buffer, at, n);
    }
  }

  // The value of a row: a number, a text, true or false; null where there is none.
  at(i) {
    if (this.kind === "text") return this.text(i) || null;
    const value = this.values[i];
    if (this.kind === "category") return this.categories[value] ?? null;
    if (this.kind === "u8") return value === 2 ? null : value === 1;
    return Number.isNaN(value) || (this.kind === "i32" && value === NULL_I32) ? null : value;
  }

  text(i) {
    if (this.kind !== "text") return String(this.at(i) ?? "");
    return decoder.decode(this.bytes.subarray(this.offsets[i], this.offsets[i + 1]));
  }

  // Texts in lower case, decoded once: what a filter as you type looks into.
  lower() {
    this.lowered ??= Array.from({ length: this.n }, (_, i) => this.text(i).toLowerCase());
    return this.lowered;
  }
}
