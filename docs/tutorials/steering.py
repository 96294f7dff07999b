# %% [markdown]
# # Steering: does the model use a feature?
#
# A feature that fires in B cells says that the model can tell them. Whether it uses the feature is seen by changing it
# inside the running model: if the B cells then look less like B cells, and other cells stay as they were, it does. This
# page uses the store of [PBMC in ten minutes](pbmc.py).

# %%
import polars as pl

import scsae

# %% [markdown]
# ## The task
#
# `target` names the label. Its ten best features on `select` cells are set to 0 at every token, the model runs on with
# what the SAE makes of it, and the cells are compared before and after. Everything that follows is of `test` cells.
# Two controls are changed in the same way: random features that fire as often, and steps of the same length in random
# directions, 20 draws of each.

# %%
steered = scsae.steer(target="CD19+ B", n_features=10, n_nulls=20)
steered.facts

# %% [markdown]
# ## What happened to the B cells
#
# `target_votes` is the share of a B cell's nearest unsteered neighbours that are B cells, by the mean activation of the
# last layer. `effect` is the difference from unsteered cells with its interval. The smallest p that 20 draws allow is
# 1/21 = .048.

# %%
store = scsae.open()
results = store.frame("steering").filter(pl.col("run") == steered.run)
columns = ["condition", "n_draws", "value", "effect", "low", "high", "p_random_features", "p_random_direction"]
results.filter(pl.col("metric") == "target_votes").select(columns).collect()

# %% [markdown]
# ## And to all others
#
# `other_accuracy` is the share of the other cells that the same neighbours still give their own type.

# %%
results.filter(pl.col("metric") == "other_accuracy").select(columns).collect()

# %%
_ = scsae.plots.steering_bars(store, steered.run)
# %% [markdown]
# ## One feature instead of ten
#
# The best B-cell feature alone. If the effect is much smaller, the type is spread over several features.

# %%
one = int(store.features_for(label="CD19+ B")["feature_id"][0])
alone = scsae.steer(target="CD19+ B", feature=one, n_nulls=20)
found = scsae.open().frame("steering").filter(pl.col("metric") == "target_votes", pl.col("condition") == "ablate")
found.filter(pl.col("run").is_in([steered.run, alone.run])).select("run", *columns[1:]).collect()
