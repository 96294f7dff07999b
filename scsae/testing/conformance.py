"""The conformance suite: what scsae assumes of every foundation model, as tests that run on any of them.

A subclass in a test file gives a tiny checkpoint folder, with random weights in the layout of the family, and inherits
the tests:

    from scsae.testing.conformance import ModelConformance

    class TestMyModel(ModelConformance):
        family = "my-family"

        @pytest.fixture
        def checkpoint(self, tmp_path):
            return write_tiny_checkpoint(tmp_path / "tiny")

The model needs at least two blocks and 10 genes. It is loaded by `load_model`, so the entry point of its package is
tested as well. The tests run in seconds for a model of a few thousand weights.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from sae_core.errors import ConfigError, TokenizationError, VocabularyError
from sae_core.scfm import CachedActivations, Site, load_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from sae_core.scfm import FoundationModel, Patch, TokenInfo, Tokens

EMPTY_CELL = 3
"""The cell of `random_counts` that has no count."""
UNKNOWN_GENES = ("not-a-gene-1", "not-a-gene-2")
_MAX_GENES = 40


def random_counts(n_genes: int) -> sp.csr_matrix:
    """Poisson counts of 12 cells, the fourth without any; at least three genes in each of the others."""
    rng = np.random.default_rng(0)
    depth = np.array([0.1, 0.2, 0.4, 0.0, 0.8, 1.0, 0.3, 0.5, 0.15, 0.9, 0.6, 0.25])
    dense = rng.poisson(depth[:, None] * rng.gamma(1.0, 1.0, n_genes)).astype(np.float32)
    dense[depth > 0, :3] += 1
    return sp.csr_matrix(dense)


def tokens_of(
    model: FoundationModel, counts: sp.csr_matrix, symbols: Sequence[str], *, seed: int = 0, **options: Any
) -> Tokens:
    """The tokens of counts in CSR form, a row a cell and a column a symbol, of cells of which nothing else is known."""
    match = model.match_genes(symbols)
    obs = missing_obs(model, counts)
    return model.tokenize(counts.indptr, counts.indices, counts.data, match, seed=seed, obs=obs, **options)


def missing_obs(model: FoundationModel, counts: sp.csr_matrix) -> dict[str, list[str]] | None:
    """The columns of obs that the model needs, missing in every cell."""
    return {column: [""] * counts.shape[0] for column in model.obs_columns} or None


def cells_of(tokens: Tokens) -> list[tuple[bytes, ...]]:
    """The genes, values and flags of the tokens of each cell, as bytes."""
    cuts = zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)
    return [tuple(a[i:j].tobytes() for a in (tokens.gene_id, tokens.value, tokens.is_special)) for i, j in cuts]


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaN included."""
    return torch.equal(a.nan_to_num(nan=7.0), b.nan_to_num(nan=7.0))


def relative_error(rough: torch.Tensor, exact: torch.Tensor) -> float:
    """Root mean square error of activations, divided by their root mean square."""
    return float((rough - exact).double().norm() / exact.double().norm())


