"""UCE against torch's stock layers, its sentences against a plain procedure, and its files when they are wrong."""

from __future__ import annotations

import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
import torch
import torch.nn.functional as F
from scipy import stats
from tiny_uce import D_OUTPUT, D_TOKEN, FILES, GENES, SYMBOLS, D, place, shapes, write_uce
from torch import nn

from sae_core.errors import CheckpointError, ConfigError, TokenizationError
from sae_core.scfm import UCE, GeneMatch, Site, Tokens, load_model
from sae_core.scfm.uce.files import read_genome
from sae_core.scfm.uce.tokenizer import UCETokenizer
from sae_core.scfm.values import cell_generator

Write = Callable[..., Path]
Weights = dict[str, torch.Tensor]
HUMAN = 7
"""Row of the first gene of human: behind 4 special tokens and 3 genes of frog."""
CHROMOSOMES = ("frog_1", "human_1", "human_2", "human_X", "mouse_1")
FIRST_CHROMOSOME = HUMAN + 40 + 2


@pytest.fixture
def write(tmp_path: Path) -> Write:
    return partial(write_uce, tmp_path)


@pytest.fixture
def model(write: Write) -> UCE:
    return loaded(write())


def loaded(folder: Path, **options: str) -> UCE:
    model = load_model(folder, options=options)
    assert isinstance(model, UCE)
    return model


def tokens_of(model: UCE, x: sp.csr_matrix, symbols: list[str] = SYMBOLS, **options: int) -> Tokens:
    return model.tokenize(x.indptr, x.indices, x.data, model.match_genes(symbols), **{"seed": 0, **options})


# the network


def by_torch(w: Weights, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """Every site and the cell by stock layers, for one cell, from the file's own weights."""
    rows = w["pe_embedding.weight"][ids]
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=1e-12)
    hidden = F.gelu(rows @ w["encoder.0.weight"].T + w["encoder.0.bias"])
    x = F.layer_norm(hidden, (D,), w["encoder.2.weight"], w["encoder.2.bias"]) * D**0.5
    x = (x + w["pos_encoder.pe"][: len(ids), 0])[:, None]
    found = {"embedding": x}
    for i in range(sum("norm1.bias" in key for key in w)):
        prefix = f"transformer_encoder.layers.{i}."
        layer = nn.TransformerEncoderLayer(D, 20, dim_feedforward=w[f"{prefix}linear1.bias"].numel(), dropout=0.0)
        layer.load_state_dict({k.removeprefix(prefix): v for k, v in w.items() if k.startswith(prefix)})
        # in training mode, so that torch's fused path does not pass the parts by
        layer.train()
        layer.self_attn.register_forward_hook(lambda m, a, out, i=i: found.update({f"attention.{i}": out[0]}))
        layer.linear2.register_forward_hook(lambda m, a, out, i=i: found.update({f"mlp.{i}": out}))
        x = found[f"layer.{i}"] = layer(x)
    cell = x[0]
    for i in range(3):
        cell = cell @ w[f"decoder.{i}.0.weight"].T + w[f"decoder.{i}.0.bias"]
        cell = F.gelu(F.layer_norm(cell, cell.shape[1:], w[f"decoder.{i}.1.weight"], w[f"decoder.{i}.1.bias"]))
    cell = cell @ w["decoder.3.weight"].T + w["decoder.3.bias"]
    return {name: site[:, 0].detach() for name, site in found.items()} | {"cell": cell[0] / cell.norm()}


@pytest.mark.parametrize("max_batch_tokens", [1, 10_000])
def test_every_site_and_the_cell_equal_torchs_layers_alone_and_padded(
    write: Write, counts: sp.csr_matrix, max_batch_tokens: int
) -> None:
    folder = write()
    model, w = loaded(folder), torch.load(folder / "4layer_model.torch", weights_only=True)
    shorter = counts.toarray()
    # of the second half of the cells only genes of one chromosome, so that sentences differ in length
    shorter[6:, [i for i in range(40) if place("human", i)[0] != "1"]] = 0
    tokens = tokens_of(model, sp.csr_matrix(shorter))
    assert len(np.unique(tokens.lengths[tokens.lengths > 0])) > 1
    found = model.activations(tokens, model.sites, max_batch_tokens=max_batch_tokens)
    embedded = model.embed(tokens, readout="official", max_batch_tokens=max_batch_tokens)
    mean = model.embed(tokens, readout="mean", max_batch_tokens=max_batch_tokens)
    assert embedded.shape == (12, D_OUTPUT)
    for cell in np.flatnonzero(tokens.lengths):
        here = slice(*tokens.offsets[cell : cell + 2])
        expected = by_torch(w, torch.from_numpy(tokens.gene_id[here]))
        assert {str(site) for site in model.sites} | {"cell"} == expected.keys()
        for site in model.sites:
            torch.testing.assert_close(found[site][here], expected[str(site)], atol=1e-5, rtol=0)
        torch.testing.assert_close(embedded[cell], expected["cell"], atol=1e-5, rtol=0)
        genes = torch.from_numpy(~tokens.is_special[here])
        torch.testing.assert_close(mean[cell], expected["layer.2"][genes].mean(0), atol=1e-5, rtol=0)


