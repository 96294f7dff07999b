"""The mathematics: foundation models, sparse autoencoders, steering. Plain torch, no I/O framework.

Import the rooms themselves: `sae_core.scfm`, `sae_core.sae`, `sae_core.steering`. Nothing heavy is imported here.
"""
