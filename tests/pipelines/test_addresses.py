"""Stages and commands on data at an address."""

from __future__ import annotations

import os
import re
import shutil

import anndata
import cell_files
import numpy as np
import pytest
import torch
from served_files import served_folder
from typer.testing import CliRunner

import scsae
from feature_store.cells import missing_files, source_location
from feature_store.errors import InputError, NotFoundError
from feature_store.storage import commit, range_file
from feature_store.storage.layout import Layout
from pipelines.associate import associate
from pipelines.baseline import baseline
from pipelines.cli import app, main
from pipelines.config import AssociateOptions, BaselineOptions, DataOptions, EncodeOptions, check
from pipelines.config.options import Files
from pipelines.encode import encode
from pipelines.errors import UsageError, exit_code
from pipelines.extract import extract
from pipelines.inputs import load_recorded_source
from pipelines.moved_data import record_if_same
from pipelines.runtime.reports import print_results
from pipelines.train import train
from pipelines.verify import verify_run

pytestmark = pytest.mark.usefixtures("module_without_actors")
COLUMNS = ["--donor", "donor", "--batch", "batch", "--cell-type", "type"]


@pytest.fixture
def served(tmp_path, tiny_data):
    folder = tmp_path / "served"
    folder.mkdir()
    shutil.copy(tiny_data, folder / "tiny.h5ad")
    with served_folder(folder) as found:
        yield found


@pytest.fixture
def address(served):
    return f"{served.address}/tiny.h5ad"


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def tables_of(result):
    frame = commit.read_table(result.path)
    return frame.drop([name for name in frame.columns if name == "dataset"])


def rewrite(path, tiny_cells):
    """Another file at the same place."""
    other = tiny_cells.copy()
    other.X = other.X * 2
    other.write_h5ad(path)
    os.utime(path, ns=(0, 10**9))


def test_the_command_extracts_from_an_address_what_it_extracts_from_the_file(address, tiny_data, tiny_model, tmp_path):
    found = []
    for place, store in ((tiny_data, "local"), (address, "remote")):
        words = ["extract", place, "--model", tiny_model, "--layer", 1, "--store", tmp_path / store, *COLUMNS]
        result = run(*words, "--dtype", "f32", "--shard-cells", 16)
        assert result.exit_code == 0, result.output
        (folder,) = (tmp_path / store / "activations").iterdir()
        found.append(commit.read_table(folder))
    assert found[0].equals(found[1])
    assert "ETag" in re.sub(r"\s", "", result.output)


def test_inspect_reads_an_address_with_a_table_at_another(served, address, tiny_cells, tiny_model):
    tiny_cells.obs.assign(stage="early").to_csv(served.folder / "obs.csv")
    result = run("inspect", address, "--model", tiny_model, "--obs", f"{served.address}/obs.csv")
    assert result.exit_code == 0, result.output
    assert "stage" in result.output
    assert "ETag" in result.output


def test_functions_take_an_address(address, tiny_data, tiny_model):
    there, here = (scsae.inspect(place, model=str(tiny_model)) for place in (address, tiny_data))
    different = {name for name in there if there[name] != here.get(name)}
    assert different <= {"data", "next", "version", "time, one core"}


def test_an_address_stays_what_it_is_in_options():
    options = EncodeOptions(data="https://host/a/cells.h5ad?x=1", obs=("s3://bucket/obs.csv",))
    assert [str(path) for path in (*options.data, *options.obs)] == [
        "https://host/a/cells.h5ad?...", "s3://bucket/obs.csv"
    ]  # fmt: skip
    assert options.data[0].address == "https://host/a/cells.h5ad?x=1"
    assert Files is not None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["extract", "ADDRESS.not", "--layer", "1"], "there is nothing at"),
        (["extract", "ftp://host/a.h5ad", "--layer", "1"], "data are read at s3://"),
        (["extract", "ADDRESS", "--vectors", "https://host/v.npy"], "at which vectors are not read"),
    ],
)
def test_what_is_wrong_with_an_address_is_one_error_and_nothing_is_written(words, said, address, tmp_path):
    words = [word.replace("ADDRESS", address) for word in words]
    result = run(*words, "--store", tmp_path / "store")
    assert exit_code(result.exception) == 2
    assert said in str(result.exception)
    assert not (tmp_path / "store").exists()


@pytest.fixture
def extracted(address, extract_options, tmp_path):
    """A store with the activations of the data at the address."""
    options = extract_options.model_copy(update={"data": address})
    checked = type(options)(**{name: getattr(options, name) for name in options.model_fields_set})
    store = tmp_path / "store"
    (result,) = extract(checked, store)
    return Layout(store), result.facts["dataset"]


