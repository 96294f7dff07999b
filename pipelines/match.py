"""Matching: which features of one SAE recur in SAEs of another seed, layer, model or data set.

SAEs of one space (the same model and site, thus the same width) are compared by the directions of their decoder rows,
whatever cells they were trained on. All others are compared by their codes of the same cells: pairs are chosen on
`select` cells and reported on `test` cells. A pair of SAEs is one run that holds the matches of both sides, so either
order of the pair gives the same run. See `feature_store.associations.matching`.

Whether given vectors of other cells are of one model, only their --source-name says: their SAEs are compared by codes,
and by directions if --method cosine asks for it.

Two SAEs of the same --seed start from the same directions. A warning is shown, because a shared start inflates the
agreement: after training on other donors of the same data, 47 % of the features recurred from the same start and 19 %
from another one (mini model, layer 2, n_features 1024, 800 steps).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from feature_store.associations import Labels, matching
from feature_store.associations.inputs import Bools
from feature_store.associations.matching import Dead, Matches, match_codes, match_directions, summarise
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes, panel_firing, panel_with_tokens
from feature_store.query.runs import newest_run, resolve_run
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout, RunInfo
from feature_store.storage.plans import ActivationsPlan, CellsPlan, MatchPlan, SAEPlan, constants_of
from pipelines.config import MatchOptions
from pipelines.encode_command import encode_command, reads_vectors
from pipelines.errors import UsageError
from pipelines.inputs import load_stored_sae
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.stage import Clock, StageResult

Method = Literal["cosine", "pearson", "spearman"]
COSINE: Literal["cosine"] = "cosine"


class _SAE(NamedTuple):
    """One SAE to match: its id, its plan and the hash of its content."""

    run: str
    plan: SAEPlan
    manifest: str

    @classmethod
    def of(cls, info: RunInfo) -> "_SAE":
        run = commit.Run.open(info.path)
        return cls(info.run, SAEPlan.of(run), run.manifest().sha)


def match(options: MatchOptions, store: Path) -> list[StageResult]:
    """Match the features of one SAE with those of each other SAE; existing matches are reused.

    Raises:
        NotFoundError: the store has no SAE, or none of the given name.
        UsageError: no other was named, or two that read different spaces have no codes of the same cells; nothing is
            written.
    """
    layout = Layout(store)
    check_before_work(layout)
    named = [resolve_run(layout, "saes", other, option="--other") for other in options.other]
    others = [_SAE.of(info) for info in dict.fromkeys(named)]
    sae = _SAE.of(_matched(layout, options.sae, [other.run for other in others]))
    if not others:
        raise UsageError(f"no --other was given to match {_name(sae)} with; {_commands(layout, sae.run)}")
    plans = [_plan(layout, sae, other, options) for other in others]
    results = []
    for other, plan in zip(others, plans, strict=True):
        clock = Clock()
        folder = layout.matches_dir(plan.id)
        path = folder / "feature_match"
        missing = not commit.is_intact(path)
        if missing:
            with commit.exclusive(folder), progress_bar("match", 1, "pairs") as report:
                commit.write_table(path, _table(layout, plan), plan.table("feature_match"))
                report(1)
        matched = commit.read_table(path).filter(sae=sae.run)
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
                    if plan.method == COSINE
                    else f"{plan.method} correlation of the cell codes of {plan.dataset}",
                    **_shared_start(sae, other),
                    "dead": int(matched["dead"].sum()),
                    **{name: figure for name, figure in summarise(matched).items() if figure == figure},
                },
            )
        )
    return results


def _matched(layout: Layout, named: str | None, others: Sequence[str]) -> RunInfo:
    """Return the SAE whose features are matched: the one that is named, else the newest that is none of the others."""
    if named is None:
        return newest_run(layout, "saes", but=others)
    return resolve_run(layout, "saes", named, option="--sae")


def _commands(layout: Layout, sae: str) -> str:
    """Return a sentence with the command that matches an SAE with each other one of the store."""
    known = [info.run for info in layout.runs("saes") if info.complete and info.run != sae]
    if not known:
        return f"it is the only one: train another with `scsae train --seed 1 {layout.store_option}`"
    commands = [f"`scsae match --sae {sae} --other {other} {layout.store_option}`" for other in known]
    return f"there are {len(known)} others: {', '.join(commands)}"


def _plan(layout: Layout, sae: _SAE, other: _SAE, options: MatchOptions) -> MatchPlan:
    """Return the plan of a match; it holds the two SAEs in the order of their names, so either order gives one plan."""
    if sae.run == other.run:
        raise UsageError(f"--other was {other.run!r}, the SAE itself; {_commands(layout, sae.run)}")
    shared = _share_space(sae, other)
    method: Method
    if options.method == "auto":
        method = COSINE if shared else "pearson"
    else:
        method = options.method
    if method == COSINE and not (shared or _share_name(layout, sae, other)):
        raise UsageError(
            f"--method was 'cosine', but {_name(sae)} and {_name(other)} read different spaces; leave --method out to "
            "compare their codes"
        )
    first, second = sorted((sae, other), key=lambda one: one.run)
    by_codes = method != COSINE
    codes: list[CodesRun | None]
    if by_codes:
        codes = [*_codes_of_same_cells(layout, (first, second))]
    else:
        codes = [next(iter(_codes_of(layout, one)), None) for one in (first, second)]
    names = [None if run is None else run.folder.name for run in codes]
    return MatchPlan(
        saes=(first.run, second.run),
        sae_manifests=(first.manifest, second.manifest),
        codes=(names[0], names[1]),
        method=method,
        seed=options.seed,
        dataset=codes[0].plan.dataset if by_codes and codes[0] else None,
        n_null=options.n_null if by_codes else None,
        max_cells=options.max_cells if by_codes else None,
        constants=constants_of((matching,)),
    )


def _share_space(a: _SAE, b: _SAE) -> bool:
    spaces = [(one.plan.model_digest, one.plan.site, one.plan.d_model) for one in (a, b)]
    return spaces[0] == spaces[1]


def _share_name(layout: Layout, a: _SAE, b: _SAE) -> bool:
    """Return whether both SAEs are of given vectors that are said to be of one model."""
    same = (a.plan.model, a.plan.d_model) == (b.plan.model, b.plan.d_model)
    return same and all(reads_vectors(layout, one.plan) for one in (a, b))


def _shared_start(a: _SAE, b: _SAE) -> dict[str, str]:
    """Return a warning if both SAEs had the same start, which inflates the agreement and which no null corrects."""
    if not (a.plan.train and b.plan.train):
        # a baseline or an imported SAE has no start that is known here
        return {}
    starts = [(one.plan.n_features, one.plan.d_model, one.plan.seed) for one in (a, b)]
    if starts[0] != starts[1]:
        return {}
    return {
        "start": f"the same random directions (--seed {a.plan.seed}), which flatters; train one with another --seed"
    }


def _name(sae: _SAE) -> str:
    return f"saes/{sae.run} ({sae.plan.site} of {sae.plan.model})"


def _codes_of(layout: Layout, sae: _SAE) -> list[CodesRun]:
    """Return the complete codes runs of an SAE: those of its training data set first, then the newest."""
    runs = [CodesRun.open(info.path) for info in layout.runs("codes") if info.complete]
    own = [run for run in runs if run.plan.sae == sae.run]
    return sorted(own, key=lambda run: run.plan.dataset != sae.plan.dataset)


def _codes_of_same_cells(layout: Layout, pair: Sequence[_SAE]) -> tuple[CodesRun, CodesRun]:
    """Return codes of both SAEs of the same files with the same pooling; UsageError names the commands that make them.

    One file may be two data sets with different splits, if the SAEs were trained on different cells.
    """

    def cells_of(codes: CodesRun) -> tuple[str, str]:
        return _digest_of(layout, codes.plan.dataset), codes.plan.pooling

    a, b = ([(cells_of(run), run) for run in _codes_of(layout, sae)] for sae in pair)
    for cells, one in a:
        for same, two in b:
            if cells == same:
                return one, two
    encoded = [run.plan.dataset for _, run in (*a, *b)]
    dataset = _data_set_of_both(layout, pair, [*encoded, *(sae.plan.dataset for sae in pair)])
    pooling = next((run.plan.pooling for _, run in (*a, *b)), "max")
    wanted = (_digest_of(layout, dataset), pooling)
    lacking = [sae for sae, runs in zip(pair, (a, b), strict=True) if wanted not in {cells for cells, _ in runs}]
    commands = " and ".join(f"`{encode_command(layout, sae.run, dataset, pooling=pooling)}`" for sae in lacking)
    raise UsageError(
        f"{_name(pair[0])} and {_name(pair[1])} are compared by their codes of the same cells, pooled alike, and there "
        f"are none of both; make them with {commands}"
    )


def _data_set_of_both(layout: Layout, pair: Sequence[_SAE], datasets: Sequence[str]) -> str:
    """Return the first data set that both SAEs can encode. UsageError if tokens were recorded of other cells alone."""
    for dataset in datasets:
        if all(_can_encode(layout, sae, dataset) for sae in pair):
            return dataset
    raise UsageError(
        f"{_name(pair[0])} and {_name(pair[1])} are compared by their codes of the same cells, and tokens that another "
        "program recorded are of other cells; record those of the same cells too, and train on them"
    )


def _can_encode(layout: Layout, sae: _SAE, dataset: str) -> bool:
    if _digest_of(layout, sae.plan.dataset) == _digest_of(layout, dataset):
        return True
    return ActivationsPlan.of(commit.Run.open(layout.activations_dir(sae.plan.activations))).origin != "recorded"


def _digest_of(layout: Layout, dataset: str) -> str:
    return CellsPlan.of(commit.Run.open(layout.cells_dir(dataset))).digest


def _table(layout: Layout, plan: MatchPlan) -> pl.DataFrame:
    """Return the matches of both sides as one table."""
    codes = [None if run is None else CodesRun.open(layout.codes_dir(run)) for run in plan.codes]
    dead = [None if run is None else _never_fires(run) for run in codes]
    if plan.method == COSINE:
        a, b = (decoder_rows(layout.saes_dir(sae)) for sae in plan.saes)
        matches = match_directions(a, b, dead=(dead[0], dead[1]), seed=plan.seed)
    else:
        matches = _match_codes(layout, plan, [run for run in codes if run is not None], (dead[0], dead[1]))
    frames = [
        frame.with_columns(sae=pl.lit(sae), other=pl.lit(other))
        for frame, sae, other in zip(matches, plan.saes, reversed(plan.saes), strict=True)
    ]
    return schemas.conform("feature_match", pl.concat(frames))


def decoder_rows(folder: Path) -> npt.NDArray[np.float32]:
    """Return the decoder rows of a saved SAE, float32 [n_features d_model]."""
    rows: npt.NDArray[np.float32] = load_stored_sae(folder).W_dec.numpy()
    return rows


def _never_fires(codes: CodesRun) -> Bools:
    """Return a mask of the features without a code in any cell of the panel [n_features]."""
    silent: Bools = panel_firing(codes) == 0
    return silent


def _match_codes(layout: Layout, plan: MatchPlan, codes: Sequence[CodesRun], dead: Dead) -> Matches:
    """Choose pairs on `select` cells and report them on `test` cells, a seeded sample of at most `max_cells` of each.

    The splits are those of the first data set, except that training cells of the second SAE count as `train`.
    """
    first, second = (layout.cells_dir(run.plan.dataset) for run in codes)
    cells = read_panel_cells(first)
    panel = cells["cell_idx"].to_numpy()
    other = read_panel_cells(second, ["cell_idx", "split"])
    in_other = other["cell_idx"].to_numpy()
    usable = panel_with_tokens(codes[0], panel)
    usable &= np.isin(panel, in_other[panel_with_tokens(codes[1], in_other)])
    usable &= ~np.isin(panel, in_other[(other["split"] == "train").to_numpy()])
    rng = np.random.default_rng(plan.seed)
    chosen = {}
    for name in ("select", "test"):
        of_split = np.flatnonzero((cells["split"] == name).to_numpy() & usable)
        chosen[name] = np.sort(rng.permutation(of_split)[: plan.max_cells])
    select, test = (
        (load_cell_codes(codes[0], panel[rows]), load_cell_codes(codes[1], panel[rows]))
        for rows in (chosen["select"], chosen["test"])
    )
    unit = next((kind for kind in ("donor", "batch") if cells[kind].null_count() < cells.height), None)
    return match_codes(
        select,
        test,
        units=None if unit is None else Labels.from_values(unit, cells[unit].gather(chosen["select"])),
        correlation="spearman" if plan.method == "spearman" else "pearson",
        dead=dead,
        n_null=plan.n_null or 0,
        seed=plan.seed,
    )
