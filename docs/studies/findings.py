"""Write docs/findings.md and its figures; `findings_study` says what is studied.

python docs/studies/findings.py --data $SCSAE_DATA --store ROOT --out docs
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from findings_study.cells import FOLDS, prepare
from findings_study.page import write_page
from findings_study.runs import (
    N_BASELINED,
    run_baselines,
    run_cell_types,
    run_detector,
    run_detector_baselines,
    run_protocol,
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the study and write its page."""
    parser = argparse.ArgumentParser(description="Study the features of real cells and write docs/findings.md.")
    parser.add_argument("--data", type=Path, required=True, help="folder with the .h5ad files ($SCSAE_DATA)")
    parser.add_argument("--store", type=Path, required=True, help="folder of the store")
    parser.add_argument("--out", type=Path, default=Path("docs"), help="folder for findings.md and its figures")
    options = parser.parse_args(arguments)

    files = prepare(options.data, options.store / "data")
    folds = [run_detector(files, options.store, fold) for fold in range(len(FOLDS))]
    types, protocol = run_cell_types(files, options.store), run_protocol(files, options.store)
    write_page(
        options.out,
        types,
        run_baselines(types),
        folds,
        [run_detector_baselines(files, fold) for fold in folds[:N_BASELINED]],
        protocol,
        run_baselines(protocol),
    )


if __name__ == "__main__":
    main()
