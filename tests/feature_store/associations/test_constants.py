"""The constants that association tables depend on are part of the plan: another value is another run."""

from dataclasses import replace

import pytest
from toy_plans import toy_plan

from feature_store.associations.constants import MODULES, association_constants
from feature_store.storage.plans import AssociationsPlan

MODULE_OF = {module.__name__.rpartition(".")[2]: module for module in MODULES}


def test_the_constants_that_decide_p_values_and_labels_are_among_them():
    known = {
        "donor_agreement.LEVEL",
        "donor_agreement.MIN_DONORS",
        "feature_table.MIN_LABEL_CELLS",
        "gene_set_enrichment.N_BINS",
        "mutual_information.THRESHOLDS",
        "rank_tests.MAX_ENUMERATED",
    }
    assert known <= association_constants().keys()


@pytest.mark.parametrize("name", sorted(association_constants()))
def test_another_value_of_a_constant_is_another_run(name, monkeypatch):
    plan = toy_plan(AssociationsPlan, constants=association_constants())
    module, constant = name.split(".")
    value = getattr(MODULE_OF[module], constant)
    monkeypatch.setattr(MODULE_OF[module], constant, (*value, 1) if isinstance(value, tuple) else value + 1)
    assert replace(plan, constants=association_constants()).id != plan.id
