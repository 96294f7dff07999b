"""Questions to a store: which runs are read (`runs`), their tables by name (`tables`), SQL and look-ups (`store`)."""