def test_the_sinusoids_are_those_of_the_file(write: Write, counts: sp.csr_matrix) -> None:
    zero = loaded(write("zero", edit=lambda w: w | {"pos_encoder.pe": torch.zeros_like(w["pos_encoder.pe"])}))
    plain = loaded(write("plain"))
    tokens = tokens_of(plain, counts)
    site = Site.parse("embedding")
    difference = plain.activations(tokens, [site])[site] - zero.activations(tokens, [site])[site]
    position = torch.from_numpy(np.concatenate([np.arange(n) for n in tokens.lengths]))
    angle = position[:, None] / 10_000 ** (torch.arange(0, D, 2) / D)
    torch.testing.assert_close(difference[:, 0::2], angle.sin(), atol=1e-4, rtol=0)
    torch.testing.assert_close(difference[:, 1::2], angle.cos(), atol=1e-4, rtol=0)


def mapped_file(address: int) -> str | None:
    """The file that lies at an address of this process."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        bounds, _, *_, last = line.split(maxsplit=5)
        low, high = (int(bound, 16) for bound in bounds.split("-"))
        if low <= address < high:
            return last if last.startswith("/") else None
    return None


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_table_is_mapped_and_no_parameter_and_random_weights_leave_it(write: Write) -> None:
    folder = write()
    model, control = loaded(folder), load_model(folder, random_init=True, seed=3)
    assert isinstance(control, UCE)
    assert not any("pe_embedding" in name for name in model.state_dict())
    assert mapped_file(model.table.rows.data_ptr()) == str(folder / "4layer_model.torch")
    assert mapped_file(model.blocks[0].linear1.weight.data_ptr()) is None
    assert torch.equal(control.table.rows, model.table.rows)
    assert torch.equal(control.pos_encoder.pe, model.pos_encoder.pe)
    assert not torch.equal(control.state_dict()["decoder.3.weight"], model.state_dict()["decoder.3.weight"])
    assert model.double().table.rows.dtype == torch.float32


def test_hidden_genes_are_refused_with_the_reason(model: UCE, counts: sp.csr_matrix) -> None:
    with pytest.raises(ConfigError, match="no way to hide and predict genes"):
        model.pretraining_loss(tokens_of(model, counts))


# the sentences


def sentence_by_hand(
    gene_id: np.ndarray, count: np.ndarray, chromosome: np.ndarray, start: np.ndarray, *, n_draws: int, seed: int
) -> list[int]:
    """A sentence written word by word, from draws and a shuffle in the order in which the authors' code makes them."""
    rng = cell_generator(seed, gene_id, count.astype(np.float64))
    weight = np.log1p(count.astype(np.float64))
    drawn = gene_id[rng.choice(np.arange(len(weight)), size=n_draws, p=weight / weight.sum(), replace=True)]
    order = np.unique(chromosome[drawn])
    rng.shuffle(order)
    words = [3]
    for one in order:
        words.append(int(one))
        words += sorted((int(g) for g in drawn if chromosome[g] == one), key=lambda g: (start[g], g))
        words.append(2)
    return words


