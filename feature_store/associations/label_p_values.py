"""The p-values of labels: which test each label gets, and what the table says of donors.

A label that varies within donors is tested within donors, a label that is constant within donors (such as disease) by
donor, and a batch within cell types (`rank_tests` has the tests and says when which one applies). For each test also
the smallest p of any feature under permuted labels is kept, of which `familywise` makes p_max.

There are three p, which answer three questions. p: do the cells of these donors differ? p_donor with the interval from
low to high (`donor_agreement`): do donors agree? p_max (`familywise`): would the best of all features look as good by
chance?
"""

from typing import NamedTuple

import numpy as np

from feature_store.associations.donor_agreement import DonorEffects, across_donors, between_donors
from feature_store.associations.familywise import Replicates, smallest_p
from feature_store.associations.inputs import Bools, Floats, Labels, Sparse, Strata
from feature_store.associations.rank_tests import RankTest, varies_within
from feature_store.associations.sorted_columns import Codes

BLOCKED = "van-elteren/1"
BY_UNIT = "unit-rank-permutation/1"


class LabelPValues(NamedTuple):
    """z and p [n_features n_labels]; method: the test of each label; smallest: the smallest p of any feature in each
    permutation [n_replicates n_labels]; units: the donors, None where none were given; by_unit: the labels [n_labels]
    that are tested by donor; strata: the blocks inside which the effect is computed, None for all cells together.
    """

    z: Floats
    p: Floats
    method: list[str]
    smallest: Floats
    units: Strata | None
    by_unit: Bools
    strata: Strata | None


def label_p_values(
    codes: Codes,
    indicator: Sparse,
    kind: str,
    split: str,
    *,
    units: Labels | None,
    within: Labels | None,
    replicates: Replicates,
) -> LabelPValues:
    """Test every feature against every label: inside the values of `within` if it is given, else within units, or by
    unit where the label is constant in them.

    codes: CSR [n_cells n_features]; indicator: CSR one-hot [n_cells n_labels]; units and within: a value for each of
    these cells; kind and split seed the permutations.
    """
    n_cells, n_labels = indicator.shape
    by_unit = Strata.of(n_cells, units)
    blocks = Strata.of(n_cells, within or units)
    blocked = RankTest.blocked(codes, indicator, blocks)
    z, p = blocked.result()
    smallest = smallest_p(blocked, replicates.n, replicates.generator(kind, split, BLOCKED))
    kinds = [labels.kind for labels in (within, units) if labels is not None] or ["none"]
    method = [f"{BLOCKED} blocks={kinds[0]}"] * n_labels
    constant = np.zeros(n_labels, dtype=bool)
    if units is not None and within is None:
        constant = ~varies_within(indicator, by_unit)
    if constant.any():
        outside = np.flatnonzero(constant)
        unit = RankTest.by_unit(codes, indicator[:, outside], by_unit)
        z[:, outside], p[:, outside] = unit.result()
        smallest[:, outside] = smallest_p(unit, replicates.n, replicates.generator(kind, split, BY_UNIT))
        method = [f"{BY_UNIT} units={kinds[0]}" if c else m for c, m in zip(constant, method, strict=True)]
    strata = None if within is None else blocks
    return LabelPValues(z, p, method, smallest, None if units is None else by_unit, constant, strata)


def donor_columns(codes: Codes, indicator: Sparse, tests: LabelPValues, effect: Floats) -> dict[str, Floats]:
    """n_donors, n_agree, p_donor, low and high, each [n_features n_labels]; NaN where they do not apply.

    effect: the rank-biserial [n_features n_labels]. A batch, whose effect is computed inside cell types, has only
    p_donor, and only where each donor is in one batch and the batch has several donors.
    """
    columns = {name: np.full(effect.shape, np.nan) for name in DonorEffects._fields}
    if tests.units is not None:
        columns["n_donors"][:] = tests.units.n_strata
    if tests.units is not None and tests.strata is not None:
        of_unit = np.asarray((tests.units.indicator() @ indicator).toarray()) > 0
        constant = ~varies_within(indicator, tests.units) & (of_unit.sum(axis=0) > 1)
        if nested := np.flatnonzero(constant).tolist():
            test = RankTest.by_unit(codes, indicator[:, nested], tests.units, within=tests.strata)
            columns["p_donor"][:, nested] = test.result()[1]
    if tests.units is not None and tests.strata is None:
        if inside := np.flatnonzero(~tests.by_unit).tolist():
            found = across_donors(codes, indicator[:, inside], tests.units, effect[:, inside])
            for name, values in found._asdict().items():
                columns[name][:, inside] = values
        if outside := np.flatnonzero(tests.by_unit).tolist():
            columns["p_donor"][:, outside] = tests.p[:, outside]
            interval = between_donors(codes, indicator[:, outside], tests.units)
            columns["low"][:, outside], columns["high"][:, outside] = interval
    return columns