class ModelConformance:
    """The promises of a foundation model; a subclass overrides `checkpoint`, and what else differs."""

    family: ClassVar[str | None] = None
    """Name of the family; None checks none."""
    has_pretraining_head: ClassVar[bool] = True
    """Whether the checkpoint has the weights of the pretraining head; without them its loss has to be refused."""
    has_fixed_special_tokens: ClassVar[bool] = True
    """Whether a cell has the same special tokens whichever of its genes go in (UCE's name the genes' chromosomes)."""
    tolerance: ClassVar[float] = 1e-5
    """Largest difference of an activation between two batches, for activations about 1."""

    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        """A tiny checkpoint folder of the family; it has to be overridden."""
        pytest.fail("override the fixture `checkpoint` with one that returns a checkpoint folder")

    @pytest.fixture
    def model(self, checkpoint: Path) -> FoundationModel:
        """The model in the folder."""
        return load_model(checkpoint)

    @pytest.fixture
    def symbols(self, model: FoundationModel) -> list[str]:
        """Genes of the data, all of them known to the model, as a data set names them."""
        vocabulary = model.vocabulary
        return [token for token in vocabulary.tokens if token not in vocabulary.special][:_MAX_GENES]

    @pytest.fixture
    def counts(self, symbols: list[str]) -> sp.csr_matrix:
        """The counts of the data, a column a symbol (`random_counts`)."""
        return random_counts(len(symbols))

    @pytest.fixture
    def tokens(self, model: FoundationModel, counts: sp.csr_matrix, symbols: list[str]) -> Tokens:
        """The tokens of the counts."""
        return tokens_of(model, counts, symbols)

    @pytest.fixture
    def pretraining(self) -> None:
        """Skip a test of the pretraining head where the checkpoint has none."""
        if not self.has_pretraining_head:
            pytest.skip("the checkpoint has no weights of the pretraining head")

    def test_the_family_is_recognised_from_the_folder_and_the_model_is_ready(
        self, model: FoundationModel, checkpoint: Path, symbols: list[str]
    ) -> None:
        assert self.family in (None, model.family)
        assert model.name == checkpoint.resolve().name
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert model.n_layers == len(model.blocks) >= 2
        assert "mean" in model.readouts
        assert len(symbols) >= 10
        assert model.match_genes(symbols).n_matched == len(symbols)

    def test_the_digest_is_one_of_the_content_and_not_of_the_place(
        self, model: FoundationModel, checkpoint: Path, tmp_path: Path
    ) -> None:
        moved = tmp_path / "moved" / "elsewhere"
        shutil.copytree(checkpoint, moved)
        assert len(model.digest) == 64
        assert set(model.digest) <= set("0123456789abcdef")
        assert load_model(checkpoint).digest == load_model(moved).digest == model.digest

    def test_loading_leaves_the_generator_of_torch_alone(self, checkpoint: Path) -> None:
        before = torch.random.get_rng_state()
        load_model(checkpoint)
        assert torch.equal(torch.random.get_rng_state(), before)

    def test_a_cells_tokens_depend_on_cell_and_seed_alone(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        order = np.random.default_rng(1).permutation(counts.shape[0])
        whole, shuffled = cells_of(tokens), cells_of(tokens_of(model, counts[order], symbols))
        assert [whole[i] for i in order] == shuffled
        assert whole == [cells_of(tokens_of(model, counts[[i]], symbols))[0] for i in range(counts.shape[0])]

    def test_tokens_do_not_depend_on_the_order_of_the_columns(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        order = np.random.default_rng(2).permutation(counts.shape[1])
        permuted = tokens_of(model, sp.csr_matrix(counts[:, order]), [symbols[i] for i in order])
        assert cells_of(permuted) == cells_of(tokens)

    def test_columns_of_one_gene_are_added(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        half = counts.copy()
        half.data = np.floor(half.data / 2)
        split = sp.csr_matrix(sp.hstack([half, counts - half]))
        assert cells_of(tokens_of(model, split, [*symbols, *symbols])) == cells_of(tokens)

    def test_genes_that_the_model_does_not_know_have_no_token(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        unknown = sp.csr_matrix(np.full((counts.shape[0], len(UNKNOWN_GENES)), 5, dtype=np.float32))
        more = sp.csr_matrix(sp.hstack([unknown, counts]))
        found = tokens_of(model, more, [*UNKNOWN_GENES, *symbols])
        assert model.match_genes([*UNKNOWN_GENES, *symbols]).n_matched == len(symbols)
        np.testing.assert_array_equal(found.gene_id, tokens.gene_id)
        np.testing.assert_array_equal(found.offsets, tokens.offsets)

    def test_of_chosen_genes_alone_come_tokens_and_a_cell_without_any_has_none(
        self, model: FoundationModel, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        dense = counts.toarray()
        dense[5, 1:20] = 0
        x = sp.csr_matrix(dense)
        whole, match = tokens_of(model, x, symbols), model.match_genes(symbols)
        wanted = np.unique(match.token_id[1:20][match.matched[1:20]])
        obs = missing_obs(model, x)
        found = model.tokenize(x.indptr, x.indices, x.data, match.only(wanted), seed=0, obs=obs)
        assert found.n_cells == whole.n_cells
        assert set(found.gene_id[~found.is_special]) <= set(wanted)
        assert found.lengths[[EMPTY_CELL, 5]].tolist() == [0, 0]
        if (whole.lengths < (model.max_genes or 1000)).all():
            # cell 5 expresses none of them, so it has no tokens, not even with zeros
            keep = np.isin(whole.gene_id, wanted) & ~whole.is_special & (found.lengths[whole.cell_of_token()] > 0)
            np.testing.assert_array_equal(found.gene_id[~found.is_special], whole.gene_id[keep])
        chosen = match.only(match.token_id[match.matched])
        every = model.tokenize(x.indptr, x.indices, x.data, chosen, seed=0, obs=obs)
        assert cells_of(every) == cells_of(whole)

    def test_log_normalised_values_give_the_tokens_of_the_counts(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        logged = counts.copy()
        total = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
        logged.data = np.log1p(counts.data / np.repeat(total, np.diff(counts.indptr)) * 1e4).astype(np.float32)
        found = tokens_of(model, logged, symbols)
        np.testing.assert_array_equal(found.gene_id, tokens.gene_id)
        np.testing.assert_allclose(found.value, tokens.value, rtol=1e-6)

    def test_scaled_values_are_refused(self, model: FoundationModel, symbols: list[str]) -> None:
        row = [-1.0, 2.0] + [0.5] * (len(symbols) - 2)
        with pytest.raises(TokenizationError, match=r"-1 and 2.*--matrix"):
            tokens_of(model, sp.csr_matrix(np.array([row], dtype=np.float32)), symbols)

    def test_data_without_a_known_gene_are_refused_with_their_genes(self, model: FoundationModel) -> None:
        with pytest.raises(VocabularyError, match=UNKNOWN_GENES[0]):
            model.match_genes(UNKNOWN_GENES)

    def test_a_cell_without_a_known_gene_is_kept_without_tokens_and_embedded_as_nan(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        assert tokens.n_cells == counts.shape[0]
        assert tokens.lengths[EMPTY_CELL] == 0
        coverage = model.coverage(counts.indptr, counts.indices, counts.data, model.match_genes(symbols))
        assert np.flatnonzero(coverage.is_empty).tolist() == [EMPTY_CELL]
        for readout in ("official", *model.readouts):
            embedded = model.embed(tokens, readout=readout)
            assert embedded.isnan().all(1).nonzero().flatten().tolist() == [EMPTY_CELL]
            assert embedded[:EMPTY_CELL].isfinite().all()

    def test_data_of_empty_cells_only_run_through(self, model: FoundationModel, symbols: list[str]) -> None:
        tokens = tokens_of(model, sp.csr_matrix(np.zeros((3, len(symbols)), dtype=np.float32)), symbols)
        assert tokens.n_tokens == 0
        assert model.embed(tokens).isnan().all()
        assert model.activations(tokens, ["layer.0"])[Site.parse("layer.0")].shape == (0, model.d_model)
        if self.has_pretraining_head:
            assert int(model.pretraining_loss(tokens).n_masked.sum()) == 0

    def test_some_cells_can_be_taken_in_any_order(self, tokens: Tokens) -> None:
        order, whole = [7, EMPTY_CELL, 0, 7], cells_of(tokens)
        assert cells_of(tokens.take(np.array(order))) == [whole[i] for i in order]
        assert tokens.take(np.array([], dtype=np.int64)).n_cells == 0

    def test_max_tokens_is_kept_with_the_special_tokens(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        cut, n = tokens_of(model, counts, symbols, max_tokens=6), counts.shape[0]
        assert cut.lengths.max() == 6
        n_special = np.bincount(tokens.cell_of_token(), tokens.is_special, minlength=n)
        kept = np.bincount(cut.cell_of_token(), cut.is_special, minlength=n)
        if self.has_fixed_special_tokens:
            np.testing.assert_array_equal(kept, n_special)
        else:
            assert ((kept > 0) == (n_special > 0)).all()
            assert (kept <= n_special).all()
        assert cells_of(cut) == cells_of(tokens_of(model, counts, symbols, max_tokens=6))

    def test_every_site_gives_a_vector_of_d_model_for_each_token(self, model: FoundationModel, tokens: Tokens) -> None:
        assert len(set(model.sites)) == len(model.sites)
        wanted = {"embedding", *(f"layer.{i}" for i in range(model.n_layers))}
        assert wanted <= {str(site) for site in model.sites}
        found = model.activations(tokens, model.sites)
        assert list(found) == list(model.sites)
        for site, x in found.items():
            assert x.shape == (tokens.n_tokens, model.d_model), str(site)
            assert x.dtype == torch.float32
            assert x.isfinite().all(), str(site)

    def test_batches_and_their_padding_do_not_change_a_cell(self, model: FoundationModel, tokens: Tokens) -> None:
        alone, together = (model.activations(tokens, model.sites, max_batch_tokens=n) for n in (1, 64 * _MAX_GENES))
        for site in model.sites:
            torch.testing.assert_close(alone[site], together[site], atol=self.tolerance, rtol=0)
        for readout in model.readouts:
            a, b = (model.embed(tokens, readout=readout, max_batch_tokens=n) for n in (1, 64 * _MAX_GENES))
            torch.testing.assert_close(a, b, atol=self.tolerance, rtol=0, equal_nan=True)

    def test_the_other_cells_of_the_data_do_not_change_a_cell(
        self, model: FoundationModel, tokens: Tokens, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        whole, few = model.embed(tokens), [5, 0, 8]
        some = model.embed(tokens_of(model, counts[few], symbols))
        torch.testing.assert_close(some, whole[few], atol=self.tolerance, rtol=0)

    def test_float64_agrees_with_float32(self, model: FoundationModel, tokens: Tokens) -> None:
        single = model.activations(tokens, model.sites)
        double = model.double().activations(tokens, model.sites)
        for site in model.sites:
            assert double[site].dtype == torch.float64
            torch.testing.assert_close(double[site].float(), single[site], atol=self.tolerance, rtol=0)

    def test_autocast_keeps_float32_activations_and_its_error_is_small(
        self, checkpoint: Path, model: FoundationModel, tokens: Tokens
    ) -> None:
        fast = load_model(checkpoint, autocast=torch.bfloat16)
        assert fast.embed(tokens).dtype == torch.float32
        site = model.default_site
        rough, exact = (m.activations(tokens, [site])[site] for m in (fast, model))
        assert 0 < relative_error(rough, exact) < 0.05

    def test_a_patch_that_changes_nothing_is_bitwise_the_unpatched_run(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        nothing: dict[Site | str, Any] = {site: lambda x, info: x.clone() for site in model.sites}
        plain, patched = model.activations(tokens, model.sites), model.activations(tokens, model.sites, patches=nothing)
        assert all(torch.equal(plain[site], patched[site]) for site in model.sites)
        last = model.sites[-1]
        assert same(model.embed(tokens, site=last), model.embed(tokens, site=last, patches=nothing))
        if self.has_pretraining_head:
            loss, patched_loss = model.pretraining_loss(tokens), model.pretraining_loss(tokens, patches=nothing)
            assert same(loss.per_cell, patched_loss.per_cell)

    def test_a_patch_changes_its_site_and_later_ones_only(self, model: FoundationModel, tokens: Tokens) -> None:
        direction = torch.linspace(-1, 1, model.d_model)
        plain = model.activations(tokens, model.sites)
        for at, patched_site in enumerate(model.sites):
            if patched_site.kind != "final" and patched_site.index in (None, 1):
                patched = model.activations(tokens, model.sites, patches={patched_site: lambda x, info: x + direction})
                for i, site in enumerate(model.sites):
                    unchanged = torch.equal(plain[site], patched[site])
                    assert unchanged == (i < at), f"a patch at {patched_site}, read at {site}"

    def test_a_patch_sees_real_tokens_only_each_once(self, model: FoundationModel, tokens: Tokens) -> None:
        seen: list[TokenInfo] = []

        def note(x: torch.Tensor, info: TokenInfo) -> torch.Tensor:
            seen.append(info)
            return x

        model.activations(tokens, ["layer.0"], patches={"layer.0": note}, max_batch_tokens=50)
        pairs = [(int(c), int(g)) for info in seen for c, g in zip(info.cell, info.gene_id, strict=True)]
        assert sorted(pairs) == sorted(zip(tokens.cell_of_token().tolist(), tokens.gene_id.tolist(), strict=True))
        assert sum(int(info.is_special.sum()) for info in seen) == int(tokens.is_special.sum())

    def test_blocks_after_the_deepest_site_are_not_run(
        self, model: FoundationModel, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model.blocks[-1], "forward", lambda *a, **k: pytest.fail("the last block was run"))
        before = f"layer.{model.n_layers - 2}"
        model.activations(tokens, [before, "embedding"])
        model.embed(tokens, site=before)

    def test_a_site_that_the_model_lacks_and_a_patch_after_the_readout_are_refused(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        last = model.n_layers - 1
        with pytest.raises(ConfigError, match=rf"'layer\.{last + 1}'.*layer\.{last}"):
            model.activations(tokens, [f"layer.{last + 1}"])
        if model.final_norm is None:
            with pytest.raises(ConfigError, match=rf"'final'.*layer\.{last}"):
                model.activations(tokens, ["final"])
        with pytest.raises(ConfigError, match=r"layer\.1 .*layer\.0.*`site`"):
            model.embed(tokens, site="layer.0", patches={"layer.1": lambda x, info: x})

    def test_a_patch_at_any_site_changes_the_embedding_at_its_readout_site(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        for site in model.sites:
            at = model.readout_site(site)
            assert at in (model.default_site, model.sites[-1])
            patched = model.embed(tokens, site=at, patches={site: lambda x, info: x * 1.5 + 0.3})
            assert not same(model.embed(tokens, site=at), patched), str(site)

    def test_a_gpu_gives_the_numbers_of_the_cpu(self, checkpoint: Path, model: FoundationModel, tokens: Tokens) -> None:
        if not torch.cuda.is_available():
            pytest.skip("there is no GPU")
        gpu, site = load_model(checkpoint, device="cuda"), model.default_site
        a, b = (m.activations(tokens, model.sites) for m in (model, gpu))
        for one in model.sites:
            torch.testing.assert_close(a[one], b[one], atol=10 * self.tolerance, rtol=0)
        fast = load_model(checkpoint, device="cuda", autocast=torch.bfloat16)
        assert relative_error(fast.activations(tokens, [site])[site], b[site]) < 0.05

    def test_cached_activations_give_what_the_whole_run_gives(self, model: FoundationModel, tokens: Tokens) -> None:
        site = Site.parse("layer.0")
        x = model.activations(tokens, [site])[site]
        patches: dict[Site | str, Any] = {"layer.1": lambda x, info: x * 0.9}
        at = model.sites[-1]
        torch.testing.assert_close(
            model.embed(tokens, cached=CachedActivations(site, x), site=at, patches=patches),
            model.embed(tokens, site=at, patches=patches),
            equal_nan=True,
        )

    def test_readouts_have_their_width_and_others_are_refused(self, model: FoundationModel, tokens: Tokens) -> None:
        for readout in model.readouts:
            assert model.embed(tokens, readout=readout).shape == (tokens.n_cells, model.width(readout))
        assert same(model.embed(tokens, readout="official"), model.embed(tokens, readout=model.readouts[0]))
        with pytest.raises(ConfigError, match=r"'median'.*mean"):
            model.embed(tokens, readout="median")

    def test_the_mean_readout_is_the_mean_of_the_gene_tokens(self, model: FoundationModel, tokens: Tokens) -> None:
        x = model.activations(tokens, [model.default_site])[model.default_site]
        embedded = model.embed(tokens, readout="mean")
        for cell in np.flatnonzero(tokens.lengths):
            genes = (tokens.cell_of_token() == cell) & ~tokens.is_special
            torch.testing.assert_close(embedded[cell], x[torch.from_numpy(genes)].mean(0), atol=1e-5, rtol=1e-5)

    def test_without_a_pretraining_head_its_loss_and_its_predictions_are_refused(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        if self.has_pretraining_head:
            pytest.skip("the checkpoint has a pretraining head")
        with pytest.raises(ConfigError):
            model.pretraining_loss(tokens)
        with pytest.raises(ConfigError):
            model.masked_gene_prediction(model.mask_genes(tokens, seed=0, fraction=model.mask_fraction))

    @pytest.mark.usefixtures("pretraining")
    def test_the_pretraining_loss_masks_the_same_genes_of_a_cell_in_any_batch(
        self, model: FoundationModel, counts: sp.csr_matrix, tokens: Tokens, symbols: list[str]
    ) -> None:
        loss = model.pretraining_loss(tokens, seed=3)
        assert np.isfinite(loss.mean)
        assert loss.per_cell[EMPTY_CELL].isnan()
        order = np.random.default_rng(5).permutation(counts.shape[0])
        shuffled = model.pretraining_loss(tokens_of(model, counts[order], symbols), seed=3, max_batch_tokens=40)
        torch.testing.assert_close(shuffled.per_cell, loss.per_cell[order], atol=1e-5, rtol=1e-5, equal_nan=True)
        assert torch.equal(shuffled.n_masked, loss.n_masked[order])
        assert model.pretraining_loss(tokens, seed=4).mean != loss.mean

    @pytest.mark.usefixtures("pretraining")
    def test_a_patch_changes_the_pretraining_loss(self, model: FoundationModel, tokens: Tokens) -> None:
        plain = model.pretraining_loss(tokens)
        patched = model.pretraining_loss(tokens, patches={"layer.1": lambda x, info: torch.zeros_like(x)})
        assert torch.equal(plain.n_masked, patched.n_masked)
        assert plain.mean != patched.mean

    @pytest.mark.usefixtures("pretraining")
    def test_there_is_one_prediction_for_each_masked_gene(self, model: FoundationModel, tokens: Tokens) -> None:
        task = model.mask_genes(tokens, seed=3, fraction=model.mask_fraction)
        predicted = model.masked_gene_prediction(task)
        assert predicted.prediction.isfinite().all()
        assert torch.equal(predicted.gene_id, torch.from_numpy(task.gene_id))
        assert predicted.cell.diff().min() >= 0
        n_masked = torch.bincount(predicted.cell, minlength=tokens.n_cells)
        assert torch.equal(model.pretraining_loss(tokens, seed=3).n_masked, n_masked)

    @pytest.mark.usefixtures("pretraining")
    def test_predictions_need_the_last_block_only_where_genes_are_predicted(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        task = model.mask_genes(tokens, seed=3, fraction=model.mask_fraction)
        # a patch at the last block receives all tokens, so that it is run at all of them
        everywhere: dict[Site | str, Patch] = {f"layer.{model.n_layers - 1}": lambda x, info: x}
        predicted = model.masked_gene_prediction(task).prediction
        whole = model.masked_gene_prediction(task, patches=everywhere).prediction
        torch.testing.assert_close(predicted, whole, atol=1e-5, rtol=1e-5)

    @pytest.mark.usefixtures("pretraining")
    def test_predictions_from_cached_activations_are_those_of_the_whole_run_and_masked_genes_are_marked(
        self, model: FoundationModel, tokens: Tokens
    ) -> None:
        task = model.mask_genes(tokens, seed=3, fraction=0.3)
        site, marked = Site.parse("layer.0"), []
        cached = CachedActivations(site, model.activations(task, [site])[site])

        def shrink(x: torch.Tensor, info: TokenInfo) -> torch.Tensor:
            marked.append(info)
            return x * 0.9

        whole, rest = (
            model.masked_gene_prediction(task, patches={"layer.1": shrink}, cached=start) for start in (None, cached)
        )
        assert torch.equal(whole.prediction, rest.prediction)
        pairs = {
            (int(c), int(p))
            for i in marked
            for c, p in zip(i.cell[i.is_masked_gene], i.position[i.is_masked_gene], strict=True)
        }
        rows = np.array([], dtype=int) if task.token_rows is None else task.token_rows
        cell = task.tokens.cell_of_token()[rows]
        assert pairs == set(zip(cell.tolist(), (rows - task.tokens.offsets[cell]).tolist(), strict=True))

    def test_random_weights_are_a_seeded_control(
        self, checkpoint: Path, model: FoundationModel, tokens: Tokens
    ) -> None:
        before = torch.random.get_rng_state()
        models = [model, *(load_model(checkpoint, random_init=True, seed=seed) for seed in (1, 1, 2))]
        assert torch.equal(torch.random.get_rng_state(), before)
        assert len({one.digest for one in models}) == 3
        x = [one.embed(tokens) for one in models]
        assert same(x[1], x[2])
        assert not same(x[0], x[1])
        assert not same(x[1], x[3])
        assert x[1][0].isfinite().all()

    def test_coverage_says_what_matched(
        self, model: FoundationModel, counts: sp.csr_matrix, symbols: list[str]
    ) -> None:
        n_unknown = len(symbols) // 4
        n_known = len(symbols) - n_unknown
        names = [*symbols[:n_known], *(f"unknown{i}" for i in range(n_unknown))]
        match = model.match_genes(names)
        coverage = model.coverage(counts.indptr, counts.indices, counts.data, match)
        dense = counts.toarray()
        assert (coverage.n_genes, coverage.n_matched) == (len(symbols), n_known)
        assert coverage.n_vocabulary == model.vocabulary.n_genes
        assert coverage.share_of_counts == pytest.approx(dense[:, :n_known].sum() / dense.sum())
        np.testing.assert_array_equal(coverage.genes_per_cell, (dense[:, :n_known] > 0).sum(1))
        heaviest = coverage.top_unmatched(names, 1)
        unknown = dense[:, n_known:].sum(0)
        assert heaviest == {f"unknown{unknown.argmax()}": pytest.approx(unknown.max() / dense.sum())}
        assert coverage.value_kind == "counts"
