"""Foundation models, sparse autoencoders and steering: the mathematics of scsae, in plain torch.

Data goes through its rooms in one direction: `scfm` turns cells into activations, `sae` turns activations into
features, and `steering`, which uses both, changes features and runs the rest of the model. Nothing here reads or writes
cells, starts a cluster or tracks runs; the only files it opens are checkpoints (`checkpoint_files`). Import the rooms
themselves: `sae_core.scfm`, `sae_core.sae`, `sae_core.steering`. This package imports nothing heavy.
"""