def test_tokens_of_two_real_cells_are_the_sentences_written_by_hand(write: Write, scsae_data: Path) -> None:
    data = anndata.read_h5ad(scsae_data / "kang18_ifnb_2000x9015_counts.h5ad", backed="r")[[0, 700]].to_memory()
    x, names = sp.csr_matrix(data.X), list(data.var_names)
    known = [name for i, name in enumerate(names) if i % 7]
    model = loaded(write(genes={"frog": ["F"], "human": known, "mouse": ["M"]}, n_positions=1536))
    assert model.max_genes == 1024
    match = model.match_genes(names)
    assert match.n_matched == len(known)
    tokens = tokens_of(model, x, names, seed=5)
    row_of = {name: 5 + i for i, name in enumerate(known)}
    first = 4 + 1 + len(known) + 1
    chromosome, start = np.full(first, -1), np.zeros(first)
    for i, name in enumerate(known):
        where, start[row_of[name]] = place("human", i)
        chromosome[row_of[name]] = first + CHROMOSOMES.index(f"human_{where}")
    for cell in range(2):
        values = x[[cell]].toarray()[0]
        of_gene = {row_of[n]: v for n, v in zip(names, values, strict=True) if v > 0 and n in row_of}
        ids = np.array(sorted(of_gene))
        hand = sentence_by_hand(ids, np.array([of_gene[i] for i in ids]), chromosome, start, n_draws=1024, seed=5)
        here = slice(*tokens.offsets[cell : cell + 2])
        assert tokens.gene_id[here].tolist() == hand
        assert len(hand) == 1 + 1024 + 2 * 3
        # of the expressed genes some are never drawn, and some more than once
        drawn = tokens.gene_id[here][~tokens.is_special[here]]
        assert len(np.unique(drawn)) < min(1024, len(ids))
        np.testing.assert_allclose(tokens.value[here][~tokens.is_special[here]], np.log1p([of_gene[g] for g in drawn]))


def small(**settings: int) -> UCETokenizer:
    """A tokenizer of genes 4 to 9, on chromosomes 10 (4, 6, 8), 11 (5, 7) and 12 (9); 6 and 8 start at one place."""
    chromosome = np.array([-1] * 4 + [10, 11, 10, 11, 10, 12] + [-1] * 3)
    start = np.array([0] * 4 + [500, 10, 90, 5, 90, 1] + [0] * 3, dtype=np.float64)
    return UCETokenizer(chromosome=chromosome, start=start, **{"n_draws": 30, "max_positions": 64, **settings})


def sentences(tokenizer: UCETokenizer, rows: list[list[float]], *, seed: int = 0, **options: int) -> list[list[int]]:
    x = sp.csr_matrix(np.array(rows, dtype=np.float64))
    match = GeneMatch(token_id=np.arange(4, 10), matched=np.ones(6, dtype=bool))
    tokens = tokenizer(x.indptr, x.indices, x.data, match, seed=seed, **options)
    return [tokens.gene_id[a:b].tolist() for a, b in zip(tokens.offsets[:-1], tokens.offsets[1:], strict=True)]


def test_a_sentence_names_each_drawn_chromosome_once_with_its_genes_by_start_and_ties_by_row() -> None:
    orders = set()
    for seed in range(40):
        (words,) = sentences(small(), [[3, 1, 9, 2, 9, 1]], seed=seed)
        assert words[0] == 3
        opened = [i for i, word in enumerate(words) if word >= 10]
        ends = [i for i, word in enumerate(words) if word == 2]
        assert len(opened) == len(ends) == len({words[i] for i in opened})
        assert [end + 1 for end in ends[:-1]] == opened[1:]
        assert ends[-1] == len(words) - 1
        orders.add(tuple(words[i] for i in opened))
        by_start = {10: [6, 8, 4], 11: [7, 5], 12: [9]}
        for a, b in zip(opened, ends, strict=True):
            genes = words[a + 1 : b]
            assert genes == sorted(genes, key=by_start[words[a]].index)
        assert len(words) == 1 + 30 + 2 * len(opened)
    # chromosomes are shuffled
    assert {order[0] for order in orders} == {10, 11, 12}


def test_genes_are_drawn_in_proportion_to_log1p_of_their_counts() -> None:
    count = np.array([0, 1, 2, 5, 20, 300])
    (words,) = sentences(small(n_draws=60_000, max_positions=10**6), [count.tolist()])
    drawn = np.bincount([word for word in words if 4 <= word < 10], minlength=10)[4:10]
    assert drawn[0] == 0
    weight = np.log1p(count[1:])
    assert stats.chisquare(drawn[1:], 60_000 * weight / weight.sum()).pvalue > 0.01


