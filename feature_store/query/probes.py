"""The newest probes of each kind of label: scores by representation, and the features of each label."""

from typing import TYPE_CHECKING, NamedTuple

import polars as pl

from feature_store.errors import InputError

if TYPE_CHECKING:
    from feature_store.query.store import FeatureStore

SAE = "sae"
PERMUTED = "permuted labels"


class Probes(NamedTuple):
    """Probes of one kind of label: the rows of `probe_score` and of `feature_probe` of the newest run that has it."""

    scores: pl.DataFrame
    features: pl.DataFrame

    def representations(self) -> list[str]:
        """The names of the representations, the SAE first and permuted labels last."""
        names = self.scores["representation"].unique(maintain_order=True).to_list()
        return sorted(names, key=lambda name: (name != SAE, name == PERMUTED))


def newest_probes(store: "FeatureStore") -> dict[str, Probes]:
    """The probes by kind of label. QueryError if there is no table `probe_score`."""
    scores, features = (store.frame(name).collect() for name in ("probe_score", "feature_probe"))
    newest = dict(
        scores.select("label_kind", "run").unique("label_kind", keep="first", maintain_order=True).iter_rows()
    )
    return {
        kind: Probes(*(rows.filter(label_kind=kind, run=run) for rows in (scores, features)))
        for kind, run in newest.items()
    }


def probes_of(store: "FeatureStore", label_kind: str | None) -> tuple[str, Probes]:
    """The probes of a kind of label, or of the first that there is, and its name.

    Raises:
        QueryError: there is no table `probe_score`.
        InputError: the kind was not probed.
    """
    found = newest_probes(store)
    kind = label_kind or next(iter(found))
    if kind not in found:
        raise InputError(
            f"label_kind was {kind!r}, which was not probed; there are {', '.join(found)}: "
            f"`scsae probe --label {kind} {store.layout.store_option}`"
        )
    return kind, found[kind]
