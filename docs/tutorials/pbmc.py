# %% [markdown]
# # PBMC in ten minutes
#
# 700 blood cells, a small foundation model that is part of the project, and the question which features of the model
# stand for which cells. Nothing is downloaded. The cells are a sample of PBMC 68k (Zheng et al. 2017) with the labels
# of sorted cells.

# %%
from pathlib import Path

import scsae
from pipelines.pbmc import write_pbmc68k

cells = write_pbmc68k(Path("data"))
facts = scsae.inspect(cells)
{name: facts[name] for name in ("cells", "genes matched", "share of values matched", "tokens per cell", "obs columns")}

# %% [markdown]
# ## Four stages
#
# The model reads every cell, and the activations of the tokens of layer 2 are stored. An SAE of 512 features is trained
# on cells of the split `train`. `encode` gives every cell a code, and `associate` tests every feature against labels,
# batches, genes and gene sets. To save time the SAE is small and its training short; `scsae demo` trains a larger one.
#
# `num_actors=0` and `num_workers=0` compute in this notebook's own process, which is enough for 700 cells. Without them
# Ray shares the work among processes, or among the machines of a cluster, and the results are the same.

# %%
scsae.extract(cells, layer=2, batch="channel", cell_type="cell_type", num_actors=0)
trained = scsae.train(n_features=512, k=16, n_steps=400, recovery_cells=0, num_workers=0)
scsae.encode(num_actors=0)
scsae.associate(num_actors=0)
{name: trained[0].facts[name] for name in ("test_fvu", "select_l0", "select_dead_fraction")}

# %% [markdown]
# ## Which features stand for B cells?
#
# Features are ranked on `select` cells (`select_auroc`). `auroc` and `q` are of `test` cells, which neither the
# training nor the ranking has seen.

# %%
store = scsae.open()
found = store.features_for(label="CD19+ B")
found.select("feature_id", "select_auroc", "auroc", "q", "top_genes").head(3)

# %% [markdown]
# ## All cell types at once
#
# For each type the best feature of `select` cells, in all types of `test` cells. The colour is the rank-biserial
# correlation, the size the share of cells in which the feature fires, and a black rim means q <= .05.

# %%
_ = scsae.plots.dotplot(store)
# %% [markdown]
# ## The genes of a feature
#
# The genes whose expression goes with the code of the best B-cell feature, on `test` cells.

# %%
feature = found["feature_id"][0]
_ = scsae.plots.gene_bars(store, feature, n=10)
# %% [markdown]
# ## Any question, in SQL
#
# How many features are of each class? `scsae describe features` says what the columns are.

# %%
store.sql("SELECT class, COUNT(*) AS n, AVG(density) AS density FROM features GROUP BY class ORDER BY n DESC")

# %% [markdown]
# What to do next: [is a feature a cell type or a gene?](type_or_gene.py), [the codes in scanpy](scanpy.py), and
# `scsae serve`, which shows all of this in a web browser.
