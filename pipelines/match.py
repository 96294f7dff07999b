"""Matching: which features of one autoencoder are found again by others, of another seed, layer, model or data set.

Autoencoders of one space (the same model and site, thus the same width) are compared by the directions of their decoder
rows, whatever cells they were trained on; all others by their codes of the same cells, `select` cells to choose the
pairs and `test` cells to report them. A pair of autoencoders is one run with the matches of both sides, so it is the
same run from whichever side it is asked for. See `feature_store.associations.matching`.

Two of the same --seed start from the same directions, and it is said, as what is left of them passes for agreement:
after training on other donors of the same data, 47 % of the features were found again from the same start and 19 % from
another one (mini model, layer 2, F 1024, 800 steps).
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations import Labels
from feature_store.associations.inputs import Bools
from feature_store.associations.matching import Dead, Matches, match_codes, match_directions, summarise
from feature_store.cells import read_cells, read_splits
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit, filesystem, schemas
from feature_store.storage.layout import Layout, run_id
from pipelines.config import MatchOptions
from pipelines.errors import UsageError
from pipelines.inputs import SOURCE_FILE
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.stage import FORMAT_VERSION, Clock, StageResult, parent_run

COSINE = "cosine"
SPACE = ("model_digest", "site")
CELL_COLUMNS = ("donor", "batch", "cell_type", "split_column")


def match(options: MatchOptions, store: Path) -> list[StageResult]:
    """Match the features of one SAE with those of each of the others; pairs that are matched already are not again.

    Raises:
        NotFoundError: there is no SAE, or none of that name.
        UsageError: no other was named, or two that read different spaces have no codes of the same cells; nothing is
            written.
    """
    layout = Layout(store)
    sae = commit.Run.open(parent_run(layout, "saes", options.sae, option="--sae").path)
    if not options.other:
        known = [info.run for info in layout.runs("saes") if info.complete and info.run != sae.path.name]
        raise UsageError(
            f"no --other was given to match {_name(sae)} with; "
            + (f"there are {', '.join(known)}" if known else "it is the only one: train another with `scsae train`")
        )
    named = [parent_run(layout, "saes", other, option="--other") for other in options.other]
    others = [commit.Run.open(info.path) for info in dict.fromkeys(named)]
    plans = [_plan(layout, sae, other, options) for other in others]
    results = []
    for other, plan in zip(others, plans, strict=True):
        clock = Clock()
        folder = layout.matches_dir(run_id(plan))
        path = folder / "feature_match"
        missing = bool(commit.verify(path))
        if missing:
            with commit.sole_driver(folder), progress_bar("match", 1, "pairs") as report:
                commit.write_table(path, _table(layout, plan), plan)
                report(1)
        matched = commit.read_table(path).filter(sae=sae.path.name)
        results.append(
            StageResult(
                kind="matches",
                run=folder.name,
                path=folder,
                done=int(missing),
                reused=int(not missing),
                seconds=clock.seconds,
                facts={
                    "features of": _name(sae),
                    "matched with": _name(other),
                    "by": "cosine of decoder rows"
                    if plan["method"] == COSINE
                    else f"{plan['method']} correlation of the cell codes of {plan['dataset']}",
                    **_shared_start(sae, other),
                    "dead": int(matched["dead"].sum()),
                    **{name: figure for name, figure in summarise(matched).items() if figure == figure},
                },
            )
        )
    return results


def _plan(layout: Layout, sae: commit.Run, other: commit.Run, options: MatchOptions) -> dict[str, Any]:
    """What determines a match; the two SAEs in the order of their names, so that it is the same from either side."""
    if sae.path.name == other.path.name:
        raise UsageError(f"--other was {other.path.name!r}, the SAE itself; give another one")
    shared = _share_space(sae, other)
    method = {True: COSINE, False: "pearson"}[shared] if options.method == "auto" else options.method
    if method == COSINE and not shared:
        raise UsageError(
            f"--method was 'cosine', but {_name(sae)} and {_name(other)} read different spaces; leave --method out to "
            "compare their codes"
        )
    pair = sorted((sae, other), key=lambda run: run.path.name)
    plan = {
        "format": FORMAT_VERSION,
        "table": "feature_match",
        "saes": [run.path.name for run in pair],
        "sae_manifests": [run.manifest().sha for run in pair],
        "method": method,
        "seed": options.seed,
    }
    if method == COSINE:
        codes = [next(iter(_codes_of(layout, run)), None) for run in pair]
        return {**plan, "codes": [None if run is None else run.folder.name for run in codes]}
    one, two = _codes_of_same_cells(layout, pair)
    return {
        **plan,
        "codes": [one.folder.name, two.folder.name],
        "dataset": one.plan["dataset"],
        "n_null": options.n_null,
        "max_cells": options.max_cells,
    }


def _share_space(a: commit.Run, b: commit.Run) -> bool:
    return all(a.plan[key] == b.plan[key] for key in SPACE) and a.plan["sae"]["d_model"] == b.plan["sae"]["d_model"]


def _shared_start(a: commit.Run, b: commit.Run) -> dict[str, str]:
    """A warning for SAEs that began as one: what they kept of it looks like agreement, and no null knows of it."""
    starts = [
        (run.plan["sae"]["n_features"], run.plan["sae"]["d_model"], run.plan.get("train", {}).get("seed"))
        for run in (a, b)
    ]
    seed = starts[0][-1]
    if seed is None or starts[0] != starts[1]:
        return {}
    return {"start": f"the same random directions (--seed {seed}), which flatters; train one with another --seed"}


def _name(sae: commit.Run) -> str:
    return f"saes/{sae.path.name} ({sae.plan['site']} of {sae.plan['model']})"


def _codes_of(layout: Layout, sae: commit.Run) -> list[CodesRun]:
    """The complete codes runs of an SAE, those of the cells that it was trained on first, then the newest."""
    runs = [CodesRun.open(info.path) for info in layout.runs("codes") if info.complete]
    own = [run for run in runs if run.plan["sae"] == sae.path.name]
    return sorted(own, key=lambda run: run.plan["dataset"] != sae.plan["dataset"])


def _codes_of_same_cells(layout: Layout, pair: Sequence[commit.Run]) -> tuple[CodesRun, CodesRun]:
    """Codes of both SAEs of the same files, pooled alike; UsageError with the commands that make them.

    One file may be two data sets, dealt to the splits in two ways, where the SAEs were trained on other cells.
    """

    def cells_of(codes: CodesRun) -> tuple[str, str]:
        return commit.Run.open(layout.cells_dir(codes.plan["dataset"])).plan["digest"], codes.plan["pooling"]

    a, b = ([(cells_of(run), run) for run in _codes_of(layout, sae)] for sae in pair)
    for cells, one in a:
        for same, two in b:
            if cells == same:
                return one, two
    dataset = next((run.plan["dataset"] for _, run in (*a, *b)), pair[0].plan["dataset"])
    digest = commit.Run.open(layout.cells_dir(dataset)).plan["digest"]
    lacking = [sae for sae, runs in zip(pair, (a, b), strict=True) if digest not in {cells[0] for cells, _ in runs}]
    commands = " and ".join(f"`{_encode_command(layout, sae, dataset)}`" for sae in lacking or pair)
    raise UsageError(
        f"{_name(pair[0])} and {_name(pair[1])} are compared by their codes of the same cells, pooled alike, and there "
        f"are none of both; make them with {commands}"
    )


def _encode_command(layout: Layout, sae: commit.Run, dataset: str) -> str:
    """What to type for codes of an SAE of the cells of a data set."""
    command = f"scsae encode --sae {sae.path.name} --store {layout.root}"
    if sae.plan["dataset"] == dataset:
        return command
    folder = layout.cells_dir(dataset)
    paths, plan = json.loads(filesystem.read_bytes(folder / SOURCE_FILE))["path"], commit.Run.open(folder).plan
    given = [("--data", path) for path in ([paths] if isinstance(paths, str) else paths)]
    given += [(f"--{key.replace('_', '-')}", plan[key]) for key in CELL_COLUMNS if plan.get(key) is not None]
    given += [("--label", label) for label in plan["labels"]]
    return " ".join([command, *(f"{option} {shlex.quote(value)}" for option, value in given)])


def _table(layout: Layout, plan: dict[str, Any]) -> pl.DataFrame:
    """The matches of both sides as one table."""
    codes = [None if run is None else CodesRun.open(layout.codes_dir(run)) for run in plan["codes"]]
    dead = [None if run is None else _never_fires(run) for run in codes]
    if plan["method"] == COSINE:
        a, b = (decoder_rows(layout.saes_dir(sae)) for sae in plan["saes"])
        matches = match_directions(a, b, dead=(dead[0], dead[1]), seed=plan["seed"])
    else:
        matches = _match_codes(layout, plan, [run for run in codes if run is not None], (dead[0], dead[1]))
    frames = [
        frame.with_columns(sae=pl.lit(sae), other=pl.lit(other))
        for frame, sae, other in zip(matches, plan["saes"], reversed(plan["saes"]), strict=True)
    ]
    return schemas.conform("feature_match", pl.concat(frames))


def decoder_rows(folder: Path) -> npt.NDArray[np.float32]:
    """Decoder rows of a saved SAE [n_features d_model]."""
    from sae_core.sae import load_sae

    with filesystem.local_folder(folder) as local:
        rows: npt.NDArray[np.float32] = load_sae(local).W_dec.numpy()
    return rows


def _never_fires(codes: CodesRun) -> Bools:
    """Features without a code in any cell [n_features]."""
    silent = np.ones(codes.n_features, dtype=bool)
    for part in codes.by_cell.parts():
        silent[commit.read_part(part, ["feature_id"])["feature_id"].to_numpy()] = False
    return silent


def _match_codes(layout: Layout, plan: dict[str, Any], codes: Sequence[CodesRun], dead: Dead) -> Matches:
    """Choose on `select` cells, report on `test` cells: of either a seeded sample, where there are more than enough.

    The splits are those of the first data set, but for cells that the second SAE was trained on.
    """
    cells = read_cells(layout.cells_dir(codes[0].plan["dataset"]))
    split = read_splits(layout.cells_dir(codes[0].plan["dataset"]))
    split[read_splits(layout.cells_dir(codes[1].plan["dataset"])) == "train"] = "train"
    rng = np.random.default_rng(plan["seed"])
    chosen = {}
    for name in ("select", "test"):
        of_split = np.flatnonzero(split == name)
        chosen[name] = np.sort(rng.permutation(of_split)[: plan["max_cells"]])
    select, test = (
        (load_cell_codes(codes[0].by_cell, cells.height, rows), load_cell_codes(codes[1].by_cell, cells.height, rows))
        for rows in (chosen["select"], chosen["test"])
    )
    unit = next((kind for kind in ("donor", "batch") if cells[kind].null_count() < cells.height), None)
    return match_codes(
        select,
        test,
        units=None if unit is None else Labels.from_values(unit, cells[unit].gather(chosen["select"]).to_list()),
        correlation=plan["method"],
        dead=dead,
        n_null=plan["n_null"],
        seed=plan["seed"],
    )
