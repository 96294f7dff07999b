"""Encoding: stored activations into sparse codes and token statistics, by Ray actors, shard by shard.

A shard of codes is a shard of activations: its tokens are encoded by the threshold encoder (a token's code depends on
nothing but the token), pooled to cell codes, and counted by gene. The by-feature copy is built at the end.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

from feature_store import commit, ingest
from feature_store.activations import ActivationReader
from feature_store.codes import CodesRun
from feature_store.layout import Layout, run_id
from feature_store.token_codes import TokenCodes
from pipelines.config import EncodeOptions
from pipelines.shards import do_shards
from pipelines.stage import FORMAT_VERSION, Clock, StageResult, parent_run


@dataclass(frozen=True, kw_only=True)
class EncodeJob:
    """Everything an actor needs to encode any shard; plain values, so that it travels."""

    activations: str
    sae: str
    cells: str
    codes: str
    device: str


class Encoder:
    """Does shards of an `EncodeJob`: the body of an actor, callable without Ray."""

    def __init__(self, job: EncodeJob) -> None:
        from sae_core.sae import load_sae

        self.run = commit.Run.open(Path(job.activations))
        self.reader = ActivationReader(self.run)
        self.sae = load_sae(job.sae, device=job.device)
        self.device = job.device
        self.codes = CodesRun.open(Path(job.codes))
        self.split = ingest.read_cells(Path(job.cells)).get_column("split").to_numpy()

    def shard(self, number: int) -> dict[str, int]:
        """Encode and commit shard `number` unless it is there; return tokens and nonzeros of the cell codes."""
        runs = (self.codes.by_cell, *self.codes.statistics.values())
        if all(run.committed(number) for run in runs):
            return {"tokens": 0, "nonzeros": 0}
        extent = self.run.manifest().shards[number]
        tokens = self._encode(number)
        marker = self.codes.commit_shard(number, tokens, start=extent.start, stop=extent.stop, split_of_cell=self.split)
        return {"tokens": tokens.n_tokens, "nonzeros": marker.rows}

    def _encode(self, number: int) -> TokenCodes:
        """Token codes of one shard."""
        import torch

        groups = [group for group in self.reader.row_groups if group.shard == number]
        blocks = [self.reader.read(group.shard, group.group) for group in groups]
        parts = [sparse.csr_array((0, self.sae.config.n_features), dtype=np.float32)]
        for block in blocks:
            found = self.sae.encode(torch.from_numpy(np.array(block.act_f32())).to(self.device))
            arrays = (found.value.cpu().numpy(), found.col.cpu().numpy(), found.crow.cpu().numpy())
            parts.append(sparse.csr_array(arrays, shape=(found.n_tokens, found.n_features)))
        return TokenCodes(
            cell_idx=np.concatenate([np.empty(0, np.int64), *(block.cell_idx for block in blocks)]),
            token_pos=np.concatenate([np.empty(0, np.int32), *(block.token_pos for block in blocks)]),
            gene_id=np.concatenate([np.empty(0, np.int32), *(block.gene_id for block in blocks)]),
            codes=sparse.vstack(parts, format="csr"),
        )


def encode(options: EncodeOptions, store: Path, *, address: str | None = None) -> StageResult:
    """Encode the activations that an SAE was trained on; resumed by calling again.

    Raises:
        NotFoundError: there is no SAE, or its activations are gone.
    """
    clock = Clock()
    layout = Layout(store)
    sae = commit.Run.open(parent_run(layout, "saes", options.run).path)
    activations = commit.Run.open(layout.activations_dir(sae.plan["activations"]))
    plan = {
        "format": FORMAT_VERSION,
        "sae": sae.path.name,
        "sae_manifest": sae.manifest().sha,
        "activations": activations.path.name,
        "dataset": sae.plan["dataset"],
        "n_features": sae.plan["sae"]["n_features"],
        "pooling": options.pooling,
        "n_shards": activations.n_shards,
    }
    codes = CodesRun.create(layout.codes_dir(run_id(plan)), plan)
    pending = codes.pending()
    if pending:
        job = EncodeJob(
            activations=str(activations.path.resolve()),
            sae=str(sae.path.resolve()),
            cells=str(layout.cells_dir(plan["dataset"]).resolve()),
            codes=str(codes.folder.resolve()),
            device="cuda" if options.num_gpus > 0 else "cpu",
        )
        do_shards(Encoder, job, pending, options, title="encode", note=_rate, address=address)
    manifest = codes.finalize()
    return StageResult(
        kind="codes",
        run=codes.folder.name,
        path=codes.folder,
        done=len(pending),
        reused=activations.n_shards - len(pending),
        seconds=clock.seconds,
        facts={"nonzeros": manifest.rows, "bytes a nonzero": round(manifest.bytes / max(manifest.rows, 1), 2)},
    )


def _rate(total: Mapping[str, int], seconds: float) -> str:
    return f"{total['tokens'] / seconds:,.0f} tokens/s"
