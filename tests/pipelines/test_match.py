"""Matching: how two SAEs are compared, what the table holds, and what is refused with the command to type."""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from in_process import replace_actors
from safetensors.numpy import load_file

from feature_store import FeatureStore
from feature_store.cells import SELECT, TEST, read_split_numbers, source_location, write_source_location
from feature_store.errors import NotFoundError
from feature_store.storage import commit, schemas
from feature_store.storage.layout import Layout
from feature_store.storage.plans import SAEPlan
from pipelines.cli import app
from pipelines.config import EncodeOptions, MatchOptions
from pipelines.encode import encode
from pipelines.encode_command import encode_command
from pipelines.errors import UsageError
from pipelines.extract import extract
from pipelines.match import match
from pipelines.train import train
from pipelines.verify import verify_run


@dataclass(frozen=True, kw_only=True)
class Saes:
    """A store with four SAEs, by their run ids: `first` alone has codes, and associations."""

    store: Path
    first: str
    seed: str
    """The same activations, another seed."""
    layer: str
    """Another layer of the same cells."""
    cells: str
    """The same layer, of other cells."""


@pytest.fixture(scope="module")
def four(chain, tmp_path_factory, shards_here, tiny_cells) -> Saes:
    """The chain's SAE and three more; read it, do not write to it."""
    store = Path(shutil.copytree(chain.store, tmp_path_factory.mktemp("match") / "store"))
    file = store.parent / "others.h5ad"
    tiny_cells[::-1].copy().write_h5ad(file)
    first = Layout(store).latest("saes").run
    with pytest.MonkeyPatch.context() as patch:
        replace_actors(patch, shards_here)
        seed = train(chain.train.model_copy(update={"seed": 1}), store).run
        extract(chain.extract.model_copy(update={"layer": ("2",)}), store)
        layer = train(chain.train, store).run
        extract(chain.extract.model_copy(update={"data": (file,)}), store)
        cells = train(chain.train, store).run
    return Saes(store=store, first=first, seed=seed, layer=layer, cells=cells)


@pytest.fixture
def own(four, tmp_path) -> Path:
    """A copy of that store, to write to."""
    return Path(shutil.copytree(four.store, tmp_path / "own"))


@pytest.fixture
def encode_here(monkeypatch, shards_here):
    """Encode with an SAE, without an actor."""
    monkeypatch.setattr("pipelines.encode.do_shards", shards_here)
    return lambda store, run, **options: encode(EncodeOptions(sae=run, **options), store)


def directions(store, sae):
    rows = load_file(store / "saes" / sae / "sae.safetensors")["W_dec"].astype(np.float64)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def cell_codes(folder, n_features=48):
    codes = np.zeros((72, n_features))
    for part in sorted((folder / "by_cell").glob("part-*.parquet")):
        cell, feature, value = pl.read_parquet(part).select("cell_idx", "feature_id", "value").to_numpy().T
        codes[cell.astype(int), feature.astype(int)] = value
    return codes


