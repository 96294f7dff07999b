// Cells by the beginning of their id, or by #cell_idx; and what fires in one of them.

import { json } from "./data.js";

const CHUNK = 1000;

// The cells whose id begins with a text, whatever its case, else the one at #cell_idx: [{id, idx}], at most `most`, and
// whether there are more.
export async function findCells(query, most = 8) {
  const index = await json("cell_ids/index.json");
  const named = await withId(index, query, most), numbered = /^#(\d{1,15})$/.exec(query.trim());
  // an id is an id, even one that looks like a place
  if (named.hits.length || !numbered || Number(numbered[1]) >= index.n) return named;
  return { hits: [{ id: `#${Number(numbered[1])}`, idx: Number(numbered[1]) }], isMore: false };
}

async function withId(index, query, most) {
  const wanted = query.trim().toLowerCase(), hits = [];
  // of ids that differ in case alone, the one that was typed comes first
  const found = (isMore) => ({ hits: hits.sort((a, b) => (b.id === query.trim()) - (a.id === query.trim())), isMore });
  if (!wanted || !index.n) return found(false);
  // the last chunk that begins before the text may hold the first that begins with it
  for (let chunk = Math.max(0, firstNotBefore(index.first, wanted) - 1); chunk < index.first.length; chunk++) {
    const { cell_id: ids, cell_idx: cells } = await json(`cell_ids/${chunk}.json`);
    for (let i = firstNotBefore(ids, wanted); i < ids.length; i++) {
      if (!ids[i].toLowerCase().startsWith(wanted)) return found(false);
      if (hits.length === most) return found(true);
      hits.push({ id: ids[i], idx: cells[i] });
    }
  }
  return found(false);
}

// Place of the first of sorted ids that does not come before a text in lower case.
function firstNotBefore(ids, wanted) {
  let low = 0, high = ids.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ids[middle].toLowerCase() < wanted) low = middle + 1;
    else high = middle;
  }
  return low;
}

// {id, idx, split, labels: {column: value}, features, values, percentiles, nActive, inPanel, keep, isCut, missing} of a cell. isCut: whether
// smaller codes than the `keep` largest may be missing; null where the panel is all cells.
export async function cell(idx) {
  const found = await json(`cell_features/${Math.floor(idx / CHUNK)}.json`);
  const i = idx - found.first;
  const labels = Object.fromEntries(Object.entries(found.labels).map(([name, column]) => [name, column[i]]));
  const inPanel = found.panel?.[i] ?? true, nActive = found.n_active?.[i] ?? 0, isCut = found.panel ? !inPanel && nActive >= found.keep : null;
  return { id: found.cell_id[i], idx, split: found.split[i], labels, features: found.feature_id?.[i] ?? [], values: found.value?.[i] ?? [], percentiles: found.percentile?.[i] ?? [], nActive, inPanel, keep: found.keep, isCut, missing: found.missing ?? null };
}
