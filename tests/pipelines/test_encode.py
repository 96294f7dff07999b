"""Encoding: stored codes are the SAE's on the stored tokens, and damage or a kill costs only the shards it hit."""

import shutil
import signal
import subprocess
import sys

import numpy as np
import polars as pl
import pytest
import torch
from deleted_runs import forget_deleted

from feature_store import FeatureStore
from feature_store.codes import CodesRun, load_token_counts, load_top_tokens
from feature_store.errors import NotFoundError
from feature_store.storage import commit
from feature_store.storage.layout import CODES_TABLES, Layout
from feature_store.storage.schemas import SPLITS
from pipelines.config import EncodeOptions
from pipelines.encode import Encoder, encode
from pipelines.inputs import load_token_of_gene
from pipelines.verify import verify_run
from sae_core.sae import load_sae

N_SHARDS, N_CELLS, N_FEATURES = 5, 72, 48
MERGED = tuple(table for table in CODES_TABLES if table.startswith("merged/"))


@pytest.fixture(scope="module")
def tokens(chain):
    """Every stored token with its dense code: the Parquet parts read by Polars, the SAE applied token by token."""
    layout = Layout(chain.store)
    parts = sorted(layout.latest("activations").path.glob("part-*.parquet"))
    frame = pl.concat([pl.read_parquet(part) for part in parts])
    x = np.frombuffer(b"".join(frame["act"].to_list()), dtype=np.float32).reshape(frame.height, 16).copy()
    sae = load_sae(layout.latest("saes").path)
    dense = torch.cat([sae.encode(row[None]).to_dense() for row in torch.from_numpy(x)]).numpy()
    split = commit.read_table(layout.cells_dir(commit.Run.open(layout.latest("saes").path).plan["dataset"]))["split"]
    return frame.drop("act").with_columns(split=split.gather(frame["cell_idx"]), code=pl.Series(dense))


def stored_codes(folder):
    """Dense [n_cells n_features] of a codes run, from its Parquet parts."""
    dense = np.zeros((N_CELLS, N_FEATURES), dtype=np.float32)
    for part in sorted((folder / "by_cell").glob("part-*.parquet")):
        for cell, feature, value in pl.read_parquet(part).select("cell_idx", "feature_id", "value").iter_rows():
            assert dense[cell, feature] == 0, "a nonzero is stored twice"
            dense[cell, feature] = value
    return dense


def pooled(tokens, how):
    """Codes of the cells, a plain loop over cells."""
    cells = [tokens.filter(cell_idx=cell)["code"].to_numpy() for cell in range(N_CELLS)]
    return np.stack([how(codes.astype(np.float64), axis=0) if len(codes) else np.zeros(N_FEATURES) for codes in cells])


def manifests(folder):
    return {table: commit.Run.open(folder / table).manifest() for table in CODES_TABLES}


