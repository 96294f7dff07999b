"""The columns and dtypes of every table of the store, defined only here.

A table may have more columns than are listed here (every obs column of the cells, the method of an association); the
listed columns have exactly this name and dtype. Codes store `feature_id` as u16 if all features fit, and readers widen
it; all other tables use i32, so that joins need no cast and differences do not wrap around.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

from feature_store.errors import InputError

SPLITS = ("train", "select", "test")


@dataclass(frozen=True, kw_only=True)
class TableSchema:
    """Required columns of one table, in order; `not_null` are those in which a null is an error."""

    columns: Mapping[str, pl.DataType]
    not_null: frozenset[str]


def _table(not_null: str, **columns: type[pl.DataType] | pl.DataType) -> TableSchema:
    return TableSchema(
        columns={name: dtype() if isinstance(dtype, type) else dtype for name, dtype in columns.items()},
        not_null=frozenset(not_null.split()),
    )


_MODULE_GENE_SET = _table(
    "module collection gene_set n_features n_known p q",
    module=pl.Int32,
    collection=pl.String,
    gene_set=pl.String,
    n_features=pl.Int64,
    n_known=pl.Int64,
    n_with_set=pl.Int64,
    n_all=pl.Int64,
    p=pl.Float64,
    q=pl.Float64,
)
TABLES: Mapping[str, TableSchema] = {
    # one row per cell of a data set; donor, batch and cell_type are the obs columns that the user named, else null;
    # panel: whether the cell is one of those that get everything (`feature_store.cells.panel`)
    "cells": _table(
        "cell_idx cell_id dataset split panel",
        cell_idx=pl.Int64,
        cell_id=pl.String,
        dataset=pl.String,
        split=pl.String,
        panel=pl.Boolean,
        donor=pl.String,
        batch=pl.String,
        cell_type=pl.String,
    ),
    # one row per gene of a data set; n_cells: cells with a value above 0; mean: over all cells, of the matrix's values
    "genes": _table(
        "gene_idx symbol n_cells mean",
        gene_idx=pl.Int32,
        symbol=pl.String,
        ensembl_id=pl.String,
        n_cells=pl.Int64,
        mean=pl.Float64,
    ),
    # one row per cell of a data set (`feature_store.cells.cell_digests`); n_detected: genes with a value
    "digests": _table(
        "cell_idx n_detected symbol_digest",
        cell_idx=pl.Int64,
        n_detected=pl.Int32,
        symbol_digest=pl.UInt64,
        ensembl_digest=pl.UInt64,
    ),
    # one row per nonzero of the codes of the panel's cells, by cell and then feature
    "codes": _table("cell_idx feature_id value", cell_idx=pl.Int64, feature_id=pl.Int32, value=pl.Float32),
    # the same of the largest codes of the cells outside the panel
    "compact_codes": _table("cell_idx feature_id value", cell_idx=pl.Int64, feature_id=pl.Int32, value=pl.Float32),
    # one row per cell of the map (`feature_store.maps.cells`); x and y have no unit
    "umap": _table("cell_idx x y", cell_idx=pl.Int64, x=pl.Float32, y=pl.Float32),
    # one row per feature of an SAE (`feature_store.maps.features`)
    "feature_umap": _table("feature_id x y", feature_id=pl.Int32, x=pl.Float32, y=pl.Float32),
    # one row per living feature of associations (`feature_store.maps.label_profiles`)
    "profile_umap": _table("feature_id x y", feature_id=pl.Int32, x=pl.Float32, y=pl.Float32),
    # the nearest features of each feature by the cosine of their decoder rows; rank 1 is the nearest
    "feature_neighbour": _table(
        "feature_id rank other_feature_id cosine",
        feature_id=pl.Int32,
        rank=pl.Int32,
        other_feature_id=pl.Int32,
        cosine=pl.Float32,
    ),
    # one row per cell of a sample of a data set
    "sample": _table("cell_idx", cell_idx=pl.Int64),
    # the most variable genes of a data set, the first one first (`feature_store.cells.variable_genes`); rank: median
    # over the n_batches batches in which the gene is among the first; variance: standardised, mean over batches
    "variable_genes": _table(
        "gene_idx rank n_batches variance",
        gene_idx=pl.Int32,
        rank=pl.Float64,
        n_batches=pl.Int64,
        variance=pl.Float64,
    ),
    # the genes that may be tokens: their token, its name in the model's vocabulary, and the name in the data; rank,
    # n_batches and variance as above, null for genes of a list
    "chosen_genes": _table(
        "gene_id token symbol",
        gene_id=pl.Int32,
        token=pl.String,
        symbol=pl.String,
        ensembl_id=pl.String,
        rank=pl.Float64,
        n_batches=pl.Int64,
        variance=pl.Float64,
    ),
    # one row per cell that has tokens; a cell without any, such as an empty droplet, is in no statistic
    "cell_tokens": _table("cell_idx n_tokens", cell_idx=pl.Int64, n_tokens=pl.Int32),
    # one row per (feature, split) that fires, over all cells: cells and tokens on which it fires, and its largest value
    "feature_firing": _table(
        "feature_id split n_cells n_tokens max",
        feature_id=pl.Int32,
        split=pl.String,
        n_cells=pl.Int64,
        n_tokens=pl.Int64,
        max=pl.Float32,
    ),
    # the cells with the largest codes of each feature among all cells, the largest first
    "feature_cell": _table("feature_id cell_idx value", feature_id=pl.Int32, cell_idx=pl.Int64, value=pl.Float32),
    # the top-activating tokens of each feature of a shard or a run
    "token_top": _table(
        "feature_id cell_idx token_pos gene_id value",
        feature_id=pl.Int32,
        cell_idx=pl.Int64,
        token_pos=pl.Int32,
        gene_id=pl.Int32,
        value=pl.Float32,
    ),
    # tokens of (split, gene) of the panel's cells at which the feature fires; split: its position in SPLITS
    "token_feature_gene": _table(
        "feature_id split gene_id n_tokens",
        feature_id=pl.Int32,
        split=pl.UInt8,
        gene_id=pl.Int32,
        n_tokens=pl.Int64,
    ),
    # all tokens of (split, gene) of the panel's cells, whether or not any feature fires
    "token_gene": _table("split gene_id n_tokens", split=pl.UInt8, gene_id=pl.Int32, n_tokens=pl.Int64),
    "features": _table(
        "feature_id density dead",
        feature_id=pl.Int32,
        density=pl.Float64,
        mean=pl.Float64,
        max=pl.Float64,
        p99=pl.Float64,
        **{"class": pl.String},
        class_confidence=pl.Float64,
        dead=pl.Boolean,
        top_genes=pl.String,
        top_label=pl.String,
    ),
    "feature_label": _table(
        "feature_id label_kind label split",
        feature_id=pl.Int32,
        label_kind=pl.String,
        label=pl.String,
        split=pl.String,
        auroc=pl.Float64,
        rank_biserial=pl.Float64,
        f1=pl.Float64,
        mcc=pl.Float64,
        ami=pl.Float64,
        threshold=pl.Float64,
        n=pl.Int64,
        n_donors=pl.Int64,
        n_agree=pl.Int64,
        low=pl.Float64,
        high=pl.Float64,
        p=pl.Float64,
        p_donor=pl.Float64,
        p_max=pl.Float64,
        q=pl.Float64,
    ),
    # one row per (feature, number of the cells, split); spearman: within donors; spearman_all: over all cells
    "feature_number": _table(
        "feature_id number split",
        feature_id=pl.Int32,
        number=pl.String,
        split=pl.String,
        spearman=pl.Float64,
        spearman_all=pl.Float64,
        n=pl.Int64,
        n_donors=pl.Int64,
        n_agree=pl.Int64,
        low=pl.Float64,
        high=pl.Float64,
        p=pl.Float64,
        p_donor=pl.Float64,
        q=pl.Float64,
    ),
    "feature_gene": _table(
        "feature_id gene",
        feature_id=pl.Int32,
        gene=pl.String,
        identity_precision=pl.Float64,
        identity_recall=pl.Float64,
        lift=pl.Float64,
        pearson=pl.Float64,
        spearman=pl.Float64,
        n=pl.Int64,
        nnz=pl.Int64,
        p=pl.Float64,
        q=pl.Float64,
    ),
    "feature_geneset": _table(
        "feature_id collection gene_set",
        feature_id=pl.Int32,
        collection=pl.String,
        gene_set=pl.String,
        overlap=pl.Int64,
        odds_ratio=pl.Float64,
        p=pl.Float64,
        p_matched=pl.Float64,
        q=pl.Float64,
        q_matched=pl.Float64,
    ),
    # the gene sets that features were tested against; n_shared: genes of the set that the data have
    "gene_sets": _table(
        "collection gene_set n_genes n_shared genes",
        collection=pl.String,
        gene_set=pl.String,
        description=pl.String,
        n_genes=pl.Int64,
        n_shared=pl.Int64,
        genes=pl.List(pl.String),
    ),
    "feature_token": _table(
        "feature_id cell_idx token_pos gene value",
        feature_id=pl.Int32,
        cell_idx=pl.Int64,
        token_pos=pl.Int32,
        gene=pl.String,
        value=pl.Float32,
    ),
    # one row per (feature, intervention, gene) of the predictions of hidden genes: effect, in the unit of the model's
    # head; null: the one of the larger p, which is p; q: over all pairs of the run; direct: the path without blocks
    "feature_effect": _table(
        "feature_id intervention gene split effect null p q n_cells",
        feature_id=pl.Int32,
        intervention=pl.String,
        gene=pl.String,
        split=pl.String,
        effect=pl.Float64,
        null=pl.String,
        null_mean=pl.Float64,
        null_sd=pl.Float64,
        z=pl.Float64,
        p=pl.Float64,
        p_random=pl.Float64,
        p_mixture=pl.Float64,
        q=pl.Float64,
        direct=pl.Float64,
        n_cells=pl.Int64,
        n_donors=pl.Int64,
    ),
    # one row per (feature, intervention): genes up and down at q <= .05; strength: root mean square over genes, and its
    # ratio to the stronger null; specificity: own genes against others; direct_spearman: direct path against effect
    "feature_effect_summary": _table(
        "feature_id intervention n_genes n_up n_down strength",
        feature_id=pl.Int32,
        intervention=pl.String,
        n_genes=pl.Int64,
        n_up=pl.Int64,
        n_down=pl.Int64,
        strength=pl.Float64,
        strength_ratio=pl.Float64,
        specificity=pl.Float64,
        specificity_null=pl.Float64,
        direct_spearman=pl.Float64,
    ),
    # one row per pair of a feature of an earlier SAE and one of a later SAE: the significant pairs, and those of the
    # smallest p of each earlier feature. effect: change of the later feature's mean code when the earlier is ablated;
    # share: effect in units of that code; n_cells: of the earlier feature; n_agree: donors with the sign of the effect
    "feature_edge": _table(
        "from_sae from_feature_id to_sae to_feature_id relation split effect null p q n_cells",
        from_sae=pl.String,
        from_feature_id=pl.Int32,
        to_sae=pl.String,
        to_feature_id=pl.Int32,
        relation=pl.String,
        split=pl.String,
        effect=pl.Float64,
        share=pl.Float64,
        null=pl.String,
        null_mean=pl.Float64,
        null_sd=pl.Float64,
        z=pl.Float64,
        p=pl.Float64,
        p_random=pl.Float64,
        p_mixture=pl.Float64,
        q=pl.Float64,
        n_cells=pl.Int64,
        n_cells_fired=pl.Int64,
        n_donors=pl.Int64,
        n_agree=pl.Int64,
        p_donor=pl.Float64,
    ),
    # one row per feature of a module of edges; n_features: of the module; n_edges: of the feature inside it
    "edge_module": _table(
        "module sae feature_id n_features n_edges",
        module=pl.Int32,
        sae=pl.String,
        feature_id=pl.Int32,
        n_features=pl.Int64,
        n_edges=pl.Int64,
    ),
    # one row per module and gene set that a feature of it goes with; n_known: features of the module with associations
    "edge_module_gene_set": _MODULE_GENE_SET,
    "module_gene_set": _MODULE_GENE_SET,
    # one row per feature of a module of features that fire together; r: its mean partial correlation with the others
    "feature_module": _table(
        "module feature_id n_features r",
        module=pl.Int32,
        feature_id=pl.Int32,
        n_features=pl.Int64,
        r=pl.Float64,
    ),
    # one row per module, and per module that shuffled codes give (control "shuffled codes"); r, r_test: mean partial
    # correlation of its pairs on train and select cells, and on test cells; null: features that fire as often
    "module": _table(
        "module n_features stability r",
        control=pl.String,
        module=pl.Int32,
        n_features=pl.Int64,
        stability=pl.Float64,
        r=pl.Float64,
        r_test=pl.Float64,
        null_mean=pl.Float64,
        null_sd=pl.Float64,
        p=pl.Float64,
        q=pl.Float64,
        top_genes=pl.String,
    ),
    # one row per (feature, gene, path): what leaving the gene's token out takes from S, the sum of the feature's code
    # over the gene tokens of a cell. path: "own token", the code that goes with the token, or "other tokens", the fall
    # of the rest; change: mean over cells, in units of code; share: change over mean S in the same cells, which
    # null_mean, null_sd and z are about; gradient: gradient times input, in units of code; q: over all rows of the path
    "feature_input": _table(
        "feature_id gene path split change share null p q n_cells",
        feature_id=pl.Int32,
        gene=pl.String,
        path=pl.String,
        split=pl.String,
        change=pl.Float64,
        share=pl.Float64,
        gradient=pl.Float64,
        null=pl.String,
        null_mean=pl.Float64,
        null_sd=pl.Float64,
        z=pl.Float64,
        p=pl.Float64,
        q=pl.Float64,
        n_cells=pl.Int64,
        n_donors=pl.Int64,
    ),
    # one row per feature: genes tested, and those at q <= .05 by each path; shares of S in all cells of the feature
    # that the tested genes take by each path, each left out alone; top_gene: the one at q <= .05 that takes most
    "feature_input_summary": _table(
        "feature_id n_cells n_genes n_nulls n_own n_other share_own share_other",
        feature_id=pl.Int32,
        n_cells=pl.Int64,
        n_genes=pl.Int64,
        n_nulls=pl.Int64,
        n_own=pl.Int64,
        n_other=pl.Int64,
        share_own=pl.Float64,
        share_other=pl.Float64,
        gradient_spearman=pl.Float64,
        top_gene=pl.String,
    ),
    # one row per representation (an SAE, its baselines, genes, permuted labels), label and feature of its probe with k
    # features: rank is the order in which features enter, weight is in logits per standard deviation of the feature,
    # gain is the test AUROC of the first `rank` features less that of those before; feature_id: of a gene its gene_idx
    "feature_probe": _table(
        "representation label_kind label split k rank feature_id weight gain",
        representation=pl.String,
        label_kind=pl.String,
        label=pl.String,
        split=pl.String,
        k=pl.Int32,
        rank=pl.Int32,
        feature_id=pl.Int32,
        name=pl.String,
        weight=pl.Float64,
        gain=pl.Float64,
    ),
    # one row per representation, label and k, and one with label null for all labels of the kind together, whose
    # balanced accuracy and macro-F1 are of the label with the largest logit; intervals are over n_donors donors; n:
    # test cells of the label
    "probe_score": _table(
        "representation label_kind split k n_features auroc balanced_accuracy n n_cells n_donors",
        representation=pl.String,
        label_kind=pl.String,
        label=pl.String,
        split=pl.String,
        k=pl.Int32,
        n_features=pl.Int32,
        auroc=pl.Float64,
        auroc_low=pl.Float64,
        auroc_high=pl.Float64,
        balanced_accuracy=pl.Float64,
        balanced_accuracy_low=pl.Float64,
        balanced_accuracy_high=pl.Float64,
        macro_f1=pl.Float64,
        macro_f1_low=pl.Float64,
        macro_f1_high=pl.Float64,
        ridge=pl.Float64,
        n=pl.Int64,
        n_cells=pl.Int64,
        n_donors=pl.Int64,
    ),
    # one row per feature of `sae`, matched with its nearest in the SAE `other`; both directions are there
    "feature_match": _table(
        "feature_id sae other mutual dead method",
        feature_id=pl.Int32,
        sae=pl.String,
        other=pl.String,
        other_feature_id=pl.Int32,
        similarity=pl.Float64,
        similarity_test=pl.Float64,
        runner_up=pl.Float64,
        rank=pl.Int32,
        mutual=pl.Boolean,
        null_median=pl.Float64,
        null_95=pl.Float64,
        random_median=pl.Float64,
        p=pl.Float64,
        dead=pl.Boolean,
        method=pl.String,
    ),
    # one row per target, statistic and representation (an SAE, its baselines), for its one best feature; feature_id is
    # null where that feature is not significant for the target on `test` cells
    "comparison": _table(
        "target_kind target statistic representation best",
        target_kind=pl.String,
        target=pl.String,
        statistic=pl.String,
        representation=pl.String,
        feature_id=pl.Int32,
        select=pl.Float64,
        test=pl.Float64,
        rank_biserial=pl.Float64,
        f1=pl.Float64,
        p=pl.Float64,
        q=pl.Float64,
        best=pl.Boolean,
        excess=pl.Float64,
        low=pl.Float64,
        high=pl.Float64,
        n_units=pl.Int64,
        n_better=pl.Int64,
    ),
    # one row per representation: its features with a label or gene set on `test` cells, and those of each class
    "representation": _table(
        "representation run n_features n_dead",
        representation=pl.String,
        run=pl.String,
        n_features=pl.Int64,
        n_dead=pl.Int64,
        l0=pl.Float64,
        fvu=pl.Float64,
        recovery=pl.Float64,
        n_label=pl.Int64,
        n_batch=pl.Int64,
        n_gene_set=pl.Int64,
        class_gene_identity=pl.Int64,
        class_cell_context=pl.Int64,
        class_batch=pl.Int64,
        class_mixed=pl.Int64,
        class_dead=pl.Int64,
    ),
    # one row per (split, condition, point of the grid, metric, group): group is "all" or a label; effect: value minus
    # the unsteered value; low, high: its 95 % interval; p_NULL: p-value from the null's draws, null without draws
    "steering": _table(
        "split condition role metric group n_draws chosen",
        split=pl.String,
        condition=pl.String,
        role=pl.String,
        intervention=pl.String,
        n_features=pl.Int64,
        dose=pl.Float64,
        metric=pl.String,
        group=pl.String,
        n_draws=pl.Int64,
        n_cells=pl.Int64,
        value=pl.Float64,
        effect=pl.Float64,
        low=pl.Float64,
        high=pl.Float64,
        p_random_features=pl.Float64,
        p_random_direction=pl.Float64,
        p_shuffled_labels=pl.Float64,
        chosen=pl.Boolean,
    ),
    # one row per steered variant of the `test` cells; features: best first
    "steering_variants": _table(
        "variant name role n_features mode draw features chosen",
        variant=pl.Int32,
        name=pl.String,
        role=pl.String,
        null=pl.String,
        intervention=pl.String,
        n_features=pl.Int64,
        dose=pl.Float64,
        mode=pl.String,
        draw=pl.Int32,
        features=pl.List(pl.Int32),
        chosen=pl.Boolean,
    ),
    # one row per living feature, best first; score: on `select` cells, in units of its code (edits: rank-biserial)
    "steering_scores": _table(
        "feature_id score rank",
        feature_id=pl.Int32,
        score=pl.Float64,
        n_units=pl.Int32,
        n_agree=pl.Int32,
        density=pl.Float64,
        rank=pl.Int32,
    ),
    # one row per (condition, draw, gene) of the model's predictions of masked genes of steered cells
    "steering_head": _table(
        "condition draw gene n_cells",
        condition=pl.String,
        draw=pl.Int32,
        gene=pl.String,
        n_cells=pl.Int64,
        change=pl.Float64,
        difference=pl.Float64,
    ),
    # one row per (variant, `test` cell) of the map; pc1, pc2: principal components of the cells' embeddings
    "steering_map": _table(
        "variant cell_idx x y",
        variant=pl.Int32,
        cell_idx=pl.Int64,
        pc1=pl.Float32,
        pc2=pl.Float32,
        x=pl.Float32,
        y=pl.Float32,
    ),
}


OTHER_COLUMNS = frozenset(
    (
        "context_effect batch_effect gene_effect gene_precision context_kind cell_density top_identity_genes "
        "top_label_kind top_label_auroc top_label_auroc_select top_label_q px py method n_label z split n n_donors "
        "pearson_within_type n_genes n_set p_rank q_rank rank_biserial run direction_seed references gap "
        "select_auroc select_pearson select_p select_rank_biserial select_identity_precision"
    ).split()
)
"""Names of columns beyond those of TABLES that associations and steering add to tables about features and cells, and of
the figures that queries and pages set beside them."""


def schema(table: str) -> TableSchema:
    """Return the schema of a table. InputError lists the tables."""
    if table not in TABLES:
        raise InputError(f"no table {table!r}; tables are {', '.join(TABLES)}")
    return TABLES[table]


def check(table: str, frame: pl.DataFrame) -> None:
    """Raise InputError naming every missing column, wrong dtype and forbidden null; additional columns are allowed."""
    wanted = schema(table)
    problems = []
    for name, dtype in wanted.columns.items():
        if name not in frame.columns:
            problems.append(f"no column {name!r} ({dtype})")
        elif frame.schema[name] != dtype:
            problems.append(f"column {name!r} is {frame.schema[name]} instead of {dtype}")
        elif name in wanted.not_null and (n_null := frame[name].null_count()):
            problems.append(f"column {name!r} has {n_null} nulls")
    if problems:
        raise InputError(
            f"no {table!r} table: {'; '.join(problems)}; `schemas.conform({table!r}, frame)` casts and orders"
        )


def conform(table: str, frame: pl.DataFrame) -> pl.DataFrame:
    """Return `frame` with the schema's columns first, in order, cast to their dtypes without loss, and `check` it.

    It raises InputError for a missing column or a value that the dtype cannot hold.
    """
    wanted = schema(table).columns
    try:
        casts = [pl.col(name).cast(dtype) for name, dtype in wanted.items()]
        cast = frame.select(*casts, pl.exclude(list(wanted)))
    except pl.exceptions.PolarsError as error:
        raise InputError(f"a frame cannot become a {table!r} table: {str(error).splitlines()[0]}") from error
    check(table, cast)
    return cast


def empty(table: str) -> pl.DataFrame:
    """Return the table without rows, which a stage writes if it has no results."""
    return pl.DataFrame(schema=dict(schema(table).columns))
