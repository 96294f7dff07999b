"""A family of foundation models as another package would bring it: a folder with `toy.json` and `toy.safetensors`.

A gene is its embedding plus its log count along a direction; two blocks; the head predicts the log count. Counts of
cells of the platform "deep" are halved.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from sae_core.checkpoint_files import digest_files, load_weights, read_json, read_weights
from sae_core.errors import ConfigError
from sae_core.scfm import Family, FoundationModel, GeneMatch, MaskedGeneTask, ModelOption, Tokens, Vocabulary
from sae_core.scfm.cell_context import OF_CELLS
from sae_core.scfm.encoder import EncoderBlock
from sae_core.scfm.foundation import masked_mean
from sae_core.scfm.pretraining import sample_masked_genes
from sae_core.scfm.values import check_values, chosen_values, matched_values, recover_counts, sample_per_cell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

HEADER, WEIGHTS = "toy.json", "toy.safetensors"
PAD, HIDDEN = "<pad>", -1.0


class ToyModel(FoundationModel):
    """The network and its tokenizer."""

    family = "toy"
    mask_fraction = 0.3
    readouts = ("mean",)

    def __init__(self, genes: Sequence[str], *, d_model: int = 8, n_layers: int = 2, head: bool = True) -> None:
        super().__init__()
        self.name, self.digest, self.d_model, self.n_layers = "toy", "", d_model, n_layers
        self.vocabulary = Vocabulary(tokens=(PAD, *genes), special=frozenset({PAD}))
        self.gene = nn.Embedding(len(self.vocabulary), d_model)
        self.level = nn.Linear(1, d_model)
        blocks = (EncoderBlock(d_model=d_model, n_heads=2, d_hidden=2 * d_model) for _ in range(n_layers))
        self.layers = nn.ModuleList(blocks)
        self.head = nn.Linear(d_model, 1) if head else None

    @property
    def blocks(self) -> Sequence[EncoderBlock]:
        return cast("tuple[EncoderBlock, ...]", tuple(self.layers))

    def input_embedding(self, gene_id: Tensor, value: Tensor) -> Tensor:
        return cast("Tensor", self.gene(gene_id) + self.level(value.unsqueeze(-1)))

    def tokenize(
        self,
        indptr: np.ndarray,
        indices: np.ndarray,
        data: np.ndarray,
        match: GeneMatch,
        *,
        seed: int,
        max_tokens: int | None = None,
        obs: Mapping[str, Sequence[str]] | None = None,
    ) -> Tokens:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens was {max_tokens}; allowed: 1 or more")
        check_values(indices, data, match)
        n_cells = len(indptr) - 1
        counts = recover_counts(indptr, data)
        gene_id, value, cell = chosen_values(matched_values(indptr, indices, counts, match), match)
        value = np.where(self._is_deep(n_cells, obs)[cell], value / 2, value)
        if max_tokens is not None:
            n_of_cell = np.bincount(cell, minlength=n_cells)
            kept = sample_per_cell(gene_id, n_of_cell, limit=max_tokens, seed=seed)
            gene_id, value, cell = gene_id[kept], value[kept], cell[kept]
        offsets = np.concatenate([[0], np.cumsum(np.bincount(cell, minlength=n_cells))]).astype(np.int64)
        return Tokens(
            offsets=offsets,
            gene_id=gene_id.astype(np.int64),
            value=np.log1p(value).astype(np.float32),
            is_special=np.zeros(len(gene_id), dtype=bool),
        )

    def _is_deep(self, n_cells: int, obs: Mapping[str, Sequence[str]] | None) -> np.ndarray:
        platform = self.context.get("platform", "")
        each = (obs or {})[platform.removeprefix(OF_CELLS)] if platform.startswith(OF_CELLS) else [platform] * n_cells
        return np.array(each) == "deep"

    def pool(self, x: Tensor, is_gene: Tensor, readout: str) -> Tensor:
        return masked_mean(x, is_gene)

    def mask_genes(self, tokens: Tokens, *, seed: int, fraction: float) -> MaskedGeneTask:
        rows = np.flatnonzero(sample_masked_genes(tokens, seed=seed, fraction=fraction))
        value = tokens.value.copy()
        value[rows] = HIDDEN
        return MaskedGeneTask(
            tokens=replace(tokens, value=value),
            cell=tokens.cell_of_token()[rows],
            gene_id=tokens.gene_id[rows],
            target=tokens.value[rows],
            token_rows=rows,
        )

    def predict_masked(self, x: Tensor, batch: Any, masked: Any) -> Tensor:
        if self.head is None:
            raise self._lacks_head("the head")
        return cast("Tensor", self.head(x[masked.row, masked.column]).squeeze(-1))

    def prediction_error(self, x: Tensor, batch: Any, masked: Any) -> Tensor:
        return (self.predict_masked(x, batch, masked) - masked.target) ** 2

    @torch.no_grad()
    def reset_weights(self, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if ".norm" in name:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.normal_(std=0.3, generator=generator)


def is_toy(folder: Path) -> bool:
    return (folder / HEADER).is_file() and (folder / WEIGHTS).is_file()


def load_toy(folder: Path, *, platform: str = "") -> ToyModel:
    config, weights = read_json(folder / HEADER), read_weights(folder / WEIGHTS)
    with torch.random.fork_rng(devices=[]):
        model = ToyModel(config["genes"], head="head.weight" in weights)
    load_weights(model, weights, what=HEADER)
    model.context = {"platform": platform}
    model.digest = digest_files([folder / HEADER, folder / WEIGHTS], salt=f"toy 1 {platform}")
    return model


def write_toy(folder: Path, *, genes: Sequence[str] | None = None, head: bool = True) -> Path:
    """Write a checkpoint folder with random weights."""
    folder.mkdir(parents=True)
    genes = [f"GENE{i}" for i in range(40)] if genes is None else genes
    model = ToyModel(genes, head=head)
    model.reset_weights(seed=5)
    (folder / HEADER).write_text(json.dumps({"genes": list(genes)}))
    save_file({name: value.clone() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    return folder


FAMILY = Family(
    name="toy",
    files=f"{HEADER} and {WEIGHTS}",
    matches=is_toy,
    load=load_toy,
    options=(ModelOption(name="platform", help="Platform of the cells; default: shallow.", of_cells=True),),
)
NO_FAMILY = "toy"
BLIND = replace(FAMILY, matches=lambda folder: folder["x"])
CLUMSY = replace(FAMILY, load=lambda folder: {}["x"])
WITHOUT_DIGEST = replace(FAMILY, load=lambda folder: ToyModel(read_json(folder / HEADER)["genes"]))
NO_MODEL = replace(FAMILY, load=lambda folder: 3)
