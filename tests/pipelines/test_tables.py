"""The tables that the stages write have the columns and dtypes that `schemas` names."""

from feature_store import FeatureStore
from feature_store.codes import CodesRun, load_token_counts, load_top_tokens
from feature_store.storage import schemas
from feature_store.storage.layout import ASSOCIATION_TABLES


def test_every_table_of_a_store_made_by_the_stages_conforms_to_its_schema(chain):
    store = FeatureStore.open(chain.store)
    written = {name: store.frame(name).collect() for name in store.tables()}
    assert set(written) - set(schemas.TABLES) == {"training"}
    assert {"cells", "genes", "codes", *ASSOCIATION_TABLES} <= set(written)
    codes = CodesRun.open(store.layout.codes_dir(store.lineage.codes))
    counts = load_token_counts(codes, 0, codes.n_features)
    written |= {
        "token_feature_gene": counts.feature_gene,
        "token_gene": counts.gene,
        "token_top": load_top_tokens(codes, 0, codes.n_features),
    }
    del written["training"]
    for name, table in written.items():
        schemas.check(name, table)
        assert list(table.columns[: len(schemas.TABLES[name].columns)]) == list(schemas.TABLES[name].columns)
    assert all(written[name].height for name in ("cells", "genes", "codes", "features", "feature_label", "token_gene"))
