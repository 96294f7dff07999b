"""Every family keeps the promises of `scsae.testing.conformance`, those here and one of another package, and a model
that breaks one is found. A new family joins by one entry in `tiny_checkpoints.KINDS` and one case of `checkpoint_of`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from tiny_checkpoints import KINDS
from toy_family import ToyModel, write_toy

from sae_core.errors import CheckpointError, ConfigError
from sae_core.scfm import FoundationModel, Tokens, TranscriptFormer, load_model
from scsae.testing.conformance import ModelConformance, random_counts, tokens_of

if TYPE_CHECKING:
    from typing import Any

RANKED = ("geneformer", "nicheformer")
"""Families that know genes by Ensembl id and predict the gene itself."""
SYMBOLS = [f"GENE{i}" for i in range(40)]
Checkpoint = Callable[[str], Path]


class TestFamilies(ModelConformance):
    # UCE has no pretraining head and its own symbols: `TestUCE`
    @pytest.fixture(params=[kind for kind in KINDS if kind != "uce"])
    def kind(self, request: pytest.FixtureRequest) -> str:
        return str(request.param)

    @pytest.fixture
    def checkpoint(self, kind: str, checkpoint_of: Checkpoint) -> Path:
        return checkpoint_of(kind)

    @pytest.fixture
    def symbols(self) -> list[str]:
        return SYMBOLS

    @pytest.mark.gpu
    def test_a_gpu_gives_the_numbers_of_the_cpu(self, checkpoint: Path, model: FoundationModel, tokens: Tokens) -> None:
        super().test_a_gpu_gives_the_numbers_of_the_cpu(checkpoint, model, tokens)

    def test_the_family_and_the_name_are_those_of_the_folder(self, model: FoundationModel, kind: str) -> None:
        assert model.family == (kind if kind == "aido-cell" else kind.partition("-")[0])
        assert model.name == kind

    def test_the_loss_is_the_mean_error_of_the_predictions(
        self, kind: str, model: FoundationModel, tokens: Tokens
    ) -> None:
        task = model.mask_genes(tokens, seed=3, fraction=model.mask_fraction)
        predicted = model.masked_gene_prediction(task)
        squared = (predicted.prediction - predicted.target) ** 2
        error = -predicted.prediction if kind.startswith(RANKED) else squared
        if isinstance(model, TranscriptFormer):
            error = model.count_error(predicted.prediction, predicted.target)
        total = torch.zeros(tokens.n_cells).index_add_(0, predicted.cell, error)
        loss = model.pretraining_loss(tokens, seed=3)
        found = total / loss.n_masked
        second_head = {"scgpt": 1, "tahoe": 2}.get(kind.partition("-")[0])
        if second_head is not None:  # whose error is added to the loss, or is half of it
            assert (found <= second_head * loss.per_cell)[loss.n_masked > 0].all()
        else:
            torch.testing.assert_close(found.double(), loss.per_cell, rtol=1e-5, atol=1e-5, equal_nan=True)

    def test_matching_is_by_symbol_or_ensembl_id_where_the_checkpoint_knows_them(
        self, kind: str, model: FoundationModel
    ) -> None:
        if kind.startswith(RANKED):
            ids = [f"ENSG{i + 1:011d}.{i % 7}" for i in range(40)]
            by_id, by_symbol = model.match_genes(ids), model.match_genes(SYMBOLS)
            np.testing.assert_array_equal(by_id.token_id, by_symbol.token_id)
            assert by_id.n_matched == 40
        else:
            assert model.match_genes([*SYMBOLS[:5], "ENSG00000000001"]).n_matched == 5

    def test_a_folder_without_its_weights_is_of_no_known_family(self, checkpoint: Path) -> None:
        for name in (
            "best_model.pt",
            "model.safetensors",
            "models.ckpt",
            "nicheformer.ckpt",
            "model_weights.pt",
        ):
            (checkpoint / name).unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=r"scgpt.*geneformer.*scfoundation"):
            load_model(checkpoint)


class TestUCE(ModelConformance):
    family = "uce"
    has_pretraining_head = False
    has_fixed_special_tokens = False

    @pytest.fixture
    def checkpoint(self, checkpoint_of: Checkpoint) -> Path:
        return checkpoint_of("uce")

    @pytest.fixture
    def symbols(self) -> list[str]:
        return SYMBOLS

    @pytest.mark.gpu
    def test_a_gpu_gives_the_numbers_of_the_cpu(self, checkpoint: Path, model: FoundationModel, tokens: Tokens) -> None:
        super().test_a_gpu_gives_the_numbers_of_the_cpu(checkpoint, model, tokens)


class TestPlugIn(ModelConformance):
    family = "toy"

    @pytest.fixture
    def checkpoint(self, tmp_path: Path, toy_plug_in: None) -> Path:
        return write_toy(tmp_path / "toy")


class WithoutHead(ModelConformance):
    has_pretraining_head = False


@pytest.mark.parametrize(
    "test",
    [
        "test_without_a_pretraining_head_its_loss_and_its_predictions_are_refused",
        "test_a_patch_that_changes_nothing_is_bitwise_the_unpatched_run",
    ],
)
def test_a_model_without_a_pretraining_head_may_say_so(tmp_path: Path, toy_plug_in: None, test: str) -> None:
    model = load_model(write_toy(tmp_path / "toy", head=False))
    tokens = tokens_of(model, random_counts(len(SYMBOLS)), SYMBOLS)
    getattr(WithoutHead(), test)(model, tokens)
    with pytest.raises(ConfigError, match="no weights of the head"):
        ModelConformance().test_a_patch_changes_the_pretraining_loss(model, tokens)


class Broken:
    """Ways to break a promise: the part of a model that is replaced, by what, and the test that has to find it."""

    @staticmethod
    def tokens_of_a_cell_depend_on_its_place(model: ToyModel, original: Any) -> Any:
        def tokenize(*arguments: Any, **options: Any) -> Tokens:
            tokens = original(*arguments, **options)
            return replace(tokens, value=(tokens.value + tokens.cell_of_token()).astype(np.float32))

        return tokenize

    @staticmethod
    def log_normalised_values_are_taken_as_counts(model: ToyModel, original: Any) -> Any:
        def tokenize(indptr: Any, indices: Any, data: Any, match: Any, **options: Any) -> Tokens:
            tokens = original(indptr, indices, np.rint(data), match, **options)
            return tokens

        return tokenize

    @staticmethod
    def padding_is_pooled(model: ToyModel, original: Any) -> Any:
        return lambda x, is_gene, readout: x.mean(1)

    @staticmethod
    def a_cell_sees_its_batch(model: ToyModel, original: Any) -> Any:
        return lambda gene_id, value: original(gene_id, value) + value.mean()

    @staticmethod
    def random_weights_ignore_the_seed(model: ToyModel, original: Any) -> Any:
        return lambda seed: original(seed=0)


@pytest.mark.parametrize(
    ("part", "broken", "test"),
    [
        ("tokenize", Broken.tokens_of_a_cell_depend_on_its_place, "test_a_cells_tokens_depend_on_cell_and_seed_alone"),
        (
            "tokenize",
            Broken.log_normalised_values_are_taken_as_counts,
            "test_log_normalised_values_give_the_tokens_of_the_counts",
        ),
        ("pool", Broken.padding_is_pooled, "test_batches_and_their_padding_do_not_change_a_cell"),
        ("input_embedding", Broken.a_cell_sees_its_batch, "test_batches_and_their_padding_do_not_change_a_cell"),
        ("reset_weights", Broken.random_weights_ignore_the_seed, "test_random_weights_are_a_seeded_control"),
    ],
)
def test_a_broken_promise_is_found(
    tmp_path: Path, toy_plug_in: None, monkeypatch: pytest.MonkeyPatch, part: str, broken: Any, test: str
) -> None:
    folder, counts = write_toy(tmp_path / "toy"), random_counts(len(SYMBOLS))
    run = getattr(ModelConformance(), test)

    def verdict() -> None:
        model = load_model(folder)
        given = {"checkpoint": folder, "model": model, "counts": counts, "symbols": SYMBOLS}
        given["tokens"] = tokens_of(model, counts, SYMBOLS)
        run(**{name: given[name] for name in signature(run).parameters})

    verdict()
    whole = getattr(ToyModel, part)
    monkeypatch.setattr(
        ToyModel, part, lambda self, *a, **k: broken(self, lambda *b, **c: whole(self, *b, **c))(*a, **k)
    )
    with pytest.raises(AssertionError):
        verdict()
