"""The tables of an inputs run: p and q of every feature, gene and path, and a line for each feature.

What is scored is a gene's share: its change of S over the mean of S in the same cells. The mean of the ratios of single
cells would be ruled by those in which the feature hardly fires. On its own token a gene can only have more code than
null genes have, or not; on other tokens it may raise the feature or lower it, so that both signs count there.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from scipy.stats import spearmanr

from feature_store.associations.multiple_testing import q_lookup
from feature_store.effects import GeneEffects, MatchedNull, pool_matched
from feature_store.storage import commit, schemas
from pipelines.effects.cells import SPLIT

OWN, OTHER = "own token", "other tokens"
Q = 0.05
_NULL = "genes"
_IS_TESTED = pl.col("of") == pl.col("gene_id")


@dataclass(frozen=True, kw_only=True)
class _Path:
    """A path from a gene to a feature: the column of the draws, and whether effects of either sign count."""

    column: str
    two_sided: bool


PATHS: Mapping[str, _Path] = {
    OWN: _Path(column="own", two_sided=False),
    OTHER: _Path(column="other", two_sided=True),
}


def write_inputs(folder: Path, draws: commit.Run, plan: dict[str, Any], genes: pl.DataFrame) -> commit.Run:
    """Write the table `feature_input`, in as many parts as the draws have; q is over all rows of a path.

    `genes`: the symbol and gene_id of each gene.
    """
    nulls = {
        name: pool_matched(partial(_effects, draws, path.column), two_sided=path.two_sided)
        for name, path in PATHS.items()
    }
    q_of = {
        name: q_lookup([np.empty(0), *(_scored(part, name, nulls)["p"].to_numpy() for part in _parts(draws))])
        for name in PATHS
    }
    run = commit.Run.create(folder, plan)
    for number, (part, marker) in enumerate(zip(_parts(draws), draws.manifest().shards, strict=True)):
        found = [_scored(part, name, nulls) for name in PATHS]
        frame = pl.concat(
            rows.with_columns(q=pl.Series(q_of[name](rows["p"].to_numpy()), dtype=pl.Float64))
            for name, rows in zip(PATHS, found, strict=True)
        )
        named = frame.join(genes, on="gene_id", how="left", maintain_order="left").rename({"symbol": "gene"})
        named = named.sort("feature_id", "gene_id", "path", descending=[False, False, True], maintain_order=True)
        table = schemas.conform("feature_input", named.drop("gene_id"))
        run.commit_shard(number, partial(commit.write_frame, frame=table), start=marker.start, stop=marker.stop)
    run.finalize()
    return run


def summary_frame(draws: commit.Run, inputs: commit.Run) -> pl.DataFrame:
    """A line for each feature of which a gene was tested."""
    rows = []
    for part, path in zip(_parts(draws), inputs.checked_parts(), strict=True):
        scores = commit.read_part(path)
        for feature, own in _by_feature(part):
            tested = own.filter(_IS_TESTED)
            if not tested.height:
                continue
            mine = scores.filter(feature_id=feature)
            significant = mine.filter(pl.col("q") <= Q)
            rows.append(
                {
                    "feature_id": feature,
                    "n_cells": tested["n_cells_fired"][0],
                    "n_genes": tested.height,
                    "n_nulls": own.height - tested.height,
                    "n_own": significant.filter(path=OWN).height,
                    "n_other": significant.filter(path=OTHER).height,
                    "share_own": _share_of_all(tested, "own"),
                    "share_other": _share_of_all(tested, "other"),
                    "gradient_spearman": _spearman(
                        tested["gradient"].to_numpy(), (tested["own"] + tested["other"]).to_numpy()
                    ),
                    "top_gene": _top_gene(mine, significant),
                }
            )
    empty = schemas.empty("feature_input_summary")
    return schemas.conform("feature_input_summary", pl.DataFrame(rows, schema=empty.schema))


def _parts(draws: commit.Run) -> Iterator[pl.DataFrame]:
    for path in draws.checked_parts():
        yield commit.read_part(path)


def _by_feature(part: pl.DataFrame) -> Iterator[tuple[int, pl.DataFrame]]:
    for (feature,), own in part.group_by("feature_id", maintain_order=True):
        yield int(feature), own


def _effects(draws: commit.Run, column: str) -> Iterator[GeneEffects]:
    for part in _parts(draws):
        for _, own in _by_feature(part):
            yield _effects_of(own, column)


def _effects_of(own: pl.DataFrame, column: str) -> GeneEffects:
    """The shares of the genes of one feature by a path."""
    tested, null = own.filter(_IS_TESTED), own.filter(~_IS_TESTED)
    genes, of = tested["gene_id"].to_numpy(), null["of"].to_numpy()
    place = np.searchsorted(genes, of)
    # a gene that was chosen may have had too few cells in which the feature fires
    is_tested = np.isin(of, genes)
    share = pl.col(column) / pl.col("total")
    return GeneEffects(
        gene=tested.select(share).to_series().to_numpy(),
        null=null.select(share).to_series().to_numpy(),
        of=np.where(is_tested, place, len(genes)).astype(np.int64),
    )


def _scored(part: pl.DataFrame, path: str, nulls: Mapping[str, MatchedNull]) -> pl.DataFrame:
    """The tested genes of a part, with their scores by a path."""
    column = PATHS[path].column
    numbers = ("null_mean", "null_sd", "z", "p")
    schema = {"feature_id": pl.Int32(), "gene_id": pl.Int32(), "n_cells": pl.Int32(), "n_donors": pl.Int32()}
    frames = [pl.DataFrame(schema={**schema, **dict.fromkeys(("change", "share", "gradient", *numbers), pl.Float64())})]
    for _, own in _by_feature(part):
        tested = own.filter(_IS_TESTED)
        scores = nulls[path].scores(_effects_of(own, column))
        frames.append(
            tested.select(
                *schema,
                change=pl.col(column),
                share=pl.col(column) / pl.col("total"),
                gradient=pl.col("gradient"),
                null_mean=pl.Series(scores.mean),
                null_sd=pl.Series(scores.sd),
                z=pl.Series(scores.z),
                p=pl.Series(scores.p),
            )
        )
    return pl.concat(frames).with_columns(
        pl.col("null_mean", "null_sd", "z").fill_nan(None),
        path=pl.lit(path),
        split=pl.lit(SPLIT),
        null=pl.lit(_NULL),
    )


def _share_of_all(tested: pl.DataFrame, column: str) -> float:
    """What the genes take by a path, over S in all cells of the feature."""
    return float((tested[column] * tested["n_cells"]).sum() / tested["sum_total"][0])


def _top_gene(mine: pl.DataFrame, significant: pl.DataFrame) -> str | None:
    """The gene that takes most by both paths together, of those at q <= Q by one of them; None if none takes any."""
    both = mine.group_by("gene").agg(pl.col("change").sum()).filter(pl.col("change") > 0)
    chosen = both.join(significant, on="gene", how="semi").sort("change", "gene", descending=[True, False])
    return None if chosen.is_empty() else str(chosen["gene"][0])


def _spearman(a: np.ndarray, b: np.ndarray) -> float | None:
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return None
    return float(spearmanr(a, b).statistic)