def test_draws_follow_the_seed_and_the_cell_alone() -> None:
    cells = [[3, 1, 9, 2, 9, 1], [0, 0, 0, 0, 0, 0], [3, 1, 9, 2, 9, 2], [3, 1, 9, 2, 9, 1]]
    found = sentences(small(), cells)
    assert found[0] == found[3] != found[2]
    assert found[1] == []
    assert sentences(small(), cells[2:]) == found[2:]
    assert sentences(small(), cells, seed=1)[0] != found[0]


def test_a_sentence_that_is_too_long_keeps_the_first_draws_that_fit() -> None:
    row = [[3, 1, 9, 2, 9, 1]]
    (whole,) = sentences(small(n_draws=9), row)
    for limit in range(4, len(whole) + 3):
        (cut,) = sentences(small(n_draws=9), row, max_tokens=limit)
        assert len(cut) <= limit
        assert set(cut) <= set(whole)
        # a draw that does not fit opens a chromosome, which takes three places
        assert len(cut) > min(limit, len(whole)) - 3
        (by_positions,) = sentences(small(n_draws=9, max_positions=limit), row)
        assert by_positions == cut
    assert sentences(small(n_draws=9), row, max_tokens=len(whole)) == [whole]
    with pytest.raises(ConfigError, match="3; allowed: 4"):
        sentences(small(), row, max_tokens=3)


def test_values_that_are_no_counts_are_refused_and_not_cut_to_whole_numbers() -> None:
    with pytest.raises(TokenizationError, match=r"1\.5.*--matrix"):
        sentences(small(), [[1.5, 0.7, 2.31, 0.2, 1.1, 0.4]])


# genes and species


def test_symbols_match_in_upper_case_and_ids_by_a_table_of_ones_own(write: Write) -> None:
    folder = write()
    model = loaded(folder)
    mixed = [symbol.lower() if i % 2 else symbol for i, symbol in enumerate(SYMBOLS)]
    np.testing.assert_array_equal(model.match_genes(mixed).token_id, HUMAN + np.arange(40))
    assert model.match_genes(["gene1", "ENSG00000000003.7", "<cls>", "FROG0"]).n_matched == 1
    (folder / "vocab_ensembl.json").write_text(json.dumps({"ENSG00000000003": "GENE5"}))
    with_ids = loaded(folder)
    match = with_ids.match_genes(["gene1", "ENSG00000000003.7"])
    np.testing.assert_array_equal(match.token_id, [HUMAN + 1, HUMAN + 5])
    assert with_ids.digest != model.digest


def test_a_species_has_its_own_rows_and_chromosomes(write: Write) -> None:
    folder = write()
    human, mouse = loaded(folder), loaded(folder, species="mouse")
    assert human.vocabulary.n_genes == 40
    assert mouse.vocabulary.n_genes == 2
    assert mouse.match_genes(["Gene2", "Mouse0"]).token_id.tolist() == [HUMAN + 40, HUMAN + 41]
    x = sp.csr_matrix(np.array([[4.0, 2.0]]))
    tokens = tokens_of(mouse, x, ["Gene2", "Mouse0"])
    assert set(tokens.gene_id) == {3, 2, HUMAN + 40, HUMAN + 41, FIRST_CHROMOSOME + 4}
    assert mouse.digest != human.digest
    assert "genes of mouse (2)" in mouse.notes[0]
    with pytest.raises(ConfigError, match=r"'rat'; allowed: frog, human, mouse.*species_offsets\.pkl"):
        load_model(folder, options={"species": "rat"})


def test_a_chromosome_has_the_row_of_its_rank_so_a_species_more_in_the_file_moves_it(write: Write) -> None:
    folder = write()
    path = folder / "species_chrom.csv"
    vocabulary = loaded(folder).vocabulary
    for rank, name in enumerate(CHROMOSOMES):
        assert vocabulary.id_of(f"<chromosome {name}>") == FIRST_CHROMOSOME + rank
    assert read_genome(path, "human").chromosomes == CHROMOSOMES
    path.write_text(path.read_text() + "ape,GENE1,7,5\n")
    assert read_genome(path, "human").chromosomes == ("ape_7", *CHROMOSOMES)
    with pytest.raises(CheckpointError, match="mouse"):
        # the table has no row for it, so the rows before the chromosomes would end too early
        loaded(folder, species="mouse")


