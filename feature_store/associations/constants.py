"""The constants that association tables depend on: all numbers in capitals of the modules that compute them.

They are part of the plan, so that another value gives another run. Modules whose constants bound the memory alone
(`ranges`, `gene_correlation`) are left out.
"""

from types import ModuleType
from typing import Any

from feature_store.associations import (
    claims,
    classes,
    donor_agreement,
    feature_table,
    gene_set_enrichment,
    moments,
    mutual_information,
    number_statistics,
    rank_tests,
)
from feature_store.storage.plans import constants_of

MODULES: tuple[ModuleType, ...] = (
    claims,
    classes,
    donor_agreement,
    feature_table,
    gene_set_enrichment,
    moments,
    mutual_information,
    number_statistics,
    rank_tests,
)


def association_constants() -> dict[str, Any]:
    """Return the constants by `module.NAME`."""
    return constants_of(MODULES)