def test_the_store_keeps_the_address_with_its_version(extracted, address, served):
    layout, dataset = extracted
    where = source_location(layout, dataset)
    assert where.paths == (address,)
    assert where.versions[0].startswith('ETag "')
    assert where.places[0].digest == where.digests[0]
    assert missing_files(layout, dataset) == []
    with load_recorded_source(layout, dataset) as source:
        assert source.versions == where.versions
    assert verify_run(dataset, layout.root) == 0


def test_a_later_command_refuses_a_file_that_changed_at_its_address(extracted, served, tiny_cells, capsys):
    layout, dataset = extracted
    rewrite(served.folder / "tiny.h5ad", tiny_cells)
    with pytest.raises(
        UsageError, match=r"tiny\.h5ad changed since its extraction \(ETag .*, was ETag .*values of the"
    ):
        load_recorded_source(layout, dataset)
    assert verify_run(dataset, layout.root) == 1
    (served.folder / "tiny.h5ad").unlink()
    with pytest.raises(UsageError, match=r"tiny\.h5ad is not there; if it was moved"):
        load_recorded_source(layout, dataset)
    capsys.readouterr()
    assert verify_run(dataset, layout.root) == 0
    assert "not there" in capsys.readouterr().err


def test_a_file_that_moved_to_another_address_is_known_by_its_etag(extracted, served, address):
    layout, dataset = extracted
    (served.folder / "tiny.h5ad").rename(served.folder / "moved.h5ad")
    new = f"{served.address}/moved.h5ad"
    assert record_if_same(layout, dataset, [type(source_location(layout, dataset).places[0])(new)])
    assert source_location(layout, dataset).paths == (new,)
    load_recorded_source(layout, dataset).close()


def test_nothing_is_committed_from_a_file_that_changes_between_plan_and_read(
    served, address, tiny_cells, extract_options, tmp_path, monkeypatch
):
    """The file changes when the actors open it, after the driver has written the tables of the data set."""
    from pipelines import extract as stage

    with_actors = stage.do_shards

    def changed_before(*given, **options):
        rewrite(served.folder / "tiny.h5ad", tiny_cells)
        return with_actors(*given, **options)

    monkeypatch.setattr(stage, "do_shards", changed_before)
    values = {name: getattr(extract_options, name) for name in extract_options.model_fields_set}
    with pytest.raises(InputError, match=r"tiny\.h5ad changed while it was in use \(now it is ETag"):
        extract(type(extract_options)(**{**values, "data": address}), tmp_path / "store")
    assert list((tmp_path / "store" / "activations").glob("*/part-*")) == []


