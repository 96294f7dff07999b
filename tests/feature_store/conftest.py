"""Small stores made by the real writers: activations, token codes, and a whole store with associations."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from scipy import sparse
from stored_bytes import hashes_of
from token_codes import TokenCodes, cut_of, toy_codes, write_codes, write_codes_of_panel
from toy_plans import toy_table

from feature_store.activations import ActivationReader, ActivationWriter
from feature_store.codes import CodesRun
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import AssociationsPlan, CellsPlan, PanelPlan, SteeringResultsPlan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture
def folder_hashes() -> Callable[[Path], dict[str, str]]:
    """Relative name -> sha256 of what every file below a folder holds, without the times of manifests."""

    return hashes_of


@dataclass
class StoredActivations:
    """A finished activations run and what was put into it, in shard order."""

    run: commit.Run
    reader: ActivationReader
    cell_idx: np.ndarray
    token_pos: np.ndarray
    gene_id: np.ndarray
    act: np.ndarray


def write_activations(
    path: Path, keys: tuple[np.ndarray, ...], act: np.ndarray, metadata: dict[str, str], *, row_group_rows: int
) -> int:
    with ActivationWriter(path, act.shape[1], metadata, row_group_rows=row_group_rows) as writer:
        writer.write(*keys, act)
    return writer.n_tokens


@pytest.fixture
def store_activations(tmp_path: Path) -> Callable[..., StoredActivations]:
    """Write cells of 5 tokens, 4 dimensions, in shards of row groups of 16; act[t, 0] numbers the tokens of the run."""

    def store(
        *, n_shards: int = 3, cells_per_shard: int = 20, dtype: str = "f32", row_group_rows: int = 16, name: str = "run"
    ) -> StoredActivations:
        per_cell, d_model = 5, 4
        n = cells_per_shard * per_cell
        run = commit.Run.create(tmp_path / name, {"n_shards": n_shards, "dtype": dtype})
        columns: list[tuple[np.ndarray, ...]] = []
        for shard in range(n_shards):
            cell_idx = np.repeat(np.arange(cells_per_shard), per_cell) + shard * cells_per_shard
            token_pos = np.tile(np.arange(per_cell), cells_per_shard)
            gene_id = (cell_idx * 7 + token_pos) % 11
            act = np.random.default_rng(shard).normal(size=(n, d_model)).astype(np.float32)
            act[:, 0] = np.arange(n) + shard * n
            part = (cell_idx, token_pos, gene_id, act)
            metadata = {"dtype": dtype, "site": "layer.2", "plan_sha": run.plan_sha}
            run.commit_shard(
                shard,
                lambda path, part=part, metadata=metadata: write_activations(
                    path, part[:3], part[3], metadata, row_group_rows=row_group_rows
                ),
                start=shard * cells_per_shard,
                stop=(shard + 1) * cells_per_shard,
            )
            columns.append(part)
        run.finalize()
        return StoredActivations(run, ActivationReader(run), *(np.concatenate(c) for c in zip(*columns, strict=True)))

    return store


def token_maker(rng: np.random.Generator) -> Callable[..., TokenCodes]:
    def make(start: int, stop: int, *, n_features: int = 12, density: float = 0.3) -> TokenCodes:
        lengths = rng.integers(1, 6, stop - start)
        n_tokens = int(lengths.sum())
        codes = sparse.random_array(
            (n_tokens, n_features), density=density, format="csr", dtype=np.float32, random_state=rng
        )
        return TokenCodes(
            cell_idx=np.repeat(np.arange(start, stop), lengths),
            token_pos=np.concatenate([np.arange(length) for length in lengths]).astype(np.int32),
            gene_id=rng.integers(0, 7, n_tokens).astype(np.int32),
            codes=codes,
        )

    return make


@pytest.fixture
def random_tokens(rng: np.random.Generator) -> Callable[..., TokenCodes]:
    """Token codes of cells [start, stop): a ragged number of tokens a cell, codes with the given density."""
    return token_maker(rng)


SPLIT_OF_CELL = np.array(["train", "train", "select", "test"] * 10)


@dataclass
class SmallStore:
    """A store with every table: 40 cells, 12 features, codes in 4 shards, associations made by hand."""

    layout: Layout
    tokens: TokenCodes
    codes: CodesRun
    cells: pl.DataFrame


@pytest.fixture
def small_store(tmp_path: Path, small_store_template: SmallStore) -> SmallStore:
    layout = Layout(tmp_path / "store")
    shutil.copytree(small_store_template.layout.root, layout.root)
    return replace(small_store_template, layout=layout, codes=CodesRun.open(layout.codes_dir("c0de")))


PANEL = np.array([0, 1, 5, 8, 9, 11, 17, 23, 24, 31, 32, 38])


@pytest.fixture
def panel_store(small_store: SmallStore) -> SmallStore:
    """The small store where PANEL, 12 of the 40 cells, has all codes, and every other cell its 3 largest."""
    layout, cells = small_store.layout, small_store.cells.with_columns(panel=pl.col("cell_idx").is_in(PANEL.tolist()))
    for folder in (layout.cells_dir("toy"), layout.codes_dir("c0de")):
        shutil.rmtree(folder)
    drawn = PanelPlan(wanted=12, n_cells=12, seed=7, strata=("split", "donor"), sha256="0" * 64)
    commit.write_table(layout.cells_dir("toy"), cells, toy_table(CellsPlan, panel=drawn))
    cut = cut_of(40, 5, n_panel=len(PANEL), other_cells=15)
    plan = toy_codes(cut, n_features=12, dataset="toy", sae="5ae", keep=3)
    codes = write_codes_of_panel(layout.codes_dir("c0de"), plan, small_store.tokens, SPLIT_OF_CELL, PANEL)
    return replace(small_store, codes=codes, cells=cells)


@pytest.fixture(scope="session")
def small_store_template(tmp_path_factory: pytest.TempPathFactory) -> SmallStore:
    layout = Layout(tmp_path_factory.mktemp("small") / "store")
    random_tokens = token_maker(np.random.default_rng(0))
    cells = schemas.conform(
        "cells",
        pl.DataFrame(
            {
                "cell_idx": np.arange(40),
                "cell_id": [f"cell-{i // 2}" if i < 2 else f"cell-{i}" for i in range(40)],
                "dataset": "toy",
                "split": SPLIT_OF_CELL.tolist(),
                "panel": True,
                "donor": [f"d{i % 5}" for i in range(40)],
                "batch": None,
                "cell_type": ["B", "T"] * 20,
                "n_counts": np.arange(40) * 10.0,
            },
            schema_overrides={"batch": pl.String},
        ),
    )
    commit.write_table(layout.cells_dir("toy"), cells, {"table": "cells", "dataset": "toy"})
    plan = toy_codes(cut_of(40, 10), n_features=12, dataset="toy", sae="5ae")
    parts = [random_tokens(10 * shard, 10 * shard + 10) for shard in range(4)]
    codes = write_codes(layout.codes_dir("c0de"), plan, parts, SPLIT_OF_CELL)
    for name, frame in _association_tables().items():
        commit.write_table(
            layout.associations_dir("a550c") / name,
            frame,
            toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae"),
        )
    results = pl.DataFrame({"target": ["B", "B"], "control": ["edited", "random"], "effect": [0.5, 0.1]})
    commit.write_table(
        layout.steering_dir("57ee4") / "results",
        results,
        toy_table(SteeringResultsPlan, associations="a550c", sae="5ae"),
    )
    joined = TokenCodes(
        **{
            name: np.concatenate([getattr(part, name) for part in parts])
            for name in ("cell_idx", "token_pos", "gene_id")
        },
        codes=sparse.vstack([part.codes for part in parts]).tocsr(),
    )
    return SmallStore(layout, joined, codes, cells)


def _association_tables() -> dict[str, pl.DataFrame]:
    features = pl.DataFrame(
        {
            "feature_id": np.arange(12),
            "density": np.linspace(0, 0.9, 12),
            "class": ["dead"] + ["cell-context"] * 11,
            "dead": [True] + [False] * 11,
            "top_genes": ["MS4A1, CD79A"] * 12,
            "top_label": ["B"] * 12,
        }
    )
    label = pl.DataFrame(
        {
            "feature_id": [3, 3, 5, 5],
            "label_kind": "cell_type",
            "label": "B",
            "split": ["select", "test", "select", "test"],
            "auroc": [0.99, 0.7, 0.6, 0.9],
        }
    )
    gene = pl.DataFrame({"feature_id": [3, 5, 7], "gene": ["MS4A1", "MS4A1", "CD79A"], "pearson": [0.2, 0.8, None]})
    geneset = pl.DataFrame(
        {"feature_id": [3, 5], "collection": "toy", "gene_set": "B cell receptor", "p": [1e-5, 1e-9]}
    )
    return {
        "features": _complete("features", features),
        "feature_label": _complete("feature_label", label),
        "feature_gene": _complete("feature_gene", gene),
        "feature_geneset": _complete("feature_geneset", geneset),
        **{name: schemas.empty(name) for name in ("feature_token", "feature_number", "gene_sets")},
    }


def _complete(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    missing: dict[str, Any] = {name: None for name in schemas.TABLES[table].columns if name not in frame.columns}
    return schemas.conform(table, frame.with_columns(**{name: pl.lit(value) for name, value in missing.items()}))
