"""Tables of effects and edges with planted rows, for tests of pages and plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from feature_store.storage import schemas

if TYPE_CHECKING:
    from collections.abc import Sequence

STRONG = 6
"""The feature whose rows are significant; those of others are not."""


def effect_tables(features: Sequence[int], genes: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Every feature and gene under both interventions; STRONG lowers the first three genes when it is ablated."""
    rng = np.random.default_rng(11)
    rows: list[dict[str, Any]] = []
    for feature in features:
        for way, turn in (("ablate", 1), ("boost", -1)):
            for i, gene in enumerate(genes):
                is_strong = feature == STRONG and i < 3
                effect = turn * (-2.0 + 0.1 * i if is_strong else float(rng.normal(0, 0.05)))
                p = 1e-6 * (i + 1) if is_strong else float(rng.uniform(0.05, 1))
                rows.append(
                    {
                        "feature_id": feature, "intervention": way, "gene": gene, "split": "test", "effect": effect,
                        "null": ("random", "mixture")[i % 2], "null_mean": 0.01, "null_sd": 0.05,
                        "z": (effect - 0.01) / 0.05, "p": p, "p_random": p / 2, "p_mixture": p,
                        "q": p * 10 if is_strong else 0.9, "direct": effect / 2, "n_cells": 20 + i, "n_donors": 4,
                    }
                )  # fmt: skip
    summary = [
        {
            "feature_id": feature, "intervention": way, "n_genes": len(genes), "n_up": 0,
            "n_down": 3 if feature == STRONG else 0, "strength": 0.5, "strength_ratio": 1.5, "specificity": 2.5,
            "specificity_null": 1.1, "direct_spearman": 0.4,
        }
        for feature in features
        for way in ("ablate", "boost")
    ]  # fmt: skip
    return {
        "feature_effect": schemas.conform("feature_effect", pl.DataFrame(rows)),
        "feature_effect_summary": schemas.conform("feature_effect_summary", pl.DataFrame(summary)),
    }


def edge_tables(features: Sequence[int], *, from_sae: str, to_sae: str, n_to: int = 12) -> dict[str, pl.DataFrame]:
    """Every pair of a feature and one of `n_to` later ones; STRONG excites the first and inhibits the second."""
    rng = np.random.default_rng(12)
    rows: list[dict[str, Any]] = []
    for feature in features:
        for to in range(n_to):
            is_strong = feature == STRONG and to < 2
            effect = (-0.4, 0.3)[to] if is_strong else float(rng.normal(0, 0.01))
            p = 1e-5 * (to + 1) if is_strong else float(rng.uniform(0.05, 1))
            rows.append(
                {
                    "from_sae": from_sae, "from_feature_id": feature, "to_sae": to_sae, "to_feature_id": to,
                    "relation": "excites" if effect < 0 else "inhibits", "split": "test", "effect": effect,
                    "share": None if to == 3 else effect / 0.8, "null": "mixture", "null_mean": 0.0, "null_sd": 0.02,
                    "z": effect / 0.02, "p": p, "p_random": p / 2, "p_mixture": p, "q": p * 100 if is_strong else 0.9,
                    "n_cells": 30, "n_cells_fired": 20, "n_donors": 4, "n_agree": 4 if is_strong else 2,
                    "p_donor": 0.125,
                }
            )  # fmt: skip
    members = [(from_sae, STRONG), (to_sae, 0), (to_sae, 1)]
    modules = [{"module": 0, "sae": sae, "feature_id": f, "n_features": 3, "n_edges": 1} for sae, f in members]
    return {
        "feature_edge": schemas.conform("feature_edge", pl.DataFrame(rows)),
        "edge_module": schemas.conform("edge_module", pl.DataFrame(modules)),
        "edge_module_gene_set": schemas.empty("edge_module_gene_set"),
    }