def times(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_stored_cell_codes_are_the_maximum_over_the_cells_gene_tokens(chain, tokens):
    stored = stored_codes(Layout(chain.store).latest("codes").path)
    assert (stored > 0).any(axis=1).all()
    np.testing.assert_allclose(stored, pooled(tokens, np.max), rtol=1e-5, atol=1e-6)


def test_mean_pooling_averages_over_all_tokens_of_the_cell_with_zeros(chain, own_store, tokens, without_actors):
    found = encode(EncodeOptions(pooling="mean"), own_store)
    assert found.run != Layout(chain.store).latest("codes").run
    np.testing.assert_allclose(stored_codes(found.path), pooled(tokens, np.mean), rtol=1e-5, atol=1e-6)


def test_token_statistics_are_those_of_a_brute_force_count(chain, tokens):
    stored = load_token_counts(CodesRun.open(Layout(chain.store).latest("codes").path), 0, N_FEATURES)
    counted, fired = {}, {}
    for split, gene, code in tokens.select("split", "gene_id", "code").iter_rows():
        counted[split, gene] = counted.get((split, gene), 0) + 1
        for feature in np.flatnonzero(np.asarray(code)):
            fired[int(feature), split, gene] = fired.get((int(feature), split, gene), 0) + 1
    genes = stored.gene.group_by("split", "gene_id").agg(pl.col("n_tokens").sum())
    assert {(SPLITS[split], gene): n for split, gene, n in genes.iter_rows()} == counted
    rows = stored.feature_gene.group_by("feature_id", "split", "gene_id").agg(pl.col("n_tokens").sum())
    assert {(feature, SPLITS[split], gene): n for feature, split, gene, n in rows.iter_rows()} == fired


def test_top_tokens_are_the_largest_codes_of_each_feature(chain, tokens):
    top = load_top_tokens(CodesRun.open(Layout(chain.store).latest("codes").path), 0, N_FEATURES)
    codes = tokens["code"].to_numpy()
    place = {key: i for i, key in enumerate(tokens.select("cell_idx", "token_pos", "gene_id").iter_rows())}
    for feature in range(N_FEATURES):
        own = top.filter(feature_id=feature)
        expected = np.sort(codes[:, feature])[::-1][: min(20, int((codes[:, feature] > 0).sum()))]
        np.testing.assert_allclose(own["value"].to_numpy(), expected, rtol=1e-5)
        at = [place[key] for key in own.select("cell_idx", "token_pos", "gene_id").iter_rows()]
        np.testing.assert_allclose(codes[at, feature], own["value"].to_numpy(), rtol=1e-5)


def test_the_cell_in_which_a_feature_fires_most_is_kept_token_by_token(chain, tokens):
    store = FeatureStore.open(chain.store)
    symbols = dict(
        load_token_of_gene(store.layout, CodesRun.open(store.layout.latest("codes").path))
        .select("gene_id", "symbol")
        .drop_nulls()
        .iter_rows()
    )
    found = store.frame("top_cell_token").collect()
    strongest = store.frame("feature_cell").collect()
    for feature in range(N_FEATURES):
        own = found.filter(feature_id=feature)
        cells = strongest.filter(feature_id=feature)["cell_idx"]
        assert own["cell_idx"].unique().to_list() == cells.head(1).to_list()
        expected = tokens.filter(cell_idx=cells[0]).sort("token_pos") if len(cells) else tokens.clear()
        assert own["token_pos"].to_list() == expected["token_pos"].to_list()
        assert own["gene"].to_list() == [symbols[gene] for gene in expected["gene_id"]]
        codes = expected["code"].to_numpy()[:, feature] if len(cells) else []
        np.testing.assert_allclose(own["value"].to_numpy(), codes, rtol=1e-5)
    assert 0 < found["feature_id"].n_unique() <= N_FEATURES


def test_the_tokens_of_top_cells_that_are_missing_are_made_without_encoding_again(own_store, without_actors):
    folder = Layout(own_store).latest("codes").path
    before, part = times(folder), (folder / "top_cells" / "part-00000.parquet").read_bytes()
    shutil.rmtree(folder / "top_cells")
    forget_deleted(own_store)
    assert "top_cell_token" not in FeatureStore.open(own_store).tables()
    assert encode(EncodeOptions(), own_store).done == 0
    assert (folder / "top_cells" / "part-00000.parquet").read_bytes() == part
    kept = {path for path in before if "top_cells" not in path.parts}
    assert {path: time for path, time in times(folder).items() if path in kept} == {path: before[path] for path in kept}


def test_features_of_several_ranges_have_the_same_tokens_as_of_one(own_store, without_actors, monkeypatch):
    whole = FeatureStore.open(own_store).frame("top_cell_token").collect()
    shutil.rmtree(Layout(own_store).latest("codes").path / "top_cells")
    forget_deleted(own_store)
    monkeypatch.setattr("feature_store.codes.top_cells.FEATURES_AT_ONCE", 20)
    encode(EncodeOptions(), own_store)
    assert len(list((Layout(own_store).latest("codes").path / "top_cells").glob("*.parquet"))) == 3
    assert FeatureStore.open(own_store).frame("top_cell_token").collect().equals(whole)


def test_encoding_again_does_nothing(chain):
    folder = Layout(chain.store).latest("codes").path
    before = times(folder)
    again = encode(EncodeOptions(), chain.store)
    assert (again.path, again.done, again.reused) == (folder, 0, N_SHARDS)
    assert times(folder) == before


def flip(part):
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)


