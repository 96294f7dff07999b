# %% [markdown]
# # From the store to scanpy
#
# The codes of all cells as an AnnData, in which features are columns like genes. This page uses the store of
# [PBMC in ten minutes](pbmc.py).

# %%
import warnings

import scanpy as sc

import scsae

warnings.simplefilter("ignore")
store = scsae.open()
adata = store.to_anndata()
adata.obsm["X_sae"].shape

# %% [markdown]
# The codes are in `obsm["X_sae"]`, the annotations in `obs`, and the tables about features in `uns["sae"]`.

# %%
adata.obs[["split", "batch", "cell_type"]].head(3)

# %% [markdown]
# ## A map of the cells by their features

# %%
sc.pp.neighbors(adata, use_rep="X_sae", n_neighbors=15)
sc.tl.umap(adata)
feature = int(store.features_for(label="CD19+ B")["feature_id"][0])
name = f"feature {feature}"
adata.obs[name] = adata.obsm["X_sae"][:, [feature]].toarray().ravel()
sc.pl.umap(adata, color=["cell_type", name], wspace=0.6)

# %% [markdown]
# ## A table of features beside the cells
#
# `uns["sae"]["features"]` has a row for each column of the codes.

# %%
adata.uns["sae"]["features"].iloc[[feature]][["feature_id", "class", "density", "top_label", "top_genes"]]

# %% [markdown]
# ## To a file
#
# What scanpy writes, any other tool of the field reads.

# %%
part = store.to_anndata(features=[feature])
part.write_h5ad("codes.h5ad")
sc.read_h5ad("codes.h5ad").obsm["X_sae"].shape
