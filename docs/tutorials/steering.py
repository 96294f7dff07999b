# %% [markdown]
# # Steering: does the model use a feature?
#
# A feature that fires in B cells shows that the model can tell them. Whether the model uses it is seen by changing it
# inside the running model: it does if the B cells then look less like B cells, and all other cells stay as they were.
# This page uses the store of [PBMC in ten minutes](pbmc.py).

# %%
import polars as pl

import scsae
from pipelines.demo import verdict

# %% [markdown]
# ## The task
#
# `target` names the label. Its ten best features on `select` cells are set to 0 at every token of every cell, the model
# runs on from there, and the cells are compared before and after. Everything that follows is of `test` cells. Two nulls
# do the same with 20 draws each: other features that fire as often, and steps of the same length in random directions.

# %%
steered = scsae.steer(target="CD19+ B", n_features=10, n_nulls=20)
verdict(steered)

# %% [markdown]
# With 20 draws p cannot be smaller than 1/21.
#
# ## What happened to the B cells
#
# `value` is the share of B cells among the 5 nearest neighbours of a B cell, which are unsteered `train` cells; cells
# are compared by the mean over their gene tokens at the end of the model. `effect` is the difference from unsteered
# cells, with its 95% interval. `ablate` adds the change to the activations; `ablate, replace` puts the SAE's
# reconstruction with the change in their place, and `reconstruction` does so without a change.

# %%
store = scsae.open()
results = store.frame("steering").filter(pl.col("run") == steered.run)
columns = ["condition", "value", "effect", "low", "high"]
results.filter(pl.col("metric") == "target_votes").select(columns).collect()

# %%
_ = scsae.plots.steering_bars(store, steered.run)
# %% [markdown]
# ## And to all others
#
# The share of the other cells that these neighbours give their own type. A fall is harm.

# %%
results.filter(pl.col("metric") == "other_accuracy").select(columns).collect()

# %% [markdown]
# ## One feature instead of ten
#
# The same with the best B-cell feature alone. If its effect is about that of the ten, the model uses this one feature;
# if it is much smaller, what the model uses is spread over several.

# %%
one = int(store.features_for(label="CD19+ B")["feature_id"][0])
alone = scsae.steer(target="CD19+ B", feature=one, n_nulls=20)
{name: [round(run.facts[name], 3) for run in (steered, alone)] for name in steered.facts if name.startswith("effect")}

# %%
verdict(alone)

# %% [markdown]
# Cells of one label are moved to another by `scsae.steer(kind="condition", target="stim", toward="ctrl")`, and batches
# are mixed by `scsae.steer(kind="batch", target="all")`: [what this does to real cells](../steering.md).
