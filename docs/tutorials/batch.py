# %% [markdown]
# # Batches: which features are technical, and can the model be freed of them?
#
# A feature that differs between batches within a cell type is most likely technical. This page first looks for such
# features where there are none, in the store of [PBMC in ten minutes](pbmc.py), and then in the same cells with a batch
# effect that is made up here, because only of one that was planted is it known what ought to be found.

# %%
import anndata
import numpy as np
import polars as pl
from scipy import sparse

import scsae

# %% [markdown]
# ## Cells without a batch effect
#
# These cells come from several channels of one machine. Every feature is tested for every channel on `test` cells, with
# labels that are permuted within cell types.

# %%
store = scsae.open()
of_batches = store.frame("feature_label").filter(pl.col("label_kind") == "batch", pl.col("split") == "test")
tested = of_batches.group_by("feature_id").agg(pl.col("q").min(), pl.col("auroc").max()).collect()
{"features tested": tested.height, "features at q <= .05": tested.filter(pl.col("q") <= 0.05).height}

# %% [markdown]
# ## A batch effect that is made up
#
# Half of the cells, drawn at random, are called the second batch, and the expression of a fifth of the genes is
# multiplied by four in them, before the logarithm. So the batch has nothing to do with the cell type. **This is no
# effect of a real experiment**, which would be neither so even nor so well known.

# %%
rng = np.random.default_rng(0)
cells = anndata.read_h5ad("data/pbmc68k_reduced.h5ad")
is_second = rng.random(cells.n_obs) < 0.5
is_changed = rng.random(cells.n_vars) < 0.2
values = np.expm1(cells.X.toarray())
values[np.ix_(is_second, is_changed)] *= 4
cells.X = sparse.csr_matrix(np.log1p(values).astype(np.float32))
cells.obs["planted"] = np.where(is_second, "second", "first")
{"cells of the second batch": int(is_second.sum()), "genes that are changed": int(is_changed.sum())}

# %% [markdown]
# The same four stages in a store of its own, with the planted column as the batch.

# %%
mixed = "store-with-batches"
scsae.extract(cells, layer=2, batch="planted", cell_type="cell_type", shard_cells=350, store=mixed)
scsae.train(n_features=512, k=16, n_steps=400, recovery_cells=0, num_workers=0, store=mixed)
scsae.encode(store=mixed)
scsae.associate(store=mixed)
store = scsae.open(mixed)
of_batches = store.frame("feature_label").filter(pl.col("label_kind") == "batch", pl.col("split") == "test")
tested = of_batches.group_by("feature_id").agg(pl.col("q").min(), pl.col("auroc").max()).collect()
{"features tested": tested.height, "features at q <= .05": tested.filter(pl.col("q") <= 0.05).height}

# %% [markdown]
# ## The features of the batch
#
# The best of them on `select` cells, with their figures of `test` cells: `auroc` is inside cell types.

# %%
found = store.features_for(label="second")
found.select("feature_id", "select_auroc", "auroc", "q", "class", "top_genes").head(5)

# %% [markdown]
# Do they read the genes that were changed? The share of changed genes among the three genes of each of the twenty best
# batch features, and among all genes:

# %%
changed = set(cells.var_names[is_changed])
genes = [gene for text in found["top_genes"].head(20).drop_nulls() for gene in text.split()[:3]]
{
    "share of changed genes, twenty batch features": round(sum(gene in changed for gene in genes) / len(genes), 2),
    "share of changed genes, all": round(float(is_changed.mean()), 2),
}

# %% [markdown]
# ## Mixing the batches inside the model
#
# With `kind="batch", target="all"` the features that distinguish the batches inside cell types are edited at every
# token, and the model runs on. Four kinds of edits are tried on `select` cells: switching the features off (ablate),
# scaling them, and moving their codes to the mean of the other batch (toward) or by the difference of the means
# (shift). The best one is reported on `test` cells. To save time the nulls have three draws, so that p cannot be
# smaller than 1/4, and 60 cells of each split are taken.

# %%
steered = scsae.steer(kind="batch", target="all", n_features=20, n_nulls=3, max_cells=60, store=mixed)
{
    name: value
    for name, value in steered.facts.items()
    if name in ("intervention", "does better") or "test cells" in name
}

# %% [markdown]
# `batch_mixing` is 1 where the neighbours of a cell are of the batches in their shares, and lower where they are of its
# own batch; `label_conservation` says how well the cells keep their types. `mean difference` adds the difference of the
# mean activations of the batches and needs no SAE; the centrings change the final vectors and not the model.

# %%
results = scsae.open(mixed).frame("steering").filter(pl.col("run") == steered.run, pl.col("group") == "all").collect()
shown = results.filter(pl.col("metric").is_in(["batch_mixing", "label_conservation"]))
with pl.Config(tbl_rows=20):
    print(shown.pivot("metric", index="condition", values="value"))

# %% [markdown]
# Compare each row with `unsteered`. Here the answer is no: the batches are mixed well in the final vectors before
# anything is steered, so a batch effect that features show need not be one of the whole cell. No edit mixes them
# better, those that change more cost the cell types, and the mean difference and the centring within types do better
# without any feature. [Cells of several protocols](../steering.md), whose batches lie apart, are another case: features
# mix those far beyond every null, and the mean difference does as well or better.
