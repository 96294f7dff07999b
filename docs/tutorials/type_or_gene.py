# %% [markdown]
# # Is my feature a cell type or a gene?
#
# A feature that fires in B cells may read one gene that only B cells have, or what B cells have in common. Both are in
# the tables. This page uses the store of [PBMC in ten minutes](pbmc.py).

# %%
import polars as pl

import scsae

store = scsae.open()
best = store.features_for(label="CD19+ B").head(5)
best.select("feature_id", "auroc", "q", "class", "top_genes")

# %% [markdown]
# ## Which genes go with it?
#
# `pearson` is the correlation of the cell's code with the gene's expression, and `pearson_within_type` the same inside
# cell types: where only the first is large, the feature and the gene both follow the type. `identity_precision` is the
# share of the feature's firing that falls on the tokens of this one gene, and `identity_recall` the share of the gene's
# tokens at which it fires.

# %%
feature = int(best["feature_id"][0])
of_genes = store.frame("feature_gene").filter(pl.col("feature_id") == feature, pl.col("split") == "test")
columns = ["gene", "pearson", "pearson_within_type", "identity_precision", "identity_recall", "q"]
of_genes.select(columns).sort("pearson", descending=True, nulls_last=True).head(6).collect()

# %% [markdown]
# ## And a feature of one gene?
#
# A feature that has half of its firing or more on one gene is called gene-identity. This is the one of them that fires
# most, with the genes on whose tokens it does.

# %%
features = store.frame("features")
reads_one = features.filter(pl.col("class") == "gene-identity", pl.col("gene_precision") >= 0.5)
of_one = reads_one.sort("density", descending=True).collect()["feature_id"][0]
rows = store.frame("feature_gene").filter(pl.col("feature_id") == of_one, pl.col("split") == "test")
rows.select(columns).sort("identity_precision", descending=True, nulls_last=True).head(3).collect()

# %% [markdown]
# ## What explains its firing?
#
# `gene_effect` is the share of its firing that the gene of the token explains, `context_effect` the share of the cell
# code's rank variance that labels such as the cell type explain, and `batch_effect` that of the batch.

# %%
named = ["feature_id", "class", "gene_precision", "gene_effect", "context_effect", "batch_effect"]
features.filter(pl.col("feature_id").is_in([of_one, *best["feature_id"]])).select(named).collect()

# %% [markdown]
# Most features of a model of gene tokens follow their gene: gene_effect is high even for a feature of a cell type,
# because it reads the genes that this type has. The class therefore asks for the context before gene families.
#
# ## In which cells does it fire?
#
# The codes of `test` cells by cell type.

# %%
_ = scsae.plots.violin(store, feature)
# %% [markdown]
# ## And the same for all features
#
# How many features of each class have a cell type at q <= .05 on `test` cells?

# %%
store.sql(
    "SELECT class, COUNT(*) AS n, SUM(CASE WHEN top_label IS NULL THEN 0 ELSE 1 END) AS with_label "
    "FROM features GROUP BY class ORDER BY n DESC"
)

# %% [markdown]
# What a feature causes is another question: `scsae effects` and `scsae inputs` change the model and measure it.
