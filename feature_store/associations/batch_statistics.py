"""The statistics of batches, conditional on cell type: does a feature tell the batch among cells of one type?

Pooled over types, a feature of B cells "finds" every batch that holds more B cells. Here U is summed over cell types
and batch labels are permuted inside them only, so composition cannot count. Without cell types the comparison is
unconditional, and the method column says so (blocks=none). The p treats cells of one type as exchangeable between
batches under the null, conditional on the batches at hand. Test: van Elteren (1960); the effect weights each type by
n_batch n_rest.
Cells of one donor are alike, so where every donor is in one batch this p also sees how these donors differ: with 14
simulated donors in two batches that do nothing, 199 of 200 data sets of 25 features had a q <= .05. p_donor permutes
whole donors between batches, by their mean ranks within types (1 of 200): it says whether batches differ by more than
donors do, and with two batches of four donors it is at least .029. It is null where donors are in several batches, or a
batch is one donor.
Cost: 50k cells, 4096 features, 8 batches 3.3 s on one core.
"""

from feature_store.associations.familywise import Replicates
from feature_store.associations.inputs import Bools, Labels, Strata
from feature_store.associations.label_statistics import LabelRows, associate_labels
from feature_store.associations.sorted_columns import Codes


def associate_batch(
    codes: Codes,
    batch: Labels,
    splits: dict[str, Bools],
    cell_type: Labels | None,
    *,
    units: Labels | None = None,
    first_feature: int = 0,
    replicates: Replicates | None = None,
) -> LabelRows:
    """Rows of `feature_label` of kind batch (shapes and errors as `associate_labels`).

    Where a batch shares no cell type with any other, nothing can be compared: auroc is null and p is 1.
    """
    everywhere = Labels.from_values("none", ["all"] * batch.n_cells)
    return associate_labels(
        codes,
        batch,
        splits,
        units or batch,
        within=cell_type or everywhere,
        first_feature=first_feature,
        replicates=replicates,
    )


def batch_strata(n_cells: int, cell_type: Labels | None, *aliased: Labels) -> Strata:
    """Cells between which only the batch differs: same cell type and same value of every label that batches carry as
    a whole.
    """
    return Strata.of(n_cells, cell_type, *aliased)
