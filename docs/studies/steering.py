"""Write docs/steering.md and its figures; `steering_study` says what is studied.

python docs/studies/steering.py --data $SCSAE_DATA --store ROOT --out docs
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from findings_study.cells import FOLDS
from steering_study.cells import CTCL_FOLDS, SEEDS, ctcl_file, ctcl_mix_file, kang_file, mixology_file
from steering_study.page import write_page
from steering_study.runs import (
    SteeringRun,
    ctcl_mix_recipe,
    ctcl_recipe,
    kang_recipe,
    kinds_recipe,
    mixology_recipe,
    steering_runs,
)

EXPERIMENTS = ("kang", "mixology", "ctcl", "mixology_kinds", "ctcl_kinds")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Steer real cells and write docs/steering.md.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for steering.md and its figures")
    parser.add_argument(
        "--only",
        choices=EXPERIMENTS,
        action="append",
        help="run one experiment, and leave the other sections; may be repeated",
    )
    options = parser.parse_args(arguments)

    sections: dict[str, list[SteeringRun]] = {}
    for experiment in options.only or EXPERIMENTS:
        for name, run in run_experiment(experiment, options.data, options.store):
            sections.setdefault(name, []).append(run)
    write_page(options.out, sections)


def run_experiment(experiment: str, data: Path, store: Path) -> list[tuple[str, SteeringRun]]:
    """Run every SAE of an experiment; return its steering runs, each with the name of its section of the page."""
    folder, found = store / "data", []
    match experiment:
        case "kang":
            names: tuple[str, ...] = ("kang", "kang_back")
            recipes = [kang_recipe(kang_file(data, folder), fold) for fold in range(len(FOLDS))]
        case "mixology":
            names = ("mixology_ablate", "mixology_shift")
            recipes = [mixology_recipe(mixology_file(data, folder, seed), seed) for seed in SEEDS]
        case "mixology_kinds":
            names = ("mixology_kinds",)
            recipes = [kinds_recipe(mixology_recipe(mixology_file(data, folder, seed), seed), seed) for seed in SEEDS]
        case "ctcl_kinds":
            names = ("ctcl_kinds",)
            recipes = [kinds_recipe(ctcl_mix_recipe(ctcl_mix_file(data, folder, seed), seed), seed) for seed in SEEDS]
        case _:
            names = ("ctcl",)
            recipes = [ctcl_recipe(ctcl_file(data, folder, fold), fold) for fold in range(len(CTCL_FOLDS))]
    for sae, recipe in enumerate(recipes):
        found += list(zip(names, steering_runs(recipe, sae, store), strict=True))
    return found


if __name__ == "__main__":
    main()