def test_genes_without_a_place_are_no_tokens_and_the_first_of_a_repeated_symbol_holds(write: Write) -> None:
    folder = write()
    path = folder / "species_chrom.csv"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("human,GENE7,")]
    lines += ["human,GENE8,X,1"]
    path.write_text("\n".join(lines))
    model = loaded(folder)
    match = model.match_genes(SYMBOLS)
    assert np.flatnonzero(~match.matched).tolist() == [7]
    assert model.tokenizer.chromosome[HUMAN + 8] == FIRST_CHROMOSOME + CHROMOSOMES.index(
        f"human_{place('human', 8)[0]}"
    )
    assert any("1 genes with a protein vector are no tokens" in note for note in model.notes)
    assert any("1 rows of species_chrom.csv repeat" in note for note in model.notes)


def test_symbols_that_differ_in_case_are_one_row(write: Write) -> None:
    folder = write()
    content = {"gene0": torch.zeros(1), "GENE0": torch.zeros(1), **{s: torch.zeros(1) for s in SYMBOLS[1:]}}
    torch.save(content, folder / "protein_embeddings" / FILES["human"])
    assert loaded(folder).match_genes(["GENE0", "GENE1"]).token_id.tolist() == [HUMAN, HUMAN + 1]


# the files


def official_names(n_layers: int) -> set[str]:
    """Every key of an official state dict, written out."""
    both = ("weight", "bias")
    names = {"pe_embedding.weight", "pos_encoder.pe"}
    names |= {f"{m}.{i}.{b}" for m in ("encoder", "gene_embedding_layer") for i in (0, 2) for b in both}
    names |= {f"{m}.{i}.{j}.{b}" for m in ("decoder", "binary_decoder") for i in range(3) for j in (0, 1) for b in both}
    names |= {f"{m}.3.{b}" for m in ("decoder", "binary_decoder") for b in both}
    parts = ("self_attn.out_proj", "linear1", "linear2", "norm1", "norm2")
    for i in range(n_layers):
        layer = f"transformer_encoder.layers.{i}"
        names |= {f"{layer}.self_attn.in_proj_{b}" for b in both} | {f"{layer}.{p}.{b}" for p in parts for b in both}
    return names


@pytest.mark.parametrize(("n_layers", "file"), [(4, "4layer_model.torch"), (33, "33l_8ep_1024t_1280.torch")])
def test_every_weight_of_an_official_file_is_read_or_named(write: Write, n_layers: int, file: str) -> None:
    assert shapes(n_rows=5, n_layers=n_layers).keys() == official_names(n_layers)
    model = loaded(write(file=file, n_layers=n_layers))
    assert model.n_layers == n_layers
    unread = {
        name for name in official_names(n_layers) if name.startswith(("binary_decoder.", "gene_embedding_layer."))
    }
    assert set(model.ignored_weights) == unread
    assert any("binary_decoder, gene_embedding_layer" in note for note in model.notes)
    own = {name.replace(".Wqkv.", ".in_proj_") for name in model.state_dict()}
    assert own == official_names(n_layers) - unread - {"pe_embedding.weight"}


def test_a_prefix_of_training_on_several_devices_and_a_wrapped_state_dict_are_read(write: Write) -> None:
    plain = loaded(write("plain")).state_dict()
    prefixed = loaded(write("prefixed", edit=lambda w: {f"module.{k}": v for k, v in w.items()})).state_dict()
    assert all(torch.equal(prefixed[key], value) for key, value in plain.items())


def test_the_table_of_the_weights_holds_unless_a_file_of_tokens_has_another_number_of_rows(write: Write) -> None:
    n_rows = FIRST_CHROMOSOME + 5
    same = loaded(write("same", tokens=torch.full((n_rows, D_TOKEN), 7.0)))
    plain = loaded(write("plain"))
    assert torch.equal(same.table.rows, plain.table.rows)
    # as for a species that was added: its own rows, genes and chromosomes
    own = write("own", tokens=torch.full((4 + 6 + 2, D_TOKEN), 7.0))
    (own / "species_offsets.pkl").write_bytes(pickle.dumps({"ape": 4}))
    (own / "species_chrom.csv").write_text("species,gene_symbol,chromosome,start\nape,A,1,3\nape,B,2,3\n")
    (own / "new_species_protein_embeddings.csv").write_text("species,path\nape,/elsewhere/ape.pt\n")
    torch.save(dict.fromkeys("ABCDEF", torch.zeros(3)), own / "protein_embeddings" / "ape.pt")
    model = loaded(own, species="ape")
    assert float(model.table.rows.min()) == 7.0
    assert model.vocabulary.id_of("<chromosome ape_2>") == 4 + 6 + 1
    assert any("all_tokens.torch (12)" in note for note in model.notes)
    assert any("4 genes with a protein vector are no tokens" in note for note in model.notes)