def written(store):
    return {path: path.stat().st_mtime_ns for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("other", ["seed", "cells"])
def test_saes_of_one_space_are_matched_by_the_directions_of_their_decoders(four, own, other):
    name = getattr(four, other)
    (result,) = match(MatchOptions(sae=four.first, other=(name,)), own)
    table = commit.read_table(result.path / "feature_match")
    schemas.check("feature_match", table)
    assert set(table["method"]) == {"cosine/1"}
    dead = cell_codes(Layout(own).latest("codes").path).max(axis=0) == 0
    assert 0 < dead.sum() < 48
    a, b = directions(own, four.first), directions(own, name)
    rows = table.filter(sae=four.first, other=name).sort("feature_id")
    assert rows["dead"].to_list() == dead.tolist()
    alive = rows.filter(~pl.col("dead"))
    np.testing.assert_allclose(alive["similarity"], (a[~dead] @ b.T).max(axis=1), rtol=1e-5)
    assert alive["other_feature_id"].to_list() == (a[~dead] @ b.T).argmax(axis=1).tolist()
    back = table.filter(sae=name, other=four.first).sort("feature_id")
    assert not back["dead"].any()
    assert back["other_feature_id"].to_list() == np.flatnonzero(~dead)[(b @ a[~dead].T).argmax(axis=1)].tolist()


def test_a_pair_is_one_run_from_either_side_and_is_matched_once(four, own):
    (one,) = match(MatchOptions(sae=four.first, other=(four.seed,)), own)
    before = written(own)
    (back,) = match(MatchOptions(sae=four.seed, other=(four.first[:6],)), own)
    assert (one.run, one.done, back.run, back.done, back.reused) == (back.run, 1, one.run, 0, 1)
    assert written(own) == before
    assert one.facts["features of"].startswith(f"saes/{four.first} (layer.1 of ")
    assert back.facts["features of"].startswith(f"saes/{four.seed} ")
    assert one.facts["compared"] < back.facts["compared"] == 48


def test_a_shared_start_is_said(four, own):
    same, other = match(MatchOptions(sae=four.first, other=(four.cells, four.seed)), own)
    assert "the same random directions (--seed 0)" in same.facts["start"]
    assert "start" not in other.facts


def test_other_layers_are_matched_by_codes_chosen_on_select_and_reported_on_test_cells(four, own, encode_here):
    encoded = encode_here(own, four.layer)
    (result,) = match(MatchOptions(sae=four.first, other=(four.layer,), n_null=19), own)
    table = commit.read_table(result.path / "feature_match")
    of_first = next(info.path for info in Layout(own).runs("codes") if info.path != encoded.path)
    a, b = cell_codes(of_first), cell_codes(encoded.path)
    split = read_split_numbers(Layout(own).cells_dir(encoded.facts["dataset"]))
    rows = table.filter(sae=four.first).drop_nulls("other_feature_id")
    assert rows.height > 20
    assert set(rows["method"]) == {"pearson/1"}

    def correlations(which):
        with np.errstate(invalid="ignore"):
            return np.corrcoef(a[split == which].T, b[split == which].T)[:48, 48:]

    chosen, found = correlations(SELECT), rows["feature_id"].to_numpy()
    np.testing.assert_allclose(rows["similarity"], np.nanmax(chosen[found], axis=1), rtol=1e-6)
    reported = correlations(TEST)[found, rows["other_feature_id"].to_numpy()]
    np.testing.assert_allclose(rows["similarity_test"].fill_null(np.nan), reported, rtol=1e-6, atol=1e-9)


def test_codes_may_be_compared_in_one_space_too_and_both_answers_stay(four, own, encode_here):
    encode_here(own, four.seed)
    for method in ("cosine", "pearson", "spearman"):
        (result,) = match(MatchOptions(sae=four.first, other=(four.seed,), method=method, n_null=19), own)
        assert method in result.facts["by"]
    store = FeatureStore.open(own)
    found = store.sql("SELECT method, COUNT(*) AS n FROM feature_match GROUP BY method ORDER BY method")
    assert found.rows() == [("cosine/1", 48), ("pearson/1", 48), ("spearman/1", 48)]


def test_at_most_so_many_cells_are_compared(four, own, encode_here):
    encode_here(own, four.layer)
    few, many = (
        match(MatchOptions(sae=four.first, other=(four.layer,), n_null=19, max_cells=n), own)[0] for n in (6, 5000)
    )
    assert few.facts["similarity"] > many.facts["similarity"]


def test_sql_joins_the_matches_of_the_sae_that_the_features_are_of(four, own):
    match(MatchOptions(sae=four.first, other=(four.seed, four.cells)), own)
    match(MatchOptions(sae=four.seed, other=(four.cells,)), own)
    store = FeatureStore.open(own)
    assert store.lineage.sae == four.first
    answer = store.sql(
        "SELECT m.sae, m.other, m.feature_id, m.similarity, f.dead FROM feature_match m JOIN features f "
        "USING (feature_id) WHERE m.mutual ORDER BY m.similarity DESC"
    )
    assert set(answer["sae"]) == {four.first}
    assert set(answer["other"]) == {four.seed, four.cells}
    assert not answer["dead"].any()


def test_other_data_of_two_layers_are_compared_once_the_command_of_the_error_was_typed(
    four, own, monkeypatch, shards_here
):
    with pytest.raises(UsageError, match="compared by their codes of the same cells") as refused:
        match(MatchOptions(sae=four.cells, other=(four.layer,)), own)
    monkeypatch.setattr("pipelines.encode.do_shards", shards_here)
    commands = re.findall(r"`scsae ([^`]*)`", str(refused.value))
    assert any("--data" in command and "--donor donor" in command for command in commands)
    for command in commands:
        app(shlex.split(command), standalone_mode=False)
    (result,) = match(MatchOptions(sae=four.cells, other=(four.layer,), n_null=19), own)
    assert result.done == 1


def test_the_printed_command_has_the_table_and_the_splits_that_the_data_set_was_made_with(
    four, own, monkeypatch, shards_here, tiny_cells, chain, tmp_path
):
    """The labels are in the table alone, so that the command fails without it; the place has a space."""
    table, file = tmp_path / "my obs.csv", tmp_path / "plain.h5ad"
    tiny_cells.obs.to_csv(table)
    plain = tiny_cells[::2].copy()
    plain.obs = plain.obs[[]]
    plain.write_h5ad(file)
    replace_actors(monkeypatch, shards_here)
    extract(chain.extract.model_copy(update={"data": (file,), "obs": (table,), "split_by": "batch"}), own)
    other = train(chain.train, own).run
    encode(EncodeOptions(sae=other), own)
    with pytest.raises(UsageError, match="compared by their codes of the same cells") as refused:
        match(MatchOptions(sae=other, other=(four.layer,)), own)
    (command,) = re.findall(r"`scsae ([^`]*)`", str(refused.value))
    assert f"--obs '{table}' --donor donor --batch batch --cell-type type --split-by batch" in command
    app(shlex.split(command), standalone_mode=False)
    (result,) = match(MatchOptions(sae=other, other=(four.layer,), n_null=19), own)
    assert result.done == 1


def test_the_printed_command_takes_no_column_of_a_schema_that_was_not_taken_and_shows_no_signature(
    four, own, tiny_cells, chain, tmp_path, monkeypatch, shards_here
):
    table, file = tmp_path / "obs.csv", tmp_path / "plain.h5ad"
    names = {"type": "cell_type", "donor": "donor_id", "batch": "assay"}
    cells = tiny_cells.copy()
    cells.obs = cells.obs.rename(columns=names).assign(disease=[f"d{i % 3}" for i in range(cells.n_obs)])
    cells.obs.to_csv(table)
    cells.write_h5ad(file)
    replace_actors(monkeypatch, shards_here)
    columns = {"donor": "donor_id", "batch": None, "cell_type": None}
    extract(chain.extract.model_copy(update={"data": (file,), "obs": (table,), **columns}), own)
    other = train(chain.train, own).run
    layout = Layout(own)
    dataset = SAEPlan.of(commit.Run.open(layout.saes_dir(other))).dataset
    where = source_location(layout, dataset)
    assert where.obs == (str(table),)
    signed = "https://host/a.h5ad?X-Amz-Signature=SECRET"
    write_source_location(layout, dataset, where._replace(paths=(signed,), obs=()))
    command = encode_command(layout, four.layer, dataset, pooling="mean")
    wanted = "--obs FILE --donor donor_id --batch none --cell-type none --label none"
    assert command.endswith(f"--pooling mean --data 'https://host/a.h5ad?...' --matrix X {wanted}")


def test_the_printed_command_works_and_the_newest_sae_may_be_named_as_the_other(four, own):
    with pytest.raises(UsageError) as refused:
        match(MatchOptions(), own)
    commands = re.findall(r"`scsae ([^`]*)`", str(refused.value))
    (command,) = [one for one in commands if f"--other {four.seed}" in one]
    app(shlex.split(command), standalone_mode=False)
    (same,) = match(MatchOptions(sae=four.cells, other=(four.seed,)), own)
    assert same.reused == 1
    # the newest that is not named is matched, here one of another layer
    with pytest.raises(UsageError, match=f"scsae encode --sae {four.layer}"):
        match(MatchOptions(other=(four.cells,)), own)


def test_what_two_layers_lack_is_named_with_the_command_and_nothing_is_written(four, own):
    before = written(own)
    command = rf"make them with `scsae encode --sae {four.layer} --store [^`]*own`$"
    with pytest.raises(UsageError, match=command):
        match(MatchOptions(sae=four.first, other=(four.seed, four.layer)), own)
    assert written(own) == before


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {},
            UsageError,
            "no --other was given to match saes/{first} .*`scsae match --sae {first} --other {seed} --store",
        ),
        ({"other": ("zzz",)}, NotFoundError, "--other was 'zzz', which names none of the complete saes runs"),
        ({"other": ("{first}",)}, UsageError, "--other was '{first}', the SAE itself; .*--other {seed}"),
        ({"other": ("{layer}",), "method": "cosine"}, UsageError, "--method was 'cosine', but .* different spaces"),
    ],
)
def test_what_cannot_be_matched_is_refused_and_nothing_is_written(four, options, error, words):
    names = {"first": four.first, "seed": four.seed, "layer": four.layer}
    given = {**options, "other": tuple(other.format(**names) for other in options.get("other", ()))}
    before = written(four.store)
    with pytest.raises(error, match=words.format(**names)):
        match(MatchOptions(sae=four.first, **given), four.store)
    assert written(four.store) == before


def test_the_only_sae_is_told_to_train_another(chain):
    with pytest.raises(UsageError, match="it is the only one: train another with `scsae train --seed 1"):
        match(MatchOptions(), chain.store)


def test_a_damaged_table_is_named_by_verify_and_written_again_to_the_same_bytes(four, own, capsys):
    options = MatchOptions(sae=four.first, other=(four.seed,))
    (result,) = match(options, own)
    part = commit.Run.open(result.path / "feature_match").part(0)
    content = part.read_bytes()
    part.write_bytes(content[:100] + b"\0" + content[101:])
    assert verify_run(result.run, own) == 1
    assert str(part) in capsys.readouterr().err
    assert match(options, own)[0].done == 1
    assert part.read_bytes() == content