@pytest.mark.slow
def test_shards_read_before_a_file_changed_are_kept_and_none_after(
    served, tiny_cells, extract_options, tmp_path, monkeypatch
):
    many = anndata.concat([tiny_cells] * 20, index_unique="-")
    many.obs["donor"] = np.repeat([f"D{i}" for i in range(6)], many.n_obs // 6)
    path = cell_files.h5ad(many, served.folder)
    monkeypatch.setattr(range_file, "BLOCK_BYTES", 1 << 10)
    monkeypatch.setattr(range_file, "CACHED_BLOCKS", 32)
    values = {name: getattr(extract_options, name) for name in extract_options.model_fields_set}
    values |= {"data": f"{served.address}/{path.name}", "shard_cells": 160, "batch": None, "cell_type": None}
    from pipelines.extract import Extractor

    shard, done = Extractor.shard, []

    def counted(self, number):
        if len(done) == 3:
            rewrite(path, many)
        done.append(number)
        return shard(self, number)

    monkeypatch.setattr(Extractor, "shard", counted)
    store = tmp_path / "store"
    with pytest.raises(InputError, match=r"cells\.h5ad changed while it was in use \(it was ETag"):
        extract(type(extract_options)(**values), store)
    parts = sorted(part.name for part in (store / "activations").glob("*/part-*.parquet"))
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    with pytest.raises(UsageError, match=r"changed since its extraction"):
        load_recorded_source(Layout(store), next((store / "cells").iterdir()).name)


@pytest.mark.slow
def test_every_stage_reads_an_address(address, tiny_data, extract_options, train_options, tmp_path):
    # training leaves one thread to the stages after it, and sums of several are others in the last bit
    torch.set_num_threads(1)
    values = {name: getattr(extract_options, name) for name in extract_options.model_fields_set}
    found = []
    for place, store in ((tiny_data, tmp_path / "local"), (address, tmp_path / "remote")):
        extract(type(extract_options)(**{**values, "data": place}), store)
        train(train_options, store)
        encode(EncodeOptions(fused=True), store)
        made = associate(AssociateOptions(), store)
        encode(EncodeOptions(data=place, donor="donor"), store)
        baseline(BaselineOptions(kind=("neurons",)), store)
        found.append(commit.read_table(made.path / "feature_gene"))
    assert found[0].equals(found[1])


@pytest.mark.slow
@pytest.mark.ray
def test_actors_of_ray_read_an_address(served, address, tiny_data, tiny_model, tmp_path, ray_local):
    """The actors are processes of their own: what they open and read is pickled to them."""
    frames = []
    for place, store in ((tiny_data, "local"), (address, "remote")):
        result = scsae.extract(
            place, model=str(tiny_model), layer=1, dtype="f32", store=tmp_path / store, shard_cells=16, donor="donor"
        )
        frames.append(tables_of(result[0]))
    assert frames[0].equals(frames[1])


@pytest.mark.parametrize(
    "words",
    [
        ["extract", "SIGNED", "--layer", "1"],
        ["extract", "abfs://a/b.h5ad?sig=SECRET", "--layer", "1"],
        ["extract", "https://host?sig=SECRET", "--layer", "1"],
        ["extract", "https://host:port/a.h5ad?sig=SECRET", "--layer", "1"],
        ["extract", "cells.h5ad", "--vectors", "SIGNED", "--layer", "1"],
        ["extract", "cells.h5ad", "--model", "SIGNED", "--layer", "1"],
        ["extract", "DATA", "--obs", "SIGNED", "--layer", "1"],
        ["extract", "DATA", "--genes", "SIGNED", "--layer", "1"],
        ["associate", "--data", "SIGNED"],
        ["associate", "--gmt", "SIGNED"],
        ["train", "SIGNED"],
        ["train", "--store", "SIGNED"],
        ["import-sae", "SIGNED", "--activations", "a"],
    ],
)
def test_no_error_of_a_command_shows_a_signature(words, served, tiny_data, capfd, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    signed = f"{served.address}/not.h5ad?X-Amz-Signature=SECRET"
    monkeypatch.setattr(
        "sys.argv", ["scsae", *(signed if one == "SIGNED" else one.replace("DATA", str(tiny_data)) for one in words)]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    said = capfd.readouterr()
    assert ended.value.code != 0
    assert said.err.strip()
    assert "SECRET" not in said.out + said.err


def test_a_signature_is_kept_for_later_reads_and_nowhere_else(
    served, address, extract_options, train_options, tmp_path, capfd
):
    """Plans, tables, the database of MLflow and what is printed: `source.json` alone has it."""
    values = {name: getattr(extract_options, name) for name in extract_options.model_fields_set}
    shutil.copy(served.folder / "tiny.h5ad", served.folder / "second.h5ad")
    (served.folder / "obs.csv").write_text("cell_id,stage\n" + "".join(f"cell{i},s{i % 2}\n" for i in range(72)))
    query, store = "?X-Amz-Signature=SECRET", tmp_path / "store"
    given = {"data": address + query, "obs": f"{served.address}/obs.csv{query}", "label": ("stage",)}
    print_results(extract(type(extract_options)(**{**values, **given}), store), store)
    print_results([train(train_options, store)], store)
    print_results([encode(EncodeOptions(fused=True), store)], store)
    print_results([associate(AssociateOptions(), store)], store)
    with pytest.raises(NotFoundError) as refused:
        associate(AssociateOptions(data=f"{served.address}/not.h5ad{query}"), store)
    said = capfd.readouterr()
    assert "SECRET" not in f"{said.out} {said.err} {refused.value!r}"
    holders = {path.name for path in tmp_path.rglob("*") if path.is_file() and b"SECRET" in path.read_bytes()}
    assert holders == {"source.json"}
    assert any(path.suffix == ".db" for path in tmp_path.rglob("*")), "the registry is a part of what was searched"


def test_a_recipe_with_a_signature_is_not_submitted(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("extract:\n  data: 'https://host/a.h5ad?X-Amz-Signature=SECRET'\n  layer: 1\n")
    result = run("submit", recipe, "--address", "http://127.0.0.1:1")
    assert isinstance(result.exception, UsageError)
    assert re.search(r"the signed address 'https://host/a\.h5ad\?\.\.\.'.*`scsae run RECIPE`", str(result.exception))


def test_a_password_in_an_address_is_not_shown():
    with pytest.raises(UsageError, match=r"data was .*//\.\.\.@host.*holds a user") as refused:
        check(DataOptions, {"data": "https://user:word@host/a.h5ad"}, "scsae extract")
    assert "word@" not in str(refused.value)