def test_chromosomes_of_a_table_without_them_are_those_that_the_authors_code_draws(write: Write) -> None:
    rows = torch.zeros(143_574, D_TOKEN)
    rows[HUMAN + 3] = torch.arange(D_TOKEN)
    folder = write(edit=lambda w: {k: v for k, v in w.items() if k != "pe_embedding.weight"}, tokens=rows)
    (folder / "species_offsets.pkl").write_bytes(pickle.dumps({"frog": 4, "human": 7}))
    model = loaded(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(23)
        drawn = torch.normal(mean=0, std=1, size=(1895, D_TOKEN))
    assert len(model.table) == 145_469
    found = model.table[torch.tensor([HUMAN + 3, 143_574, 145_468])]
    assert torch.equal(found, torch.stack([rows[HUMAN + 3], drawn[0], drawn[-1]]))
    assert model.vocabulary.id_of("<chromosome human_X>") == 143_574 + 3
    assert any("seed 23" in note for note in model.notes)
    assert any("5 chromosomes and the table rows for 1,895" in note for note in model.notes)
    assert any("rows behind those of human" in note for note in model.notes)


@pytest.mark.parametrize(
    "name",
    ["4layer_model.torch", "species_chrom.csv", "species_offsets.pkl", f"protein_embeddings/{FILES['human']}"],
)
def test_a_missing_file_is_named(write: Write, name: str) -> None:
    folder = write()
    (folder / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} (or .* )?is missing"):
        load_model(folder)


def test_a_packed_folder_of_proteins_is_recognised(write: Write) -> None:
    folder = write()
    (folder / "protein_embeddings" / FILES["human"]).unlink()
    (folder / "protein_embeddings.tar.gz").write_bytes(b"\x1f\x8b")
    with pytest.raises(CheckpointError, match=r"unpack protein_embeddings\.tar\.gz"):
        load_model(folder)


def test_without_any_table_the_file_that_is_needed_is_named(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"lack pe_embedding\.weight, and all_tokens\.torch is missing"):
        load_model(write(edit=lambda w: {k: v for k, v in w.items() if k != "pe_embedding.weight"}))


def test_of_two_models_in_a_folder_one_has_to_be_named(write: Write) -> None:
    folder = write()
    (folder / "33l_8ep_1024t_1280.torch").write_bytes((folder / "4layer_model.torch").read_bytes())
    with pytest.raises(CheckpointError, match=r"33l_8ep.*4layer.*--model-option weights="):
        load_model(folder)
    assert loaded(folder, weights="33l_8ep_1024t_1280.torch").n_layers == 3
    with pytest.raises(ConfigError, match=r"'other'; allowed: 33l_8ep"):
        load_model(folder, options={"weights": "other"})


@pytest.mark.parametrize(
    "key", ["encoder.2.bias", "decoder.3.bias", "transformer_encoder.layers.1.self_attn.in_proj_bias"]
)
def test_a_missing_weight_is_named(write: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"missing {key}"):
        load_model(write(edit=lambda w: {k: v for k, v in w.items() if k != key}))


@pytest.mark.parametrize("key", ["encoder.0.weight", "pos_encoder.pe", "decoder.0.0.weight"])
def test_a_missing_weight_that_tells_a_size_is_named(write: Write, key: str) -> None:
    with pytest.raises(CheckpointError, match=f"the weights lack {key}"):
        load_model(write(edit=lambda w: {k: v for k, v in w.items() if k != key}))


def test_an_unexpected_weight_another_shape_and_another_width_are_named(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"unexpected norm\.weight"):
        load_model(write("a", edit=lambda w: w | {"norm.weight": torch.ones(D)}))
    with pytest.raises(CheckpointError, match=r"decoder\.1\.0\.weight is \(36, 31\) instead of \(36, 32\)"):
        load_model(write("b", edit=lambda w: w | {"decoder.1.0.weight": torch.ones(D_OUTPUT, 31)}))
    with pytest.raises(CheckpointError, match=r"encoder\.0\.weight has 39 outputs.*multiple of 20"):
        load_model(write("c", edit=lambda w: w | {"encoder.0.weight": torch.ones(39, D_TOKEN)}))


def test_rows_of_another_length_and_rows_that_are_not_finite_are_named(write: Write) -> None:
    with pytest.raises(CheckpointError, match=r"pe_embedding\.weight is \(54, 9\).*rows of 24"):
        load_model(write("a", edit=lambda w: w | {"pe_embedding.weight": torch.ones(54, 9)}))
    with pytest.raises(CheckpointError, match=r"all_tokens\.torch is \(60, 9\).*rows of 24"):
        load_model(write("b", tokens=torch.ones(60, 9)))

    def damaged(w: Weights) -> Weights:
        w["pe_embedding.weight"][HUMAN + 2, 1] = torch.nan
        return w

    with pytest.raises(CheckpointError, match=r"not finite in rows 7 to 46"):
        load_model(write("c", edit=damaged))


def test_genes_of_another_release_than_the_table_are_refused_with_both_numbers(write: Write) -> None:
    for n in (39, 41):
        folder = write(f"n{n}")
        content = {f"GENE{i}": torch.zeros(3) for i in range(n)}
        torch.save(content, folder / "protein_embeddings" / FILES["human"])
        with pytest.raises(CheckpointError, match=rf"40 rows for human.*names {n} genes"):
            load_model(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("species,gene_symbol,start\nhuman,A,1\n", "lacks the column chromosome"),
        ("species,gene_symbol,chromosome,start\nhuman,A,1,far\n", "start 'far' in line 2"),
        ("species,gene_symbol,chromosome,start\nhuman,A,,5\n", "no chromosome or species in line 2"),
        ("species,gene_symbol,chromosome,start\nmouse,A,1,5\n", "no gene of the species 'human'"),
    ],
)
def test_a_wrong_table_of_chromosomes_is_one_line_with_the_field(write: Write, text: str, words: str) -> None:
    folder = write()
    (folder / "species_chrom.csv").write_text(text)
    with pytest.raises(CheckpointError, match=rf"species_chrom\.csv .*{words}") as told:
        load_model(folder)
    assert "\n" not in str(told.value)


