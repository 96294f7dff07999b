"""The six architectures, PCA, ICA and random directions in a world of known features, as a Markdown table and a figure.

    python tests/benchmarks/bench_world.py --out world.jsonl [--features 16384 --d-model 768 --k 17 34 68 --steps 3000]
    python tests/benchmarks/bench_world.py --out world.jsonl --draw world.png

`planted_world` has the world and what recovery, splitting, absorption and composition are. All see the same batches,
drawn as they go, so that memory is that of one batch. Thresholds are calibrated on tokens that neither training nor the
table sees. Standard and Gated have no k: their L1 coefficient is searched first, and the table has the L0 that came
out. `--orthogonality` adds the penalty on alike decoder rows, whose weight then stands behind the name. Each row is
appended to `--out` when it is done, and a row that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_quality import Data, coefficient_for
from planted_world import Recovered, World, recovery

from sae_core.sae import (
    ARCHITECTURES,
    Normaliser,
    SAEConfig,
    SparseAutoencoder,
    TrainConfig,
    Trainer,
    calibrate_threshold,
    calibrated_theta,
    evaluate,
    fit_baseline,
)
from sae_core.sae.objectives import GATE_L1, L1

if TYPE_CHECKING:
    from collections.abc import Sequence

BATCH, HELD_OUT, CALIBRATION, FIT_TOKENS, SEARCH_STEPS = 4096, 32_768, 16_384, 65_536, 200
FIRST_HELD_OUT, FIRST_CALIBRATION, FIRST_FIT = 1_000_000, 2_000_000, 3_000_000
"""Seeds of batches that no autoencoder is trained on: those of the table, of thresholds, and of baselines."""
TRUTH = "truth"
"""The true directions, read as a baseline reads its own: by their product with x above one threshold."""
BASELINES = ("pca", "ica", "random", TRUTH)
COLUMNS = ("name", "k", "seed", "l0", "fvu", "dead", *Recovered._fields, "cpu_s")


class Bench:
    """A world, its tokens to fit, calibrate and judge by, and the rows that are done."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.world = World(options.features, options.d_model, l0=options.l0)
        self.width = options.width or options.features
        self.fit = torch.cat(self._batches(FIT_TOKENS, FIRST_FIT))
        self.calibration = self._batches(CALIBRATION, FIRST_CALIBRATION)
        self.held_out = [self.world.sample(BATCH, FIRST_HELD_OUT + i) for i in range(HELD_OUT // BATCH)]
        self.normaliser = Normaliser.fit(self.fit.split(BATCH))
        self._fitted: dict[str, SparseAutoencoder] = {}

    def _batches(self, n_tokens: int, first: int) -> list[torch.Tensor]:
        return [self.world.sample(BATCH, first + i).x for i in range(n_tokens // BATCH)]

    def baseline(self, kind: str, k: int) -> SparseAutoencoder:
        if kind not in self._fitted:
            known = kind == TRUTH
            fitted = fit_baseline(
                "random" if known else kind,
                self.fit,
                self.calibration,
                k=k,
                n_features=self.options.features if known else self.width,
                seed=1,
            )
            self._fitted[kind] = fitted.sae
            for weight in (fitted.sae.W_enc, fitted.sae.W_dec) if known else ():
                weight.copy_(self.world.directions)
        # the directions are the same at every k, and those of ica take a minute
        fitted = self._fitted[kind]
        sae = SparseAutoencoder(SAEConfig.from_dict(fitted.config.to_dict() | {"k": k}))
        sae.load_state_dict(fitted.state_dict())
        sae.theta.copy_(calibrated_theta(sae, calibrate_threshold(sae, self.calibration)))
        return sae

    def trained(self, arch: str, k: int) -> SparseAutoencoder:
        options = self.options
        config = SAEConfig(
            d_model=options.d_model,
            n_features=self.width,
            k=k,
            arch=arch,
            orthogonality_coefficient=options.orthogonality,
        )
        if has_l1(arch) and options.l1 is not None:
            config = SAEConfig.from_dict(config.to_dict() | {"l1_coefficient": options.l1})
        elif has_l1(arch):
            data = Data(self.fit, torch.cat(self.calibration), None)
            steps = min(SEARCH_STEPS, options.steps)
            value = coefficient_for(config, data, self.normaliser, n_steps=steps, size=options.batch)
            config = SAEConfig.from_dict(config.to_dict() | {"l1_coefficient": value})
        how = TrainConfig(n_steps=options.steps, batch_size=options.batch, seed=options.seed)
        trainer = Trainer(config, how, self.normaliser)
        for step in range(options.steps):
            trainer.step(self.world.sample(options.batch, step).x)
        return trainer.finish(self.calibration)

    def label(self, name: str) -> str:
        penalty, l1 = self.options.orthogonality, self.options.l1
        if name in ARCHITECTURES and has_l1(name) and l1 is not None:
            return f"{name}, L1 {l1:g}"
        return name if name in BASELINES or not penalty else f"{name}, {penalty:g}"

    @torch.no_grad()
    def row(self, name: str, k: int) -> dict[str, Any]:
        """Fit or train one dictionary, and what is measured of it on held-out tokens."""
        clock = time.process_time()
        sae = self.baseline(name, k) if name in BASELINES else torch.enable_grad()(self.trained)(name, k)
        seconds = time.process_time() - clock
        metrics = evaluate(sae, [batch.x for batch in self.held_out])
        judged = ((sae.encode(x).to_dense(), active) for x, active in self.held_out)
        found = recovery(self.world, torch.nn.functional.normalize(sae.W_dec, dim=1), judged)
        made = {
            "name": self.label(name),
            "k": k,
            "seed": self.options.seed,
            "l1_coefficient": sae.config.l1_coefficient,
        }
        measured = {"l0": metrics.l0, "fvu": metrics.fvu, "dead": metrics.dead_fraction, **found._asdict()}
        return made | measured | {"cpu_s": seconds}


def has_l1(arch: str) -> bool:
    """Whether the objective has an L1 term, whose coefficient determines L0."""
    return not {L1, GATE_L1}.isdisjoint(ARCHITECTURES[arch].objective)


def done(path: Path | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path and path.is_file() else []


def cell(value: Any) -> str:
    """A value of the table; what is not defined, such as the precision where nothing is recovered, is a dash."""
    if not isinstance(value, float):
        return str(value)
    return "-" if value != value else f"{value:.0f}" if value >= 100 else f"{value:.3f}"


def draw(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Recovery, F1, absorption and composition against the L0 of held-out tokens, a line for each kind."""
    from feature_store.plots.canvas import GREY, OKABE_ITO, beside, canvas, head

    panels = {
        "share": "share of true features recovered",
        "f1": "F1 of firing, all true features",
        "absorption": "absorption by children, recovered roots",
        "composition": "root in the row of a child",
    }
    drawn = canvas(None, (3.9, 3.6), show=False, save=path, n_panels=len(panels))
    made = dict.fromkeys(row["name"] for row in rows)
    names = sorted(made, key=lambda name: [*ARCHITECTURES, *BASELINES].index(name.partition(",")[0]))
    colours = dict(zip(ARCHITECTURES, OKABE_ITO, strict=False))
    styles = dict(zip(BASELINES, (":", "-.", "--", (0, (6, 2))), strict=True))
    markers = dict(zip(BASELINES, "sDv*", strict=True))
    for axes, (field, title) in zip(drawn.axes, panels.items(), strict=True):
        for name in names:
            own = sorted((row["l0"], row[field]) for row in rows if row["name"] == name)
            arch, _, penalty = name.partition(",")
            style = {"linestyle": styles.get(name, "--" if penalty else "-"), "color": colours.get(arch, GREY)}
            marker = markers.get(name, "^" if penalty else "o")
            axes.plot(*zip(*own, strict=True), marker=marker, ms=4, label=name, **style)
        axes.set_xscale("log", base=2)
        axes.set_xticks(sorted({row["k"] for row in rows}))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.set_xlabel("L0 on held-out tokens", fontsize=9)
        head(axes, title)
    beside(drawn.axes[-1], drawn.axes[-1].get_legend_handles_labels()[0], names)
    drawn.figure.savefig(path, dpi=120, bbox_inches="tight", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--features", type=int, default=16_384, help="features of the world")
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--l0", type=float, default=34.0)
    parser.add_argument("--width", type=int, help="features of the autoencoders; default: those of the world")
    parser.add_argument("--k", type=int, nargs="+", default=[34])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights")
    parser.add_argument("--orthogonality", type=float, default=0.0, help="weight of the penalty on alike decoder rows")
    parser.add_argument("--l1", type=float, help="L1 coefficient of Standard and Gated; default: searched for L0 = k")
    parser.add_argument("--arch", nargs="*", default=list(ARCHITECTURES), choices=list(ARCHITECTURES))
    parser.add_argument("--baseline", nargs="*", default=list(BASELINES), choices=list(BASELINES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="file of JSON lines to which rows are appended")
    parser.add_argument("--draw", type=Path, help="draw the rows of --out into this picture, and make none")
    options = parser.parse_args()
    if options.draw:
        draw(done(options.out), options.draw)
        return
    torch.set_num_threads(options.threads)
    bench = Bench(options)
    print(f"world of {options.features} features, d {options.d_model}, L0 {float(bench.world.density.sum()):.1f}; ")
    print(f"F {bench.width}, {options.steps} steps of {options.batch} tokens, {options.threads} threads\n")
    print("| " + " | ".join(COLUMNS) + " |\n" + "|---" * len(COLUMNS) + "|", flush=True)
    for k in options.k:
        for name in (*options.baseline, *options.arch):
            key = {"name": bench.label(name), "k": k, "seed": options.seed}
            row = next((row for row in done(options.out) if key.items() <= row.items()), None)
            if row is None:
                row = bench.row(name, k)
                if options.out:
                    with options.out.open("a") as file:
                        file.write(json.dumps(row) + "\n")
            print("| " + " | ".join(cell(row[column]) for column in COLUMNS) + " |", flush=True)


if __name__ == "__main__":
    main()
