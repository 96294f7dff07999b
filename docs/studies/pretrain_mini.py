"""Pretraining of the mini model with scGPT's masked-value objectives.

    python docs/studies/pretrain_mini.py --data $SCSAE_DATA --out DIR [--steps N]

A cell's nonzero genes are split into visible genes and queries; queries also hold genes with zero counts, drawn among
those the cohort measured by how much their detection varies (a rarely seen gene is a trivial zero). Queries attend
to the visible genes but are never keys, so the visible part of a training input looks exactly like an input at
inference. Two losses on the binned
values of the queries, as in scGPT's generative pretraining: from the query's own token, and from `<cls>` (masked value
prediction for cell modelling, MVC). The number of visible genes varies from step to step because inference
shows all nonzero genes of a cell, 200 to 1,000 of them.

Deterministic on one machine: step i draws from (seed, i) only, so a resumed run equals an undisturbed one.
Cui et al. 2024, scGPT, 10.1038/s41592-024-02201-0.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from mini_corpus import Batch, Corpus, PretrainConfig, build_corpus, make_batch, training_batch
from safetensors.torch import save_file
from torch import Tensor

from sae_core.scfm import ScGPT, ScGPTConfig, Vocabulary
from sae_core.scfm.scgpt.network import init_weights

if TYPE_CHECKING:
    from collections.abc import Mapping


class Losses(NamedTuple):
    """Mean squared errors over the queries, in units of value_scale bins."""

    gene: Tensor
    cell: Tensor


def losses(model: ScGPT, batch: Batch, config: PretrainConfig) -> Losses:
    """Both masked-value losses of a batch."""
    assert model.decoder is not None
    assert model.mvc_decoder is not None
    x = model.input_embedding(batch.gene_id, batch.value)
    key_mask = None if bool(batch.is_key.all()) else batch.is_key
    for i, block in enumerate(model.blocks):
        x = block(x, index=i, key_mask=key_mask, n_keys=batch.n_keys)
    by_gene = model.decoder(x[:, batch.n_keys :])
    by_cell = model.mvc_decoder(x[:, 0], model.encoder(batch.gene_id[:, batch.n_keys :]))
    target = batch.target / config.value_scale
    return Losses(F.mse_loss(by_gene, target), F.mse_loss(by_cell, target))


class HeldOut(NamedTuple):
    """Held-out losses beside what predicting the gene's mean, or the overall mean, would give."""

    gene: float
    cell: float
    gene_mean: float
    variance: float


def mean_values(corpus: Corpus, config: PretrainConfig, model: ScGPT, *, n_batches: int = 300) -> np.ndarray:
    """Mean target of each gene over queries of training cells [vocabulary]; the overall mean for genes never drawn."""
    total, count = np.zeros(len(model.vocabulary)), np.zeros(len(model.vocabulary))
    for step in range(n_batches):
        batch = training_batch(corpus, 10**9 + step, config, model)
        genes = batch.gene_id[:, batch.n_keys :].numpy().ravel()
        np.add.at(total, genes, batch.target.numpy().ravel())
        np.add.at(count, genes, 1)
    overall = total.sum() / count.sum()
    return np.where(count > 0, total / np.maximum(count, 1), overall)


