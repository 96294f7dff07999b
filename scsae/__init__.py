"""The door for a notebook: run the stages, open a store, draw plots, load models.

>>> import scsae
>>> scsae.extract("cells.h5ad", layer=2, cell_type="cell_type", batch="batch")
>>> scsae.train(k=16)
>>> scsae.encode()
>>> scsae.associate()
>>> store = scsae.open("scsae-store")
>>> store.features_for(label="CD19+ B")
>>> scsae.plots.dotplot(store)

Every stage is also a command of the same name with the same options, e.g. `scsae train --k 16`. This package holds no
logic: a name is imported from its room when it is first used, so that `import scsae` itself takes milliseconds.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feature_store import plots
    from feature_store.query.store import FeatureStore
    from pipelines.external.recording import record
    from pipelines.external.writer import ActivationWriter
    from pipelines.functions import (
        associate,
        baseline,
        circuit,
        compare,
        effects,
        encode,
        export_sae,
        extract,
        import_sae,
        inputs,
        inspect,
        match,
        modules,
        open,
        probe,
        steer,
        train,
    )
    from sae_core.sae import load_sae
    from sae_core.scfm import load_model

__all__ = [
    "ActivationWriter",
    "FeatureStore",
    "associate",
    "baseline",
    "circuit",
    "compare",
    "effects",
    "encode",
    "export_sae",
    "extract",
    "import_sae",
    "inputs",
    "inspect",
    "load_model",
    "load_sae",
    "match",
    "modules",
    "open",
    "plots",
    "probe",
    "record",
    "steer",
    "train",
]

_ROOMS = {
    "ActivationWriter": "pipelines.external.writer",
    "FeatureStore": "feature_store.query.store",
    "load_model": "sae_core.scfm",
    "load_sae": "sae_core.sae",
    "record": "pipelines.external.recording",
}
"""Where a name is defined that is no function of `pipelines.functions`."""


def __dir__() -> list[str]:
    return __all__


if not TYPE_CHECKING:  # a type checker reads the imports above, and finds misspelt names by them

    def __getattr__(name: str) -> Any:
        if name not in __all__:
            raise AttributeError(f"module 'scsae' has no attribute {name!r}; it has {', '.join(__all__)}")
        if name == "plots":
            return importlib.import_module("feature_store.plots")
        return getattr(importlib.import_module(_ROOMS.get(name, "pipelines.functions")), name)
