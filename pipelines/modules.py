"""Modules: which features fire together beyond their rates, and the gene sets that they share.

    <root>/modules/<run>/feature_module/   a row for each feature of a module
    <root>/modules/<run>/module/           a row for each module, and for each that shuffled codes give
    <root>/modules/<run>/module_gene_set/  the gene sets of modules

`feature_store.modules` has the method. All is done in this process: at most 20,000 cells and 4,096 features take 330 MB
and the product of that matrix with itself for each resample.
"""

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

import feature_store.modules.communities as communities_module
import feature_store.modules.gene_sets as gene_sets_module
from feature_store.associations.held_out_units import unit_column
from feature_store.associations.inputs import Labels
from feature_store.associations.moments import column_moments
from feature_store.associations.multiple_testing import benjamini_hochberg
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes, panel_tokens
from feature_store.modules import (
    coherence,
    correlations,
    find_modules,
    module_gene_sets,
    residuals,
    shuffled_in_blocks,
    significant_sets,
)
from feature_store.modules.communities import Modules
from feature_store.query.runs import RunChain
from feature_store.storage import commit, schemas
from feature_store.storage.layout import MODULE_TABLES, Layout
from feature_store.storage.plans import ModulesPlan, constants_of
from pipelines.associate import associations_of
from pipelines.config import ModulesOptions
from pipelines.errors import UsageError
from pipelines.inputs import warn_of_samples
from pipelines.runtime.checks import check_before_work
from pipelines.runtime.progress import progress_bar
from pipelines.runtime.stage import Clock, StageResult

FOUND_ON, TESTED_ON = ("train", "select"), ("test",)
SHUFFLED = "shuffled codes"
Q = 0.05
N_GENES = 8
"""Genes by which a module is named."""
LEAST_FIRED = 10
"""Least number of cells in which a feature fires."""
_STREAM = 31
Ints = npt.NDArray[np.int64]


def modules(options: ModulesOptions, store: Path) -> StageResult:
    """Find the modules of an SAE and test them; a run that is there is not made again.

    Raises:
        NotFoundError: there are no associations of the SAE.
        UsageError: there are too few cells.
    """
    clock, layout = Clock(), Layout(store)
    check_before_work(layout)
    chain = RunChain.of(layout, associations_of(layout, options.sae).run)
    plan = ModulesPlan(
        associations=chain.run,
        associations_manifest=commit.Run.open(layout.associations_dir(chain.run) / "features").manifest().sha,
        sae=chain.associations.sae,
        dataset=chain.associations.dataset,
        n_features=options.features,
        cells=options.cells,
        n_resamples=options.n_resamples,
        n_draws=options.n_draws,
        seed=options.seed,
        constants=constants_of((communities_module, gene_sets_module, sys.modules[__name__])),
    )
    folder = layout.modules_dir(plan.id)
    missing = [name for name in MODULE_TABLES if not commit.is_intact(folder / name)]
    if missing:
        with commit.exclusive(folder):
            for name, frame in _Search(layout, chain, plan).tables().items():
                commit.write_table(folder / name, frame, plan.table(name))
    found = commit.read_table(folder / "module")
    own = found.filter(pl.col("control").is_null())
    warn_of_samples(layout, plan.dataset)
    return StageResult(
        kind="modules",
        run=folder.name,
        path=folder,
        done=len(missing),
        reused=len(MODULE_TABLES) - len(missing),
        seconds=clock.seconds,
        facts={
            "sae": plan.sae,
            "modules": f"{own.height}, of {own['n_features'].sum()} features together",
            "beyond features that fire as often": f"{(own['q'] <= Q).sum()} at q <= {Q} on test cells",
            "modules of shuffled codes": found.height - own.height,
        },
    )


