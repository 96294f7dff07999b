"""The stage of circuits: which features of a later SAE change when a feature of an earlier one is ablated.

request   the options, checked
actors    a shard: a few earlier features, each with its own cells
tables    edges with z, p and q; modules of features and their gene sets
run       the stage
"""

from pipelines.circuit.run import circuit

__all__ = ["circuit"]
