"""The resources of every page, a module a page; `feature_store.atlas.resources` assembles them."""
