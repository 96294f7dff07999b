# %% [markdown]
# # Your own checkpoint
#
# A foundation model is given as the folder that its authors published, or that your own fine-tuning wrote in the same
# layout; `scsae models-supported` lists the families. This page uses the cells of [PBMC in ten minutes](pbmc.py) and
# the folder of the small model of the project, which has the layout of scGPT. Put your own path in its place.

# %%
from pathlib import Path

import anndata

import sae_core.scfm
import scsae

folder = Path(sae_core.scfm.__file__).parent / "mini"
sorted(file.name for file in folder.iterdir() if file.suffix != ".md")

# %% [markdown]
# ## Is it read as it was meant?
#
# Weights that are missing, that nothing needs, or of another shape are an error that names them. The sites are the
# places whose activations can be stored, and the readouts are the vectors of a whole cell.

# %%
model = scsae.load_model(folder)
{"family": model.family, "d_model": model.d_model, "readouts": model.readouts, "sites": list(map(str, model.sites))}

# %% [markdown]
# ## Do the cells fit?
#
# `inspect` reads the first cells and writes nothing into a store. What matters most is the share of values that lies
# in genes which the model knows; below 30% `extract` refuses the data. The largest unmatched genes say why: another
# species, other names, or genes that the model never had.

# %%
cells = anndata.read_h5ad("data/pbmc68k_reduced.h5ad")
facts = scsae.inspect(cells, model=folder)
names = ("checkpoint", "genes matched", "matched by", "share of values matched", "largest unmatched", "tokens per cell")
{name: facts[name] for name in names}

# %% [markdown]
# `activations, f16` and `time, one core` tell what all cells would take. For an atlas, `cells=200_000` stores the
# activations of a sample, and `num_gpus=1` runs the model on a GPU.
#
# ## Activations of two layers
#
# Layer 0 is the output of the first block. All layers come from one pass, and each is a run of its own. Here they are
# of every third cell, which is a view of the AnnData.

# %%
store = "checkpoint-store"
some = cells[::3]
runs = scsae.extract(some, model=folder, layer=[1, 2], cell_type="cell_type", num_actors=0, store=store)
[(run.run, run.facts["site"], run.facts["cells"], run.facts["tokens"]) for run in runs]

# %% [markdown]
# The same call again computes nothing: the run is named after what determines its content. A file of weights that
# changed is another model, and its runs are others too.

# %%
again = scsae.extract(some, model=folder, layer=[1, 2], cell_type="cell_type", num_actors=0, store=store)
[(run.run, run.done) for run in again]

# %% [markdown]
# ## The control
#
# With random weights instead of the trained ones everything else stays the same. What an SAE finds there as well, the
# model has not learned. Such a run is marked as a control, and no later stage takes it unless it is named.

# %%
control = scsae.extract(some, model=folder, layer=2, random_init=True, cell_type="cell_type", num_actors=0, store=store)
scsae.open(store).runs("activations").select("run", "state", "control")

# %% [markdown]
# Training, codes and associations follow as in [PBMC in ten minutes](pbmc.py); `scsae.train(activations=...)` says of
# which layer.
