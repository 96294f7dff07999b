"""`scsae modules`: its tables against the functions that they are made by, and what they are tested against."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from feature_store import FeatureStore
from feature_store.associations.held_out_units import limit_of_claims
from feature_store.cells import read_panel_cells
from feature_store.codes import CodesRun, load_cell_codes, panel_tokens
from feature_store.modules import communities, correlations, residuals
from feature_store.query.runs import RunChain
from feature_store.storage import commit
from feature_store.storage.layout import MODULE_TABLES, Layout
from pipelines.config import ModulesOptions
from pipelines.modules import SHUFFLED, modules

OPTIONS = ModulesOptions(n_resamples=4, n_draws=50)


@pytest.fixture
def found(own_store, monkeypatch):
    """The modules of random features, of which there are none as they are: any correlation joins two features."""
    monkeypatch.setattr(communities, "shuffled_in_blocks", lambda values, *_: np.zeros_like(values))
    monkeypatch.setattr(communities, "STABLE", 0.25)
    return own_store, modules(OPTIONS, own_store)


def test_the_cohesion_of_a_module_is_the_mean_partial_correlation_of_its_pairs(found):
    store, result = found
    layout = Layout(store)
    chain = RunChain.of(layout, layout.latest("associations").run)
    codes = CodesRun.open(layout.codes_dir(chain.associations.codes))
    cells = read_panel_cells(layout.cells_dir(chain.associations.dataset))
    n_tokens = panel_tokens(codes, cells["cell_idx"].to_numpy())
    members = commit.read_table(result.path / "feature_module")
    every = commit.read_table(result.path / "module")
    own = every.filter(pl.col("control").is_null())
    assert own.height >= 1
    assert members.group_by("module").len().sort("module")["len"].to_list() == own["n_features"].to_list()
    for splits, column in ((("train", "select"), "r"), (("test",), "r_test")):
        mask = cells["split"].is_in(splits).to_numpy()
        block = cells.select(pl.struct("cell_type", "donor").rank("dense")).to_series().to_numpy()[mask]
        values = load_cell_codes(codes, cells["cell_idx"].to_numpy()[mask])
        r = correlations(residuals(values, block.astype(np.int64), n_tokens[mask]))
        for module, expected in own.select("module", column).iter_rows():
            group = members.filter(module=module)["feature_id"].to_list()
            pairs = [r[a, b] for a in group for b in group if a != b]
            assert expected == pytest.approx(np.mean(pairs), abs=1e-5)
    assert ((own["p"] >= 1 / 51) & (own["p"] <= 1)).all()
    assert (own["stability"] >= 0.25).all()
    assert set(every["control"].drop_nulls()) <= {SHUFFLED}


def test_a_second_call_makes_nothing_and_sql_reads_the_tables(found):
    store, result = found
    again = modules(OPTIONS, store)
    assert (again.run, again.done, again.reused) == (result.run, 0, 3)
    opened = FeatureStore.open(store)
    for name in MODULE_TABLES:
        assert opened.sql(f"SELECT COUNT(*) FROM {name}").item() == commit.read_table(result.path / name).height
    other = modules(OPTIONS.model_copy(update={"seed": 1}), store)
    assert other.run != result.run


def test_few_donors_are_said_beside_the_result(found, capsys):
    store, _ = found
    capsys.readouterr()
    modules(OPTIONS, store)
    limit = limit_of_claims(FeatureStore.open(store).panel_cells().collect())
    assert limit is not None
    said = " ".join(capsys.readouterr().err.split())
    assert said.count(f"warning: {limit}") == 1


def test_few_cells_are_refused_and_nothing_is_written(own_store, monkeypatch):
    from pipelines import modules as module
    from pipelines.errors import UsageError

    monkeypatch.setattr(module, "FOUND_ON", ("nothing",))
    with pytest.raises(UsageError, match="0 cells of nothing, too few"):
        modules(OPTIONS, own_store)
    assert not any((own_store / "modules").rglob("*.parquet"))