@torch.no_grad()
def evaluate(
    model: ScGPT, corpus: Corpus, means: np.ndarray, config: PretrainConfig, *, n_cells: int = 256, n_visible: int = 256
) -> HeldOut:
    """Losses on held-out control cells, drawn once with `seed` by the balance of the training; `means` by gene."""
    rng = np.random.default_rng(config.seed)
    weight = corpus.held_out_weight
    drawn = rng.choice(len(weight), size=min(n_cells, int((weight > 0).sum())), p=weight, replace=False)
    squares: list[list[np.ndarray]] = [[], [], [], []]
    for cells in np.array_split(drawn, max(len(drawn) // 32, 1)):
        batch = make_batch(corpus, cells, n_visible, config, model, rng)
        gene, cell = losses(model, batch, config)
        target = batch.target.numpy() / config.value_scale
        mean = means[batch.gene_id[:, batch.n_keys :].numpy()] / config.value_scale
        for kept, value in zip(squares, (float(gene), float(cell), ((mean - target) ** 2).mean(), target), strict=True):
            kept.append(np.broadcast_to(value, target.shape))
    gene_loss, cell_loss, mean_loss, target = (np.concatenate(kept) for kept in squares)
    return HeldOut(*(float(v) for v in (gene_loss.mean(), cell_loss.mean(), mean_loss.mean(), target.var())))


def pretrain(data: Path, out: Path, config: PretrainConfig) -> ScGPT:
    """Train, with a log and a resumable state in `out`, and write the checkpoint folder `out/checkpoint`.

    Raises:
        ForbiddenCellsError: the data would show the model cells that have to stay unseen.
    """
    out.mkdir(parents=True, exist_ok=True)
    corpus, vocabulary, start = build_corpus(data, config)
    model = new_model(vocabulary, start, config)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    state_path, log_path = out / "state.pt", out / "log.json"
    step, log, before = 0, [], 0.0
    if state_path.is_file():
        state = torch.load(state_path, weights_only=True)
        check_same_course(state["config"], config)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, log = int(state["step"]), json.loads(log_path.read_text())
        before = log[-1]["seconds"]
    means = mean_values(corpus, config, model)
    recent, began = [], time.monotonic()
    while step < config.steps:
        for group in optimizer.param_groups:
            group["lr"] = config.lr * _schedule(step, config)
        gene, cell = losses(model, training_batch(corpus, step, config, model), config)
        torch.autograd.backward(gene + config.mvc_weight * cell)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        recent.append((float(gene.detach()), float(cell.detach())))
        step += 1
        if step % config.checkpoint_every == 0 or step == config.steps:
            held_out = evaluate(model, corpus, means, config)
            train = np.mean(recent, axis=0)
            entry = {
                "step": step,
                "seconds": before + time.monotonic() - began,
                "train_gene": train[0],
                "train_cell": train[1],
            }
            log.append({**entry, **{f"held_out_{k}": v for k, v in held_out._asdict().items()}})
            print(json.dumps(log[-1]), flush=True)
            recent = []
            log_path.write_text(json.dumps(log, indent=1))
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state | {"config": asdict(config)}, state_path)
            save_checkpoint(model, out / "checkpoint", config)
    return model.eval()


def check_same_course(before: Mapping[str, Any], config: PretrainConfig) -> None:
    """Check that a run of config `before` may continue under `config`: only the number of steps may differ.

    Raises:
        ValueError: another setting differs.
    """
    now = asdict(config)
    if differing := sorted(key for key in now if key != "steps" and before.get(key) != now[key]):
        changes = ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in differing)
        raise ValueError(f"the run in --out was started with other settings: {changes}; choose another --out")


def new_model(vocabulary: Vocabulary, start: np.ndarray, config: PretrainConfig) -> ScGPT:
    """Network at step 0: fresh weights, gene vectors from `start`."""
    args = ScGPTConfig(
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        d_model=config.d_model,
        d_hidden=config.d_hidden,
        tie_break="midpoint",
    )
    model = ScGPT.empty(args, vocabulary, n_tokens=len(vocabulary))
    init_weights(model, seed=config.seed)
    with torch.no_grad():
        model.encoder.embedding.weight.copy_(torch.from_numpy(start))
    return model


def _schedule(step: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant, linear fall to 2 % at the end."""
    left = (config.steps - step) / max(config.decay_share * config.steps, 1.0)
    return min((step + 1) / config.warmup, 1.0, 0.02 + 0.98 * left)


def save_checkpoint(model: ScGPT, folder: Path, config: PretrainConfig) -> None:
    """ScGPT checkpoint folder: args.json, vocab.json, vocab_ensembl.json, model.safetensors (float16)."""
    folder.mkdir(parents=True, exist_ok=True)
    c, vocabulary = model.config, model.vocabulary
    args: dict[str, Any] = {
        "nlayers": c.n_layers,
        "nheads": c.n_heads,
        "embsize": c.d_model,
        "d_hid": c.d_hidden,
        "n_bins": c.n_bins,
    }
    args |= {"max_seq_len": c.max_seq_len, "pad_value": c.pad_value, "mask_value": c.mask_value}
    args |= {"cls_value": c.cls_value, "tie_break": c.tie_break, "input_emb_style": "continuous"}
    args |= {"pretraining": asdict(config)}
    weights = {key: value.detach().clone() for key, value in model.state_dict().items()}
    for key in ("decoder.fc.4.weight", "decoder.fc.4.bias", "mvc_decoder.W.weight"):
        weights[key] *= config.value_scale
    ids = {token: i for i, token in enumerate(vocabulary.tokens)}
    (folder / "args.json").write_text(json.dumps(args, indent=1) + "\n")
    (folder / "vocab.json").write_text(json.dumps(ids, indent=0) + "\n")
    (folder / "vocab_ensembl.json").write_text(json.dumps(dict(vocabulary.ensembl), indent=0) + "\n")
    save_file({key: value.half().contiguous() for key, value in weights.items()}, folder / "model.safetensors")


def main() -> None:
    """Run the pretraining from the command line."""
    parser = argparse.ArgumentParser(description="Pretrain the mini model on the control cells of a data folder.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--out", type=Path, required=True, help="folder for log, state and checkpoint")
    defaults = PretrainConfig()
    for name in ("steps", "lr", "seed", "n_genes", "n_heads", "d_hidden", "positions_per_step", "mvc_weight"):
        value = getattr(defaults, name)
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    options = vars(parser.parse_args())
    data, out = options.pop("data"), options.pop("out")
    pretrain(data, out, PretrainConfig(**options))


if __name__ == "__main__":
    main()
