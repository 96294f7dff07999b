"""A planted store with every table and hostile names, its atlas on a local port, and pages that fail a test for
anything their console says.
"""

from __future__ import annotations

import json
import shutil
import time
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
import pytest
from deleted_runs import forget_deleted
from planted_effects import cofiring_tables, edge_tables, effect_tables, input_tables, probe_tables
from scipy import sparse
from token_codes import TokenCodes, cut_of, pooled, toy_codes, write_codes, write_codes_of_panel
from toy_plans import toy_plan, toy_table

from feature_store import FeatureStore
from feature_store.atlas.columns import NULL_I32
from feature_store.codes import TokenPiece, TopCells
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import (
    AssociationsPlan,
    CellsPlan,
    CircuitPlan,
    ComparisonPlan,
    EffectsPlan,
    InputsPlan,
    MatchPlan,
    ModulesPlan,
    PanelPlan,
    ProbePlan,
    SAEPlan,
    SteeringResultsPlan,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from playwright.sync_api import Browser, Page

HOSTILE = '<img src=x onerror="window.hacked=1">'
N_CELLS, N_FEATURES, N_TOKENS = 400, 120, 3
TYPES = ("B", "T", HOSTILE, "NK, bright")
BATCHES = ("one", 'two "2"')
DONORS = ("d1", "d2", "d3", "d4")
GENES = [f"GENE{i}" for i in range(38)] + [HOSTILE, "CD79A"]
GENE_SETS = [f"SET_{i}" for i in range(6)] + [HOSTILE]
CLASSES = ("gene-identity", "cell-context", "batch", "mixed")
NULLS = ("random features", "random direction", "shuffled labels")
DOSES, COUNTS = (0.5, 1.0, 1.5), (5, 10)
PANEL = np.sort(np.random.default_rng(5).permutation(N_CELLS)[:120])
"""The panel of the store whose panel is not all cells."""


def cell_table() -> pl.DataFrame:
    """Cells of 4 types, 2 batches and 4 donors, all crossed."""
    i = np.arange(N_CELLS)
    frame = pl.DataFrame(
        {
            "cell_idx": i,
            "cell_id": [f"AC{n:04d}-1" for n in i],
            "dataset": "toy",
            "split": [("train", "train", "select", "test")[n // 8 % 4] for n in i],
            "panel": True,
            "donor": [DONORS[n // 2 % 4] for n in i],
            "batch": [BATCHES[n // 4 % 2] for n in i],
            "cell_type": [TYPES[n % 4] for n in i],
            "condition": [("ctrl", "stim")[n // 16 % 2] for n in i],
            "n_counts": i * 10.0,
        }
    )
    return schemas.conform("cells", frame)


def token_codes(cells: pl.DataFrame, rng: np.random.Generator) -> TokenCodes:
    """Feature f prefers type f % 4; the last one is dead; every token of a cell has its own genes."""
    n = N_CELLS * N_TOKENS
    kind = np.repeat(cells["cell_idx"].to_numpy() % 4, N_TOKENS)
    chance = np.where(kind[:, None] == np.arange(N_FEATURES) % 4, 0.35, 0.04)
    chance[:, -1] = 0
    values = (rng.random((n, N_FEATURES)) < chance) * (rng.gamma(2.0, 0.5, (n, N_FEATURES)) + 0.05)
    return TokenCodes(
        cell_idx=np.repeat(np.arange(N_CELLS), N_TOKENS),
        token_pos=np.tile(np.arange(N_TOKENS), N_CELLS).astype(np.int32),
        gene_id=rng.integers(0, len(GENES), n).astype(np.int32),
        codes=sparse.csr_array(values.astype(np.float32)),
    )


def association_tables(rng: np.random.Generator) -> dict[str, pl.DataFrame]:
    """What associate would write, with figures drawn at random about planted ones."""
    f = np.arange(N_FEATURES)
    is_dead = f == N_FEATURES - 1
    types = [TYPES[n % 4] for n in f]
    auroc = np.clip(0.75 + 0.1 * rng.normal(size=N_FEATURES), 0, 1)
    features = pl.DataFrame(
        {
            "feature_id": f,
            "density": np.where(is_dead, 0.0, rng.uniform(0.005, 0.3, N_FEATURES)),
            "mean": rng.uniform(0.1, 2, N_FEATURES),
            "max": rng.uniform(2, 5, N_FEATURES),
            "p99": rng.uniform(1.5, 2, N_FEATURES),
            "class": ["dead" if dead else CLASSES[n // 4 % 4] for n, dead in zip(f, is_dead, strict=True)],
            "class_confidence": rng.uniform(0.5, 1, N_FEATURES),
            "dead": is_dead,
            "top_genes": [f"{GENES[n % 40]} {GENES[(n + 7) % 40]}" for n in f],
            "top_label": [None if dead else name for name, dead in zip(types, is_dead, strict=True)],
            "context_effect": rng.uniform(0, 0.5, N_FEATURES),
            "batch_effect": rng.uniform(0, 0.4, N_FEATURES),
            "gene_effect": rng.uniform(0, 1, N_FEATURES),
            "gene_precision": rng.uniform(0, 1, N_FEATURES),
            "context_kind": "cell_type",
            "cell_density": rng.uniform(0.1, 1, N_FEATURES),
            "top_label_kind": "cell_type",
            "top_label_auroc_select": auroc,
            "top_label_auroc": np.clip(auroc - 0.05, 0, 1),
        }
    )
    return {
        "features": schemas.conform("features", features),
        "feature_label": schemas.conform("feature_label", label_rows(rng)),
        "feature_gene": schemas.conform("feature_gene", gene_rows(rng)),
        "feature_geneset": schemas.conform("feature_geneset", geneset_rows(rng)),
        "feature_token": schemas.conform("feature_token", token_rows(rng)),
        **{name: schemas.empty(name) for name in ("feature_number", "gene_sets")},
    }


def label_rows(rng: np.random.Generator) -> pl.DataFrame:
    labels = [("cell_type", name) for name in TYPES] + [("batch", name) for name in BATCHES] + [("condition", "stim")]
    rows = []
    for f in range(N_FEATURES - 1):
        for kind, name in labels:
            own = kind == "cell_type" and TYPES[f % 4] == name
            for split in ("select", "test"):
                effect = float(np.clip((0.6 if own else 0.0) + 0.12 * rng.normal(), -1, 1))
                p = 1e-9 if own else float(rng.uniform())
                rows.append(
                    {
                        "feature_id": f,
                        "label_kind": kind,
                        "label": name,
                        "split": split,
                        "auroc": (effect + 1) / 2,
                        "rank_biserial": effect,
                        "f1": 0.5,
                        "mcc": 0.2,
                        "ami": 0.1,
                        "threshold": 0.3,
                        "n": 100,
                        "n_donors": 4,
                        "n_agree": 4 if own else 2,
                        "low": effect - 0.1,
                        "high": effect + 0.1,
                        "p": p,
                        "p_donor": max(p, 0.125),
                        "p_max": min(1.0, p * 119),
                        "q": min(1.0, p * 3),
                        "z": effect / 0.1,
                        "n_label": 25,
                        "method": "van-elteren/1 blocks=donor",
                    }
                )
    return pl.DataFrame(rows)


def gene_rows(rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    for f in range(N_FEATURES - 1):
        for j in range(8):
            for split in ("select", "test"):
                r = float(rng.uniform(-0.5, 0.9))
                rows.append(
                    {
                        "feature_id": f,
                        "gene": GENES[(f + 5 * j) % 40],
                        "identity_precision": float(rng.uniform()),
                        "identity_recall": float(rng.uniform()),
                        "lift": float(rng.uniform(0.5, 40)),
                        "pearson": r,
                        "spearman": r * 0.9,
                        "n": 100,
                        "nnz": 40,
                        "p": float(rng.uniform() ** 4),
                        "q": float(rng.uniform()),
                        "split": split,
                        "pearson_within_type": r * 0.5,
                        "n_donors": 4,
                        "method": "blocked-spearman/1",
                    }
                )
    return pl.DataFrame(rows)


def geneset_rows(rng: np.random.Generator) -> pl.DataFrame:
    rows = []
    for f in range(N_FEATURES - 1):
        for j in range(3):
            for split in ("select", "test"):
                p = float(rng.uniform() ** 6)
                rows.append(
                    {
                        "feature_id": f,
                        "collection": "toy",
                        "gene_set": GENE_SETS[(f + 2 * j) % 7],
                        "overlap": 3,
                        "odds_ratio": 4.5,
                        "p": p,
                        "p_matched": p,
                        "q": min(1.0, p * 5),
                        "q_matched": min(1.0, p * 5),
                        "split": split,
                        "n_set": 12,
                        "n_genes": 20,
                        "rank_biserial": 0.4,
                        "n": 40,
                        "n_donors": 4,
                        "p_rank": p,
                        "method": "hypergeometric/1 background=detected",
                        "q_rank": min(1.0, p * 5),
                    }
                )
    return pl.DataFrame(rows)


def token_rows(rng: np.random.Generator) -> pl.DataFrame:
    n = (N_FEATURES - 1) * 5
    values = -np.sort(-rng.uniform(1, 5, (N_FEATURES - 1, 5)), axis=1)
    return pl.DataFrame(
        {
            "feature_id": np.repeat(np.arange(N_FEATURES - 1), 5),
            "cell_idx": rng.integers(0, N_CELLS, n),
            "token_pos": rng.integers(0, N_TOKENS, n),
            "gene": [GENES[i] for i in rng.integers(0, len(GENES), n)],
            "value": values.ravel(),
        }
    )


def steering_rows() -> pl.DataFrame:
    """A move from stim to ctrl: a grid of doses and counts, nulls and a baseline at its chosen point."""
    rows: list[dict[str, Any]] = []

    def add(condition, role, metric, value, base, *, n=None, dose=None, group="all", chosen=False, draws=1):
        own = role == "grid"
        rows.append(
            {
                "split": "test",
                "condition": condition,
                "role": role,
                "intervention": "shift" if own else None,
                "n_features": n,
                "dose": dose,
                "metric": metric,
                "group": group,
                "n_draws": draws,
                "n_cells": 48,
                "value": value,
                "effect": value - base,
                "low": value - base - 0.05,
                "high": value - base + 0.05,
                "p_random_features": 0.048 if own else None,
                "p_random_direction": 0.048 if own else None,
                "p_shuffled_labels": 0.19 if own else None,
                "chosen": chosen,
            }
        )

    for metric, base in (("remaining", 1.0), ("type_accuracy", 0.95)):
        add("unsteered", "unsteered", metric, base, base)
        for n in COUNTS:
            for dose in DOSES:
                value = base - (0.4 if metric == "remaining" else 0.02) * min(dose, 2 - dose) * n / 10
                add("shift", "grid", metric, value, base, n=n, dose=dose, chosen=(n, dose) == (10, 1.0))
        for i, null in enumerate(NULLS):
            add(null, "null", metric, base - 0.01 * i, base, n=10, dose=1.0, draws=5)
        add("mean difference", "baseline", metric, base - 0.3, base)
        add("reconstruction", "reconstruction", metric, base - 0.02, base, n=0)
    for name in TYPES:
        add("unsteered", "unsteered", "distance", 2.0, 2.0, group=name)
        add("shift", "grid", "distance", 1.1, 2.0, n=10, dose=1.0, group=name, chosen=True)
    return schemas.conform("steering", pl.DataFrame(rows, infer_schema_length=None))


def steering_variants() -> pl.DataFrame:
    rows: list[dict[str, Any]] = [{"name": "unsteered", "role": "unsteered", "n_features": 0}]
    rows += [
        {"name": "shift", "role": "grid", "n_features": n, "dose": dose, "features": list(range(2, 2 + n)),
         "intervention": "shift", "chosen": (n, dose) == (10, 1.0)}
        for n in COUNTS
        for dose in DOSES
    ]  # fmt: skip
    rows += [
        {"name": null, "role": "null", "null": null, "n_features": 10, "dose": 1.0, "draw": draw,
         "intervention": "shift", "features": list(range(40, 50))}
        for null in NULLS
        for draw in range(2)
    ]  # fmt: skip
    empty: dict[str, Any] = {"null": None, "intervention": None, "dose": None, "draw": 0, "chosen": False}
    frame = pl.DataFrame(
        [
            {**empty, "features": [], **row, "variant": i, "mode": "delta"}
            for i, row in enumerate(rows)
        ],
        infer_schema_length=None,
    )  # fmt: skip
    return schemas.conform("steering_variants", frame)


def embeddings(cells: pl.DataFrame, variants: pl.DataFrame, rng: np.random.Generator) -> pl.DataFrame:
    """Test cells [8]: types apart in the first columns, conditions in the last; steering moves stim by its dose."""
    test = cells.filter(split="test")
    types = pl.Series(list(TYPES))
    base = rng.normal(scale=0.3, size=(test.height, 8))
    for i, kind in enumerate(types):
        base[(test["cell_type"] == kind).to_numpy(), i] += 3
    is_stim = (test["condition"] == "stim").to_numpy()
    base[is_stim, 7] += 2
    frames = []
    for row in variants.iter_rows(named=True):
        moved = base.copy()
        if row["role"] == "grid":
            moved[is_stim, 7] -= 2 * 0.8 * row["dose"] * row["n_features"] / 10
        table = {"cell_idx": test["cell_idx"], "variant": row["variant"], "embedding": moved.astype(np.float32)}
        frames.append(pl.DataFrame(table, schema_overrides={"variant": pl.Int32}))
    return pl.concat(frames).with_columns(pl.col("embedding").cast(pl.Array(pl.Float32, 8)))


def write_sae(folder: Path) -> None:
    """The files of a trained SAE that the store reads, committed as training does."""
    history = [
        {"step": 50.0 * i, "loss": 1 / i, "mse": 0.9 / i, "l0": 16.0, "n_dead": 10.0 - i, "theta": 0.1 * i, "lr": 1e-3}
        for i in range(1, 9)
    ]
    summary = {"test_fvu": 0.125, "select_fvu": 0.12, "select_l0": 15.9, "select_dead_fraction": 1 / 120, "theta": 0.25}
    files = {"history.json": history, "summary.json": {**summary, "select_recovery": 0.99, "gamma": 0.6}}
    sae = {"arch": "batchtopk", "n_features": N_FEATURES, "k": 16, "d_model": 8}
    plan = toy_plan(
        SAEPlan, sae=sae, model="mini", site="layer.2", train={"n_steps": 400, "batch_size": 64, "seed": 0},
        activations="ac7", dataset="toy",
    )  # fmt: skip
    run = commit.Run.create(folder, plan.table("sae", n_shards=len(files), files=list(files)))
    for shard, text in enumerate(map(json.dumps, files.values())):
        run.commit_shard(shard, lambda path, text=text: path.write_text(text), start=shard, stop=shard + 1)
    run.finalize()


def match_rows(rng: np.random.Generator) -> pl.DataFrame:
    """Each feature and its nearest in another SAE; two of three are mutual."""
    f = np.arange(N_FEATURES)
    frame = pl.DataFrame(
        {
            "feature_id": f, "sae": "5ae", "other": "07he5", "other_feature_id": (f * 7) % 120,
            "similarity": rng.uniform(0.2, 0.99, N_FEATURES), "similarity_test": None, "runner_up": 0.2, "rank": 1,
            "mutual": f % 3 > 0, "null_median": 0.3, "null_95": 0.45, "random_median": 0.25,
            "p": rng.uniform(0.001, 1, N_FEATURES), "dead": f == N_FEATURES - 1, "method": "decoder",
        }
    )  # fmt: skip
    return schemas.conform("feature_match", frame)


def comparison_tables() -> dict[str, pl.DataFrame]:
    """The SAE beside PCA and random directions on every label."""
    rows: list[dict[str, Any]] = []
    for kind, names in (("cell_type", TYPES), ("batch", BATCHES)):
        for i, name in enumerate(names):
            for j, of in enumerate(("sae", "pca", "random")):
                over = {
                    "excess": 0.04 * j,
                    "low": 0.04 * j - 0.03,
                    "high": 0.04 * j + 0.03,
                    "n_units": 4,
                    "n_better": 3,
                }
                rows.append(
                    {
                        "target_kind": kind,
                        "target": name,
                        "statistic": "auroc",
                        "representation": of,
                        "feature_id": i,
                        "select": 0.96 - 0.03 * j,
                        "test": 0.94 - 0.04 * j,
                        "rank_biserial": 0.9,
                        "f1": 0.8,
                        "p": 1e-6,
                        "q": 1e-5,
                        "best": of == "pca",
                        **(over if of != "sae" else dict.fromkeys(over)),
                    }
                )
    represented = pl.DataFrame(
        {
            "representation": ["sae", "pca", "random"], "run": ["a550c", "9ca", "4a2d"], "n_features": N_FEATURES,
            "n_dead": [1, 0, 0], "l0": 16.0, "fvu": [0.125, 0.2, 0.5], "recovery": [0.99, 0.98, 0.8],
            "n_label": [60, 50, 40], "n_batch": [10, 12, 11], "n_gene_set": [30, 20, 10], "class_gene_identity": 30,
            "class_cell_context": 30, "class_batch": 30, "class_mixed": 29, "class_dead": [1, 0, 0],
        }
    )  # fmt: skip
    comparison = schemas.conform("comparison", pl.DataFrame(rows))
    return {"comparison": comparison, "representation": schemas.conform("representation", represented)}


def write_store(root: Path, panel: np.ndarray | None = None) -> None:
    """Every table of a store that was gone through all stages; the panel is all cells, unless it is given."""
    rng, layout, cells = np.random.default_rng(0), Layout(root), cell_table()
    tokens = token_codes(cells, rng)
    if panel is None:
        commit.write_table(layout.cells_dir("toy"), cells, {"table": "cells", "dataset": "toy"})
        plan = toy_codes(cut_of(N_CELLS, N_CELLS), n_features=N_FEATURES, dataset="toy", sae="5ae")
        write_codes(layout.codes_dir("c0de"), plan, [tokens], cells["split"].to_numpy())
    else:
        drawn = PanelPlan(wanted=len(panel), n_cells=len(panel), seed=7, strata=("split", "donor"), sha256="0" * 64)
        cells = cells.with_columns(panel=pl.col("cell_idx").is_in(panel.tolist()))
        commit.write_table(layout.cells_dir("toy"), cells, toy_table(CellsPlan, panel=drawn))
        cut = cut_of(N_CELLS, 50, n_panel=len(panel), other_cells=150)
        plan = toy_codes(cut, n_features=N_FEATURES, dataset="toy", sae="5ae", keep=16)
        write_codes_of_panel(layout.codes_dir("c0de"), plan, tokens, cells["split"].to_numpy(), panel)
    write_top_cells(layout, tokens)
    genes = pl.DataFrame({"gene_idx": np.arange(40), "symbol": GENES, "ensembl_id": None, "n_cells": 50, "mean": 0.5})
    commit.write_table(layout.genes_dir("toy"), schemas.conform("genes", genes), {"table": "genes"})
    write_sae(layout.saes_dir("5ae"))
    of = toy_table(AssociationsPlan, codes="c0de", dataset="toy", sae="5ae")
    for name, frame in association_tables(rng).items():
        commit.write_table(layout.associations_dir("a550c") / name, frame, of)
    write_maps(layout, rng, panel)
    match = toy_table(MatchPlan, saes=("5ae", "07he5"), method="cosine")
    commit.write_table(layout.matches_dir("3a7c") / "feature_match", match_rows(rng), match)
    for name, frame in comparison_tables().items():
        made_of = toy_table(ComparisonPlan, associations="a550c", baselines={"pca": "9ca", "random": "4a2d"})
        commit.write_table(layout.comparisons_dir("c09a") / name, frame, made_of)
    write_steering(layout, cells, rng)
    for name, frame in effect_tables(range(20), GENES).items():
        commit.write_table(layout.effects_dir("effec") / name, frame, toy_table(EffectsPlan, sae="5ae"))
    for name, frame in input_tables(range(20), GENES[:12]).items():
        commit.write_table(layout.inputs_dir("1nput") / name, frame, toy_table(InputsPlan, sae="5ae"))
    for name, frame in cofiring_tables([range(5), range(5, 9)]).items():
        commit.write_table(layout.modules_dir("m0d") / name, frame, toy_table(ModulesPlan, sae="5ae"))
    for name, frame in probe_tables(range(20), TYPES).items():
        commit.write_table(layout.probes_dir("9robe") / name, frame, toy_table(ProbePlan, sae="5ae"))
    for run, ends in (("c1rc", ("5ae", "1a7e")), ("c1rd", ("07he5", "5ae"))):
        plan = toy_table(CircuitPlan, sae=ends[0], to_sae=ends[1])
        for name, frame in edge_tables(range(10), from_sae=ends[0], to_sae=ends[1]).items():
            commit.write_table(layout.circuits_dir(run) / name, frame, plan)


def write_top_cells(layout: Layout, tokens: TokenCodes) -> None:
    """The tokens of the cell in which each feature fires most; the last gene is taken for a special
    token.
    """

    def pieces(cells: np.ndarray) -> Iterator[TokenPiece]:
        rows = np.flatnonzero(np.isin(tokens.cell_idx, cells))
        codes = tokens.codes[rows].tocoo()
        keys = tokens.cell_idx[rows], tokens.token_pos[rows], tokens.gene_id[rows]
        yield TokenPiece(*keys, codes.row, codes.col.astype(np.int32), codes.data)

    top = TopCells(layout.codes_dir("c0de"))
    for number in top.pending():
        top.write(number, pieces, dict(enumerate(GENES[:-1])))
    top.finalize()


def write_maps(layout: Layout, rng: np.random.Generator, panel: np.ndarray | None = None) -> None:
    """Cells in a cloud a type, features in a cloud a preferred type on both maps, ten neighbours of each feature."""
    i, f = np.arange(N_CELLS), np.arange(N_FEATURES)
    cell = np.stack([np.cos(i % 4 * 1.6) * 5, np.sin(i % 4 * 1.6) * 5], axis=1) + rng.normal(size=(N_CELLS, 2))
    umap = schemas.conform("umap", pl.DataFrame({"cell_idx": i, "x": cell[:, 0], "y": cell[:, 1]}))
    umap = umap if panel is None else umap[panel]
    commit.write_table(layout.umap_dir("c0de"), umap, {"table": "umap"})
    dot = np.stack([np.cos(f % 4 * 1.6) * 4, np.sin(f % 4 * 1.6) * 4], axis=1) + rng.normal(size=(N_FEATURES, 2))
    places = schemas.conform("feature_umap", pl.DataFrame({"feature_id": f, "x": dot[:, 0], "y": dot[:, 1]}))
    commit.write_table(layout.feature_map_dir("5ae") / "umap", places, {"table": "feature_umap"})
    living = f[:-1]
    spot = np.stack([living % 4 * 3.0, living % 4 % 2 * 3.0], axis=1)
    spot += np.random.default_rng(1).normal(size=spot.shape)
    by_label = pl.DataFrame({"feature_id": living, "x": spot[:, 0], "y": spot[:, 1]})
    profiles = schemas.conform("profile_umap", by_label)
    commit.write_table(layout.profile_map_dir("a550c"), profiles, {"table": "profile_umap"})
    near = pl.DataFrame(
        {
            "feature_id": np.repeat(f, 10),
            "rank": np.tile(np.arange(1, 11), N_FEATURES),
            "other_feature_id": (np.repeat(f, 10) + np.tile(np.arange(1, 11), N_FEATURES)) % N_FEATURES,
            "cosine": np.tile(np.linspace(0.9, 0.2, 10), N_FEATURES),
        }
    )
    neighbours = schemas.conform("feature_neighbour", near)
    commit.write_table(layout.feature_map_dir("5ae") / "neighbours", neighbours, {"table": "feature_neighbour"})


def write_steering(layout: Layout, cells: pl.DataFrame, rng: np.random.Generator) -> None:
    variants = steering_variants()
    per_cell = embeddings(cells, variants, rng)
    places = per_cell.with_columns(
        **{name: pl.col("embedding").arr.get(i) for name, i in (("pc1", 7), ("pc2", 0), ("x", 1), ("y", 2))}
    ).drop("embedding")
    scores = pl.DataFrame({"feature_id": np.arange(2, 22), "score": np.linspace(2, 0.1, 20), "rank": np.arange(1, 21)})
    scores = scores.with_columns(n_units=4, n_agree=4, density=0.1)
    tables = {
        "results": steering_rows(),
        "variants": variants,
        "per_cell": per_cell,
        "scores": schemas.conform("steering_scores", scores),
        "map": schemas.conform("steering_map", places),
    }
    plan = toy_plan(
        SteeringResultsPlan, sae="5ae", associations="a550c", dataset="toy", question="move", kind="condition",
        target="stim", toward="ctrl", intervention="shift", by="cell_type", n_nulls=5, seed=0,
        grid=tuple((n, dose) for n in COUNTS for dose in DOSES), features=tuple(range(2, 12)), readout="mean",
    )  # fmt: skip
    for name, frame in tables.items():
        commit.write_table(layout.steering_dir("57ee4") / name, frame, plan.table(name))


def decoded(data: bytes) -> pl.DataFrame:
    """The frame that `feature_store.atlas.columns.encode` wrote, with nulls where they were (in numbers NaN too)."""
    size = int.from_bytes(data[:4], "little")
    header = json.loads(data[4 : 4 + size])
    body = memoryview(data)[4 + size :]
    columns = [decoded_column(about, body[about["at"] :][: about["bytes"]], header["n"]) for about in header["columns"]]
    return pl.DataFrame(columns) if columns else pl.DataFrame()


def decoded_column(about: dict[str, Any], data: memoryview, n: int) -> pl.Series:
    name, kind = about["name"], about["kind"]
    if kind == "text":
        offsets, body = np.frombuffer(data[: 4 * (n + 1)], "<u4"), bytes(data[4 * (n + 1) :])
        return pl.Series(name, [body[a:b].decode() for a, b in pairwise(offsets)], dtype=pl.String)
    if kind == "category":
        codes = np.frombuffer(data, f"<{about['codes'][0]}{int(about['codes'][1:]) // 8}")
        return pl.Series(name, [*about["categories"], None], dtype=pl.String).gather(codes)
    if kind == "u8":
        known = {0: False, 1: True}
        return pl.Series(name, [known.get(value) for value in np.frombuffer(data, "u1").tolist()], dtype=pl.Boolean)
    values = pl.Series(name, np.frombuffer(data, f"<{kind[0]}{int(kind[1:]) // 8}"))
    return values.set(values == NULL_I32, None) if kind == "i32" else values


@pytest.fixture(scope="session")
def decode() -> Callable[[bytes], pl.DataFrame]:
    """What reads the bytes of a table of columns; the atlas itself only writes them."""
    return decoded


@pytest.fixture(scope="session")
def atlas_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the planted store; not to be written to."""
    root = tmp_path_factory.mktemp("atlas") / "store"
    write_store(root)
    return root


@pytest.fixture(scope="session")
def atlas_store(atlas_root: Path) -> FeatureStore:
    """The planted store with every table."""
    return FeatureStore.open(atlas_root)


@pytest.fixture(scope="session")
def panel_atlas(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    """The planted store where PANEL, 120 of the 400 cells, has all codes, and every other cell its 16 largest."""
    root = tmp_path_factory.mktemp("panel") / "store"
    write_store(root, PANEL)
    return FeatureStore.open(root)


@pytest.fixture(scope="session")
def planted_codes() -> np.ndarray:
    """The codes of all cells of the planted store [N_CELLS N_FEATURES]."""
    return pooled(token_codes(cell_table(), np.random.default_rng(0)), N_CELLS)


@pytest.fixture(scope="session")
def hostile() -> str:
    """A cell type, a gene and a gene set of this name are planted."""
    return HOSTILE


@pytest.fixture
def store_without(atlas_root: Path, tmp_path: Path) -> Callable[..., FeatureStore]:
    """The planted store less some of its folders, named from its root."""

    def make(*folders: str) -> FeatureStore:
        root = shutil.copytree(atlas_root, tmp_path / "less")
        for folder in folders:
            shutil.rmtree(root / folder)
        forget_deleted(root)
        return FeatureStore.open(root)

    return make


@pytest.fixture(scope="session")
def served(atlas_store: FeatureStore, serving: Callable[[FeatureStore], str]) -> str:
    """Address of the planted store's atlas."""
    return serving(atlas_store)


def until(page: Page, expression: str, *, arg: Any = None, timeout: float = 60_000) -> None:
    """Wait until an expression is true. Playwright's own way evaluates text in the page, which the policy forbids."""
    deadline = time.monotonic() + timeout / 1000
    while not page.evaluate(expression, arg):
        assert time.monotonic() < deadline, f"never true: {expression} ({arg})"
        page.wait_for_timeout(20)


@pytest.fixture
def open_page(browser: Browser, served: str) -> Iterator[Callable[..., Page]]:
    """Open a page of the atlas, `#/feature/3` for one, and wait until it is drawn.

    At the end the test fails if any page said something on its console, raised, asked for what is not there, asked
    another host, or ran a planted script.
    """
    contexts, trouble = [], []

    def open_at(
        where: str = "", *, address: str = served, width: int = 1280, height: int = 800, dark: bool = False
    ) -> Page:
        scheme = "dark" if dark else "light"
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, accept_downloads=True
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.wait_for_function = partial(until, page)  # type: ignore[method-assign]
        page.on("console", lambda message: trouble.append(f"console {message.type}: {message.text}"))
        page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
        page.on("response", lambda got: trouble.append(f"{got.status}: {got.url}") if got.status >= 400 else None)
        page.on("request", lambda asked: trouble.append(f"asked {asked.url}") if is_elsewhere(asked.url) else None)
        page.goto(f"{address}/{where}")
        page.wait_for_selector("main[data-ready]")
        return page

    def is_elsewhere(url: str) -> bool:
        return not url.startswith(("http://127.0.0.1:", "blob:", "data:"))

    yield open_at
    for context in contexts:
        for page in context.pages:
            if page.evaluate("window.hacked") is not None:
                trouble.append(f"a name ran as a script on {page.url}")
        context.close()
    assert trouble == []
