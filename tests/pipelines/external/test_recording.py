"""Recording hooks the user's own loop; the tutorial runs as it stands, and every stage goes on from what it leaves."""

from __future__ import annotations

import contextlib
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import scsae
from feature_store import FeatureStore
from feature_store.activations import ActivationReader
from feature_store.codes import CodesRun, load_cell_codes
from feature_store.errors import InputError
from feature_store.storage import commit
from feature_store.storage.layout import Layout, tables_of
from pipelines.baseline import baseline
from pipelines.config import BaselineOptions, SteerOptions
from pipelines.errors import UsageError
from pipelines.steering.run import steer
from pipelines.verify import verify_run
from sae_core.sae import load_sae

PAGE = Path(__file__).parents[3] / "docs" / "vectors.md"
WIDTH = 8


class Net(nn.Module):
    """An embedding of genes, a layer, and a layer that gives a tuple."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.gene = nn.Embedding(31, WIDTH)
        self.gene.weight.data.normal_(generator=generator)
        self.layer, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)
        self.layer.weight.data.normal_(generator=generator)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)

    def forward(self, genes: torch.Tensor) -> torch.Tensor:
        x = self.layer(self.gene(genes))
        return self.attention(x, x, x)[0]


@pytest.fixture
def net() -> Net:
    return Net().eval()


@pytest.fixture
def inputs():
    """The genes of 72 cells of 5 positions, of which the first is special (gene 30) and padding is -1."""
    rng = np.random.default_rng(0)
    genes = np.stack([rng.permutation(30)[:5] for _ in range(72)])
    genes[:, 0] = 30
    genes[::3, 4] = -1
    return genes


def run(recording, net, inputs, rows=range(72), **named):
    """The loop of a user over some cells, in batches of 10."""
    for start in range(0, len(rows), 10):
        cells = np.asarray(rows[start : start + 10])
        genes = np.where(inputs[cells] == 30, -1, inputs[cells])
        recording.batch(cells, genes)
        net(torch.from_numpy(inputs[cells]).clamp(min=0))


def stored(folder):
    reader = ActivationReader(commit.Run.open(folder))
    blocks = [reader.read(group.shard, group.group) for group in reader.row_groups]
    return [np.concatenate([getattr(block, name) for block in blocks]) for name in ("cell_idx", "gene_id", "act")]


@pytest.mark.parametrize("module", ["layer", "gene"])
def test_the_output_at_the_genes_of_each_cell_is_stored(net, inputs, tiny_data, tmp_path, module):
    with scsae.record(net, getattr(net, module), tmp_path, tiny_data, name="net", dtype="f32") as recording:
        run(recording, net, inputs)
    cells, genes, act = stored(recording.result.path)
    has_gene = (inputs >= 0) & (inputs < 30)
    np.testing.assert_array_equal(cells, np.repeat(np.arange(72), has_gene.sum(1)))
    np.testing.assert_array_equal(genes, inputs[has_gene])
    x = net.gene(torch.from_numpy(inputs[has_gene]))
    wanted = net.layer(x) if module == "layer" else x
    np.testing.assert_allclose(act, wanted.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert recording.result.facts["site"] == module


def test_a_tuple_gives_its_first_tensor_and_positions_may_come_first(net, inputs, tiny_data, tmp_path):
    with scsae.record(net, "attention", tmp_path / "a", tiny_data, name="net", dtype="f32") as recording:
        run(recording, net, inputs)
    first = stored(recording.result.path)
    layer = net.layer
    net.layer = nn.Sequential(layer)
    turned = scsae.record(net, "layer", tmp_path / "b", tiny_data, name="net", dtype="f32", batch_first=False)
    net.layer.register_forward_hook(lambda *_: None)
    with turned as recording, torch.no_grad():
        for cells in np.split(np.arange(72), 8):
            recording.batch(cells, np.where(inputs[cells] == 30, -1, inputs[cells]))
            net.layer(net.gene(torch.from_numpy(inputs[cells]).clamp(min=0).T))
    assert len(stored(recording.result.path)[0]) == len(first[0])
    x = layer(net.gene(torch.from_numpy(stored(recording.result.path)[1]).long()))
    np.testing.assert_allclose(stored(recording.result.path)[2], x.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_an_interrupted_recording_lacks_cells_and_other_weights_are_another_run(net, inputs, tiny_data, tmp_path):
    options = {"name": "net", "d_model": WIDTH, "shard_cells": 16}
    with contextlib.suppress(ZeroDivisionError), scsae.record(net, "layer", tmp_path, tiny_data, **options) as first:
        run(first, net, inputs, range(40))
        raise ZeroDivisionError
    assert first.result is None
    with scsae.record(net, "layer", tmp_path, tiny_data, **options) as second:
        assert second.missing.tolist() == list(range(32, 72))
        run(second, net, inputs, second.missing)
    assert (second.result.done, second.result.reused) == (3, 2)
    with pytest.raises(InputError, match="is complete"), scsae.record(net, "layer", tmp_path, tiny_data, **options):
        pass
    net.layer.weight.data += 1
    with scsae.record(net, "layer", tmp_path, tiny_data, **options) as other:
        run(other, net, inputs)
    assert other.result.run != second.result.run


def no_output(_one, _net, _inputs):
    """A block that runs nothing."""


def not_named(_one, net, _inputs):
    net(torch.zeros(1, 5, dtype=torch.int64))


def other_shape(one, net, inputs):
    one.batch([0, 1, 2], inputs[:3, 1:])
    net(torch.from_numpy(inputs[:3]).clamp(min=0))


def no_positions(one, _net, _inputs):
    one.batch([0, 1, 2], ["GENE1"] * 3)


def special_token(one, net, _inputs):
    one.batch(["cell0"], [["<cls>", "GENE1"]])
    net(torch.zeros(1, 2, dtype=torch.int64))


def all_cells(one, net, inputs):
    run(one, net, inputs)


@pytest.mark.parametrize(
    ("module", "loop", "error", "words"),
    [
        ("layr", no_output, UsageError, r"module was 'layr'.*did you mean 'layer'"),
        (nn.Linear(1, 1), no_output, UsageError, r"Linear is no module of the model"),
        ("unused", no_output, InputError, r"'unused' of net never ran"),
        ("unused", all_cells, InputError, r"a batch of 10 cells was named, but .*'unused' of net did not run"),
        ("layer", not_named, InputError, r"'layer' of net ran, and nothing said of which cells"),
        ("layer", other_shape, InputError, r"output of shape \(3, 5, 8\) for genes of shape \(3, 4\)"),
        ("layer", no_positions, InputError, r"cells of shape \(3,\) and genes of shape \(3,\)"),
        ("layer", special_token, InputError, r"'<cls>'"),
    ],
)
def test_a_fault_of_the_loop_is_named_and_leaves_no_finished_run(
    net, inputs, tiny_data, tmp_path, module, loop, error, words
):
    with pytest.raises(error, match=words), scsae.record(net, module, tmp_path, tiny_data, name="net") as one:
        loop(one, net, inputs)
    assert all(not info.complete for info in Layout(tmp_path).runs("activations"))
    assert not net.layer._forward_hooks


@pytest.fixture
def tutorial() -> str:
    (code,) = re.findall(r"```python\n(import anndata\n.*?)```", PAGE.read_text(), re.DOTALL)
    return code


def test_the_tutorial_has_at_most_25_lines(tutorial):
    assert len([line for line in tutorial.splitlines() if line.strip()]) <= 25


def test_the_tutorial_records_a_model_of_no_family_and_every_stage_goes_on_from_it(
    tutorial, tiny_data, tmp_path, monkeypatch, without_ray, without_mlflow
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("pipelines.steering.run.drawings_of", lambda *_: {})
    shutil.copy(tiny_data, "cells.h5ad")
    made: dict[str, object] = {}
    exec(compile(tutorial, str(PAGE), "exec"), made)
    (trained,) = scsae.train(n_features=48, k=4, n_steps=60, batch_size=64, num_workers=0)
    assert "recorded by another program" in trained.facts["select_recovery"]
    encoded = scsae.encode()
    scsae.associate()
    store, model, counts = FeatureStore.open("scsae-store"), made["model"], torch.from_numpy(made["counts"])
    with torch.no_grad():
        x = model(torch.arange(30).expand(72, -1), counts.log1p())
    codes = load_sae(trained.path).encode(x.half().float().flatten(0, 1)).to_dense().reshape(72, 30, 48)
    wanted = codes.masked_fill(counts[..., None] == 0, 0).amax(1).numpy()
    found = load_cell_codes(CodesRun.open(encoded.path), np.arange(72)).toarray()
    np.testing.assert_allclose(found, wanted, rtol=1e-2, atol=2e-2)
    tokens = store.sql("SELECT max(identity_recall) AS recall FROM feature_gene")
    assert tokens["recall"].item() > 0, "tokens are of genes"
    layout = Layout("scsae-store")
    for kind in ("cells", "activations", "saes", "codes", "associations"):
        assert tables_of(layout.latest(kind))
        assert verify_run(layout.latest(kind).run, layout.root) == 0
    made_baselines = baseline(BaselineOptions(kind=("random",)), layout.root)
    assert made_baselines[-1].kind == "associations"
    for call in (
        lambda: steer(SteerOptions(target="A"), layout.root),
        lambda: scsae.encode(fused=True),
        lambda: scsae.encode(data=tiny_data, donor="donor"),
        lambda: baseline(BaselineOptions(kind=("random-model",)), layout.root),
    ):
        with pytest.raises(UsageError, match=r"of transformer were recorded by another program"):
            call()
