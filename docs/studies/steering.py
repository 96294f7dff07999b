"""The steering recipes from a shell."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from findings_study.cells import FOLDS
from steering_study.cells import CTCL_FOLDS, SEEDS, ctcl_file, kang_file, mixology_file
from steering_study.page import write_page
from steering_study.runs import Answer, answers, ctcl_recipe, kang_recipe, mixology_recipe

QUESTIONS = ("kang", "mixology", "ctcl")


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of these recipes."""
    parser = argparse.ArgumentParser(description="Steer real cells and write what came of it.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for steering.md and its figures")
    parser.add_argument("--only", choices=QUESTIONS, action="append", help="ask this alone; may be repeated")
    options = parser.parse_args(arguments)

    asked: dict[str, list[Answer]] = {}
    for question in options.only or QUESTIONS:
        for name, found in ask(question, options.data, options.store):
            asked.setdefault(name, []).append(found)
    write_page(options.out, asked)


def ask(question: str, data: Path, store: Path) -> list[tuple[str, Answer]]:
    """Run every SAE of a question; return its steering runs with the name of the section they are of."""
    folder, found = store / "data", []
    match question:
        case "kang":
            names: tuple[str, ...] = ("kang", "kang_back")
            recipes = [kang_recipe(kang_file(data, folder), fold) for fold in range(len(FOLDS))]
        case "mixology":
            names = ("mixology_ablate", "mixology_shift")
            recipes = [mixology_recipe(mixology_file(data, folder, seed), seed) for seed in SEEDS]
        case _:
            names = ("ctcl",)
            recipes = [ctcl_recipe(ctcl_file(data, folder, fold), fold) for fold in range(len(CTCL_FOLDS))]
    for unit, recipe in enumerate(recipes):
        found += list(zip(names, answers(recipe, unit, store), strict=True))
    return found


if __name__ == "__main__":
    main()
