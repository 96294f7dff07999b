"""Tokens of another program: any order gives the same bytes, a killed run resumes, and what does not fit is refused."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from stored_bytes import hashes_of

import scsae
from feature_store.activations import ActivationReader, to_stored
from feature_store.cells import read_cells
from feature_store.errors import BusyError, InputError, NotFoundError
from feature_store.query.runs import newest_run
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from feature_store.storage.plans import ActivationsPlan
from pipelines.errors import UsageError
from pipelines.inputs import load_model_location

WIDTH, SHARD = 6, 16


@pytest.fixture(scope="module")
def tokens():
    """Cell, gene and vector of tokens of the tiny cells, by cell: 3 to 8 tokens each, cell 20 has none."""
    rng = np.random.default_rng(3)
    n = rng.integers(3, 9, 72)
    n[20] = 0
    cell = np.repeat(np.arange(72), n)
    gene = np.concatenate([rng.permutation(30)[:length] for length in n])
    return cell, gene, rng.normal(size=(len(cell), WIDTH)).astype(np.float32)


@pytest.fixture
def writer(tiny_data, tmp_path):
    """Makes a writer of the tiny cells; `changes` are other options than shards of 16 cells in f32."""

    def make(store="store", data=tiny_data, **changes):
        options = {"name": "net", "d_model": WIDTH, "dtype": "f32", "shard_cells": SHARD, "donor": "donor", **changes}
        return scsae.ActivationWriter(tmp_path / store, data, **options)

    return make


def given(writer, tokens, cells):
    """Write the tokens of these cells as one block."""
    cell, gene, x = tokens
    own = np.concatenate([np.flatnonzero(cell == one) for one in cells])
    writer.write(cell[own], gene[own], x[own])


def stored(folder):
    reader = ActivationReader(commit.Run.open(folder))
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    return [np.concatenate([getattr(b, name) for b in blocks]) for name in ("cell_idx", "token_pos", "gene_id", "act")]


def parts(folder):
    """Hashes of the files of a run, without the locations of the data."""
    return {name: one for name, one in hashes_of(folder).items() if name.startswith("part-")}


def test_a_run_holds_every_token_by_cell_and_position(writer, tokens, tmp_path):
    with writer() as opened:
        assert opened.missing.tolist() == list(range(72))
        for start in range(0, 72, 10):
            given(opened, tokens, range(start, min(start + 10, 72)))
    cell, gene, x = tokens
    cells, positions, genes, act = stored(opened.result.path)
    np.testing.assert_array_equal(cells, cell)
    np.testing.assert_array_equal(genes, gene)
    np.testing.assert_array_equal(act, x)
    np.testing.assert_array_equal(positions, np.concatenate([np.arange(n) for n in np.bincount(cell)]))
    plan = ActivationsPlan.of(commit.Run.open(opened.result.path))
    assert (plan.origin, plan.model, plan.site, plan.n_cells) == ("recorded", "net", "recorded", 72)
    assert opened.result.facts["CELLS WITHOUT TOKENS"].startswith("1 of 72")
    assert newest_run(Layout(tmp_path / "store"), "activations").run == opened.run


def by_name(cell, gene, x):
    return [f"cell{one}" for one in cell], [f"GENE{one}" for one in gene], torch.from_numpy(x)


def as_tensors(cell, gene, x):
    return torch.from_numpy(cell), torch.from_numpy(gene).int(), torch.nn.Parameter(torch.from_numpy(x))


def as_arrays(cell, gene, x):
    return cell.astype(np.int32), np.array([f"GENE{one}" for one in gene], dtype=object), x.astype(np.float64)


@pytest.mark.parametrize(("form", "buffer_size"), [(by_name, "512MB"), (as_tensors, "200B"), (as_arrays, "200B")])
def test_any_order_form_and_buffer_give_the_same_bytes(writer, tokens, form, buffer_size):
    with writer() as plain:
        given(plain, tokens, range(72))
    cell, gene, x = tokens
    order = np.random.default_rng(0).permutation(72)
    with writer("other", buffer_size=buffer_size) as shuffled:
        for block in np.split(order, range(7, 72, 7)):
            own = np.concatenate([np.flatnonzero(cell == one) for one in block])
            if form is as_arrays:
                # tokens of several cells may be mixed, as long as those of a cell keep their order
                own = own[np.argsort(own - np.searchsorted(cell, cell[own]), kind="stable")]
            shuffled.write(*form(cell[own], gene[own], x[own]))
    assert parts(shuffled.result.path) == parts(plain.result.path)
    assert shuffled.run == plain.run


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_vectors_are_rounded_as_in_an_extraction(writer, tokens, dtype):
    with writer(dtype=dtype, buffer_size="200B") as opened:
        given(opened, tokens, range(72))
    np.testing.assert_array_equal(stored(opened.result.path)[-1], to_stored(tokens[2], dtype))


def test_a_shard_is_committed_when_its_cells_are_complete(writer, tokens):
    with writer() as opened:
        given(opened, tokens, range(40, 10, -1))
        assert opened.missing.tolist() == list(range(72)), "cell 20 has no token, so that its shard waits"
        given(opened, tokens, range(41, 70))
        assert opened.missing.tolist() == [*range(32), *range(64, 72)]
        given(opened, tokens, range(10, -1, -1))
        assert opened.missing.tolist() == [*range(16, 32), *range(64, 72)]


def test_a_block_that_fails_leaves_an_unfinished_run_which_resumes_to_the_same_bytes(writer, tokens, tmp_path):
    with contextlib.suppress(ZeroDivisionError), writer("killed") as first:
        given(first, tokens, range(20))
        raise ZeroDivisionError
    layout = Layout(tmp_path / "killed")
    with pytest.raises(NotFoundError, match=f"only incomplete ones .*{first.run}"):
        layout.latest("activations")
    with writer("killed") as again:
        assert again.missing.tolist() == list(range(16, 72))
        given(again, tokens, range(72))
    with writer() as plain:
        given(plain, tokens, range(72))
    assert (again.run, again.result.done, again.result.reused) == (plain.run, 4, 1)
    assert parts(again.result.path) == parts(plain.result.path)


def test_a_complete_run_is_not_written_again_and_another_version_is_another_run(writer, tokens):
    with writer() as first:
        given(first, tokens, range(72))
    with pytest.raises(InputError, match=f"activations/{first.run} .* is complete.*give another version"):
        writer().__enter__()
    with writer(version="2") as second:
        given(second, tokens, range(72))
    assert second.run != first.run


def test_one_process_writes_a_run(writer, tokens):
    with writer() as opened:
        with pytest.raises(BusyError):
            writer().__enter__()
        given(opened, tokens, range(72))


def test_a_writer_that_was_given_nothing_leaves_no_finished_run(writer, tmp_path):
    with pytest.raises(InputError, match="no token was written"), writer():
        pass
    assert not Layout(tmp_path / "store").runs("activations")[0].complete


def test_an_anndata_is_written_once_and_left_as_it_was(writer, tokens, tiny_cells, tmp_path):
    cells = tiny_cells.copy()
    before = cells.obs.dtypes.to_dict()
    for version in ("1", "2"):
        with writer(data=cells, version=version) as opened:
            given(opened, tokens, range(72))
    assert cells.obs.dtypes.to_dict() == before
    assert len(list((tmp_path / "store" / "data").iterdir())) == 1
    (dataset,) = Layout(tmp_path / "store").runs("cells")
    assert read_cells(dataset.path)["donor"].to_list() == cells.obs["donor"].tolist()


GOOD = {"cells": [0, 0, 1], "genes": [3, 4, 3], "vectors": np.zeros((3, WIDTH), np.float32)}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"cells": ["cell0", "cell0", "cell99"]}, r"1 names are not among the cells of .*tiny\.h5ad: 'cell99'"),
        ({"cells": [0, 0, 72]}, r"no cell 72: the cells of .*tiny\.h5ad have the numbers 0 to 71"),
        ({"cells": [0, 0, -1]}, "no cell -1"),
        ({"cells": [0.0, 0.0, 1.0]}, "cells of a block have shape .* and type float64"),
        ({"cells": [True, True, False]}, "type bool"),
        ({"cells": [[0], [0], [1]]}, r"cells of a block have shape \(3, 1\)"),
        ({"genes": ["GENE3", "<cls>", "GENE3"]}, "'<cls>'; leave out tokens that are no genes"),
        ({"genes": [3, 30, 3]}, "no gene 30"),
        ({"genes": [3, 4]}, "3 cells, 2 genes"),
        ({"vectors": np.zeros((3, WIDTH + 1))}, r"vectors \(3, 7\).*\[n_tokens 6\]"),
        ({"vectors": np.zeros((3, WIDTH), int)}, "of int64"),
        ({"vectors": np.full((3, WIDTH), np.nan)}, r"activation nan of token 0 \(cell 'cell0', gene 'GENE3'\)"),
        ({"vectors": np.full((3, WIDTH), 1e5)}, r"activation 100000 .* is beyond f16: give dtype='bf16'"),
        ({"cells": [[0, 0], [1]]}, "rows of unequal length"),
    ],
)
def test_a_block_that_does_not_fit_is_refused_and_not_taken(writer, changes, words):
    with writer(dtype="f16") as opened:
        with pytest.raises(InputError, match=words):
            opened.write(**{**GOOD, **changes})
        opened.write(**GOOD)
        with pytest.raises(InputError, match="cell 'cell1' was given twice"):
            opened.write([1, 2], [3, 3], np.zeros((2, WIDTH)))
        opened.write([2], [3], np.zeros((1, WIDTH)))
    assert stored(opened.result.path)[0].tolist() == [0, 0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"name": " "}, UsageError, "name was ' '"),
        ({"site": "a\nb"}, UsageError, "site was"),
        ({"dtype": "f64"}, UsageError, "dtype was 'f64'; it is one of f16, bf16, f32"),
        ({"d_model": 0}, UsageError, "d_model was 0"),
        ({"shard_cells": 0}, UsageError, "shard_cells was 0"),
        ({"split_by": "batch"}, UsageError, "split_by was 'batch'"),
        ({"buffer_size": "many"}, UsageError, "'many'"),
        ({"donor": "doner"}, InputError, "'doner', which is not an obs column"),
        ({"data": "none.h5ad"}, InputError, r"none\.h5ad"),
        ({"data": 3}, InputError, "the cells were int"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(writer, tmp_path, changes, error, words):
    with pytest.raises(error, match=words):
        writer(**changes).__enter__()
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]


def test_the_model_of_a_recorded_run_is_not_here(writer, tokens):
    with writer() as opened:
        given(opened, tokens, range(72))
    with pytest.raises(UsageError, match="of net were recorded by another program, whose model is not here"):
        load_model_location(commit.Run.open(opened.result.path))
