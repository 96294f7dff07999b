"""The mathematics: foundation models, sparse autoencoders, steering. Plain torch, no I/O framework.

Import the rooms themselves (`sae_core.scfm`, `sae_core.sae`, `sae_core.steering`); this module imports nothing heavy.
"""