def truncate(part):
    part.write_bytes(part.read_bytes()[:-1])


@pytest.mark.parametrize("table", CODES_TABLES)
@pytest.mark.parametrize("damage", [flip, truncate, lambda part: part.unlink()], ids=["flip", "truncate", "delete"])
def test_a_damaged_part_is_named_by_verify_and_repaired_by_encoding_again(
    own_store, without_actors, capsys, table, damage
):
    folder = Layout(own_store).latest("codes").path
    before = manifests(folder)
    assert verify_run(folder.name, own_store) == 0
    run = commit.Run.open(folder / table)
    part = run.part(min(2, run.n_shards - 1))
    damage(part)
    capsys.readouterr()
    assert verify_run(folder.name[:6], own_store) == 1
    assert str(part) in capsys.readouterr().err
    again = encode(EncodeOptions(), own_store)
    assert (again.done, again.reused) == ((0, N_SHARDS) if table in MERGED else (1, N_SHARDS - 1))
    assert verify_run(folder.name, own_store) == 0
    assert manifests(folder) == before


def test_an_interrupted_encoding_resumes_to_the_same_bytes(chain, own_store, without_actors, monkeypatch):
    folder = Layout(own_store).latest("codes").path
    calm = manifests(folder)
    shutil.rmtree(folder)
    original = Encoder.shard

    def dies_at_3(self, number):
        if number == 3:
            raise KeyboardInterrupt
        return original(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Encoder, "shard", dies_at_3)
        with pytest.raises(KeyboardInterrupt):
            encode(EncodeOptions(), own_store)
    assert not any(info.complete for info in Layout(own_store).runs("codes"))
    resumed = encode(EncodeOptions(), own_store)
    assert (resumed.path, resumed.done, resumed.reused) == (folder, 2, 3)
    assert manifests(folder) == calm


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
import pipelines.encode
from feature_store.codes import CodesRun
from pipelines.config import EncodeOptions

def in_process(worker, work, shards, *args, **options):
    body = worker(work)
    for shard in shards:
        body.shard(shard)

write = CodesRun._write_table
written = 0

def dies_in_the_third(self, path, table, columns):
    global written
    rows = write(self, path, table, columns)
    written += table == "firing"
    if written == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return rows

pipelines.encode.do_shards, CodesRun._write_table = in_process, dies_in_the_third
pipelines.encode.encode(EncodeOptions(), Path(sys.argv[1]))
"""


def test_a_kill_while_a_part_is_written_leaves_a_run_that_resumes_to_the_same_bytes(own_store, without_actors):
    folder = Layout(own_store).latest("codes").path
    calm = manifests(folder)
    shutil.rmtree(folder)
    killed = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(own_store)], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert list((folder / "by_cell").glob(".tmp-*")), "the kill left nothing half written: the test shows nothing"
    resumed = encode(EncodeOptions(), own_store)
    assert (resumed.path, resumed.done, resumed.reused) == (folder, 3, 2)
    assert manifests(folder) == calm
    assert not list(folder.rglob(".tmp-*"))


def test_statistics_merged_by_actors_have_the_bytes_of_those_merged_here_and_resume(
    ray_local, own_store, monkeypatch, capsys
):
    folder = Layout(own_store).latest("codes").path
    calm = manifests(folder)
    frames = {table: commit.read_table(folder / table) for table in MERGED}
    shutil.rmtree(folder / "merged")
    monkeypatch.setattr("feature_store.codes.codes_run.MERGE_ROWS", 1000)
    again = encode(EncodeOptions(num_actors=2), own_store)
    assert (again.path, again.done, again.reused) == (folder, 0, N_SHARDS)
    assert "merge" in capsys.readouterr().err
    assert [len(commit.Run.open(folder / table).manifest().shards) for table in MERGED] == [16] * len(MERGED)
    for table, frame in frames.items():
        assert commit.read_table(folder / table).equals(frame)
    assert manifests(folder)["by_feature"] == calm["by_feature"]


def test_encoding_without_an_sae_says_what_to_run_first(tmp_path):
    with pytest.raises(NotFoundError, match="scsae train"):
        encode(EncodeOptions(), tmp_path)
    assert not list(tmp_path.iterdir())