def test_wrong_offsets_and_wrong_files_of_genes_are_named(write: Write) -> None:
    folder = write()
    (folder / "species_offsets.pkl").write_bytes(pickle.dumps({"human": "seven"}))
    with pytest.raises(CheckpointError, match=r"species_offsets\.pkl has 'human': 'seven'"):
        load_model(folder)
    (folder / "species_offsets.pkl").write_bytes(pickle.dumps(print))
    with pytest.raises(CheckpointError, match=r"species_offsets\.pkl.*pickled code is never run"):
        load_model(folder)
    (folder / "species_offsets.pkl").unlink()
    (folder / "species_offsets.json").write_text(json.dumps({"frog": 4, "human": 7, "mouse": 47}))
    assert loaded(folder).match_genes(["GENE3"]).token_id.tolist() == [HUMAN + 3]
    torch.save(torch.zeros(3), folder / "protein_embeddings" / FILES["human"])
    with pytest.raises(CheckpointError, match=f"{FILES['human']} holds no symbols"):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3400000000\n", "Git LFS pointer"),
        (b"<html>Just a moment</html>", "web page"),
        (b"", "is empty"),
    ],
)
@pytest.mark.parametrize(
    "name", ["4layer_model.torch", "all_tokens.torch", "species_chrom.csv", f"protein_embeddings/{FILES['human']}"]
)
def test_what_lies_in_the_place_of_a_file_is_recognised(write: Write, name: str, content: bytes, words: str) -> None:
    folder = write()
    (folder / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} .*{words}") as told:
        load_model(folder)
    assert "\n" not in str(told.value)


def test_half_a_download_of_the_weights_is_recognised(write: Write) -> None:
    folder = write()
    path = folder / "4layer_model.torch"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match=r"4layer_model\.torch is incomplete"):
        load_model(folder)


def test_another_option_than_its_own_is_refused(write: Write) -> None:
    with pytest.raises(ConfigError, match=r"part was 'cell'.*is a uce model"):
        load_model(write(), options={"part": "cell"})
    with pytest.raises(ConfigError, match="one for all cells"):
        load_model(write("other"), options={"species": "obs:species"})
    assert set(GENES) == {"frog", "human", "mouse"}
