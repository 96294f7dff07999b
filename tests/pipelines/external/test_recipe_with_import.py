"""A recipe of given vectors and an imported SAE: every stage from one file, resumed, registered, refused when wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from given_vectors import COLUMNS, WIDTH, refused_by, said_by, vectors_of
from stored_bytes import hashes_of

from feature_store.codes import CodesRun, load_cell_codes
from feature_store.storage import commit
from feature_store.storage.layout import Layout
from pipelines.config import Recipe, load_recipe
from pipelines.errors import UsageError
from pipelines.recipe import run_recipe
from pipelines.runtime.job_submission import refuse_relative
from pipelines.tracking import Tracking
from sae_core.sae import Origin, SAEConfig, SparseAutoencoder, write_sparsify

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("without_ray", "few_cells")

KINDS = ["activations", "saes", "codes", "associations", "steering"]


@dataclass(frozen=True, kw_only=True)
class Outside:
    """A file of cells and their vectors, an SAE of them from another library, and the recipe of the whole chain."""

    folder: Path
    vectors: np.ndarray
    sae: SparseAutoencoder

    @property
    def stages(self) -> dict[str, object]:
        return {
            "extract": {
                "data": str(self.folder / "cells.h5ad"),
                "vectors": str(self.folder / "emb.npy"),
                "source_name": "emb-v1",
                "shard_cells": 16,
                "dtype": "f32",
                **COLUMNS,
            },
            "import-sae": {"folder": str(self.folder / "sae")},
            "encode": {},
            "associate": {},
            "steer": [{"target": "A", "n_nulls": 2, "n_features": 3}],
        }

    def recipe(self, **changes: object) -> Path:
        """A file with the stages, of which some are changed, or left out where they are None."""
        stages = {name: stage for name, stage in {**self.stages, **changes}.items() if stage is not None}
        file = self.folder / "recipe.yaml"
        file.write_text(yaml.safe_dump(stages))
        return file


@pytest.fixture
def outside(tiny_cells, tmp_path) -> Outside:
    tiny_cells.write_h5ad(tmp_path / "cells.h5ad")
    vectors = vectors_of(tiny_cells)
    np.save(tmp_path / "emb.npy", vectors)
    config = SAEConfig(d_model=WIDTH, n_features=32, k=4, arch="topk")
    sae = SparseAutoencoder(config, generator=torch.Generator().manual_seed(1)).requires_grad_(False)
    # trained on vectors of other cells of this model
    write_sparsify(sae, tmp_path / "sae", origin=Origin(model="emb-v1", site="vectors", model_digest="0" * 64))
    return Outside(folder=tmp_path, vectors=vectors, sae=sae)


@pytest.fixture
def no_tracking(monkeypatch):
    """Register nothing."""
    monkeypatch.setattr("pipelines.exchange.register_sae", lambda *_, **__: "nowhere")
    monkeypatch.setattr("pipelines.steering.run.log_evaluation", lambda *_: "nowhere")
    for stage in ("exchange", "steering.run"):
        monkeypatch.setattr(f"pipelines.{stage}.check_tracking", lambda *_: None)


def test_a_recipe_of_vectors_and_an_imported_sae_runs_the_whole_chain_once(outside, no_tracking):
    store = outside.folder / "store"
    said = said_by("run", outside.recipe(), "--store", store)
    layout = Layout(store)
    runs = {kind: layout.latest(kind) for kind in KINDS}
    assert all(f"{kind}/{one.run}" in said for kind, one in runs.items())
    plan = commit.Run.open(runs["saes"].path).plan
    assert (plan["activations"], plan["imported"]["format"]) == (runs["activations"].run, "sparsify")
    codes = CodesRun.open(runs["codes"].path)
    assert codes.plan.sae == runs["saes"].run
    wanted = outside.sae.encode(torch.from_numpy(outside.vectors)).to_dense().numpy()
    np.testing.assert_allclose(load_cell_codes(codes, np.arange(72)).toarray(), wanted, rtol=1e-4, atol=1e-5)
    assert commit.Run.open(runs["associations"].path / "features").plan["codes"] == runs["codes"].run
    again = run_recipe(load_recipe(outside.recipe()), store)
    assert [(one.kind, one.run, one.done) for one in again] == [(kind, runs[kind].run, 0) for kind in KINDS]


@pytest.mark.slow
def test_a_recipe_that_was_interrupted_behind_the_import_resumes_to_the_same_bytes(outside, no_tracking, monkeypatch):
    recipe = load_recipe(outside.recipe(steer=None))
    run_recipe(recipe, outside.folder / "whole")

    def killed(worker, work, shards, *_args, **_options):
        worker(work).shard(shards[0])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.encode.do_shards", killed)
        with pytest.raises(KeyboardInterrupt):
            run_recipe(recipe, outside.folder / "killed")
    extracted, imported, encoded, _ = run_recipe(recipe, outside.folder / "killed")
    assert (extracted.done, imported.done, encoded.reused) == (0, 0, 1)
    kinds = ("activations", "saes", "codes", "associations")
    whole, resumed = ({kind: hashes_of(outside.folder / one / kind) for kind in kinds} for one in ("whole", "killed"))
    assert resumed == whole


@pytest.mark.slow
def test_the_sae_of_a_recipe_is_registered_as_that_of_the_command(outside):
    short = {"encode": None, "associate": None, "steer": None}
    run_recipe(load_recipe(outside.recipe(**short)), outside.folder / "by-recipe")
    run_recipe(load_recipe(outside.recipe(**short, **{"import-sae": None})), outside.folder / "by-command")
    said_by("import-sae", outside.folder / "sae", "--store", outside.folder / "by-command")
    versions = [Tracking(Layout(outside.folder / store)).versions() for store in ("by-recipe", "by-command")]
    (one,), (two,) = versions
    assert (one.name, one.version, one.aliases, one.metrics) == (two.name, two.version, two.aliases, two.metrics)
    assert one.name == "sae-emb-v1-vectors"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train": {"k": 4}}, "the recipe has train and import-sae; an SAE is trained or imported"),
        ({"import-sae": {"folder": "sae", "pik": "x"}}, r"'import-sae\.pik' is unknown; did you mean 'pick'"),
        ({"import-sae": {}}, r"import-sae\.folder"),
        (
            {"import-sae": {"folder": "sae", "activations": "a1"}},
            r"import-sae\.activations was 'a1', but .* extract too",
        ),
        ({"encode": {"sae": "a1"}}, r"encode\.sae was 'a1', but the recipe has import-sae too"),
        ({"import-say": {"folder": "sae"}}, "'import-say' is unknown; did you mean 'import-sae'"),
    ],
)
def test_a_wrong_import_in_a_recipe_is_refused_with_its_key(outside, changes, words):
    with pytest.raises(UsageError, match=words):
        load_recipe(outside.recipe(**changes))


def test_one_sae_is_not_imported_for_several_sites(outside):
    extract = {"data": "cells.h5ad", "layer": [0, 1]}
    with pytest.raises(UsageError, match=r"extract\.layer was \['0', '1'\], but import-sae takes one SAE"):
        load_recipe(outside.recipe(extract=extract))


def test_a_folder_without_an_sae_is_found_before_the_first_stage(outside):
    (outside.folder / "sae" / "cfg.json").unlink()
    said = refused_by("run", outside.recipe(), "--store", outside.folder / "store")
    assert str(outside.folder / "sae") in said
    assert not (outside.folder / "store").exists()


def test_the_folder_of_a_submitted_recipe_has_to_be_absolute(outside):
    with pytest.raises(UsageError, match=r"import-sae\.folder was 'sae', a relative path"):
        refuse_relative(load_recipe(outside.recipe(**{"import-sae": {"folder": "sae"}})), "/store")
    refuse_relative(load_recipe(outside.recipe()), "/store")
    assert Recipe(import_sae={"folder": "sae"}).import_sae is not None