@dataclass(frozen=True)
class _Search:
    """The work of one run."""

    layout: Layout
    chain: RunChain
    plan: ModulesPlan

    def tables(self) -> dict[str, pl.DataFrame]:
        """The tables of the run."""
        plan, n_steps = self.plan, 2 * (self.plan.n_resamples + 1) + 1
        with progress_bar("modules", n_steps, "resamples") as report:
            cells = self._sample(FOUND_ON)
            features = self._features(cells)
            values, block, unit = self._residuals(cells, features)
            own = find_modules(values, block, unit, n_resamples=plan.n_resamples, seed=plan.seed)
            report(plan.n_resamples + 1)
            rng = np.random.default_rng((plan.seed, _STREAM, 1))
            noise = shuffled_in_blocks(values, block, rng)
            shuffled = find_modules(noise, block, unit, n_resamples=plan.n_resamples, seed=plan.seed)
            report(2 * (plan.n_resamples + 1))
            test, _, _ = self._residuals(self._sample(TESTED_ON), features)
            found = {None: (own, correlations(values)), SHUFFLED: (shuffled, correlations(noise))}
            rows = [self._rows(control, *one, correlations(test), features) for control, one in found.items()]
            report(n_steps)
        members = pl.DataFrame(
            [
                {
                    "module": i,
                    "feature_id": int(features[f]),
                    "n_features": len(group),
                    "r": _mean_with(found[None][1], f, group),
                }
                for i, group in enumerate(own.members)
                for f in group
            ],
            schema=schemas.empty("feature_module").schema,
        )
        sets = significant_sets(self.layout, plan.sae, self.chain.run)
        return {
            "feature_module": schemas.conform("feature_module", members),
            "module": schemas.conform("module", self._named(pl.concat(rows), members)),
            "module_gene_set": module_gene_sets(members.with_columns(sae=pl.lit(plan.sae)), sets),
        }

    @cached_property
    def _codes(self) -> CodesRun:
        return CodesRun.open(self.layout.codes_dir(self.chain.associations.codes))

    @cached_property
    def _panel(self) -> pl.DataFrame:
        """The cells of the panel that have tokens, with their number as the column n_tokens."""
        cells = read_panel_cells(self.layout.cells_dir(self.plan.dataset))
        n_tokens = pl.Series("n_tokens", panel_tokens(self._codes, cells["cell_idx"].to_numpy()))
        return cells.with_columns(n_tokens).filter(pl.col("n_tokens") > 0)

    def _sample(self, splits: tuple[str, ...]) -> pl.DataFrame:
        """The cells of the splits, at most as many as the plan says. UsageError for fewer than 10."""
        own = self._panel.filter(pl.col("split").is_in(splits))
        if own.height < 10:
            raise UsageError(
                f"the panel has {own.height} cells of {' and '.join(splits)}, too few to say what fires together"
            )
        rng = np.random.default_rng((self.plan.seed, _STREAM))
        rows = rng.choice(own.height, min(self.plan.cells, own.height), replace=False)
        return own[np.sort(rows)]

    def _features(self, cells: pl.DataFrame) -> Ints:
        """The features of the largest variance among these cells, ascending; those that hardly fire are left out."""
        codes = load_cell_codes(self._codes, cells["cell_idx"].to_numpy()).sqrt()
        fired = np.bincount(codes.indices, minlength=codes.shape[1])
        variance = np.where(fired >= LEAST_FIRED, column_moments(codes)[1], 0)
        best = np.argsort(-variance, kind="stable")[: self.plan.n_features]
        return np.sort(best[variance[best] > 0]).astype(np.int64)

    def _residuals(self, cells: pl.DataFrame, features: Ints) -> tuple[Any, Ints, Ints]:
        """Residuals [n_cells n_features], and the number of the block and of the unit of each cell."""
        codes = load_cell_codes(self._codes, cells["cell_idx"].to_numpy())[:, features]
        units = unit_column(cells)
        unit = np.arange(cells.height) if units is None else _numbers(cells[units])
        kind = _numbers(cells["cell_type"])
        block = kind if units is None else np.unique(np.column_stack([kind, unit]), axis=0, return_inverse=True)[1]
        return residuals(codes, block.astype(np.int64).ravel(), cells["n_tokens"].to_numpy()), block.ravel(), unit

    def _rows(self, control: str | None, found: Modules, r: Any, r_test: Any, features: Ints) -> pl.DataFrame:
        """A row for each module, tested against features that fire as often."""
        density = commit.read_table(
            self.layout.associations_dir(self.chain.run) / "features", ["feature_id", "density"]
        )
        fires = density.sort("feature_id")["density"].to_numpy()[features]
        rng, rows = np.random.default_rng((self.plan.seed, _STREAM, 2)), []
        for i, group in enumerate(found.members):
            own, draws = coherence(r_test, group, fires, n_draws=self.plan.n_draws, rng=rng)
            draws = draws[np.isfinite(draws)]
            rows.append(
                {
                    "control": control,
                    "module": i,
                    "n_features": len(group),
                    "stability": found.stability[i],
                    "r": float(np.mean([_mean_with(r, f, group) for f in group])),
                    "r_test": own,
                    "null_mean": float(draws.mean()) if len(draws) else None,
                    "null_sd": float(draws.std(ddof=1)) if len(draws) > 1 else None,
                    "p": float((1 + (draws >= own).sum()) / (1 + len(draws))) if len(draws) else None,
                }
            )
        columns = schemas.empty("module").schema
        frame = pl.DataFrame(rows, schema={name: columns[name] for name in columns if name not in ("q", "top_genes")})
        q = benjamini_hochberg(frame["p"].fill_null(1.0).to_numpy()) if frame.height else np.empty(0)
        return frame.with_columns(q=pl.Series(q, dtype=pl.Float64))

    def _named(self, rows: pl.DataFrame, members: pl.DataFrame) -> pl.DataFrame:
        """The rows with the genes that most features of a module go with."""
        names = commit.read_table(
            self.layout.associations_dir(self.chain.run) / "features", ["feature_id", "top_genes"]
        )
        genes = (
            members.join(names, on="feature_id")
            .select("module", gene=pl.col("top_genes").str.split(" "))
            .explode("gene")
            .drop_nulls("gene")
            .group_by("module", "gene")
            .len()
            .sort("module", "len", "gene", descending=[False, True, False])
            .group_by("module", maintain_order=True)
            .agg(top_genes=pl.col("gene").head(N_GENES).str.join(" "))
        )
        named = rows.join(genes, on="module", how="left", maintain_order="left")
        return named.with_columns(pl.when(pl.col("control").is_null()).then("top_genes").alias("top_genes"))


def _numbers(column: pl.Series) -> Ints:
    labels = Labels.from_values(column.name, column.fill_null(""))
    return labels.codes


def _mean_with(r: Any, feature: int, group: tuple[int, ...]) -> float:
    return float(r[feature, list(group)].sum(dtype=np.float64) / (len(group) - 1))
