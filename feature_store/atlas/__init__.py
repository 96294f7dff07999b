"""The atlas: a web page to look at the features of a store, from a local server or as static files.

>>> from feature_store import FeatureStore
>>> from feature_store.atlas import export, serve
>>> serve(FeatureStore.open("scsae-store"))            # http://127.0.0.1:8300
>>> export(FeatureStore.open("scsae-store"), "atlas")  # the same page for any web host

It reads the store through `feature_store.query` and writes nothing to it. Data go from `data` (tables read once) to
`pages` (resources of each page) to `resources`, which `server` and `export` use.
"""

from feature_store.atlas.export import export
from feature_store.atlas.server import application, serve

__all__ = ["application", "export", "serve"]