def cofiring_tables(groups: Sequence[Sequence[int]]) -> dict[str, pl.DataFrame]:
    """Modules of these features, and one that shuffled codes gave."""
    members = [
        {"module": i, "feature_id": feature, "n_features": len(group), "r": 0.3}
        for i, group in enumerate(groups)
        for feature in group
    ]
    rows = [
        {"control": control, "module": i, "n_features": len(group), "stability": 0.9, "r": 0.3, "r_test": 0.28,
         "null_mean": 0.01, "null_sd": 0.02, "p": 0.002, "q": 0.004,
         "top_genes": None if control else "CD3D IL32 LCK AES"}
        for control, own in ((None, groups), ("shuffled codes", groups[:1]))
        for i, group in enumerate(own)
    ]  # fmt: skip
    frame = pl.DataFrame(rows, infer_schema_length=None)
    return {
        "feature_module": schemas.conform("feature_module", pl.DataFrame(members)),
        "module": schemas.conform("module", frame),
        "module_gene_set": schemas.empty("module_gene_set"),
    }


def probe_tables(features: Sequence[int], labels: Sequence[str], *, kind: str = "cell_type") -> dict[str, pl.DataFrame]:
    """Probes of labels with 1 and 3 features, from an SAE (the first features for each label), genes and chance."""
    scores: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = []
    for representation, best in (("sae", 0.9), ("genes", 0.8), ("permuted labels", 0.5)):
        for i, label in enumerate([*labels, None]):
            for k in (1, 3):
                shared = {"representation": representation, "label_kind": kind, "label": label, "split": "test", "k": k}
                value = best + 0.01 * k
                row = {**shared, "n_features": k, "ridge": 0.01, "n": 10, "n_cells": 40, "n_donors": 4}
                row |= {"auroc": value, "auroc_low": value - 0.05, "auroc_high": value + 0.05}
                row |= {"balanced_accuracy": value - 0.1, "balanced_accuracy_low": None, "balanced_accuracy_high": None}
                ends = {"macro_f1": value - 0.2, "macro_f1_low": value - 0.3, "macro_f1_high": value - 0.1}
                scores.append(row | (dict.fromkeys(ends) if label else ends))
                for rank in range(k if label else 0):
                    feature, weight = features[(i + rank) % len(features)], (1 - 2 * (rank % 2)) * (2 - 0.5 * rank)
                    own = {"rank": rank + 1, "feature_id": feature, "name": "CD79A MS4A1", "weight": weight}
                    chosen.append({**shared, **own, "gain": 0.4 / (1 + rank)})
    return {
        "feature_probe": schemas.conform("feature_probe", pl.DataFrame(chosen)),
        "probe_score": schemas.conform("probe_score", pl.DataFrame(scores)),
    }


def input_tables(features: Sequence[int], genes: Sequence[str]) -> dict[str, pl.DataFrame]:
    """Every feature and gene by both paths; STRONG reads the second gene from its own token and from others."""
    rng = np.random.default_rng(13)
    rows: list[dict[str, Any]] = []
    for feature in features:
        for i, gene in enumerate(genes):
            for path in ("own token", "other tokens"):
                is_strong = feature == STRONG and i == 1
                share = (0.3 if path == "own token" else 0.4) if is_strong else float(rng.uniform(0, 0.02))
                p = 1e-5 if is_strong else float(rng.uniform(0.05, 1))
                rows.append(
                    {
                        "feature_id": feature, "gene": gene, "path": path, "split": "test", "change": 5 * share,
                        "share": share, "gradient": 4 * share, "null": "genes", "null_mean": 0.01, "null_sd": 0.01,
                        "z": (share - 0.01) / 0.01, "p": p, "q": p * 10 if is_strong else 0.9, "n_cells": 20 + i,
                        "n_donors": 4,
                    }
                )  # fmt: skip
    return {
        "feature_input": schemas.conform("feature_input", pl.DataFrame(rows)),
        "feature_input_summary": schemas.empty("feature_input_summary"),
    }
