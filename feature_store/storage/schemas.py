"""The columns and dtypes of every table of the store, defined only here.

A table may have more columns than are listed here (every obs column of the cells, the method of an association); the
listed columns have exactly this name and dtype, and `descriptions` says what each holds. Codes store `feature_id` as
u16 if all features fit, and readers widen it; all other tables use i32, so that joins need no cast and differences do
not wrap around.
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
    "genes": _table(
        "gene_idx symbol n_cells mean",
        gene_idx=pl.Int32,
        symbol=pl.String,
        ensembl_id=pl.String,
        n_cells=pl.Int64,
        mean=pl.Float64,
    ),
    "digests": _table(
        "cell_idx n_detected symbol_digest",
        cell_idx=pl.Int64,
        n_detected=pl.Int32,
        symbol_digest=pl.UInt64,
        ensembl_digest=pl.UInt64,
    ),
    "codes": _table("cell_idx feature_id value", cell_idx=pl.Int64, feature_id=pl.Int32, value=pl.Float32),
    "compact_codes": _table("cell_idx feature_id value", cell_idx=pl.Int64, feature_id=pl.Int32, value=pl.Float32),
    "umap": _table("cell_idx x y", cell_idx=pl.Int64, x=pl.Float32, y=pl.Float32),
    "feature_umap": _table("feature_id x y", feature_id=pl.Int32, x=pl.Float32, y=pl.Float32),
    "profile_umap": _table("feature_id x y", feature_id=pl.Int32, x=pl.Float32, y=pl.Float32),
    "feature_neighbour": _table(
        "feature_id rank other_feature_id cosine",
        feature_id=pl.Int32,
        rank=pl.Int32,
        other_feature_id=pl.Int32,
        cosine=pl.Float32,
    ),
    "sample": _table("cell_idx", cell_idx=pl.Int64),
    "variable_genes": _table(
        "gene_idx rank n_batches variance",
        gene_idx=pl.Int32,
        rank=pl.Float64,
        n_batches=pl.Int64,
        variance=pl.Float64,
    ),
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
    "cell_tokens": _table("cell_idx n_tokens", cell_idx=pl.Int64, n_tokens=pl.Int32),
    "feature_firing": _table(
        "feature_id split n_cells n_tokens max",
        feature_id=pl.Int32,
        split=pl.String,
        n_cells=pl.Int64,
        n_tokens=pl.Int64,
        max=pl.Float32,
    ),
    "feature_cell": _table("feature_id cell_idx value", feature_id=pl.Int32, cell_idx=pl.Int64, value=pl.Float32),
    "token_top": _table(
        "feature_id cell_idx token_pos gene_id value",
        feature_id=pl.Int32,
        cell_idx=pl.Int64,
        token_pos=pl.Int32,
        gene_id=pl.Int32,
        value=pl.Float32,
    ),
    "top_cell_token": _table(
        "feature_id cell_idx token_pos value",
        feature_id=pl.Int32,
        cell_idx=pl.Int64,
        token_pos=pl.Int32,
        gene=pl.String,
        value=pl.Float32,
    ),
    "token_feature_gene": _table(
        "feature_id split gene_id n_tokens",
        feature_id=pl.Int32,
        split=pl.UInt8,
        gene_id=pl.Int32,
        n_tokens=pl.Int64,
    ),
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
    "edge_module": _table(
        "module sae feature_id n_features n_edges",
        module=pl.Int32,
        sae=pl.String,
        feature_id=pl.Int32,
        n_features=pl.Int64,
        n_edges=pl.Int64,
    ),
    "edge_module_gene_set": _MODULE_GENE_SET,
    "module_gene_set": _MODULE_GENE_SET,
    "feature_module": _table(
        "module feature_id n_features r",
        module=pl.Int32,
        feature_id=pl.Int32,
        n_features=pl.Int64,
        r=pl.Float64,
    ),
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
    "steering_scores": _table(
        "feature_id score rank",
        feature_id=pl.Int32,
        score=pl.Float64,
        n_units=pl.Int32,
        n_agree=pl.Int32,
        density=pl.Float64,
        rank=pl.Int32,
    ),
    "steering_head": _table(
        "condition draw gene n_cells",
        condition=pl.String,
        draw=pl.Int32,
        gene=pl.String,
        n_cells=pl.Int64,
        change=pl.Float64,
        difference=pl.Float64,
    ),
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
