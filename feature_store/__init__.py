"""The bytes: schemas, commits, cells, activations, codes, associations and the queries over them."""
