"""A tiny folder of UCE with random weights in the official layout: three species, of which human has most genes.

The table has, in this order: 4 special tokens, 3 genes of frog, `SYMBOLS` of human, 2 of mouse, and the chromosomes
frog_1, human_1, human_2, human_X and mouse_1. GENE11 and GENE12 start at one place.
"""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

N_GENES = 40
SYMBOLS = [f"GENE{i}" for i in range(N_GENES)]
FILES = {
    "frog": "Xenopus_tropicalis.Xenopus_tropicalis_v9.1.gene_symbol_to_embedding_ESM2.pt",
    "human": "Homo_sapiens.GRCh38.gene_symbol_to_embedding_ESM2.pt",
    "mouse": "Mus_musculus.GRCm39.gene_symbol_to_embedding_ESM2.pt",
}
GENES: dict[str, Sequence[str]] = {"frog": ["FROG0", "FROG1", "GENE1"], "human": SYMBOLS, "mouse": ["GENE2", "MOUSE0"]}
N_CHROMOSOMES = 5
D, D_TOKEN, D_HIDDEN, D_FIRST, D_OUTPUT = 40, 24, 28, 32, 36


def place(species: str, i: int) -> tuple[str, int]:
    """Chromosome and start of gene i of a species."""
    if species != "human":
        return "1", 100 + i
    return ("2", "1", "1", "1", "X")[i % 5], {11: 511, 12: 511}.get(i, 1000 - 37 * i if i % 2 else 40 * i)


def shapes(*, n_rows: int, n_positions: int = 48, n_layers: int = 3) -> dict[str, tuple[int, ...]]:
    """Every tensor of a checkpoint, by its official name."""
    found = {"pos_encoder.pe": (n_positions, 1, D), "pe_embedding.weight": (n_rows, D_TOKEN)}
    for name in ("encoder", "gene_embedding_layer"):
        found |= {f"{name}.0.weight": (D, D_TOKEN), f"{name}.0.bias": (D,)}
        found |= {f"{name}.2.weight": (D,), f"{name}.2.bias": (D,)}
    for i in range(n_layers):
        layer = f"transformer_encoder.layers.{i}."
        found |= {f"{layer}self_attn.in_proj_weight": (3 * D, D), f"{layer}self_attn.in_proj_bias": (3 * D,)}
        found |= {f"{layer}self_attn.out_proj.weight": (D, D), f"{layer}self_attn.out_proj.bias": (D,)}
        found |= {f"{layer}linear1.weight": (D_HIDDEN, D), f"{layer}linear1.bias": (D_HIDDEN,)}
        found |= {f"{layer}linear2.weight": (D, D_HIDDEN), f"{layer}linear2.bias": (D,)}
        for norm in ("norm1", "norm2"):
            found |= {f"{layer}{norm}.weight": (D,), f"{layer}{norm}.bias": (D,)}
    widths = {"decoder": (D, D_FIRST, D_OUTPUT, D_OUTPUT, D_OUTPUT), "binary_decoder": (D_OUTPUT + D, 20, 12, 8, 1)}
    for name, sizes in widths.items():
        for i in range(4):
            linear = f"{name}.{i}.0" if i < 3 else f"{name}.3"
            found |= {f"{linear}.weight": (sizes[i + 1], sizes[i]), f"{linear}.bias": (sizes[i + 1],)}
            if i < 3:
                found |= {f"{name}.{i}.1.weight": (sizes[i + 1],), f"{name}.{i}.1.bias": (sizes[i + 1],)}
    return found


def weights(**sizes: int) -> dict[str, torch.Tensor]:
    """Random weights of all `shapes`, norms near one, the padding's row zero, and the sinusoids."""
    found: dict[str, torch.Tensor] = {}
    for key, shape in shapes(**sizes).items():
        generator = torch.Generator().manual_seed(sum(map(ord, key)) * 131 + len(shape))
        is_norm = len(shape) == 1 and key.endswith("weight")
        found[key] = torch.randn(*shape, generator=generator) * 0.25 + float(is_norm)
    # the network multiplies it by sqrt(d_model); so the tiny model has activations about 1
    found["encoder.2.weight"] /= D**0.5
    found["pe_embedding.weight"][0] = 0
    position, frequency = torch.arange(len(found["pos_encoder.pe"])), 10_000 ** (-torch.arange(0, D, 2) / D)
    angle = position[:, None] * frequency
    found["pos_encoder.pe"] = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, None]
    return found


def write_uce(
    parent: Path,
    name: str = "uce",
    *,
    edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] | None = None,
    file: str = "4layer_model.torch",
    genes: dict[str, Sequence[str]] | None = None,
    tokens: torch.Tensor | None = None,
    **sizes: int,
) -> Path:
    """Write a folder: `edit` changes the weights, `genes` are those of species, `tokens` is a separate table."""
    folder, genes = parent / name, GENES if genes is None else genes
    (folder / "protein_embeddings").mkdir(parents=True)
    held = weights(**{"n_rows": 4 + sum(map(len, genes.values())) + N_CHROMOSOMES, **sizes})
    torch.save(edit(held) if edit else held, folder / file)
    if tokens is not None:
        torch.save(tokens, folder / "all_tokens.torch")
    rows, offsets, first = ["species,gene_symbol,chromosome,start"], {}, 4
    for species, symbols in genes.items():
        offsets[species], first = first, first + len(symbols)
        content = {symbol: torch.full((D_TOKEN,), float(i)) for i, symbol in enumerate(symbols)}
        torch.save(content, folder / "protein_embeddings" / FILES[species])
        places = [place(species, i) for i in range(len(symbols))]
        # in the order of chromosomes and starts, as the authors' file is
        order = sorted(range(len(symbols)), key=lambda i: (places[i][0], str(places[i][1])))
        rows += [f"{species},{symbols[i].upper()},{places[i][0]},{places[i][1]}" for i in order]
    (folder / "species_chrom.csv").write_text("\n".join(rows) + "\n")
    (folder / "species_offsets.pkl").write_bytes(pickle.dumps(offsets))
    return folder
