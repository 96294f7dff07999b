# %% [markdown]
# # Vectors of any model
#
# An SAE can take apart any vectors of cells: the embeddings of a model that scsae does not run, the latent space of a
# VAE, or principal components. Here the vectors are 50 principal components of PBMC that come with scanpy: nothing is
# downloaded; put your own array in their place.

# %%
import warnings

import scanpy

import scsae

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    shipped = scanpy.datasets.pbmc68k_reduced()
own = shipped.raw.to_adata()
own.obsm = {"X_pca": shipped.obsm["X_pca"]}
own

# %% [markdown]
# The array lies in `obsm` beside the expression. It may also be a file with a row for each cell (`.npy`, `.pt`,
# `.safetensors`, `.parquet`): [what is read](../vectors.md). The cells are given as an AnnData here, and may as well be
# the path of an `.h5ad` file. `inspect` looks at both and writes nothing into a store.

# %%
scsae.inspect(own, vectors="obsm/X_pca")["vectors"]

# %% [markdown]
# ## The same stages
#
# No model is opened. A cell is one row, and what the vectors are of is said with `source_name`, which becomes a part of
# the run. They go into a store of their own.

# %%
store = "vectors-store"
scsae.extract(own, vectors="obsm/X_pca", source_name="PCA-50", cell_type="bulk_labels", num_actors=0, store=store)
scsae.train(n_features=128, k=8, n_steps=300, batch_size=256, num_workers=0, store=store)
scsae.encode(num_actors=0, store=store)
scsae.associate(num_actors=0, store=store)[-1].facts

# %% [markdown]
# ## What its features stand for
#
# A feature is named after the cell type that it goes with best on `select` cells, if `test` cells confirm it. How many
# features have each name?

# %%
opened = scsae.open(store)
opened.sql("SELECT top_label, COUNT(*) AS n FROM features WHERE NOT dead GROUP BY top_label ORDER BY n DESC")

# %% [markdown]
# ## The genes of such a feature
#
# The vectors know nothing of genes, but the cells do: expression is correlated with the codes.

# %%
opened.features_for(label="CD14+ Monocyte").select("feature_id", "auroc", "q", "top_genes").head(3)

# %% [markdown]
# Components of so simple a space are themselves a baseline. Run `scsae baseline` before you believe that the SAE adds
# anything to the vectors that you gave it.
