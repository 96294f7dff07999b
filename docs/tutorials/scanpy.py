# %% [markdown]
# # From the store to scanpy
#
# The cells of a store as an AnnData: genes, codes of features, the map, and vectors of the model in one object. This
# page uses the store of [PBMC in ten minutes](pbmc.py).

# %%
import warnings

import scanpy as sc

import scsae

warnings.simplefilter("ignore")
store = scsae.open()
_ = scsae.plots.umap(store, "cell_type")
# %% [markdown]
# `plots.umap` has computed the map of the cells from their codes and written it to the store, so `to_anndata` has it.

# %%
adata = store.to_anndata()
adata

# %% [markdown]
# `X` holds log1p of counts per 10,000, as scanpy makes it. `X="counts"` gives the counts instead; these cells have
# none, because their file is log-normalised. The codes are in `obsm["X_sae"]`, and the mean activation of each cell is
# in `obsm["X_model"]`. X and codes are sparse. What a store does not have is not there: without a map there is no
# `X_umap`.
#
# ## Genes and features on the map
#
# A column of `obs` colours the map, and so does a gene. A feature becomes a column of `obs`.

# %%
feature = int(store.features_for(label="CD19+ B")["feature_id"][0])
name = f"feature {feature}"
adata.obs[name] = adata.obsm["X_sae"][:, [feature]].toarray().ravel()
sc.pl.umap(adata, color=["CD79A", name, "cell_type"], wspace=0.2)

# %% [markdown]
# ## Features as columns
#
# With `features_as_var=True` the codes are in `X` and the table of features is in `var`. What scanpy does with genes
# it then does with features.

# %%
codes = store.to_anndata(features_as_var=True)
codes.var.loc[[name], ["class", "density", "top_label", "top_genes"]]

# %%
sc.tl.rank_genes_groups(codes, "cell_type", method="wilcoxon")
sc.get.rank_genes_groups_df(codes, group="CD19+ B").head(3)

# %% [markdown]
# This ranking is of all cells, those of the training among them, and has no donors. To report a feature of a type, take
# `store.features_for`, whose figures are of `test` cells.
#
# ## The vectors of the model itself
#
# The same cells by the model's activations instead of the codes.

# %%
sc.pp.neighbors(adata, use_rep="X_model", n_neighbors=15)
sc.tl.umap(adata, key_added="X_umap_model")
sc.pl.embedding(adata, basis="X_umap_model", color=[name, "cell_type"], wspace=0.2)

# %% [markdown]
# ## To a file, and back
#
# scanpy and cellxgene open what is written. An AnnData can also be given to any stage in the place of a file.

# %%
adata.write_h5ad("codes.h5ad")
read = sc.read_h5ad("codes.h5ad")
scsae.inspect(read[read.obs["cell_type"] == "CD19+ B"], model="mini")["cells"]
