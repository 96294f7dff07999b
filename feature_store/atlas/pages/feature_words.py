"""What a feature is and how sure that is, in sentences made of the tables by rules, with the figures they stand on.

Only what is significant on `test` cells is said of it (`feature_store.associations.claims`). A claim is then checked as
far as the store allows: is the association strong for the best of all features, do donors agree, does another SAE have
the feature, and is its class that of resampled cells? The grade follows from the checks that could be made.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import polars as pl

from feature_store.associations.claims import ALPHA
from feature_store.atlas.data import AtlasData

N_GENES = 4
LEAST_DONORS = 3
"""Donors from which their agreement says something: it is what an interval over donors needs."""
LEAST_CONFIDENCE = 0.8
"""Share of resampled data sets in which the class has to be the same."""
GRADES: Mapping[str, str] = {
    "well supported": "the association is significant on test cells, every further check that was made holds, and "
    "donors or another SAE are among them",
    "partly supported": "the association is significant on test cells",
    "unexplained": "no label, gene or gene set is significant on test cells",
    "silent": "it does not fire",
}
"""The grades, and what each means; `_doubts` says what "partly" leaves open."""


class Check(NamedTuple):
    """One figure behind the sentences: what it says, and whether it supports them; None where it could not be asked."""

    text: str
    holds: bool | None
    is_independent: bool = False
    """Whether it is about other donors or another SAE, and not the same cells again."""


def in_words(data: AtlasData, feature: int, document: Mapping[str, Any]) -> dict[str, Any]:
    """`text`: what the feature is; `grade` with `means`; `checks`: text and holds of each. document: the page's own."""
    about = document["about"]
    if about["dead"]:
        text, checks = "It fires on no token of this data set.", list[Check]()
    else:
        text = " ".join(_sentences(about, document))
        checks = [*_of_label(data, feature, about), *_of_genes(about, document), *_of_batch(about)]
    is_named = not about["dead"] and _is_named(about, document)
    if is_named:
        checks = [*checks, *_further(about, document)]
    grade = "silent" if about["dead"] else _grade(checks) if is_named else "unexplained"
    return {
        "text": text,
        "grade": grade,
        "means": GRADES[grade] + (_doubts(checks) if grade == "partly supported" else ""),
        "checks": [{"text": check.text, "holds": check.holds} for check in checks],
    }


def _is_named(about: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
    """Whether anything is said of it."""
    known = any(about.get(name) for name in ("top_label", "top_genes", "top_identity_genes"))
    return known or about.get("class") == "batch" or _best_set(document) is not None


def _grade(checks: Sequence[Check]) -> str:
    asked = [check for check in checks if check.holds is not None]
    sure = all(check.holds for check in asked) and any(check.is_independent for check in asked)
    return "well supported" if sure else "partly supported"


def _doubts(checks: Sequence[Check]) -> str:
    """What keeps a feature from being well supported: the checks that failed, and whether none was independent."""
    failed = [check.text for check in checks if check.holds is False]
    alone = not any(check.is_independent and check.holds is not None for check in checks)
    parts = (
        [f"{'this check fails' if len(failed) == 1 else 'these checks fail'}: {'; '.join(failed)}"] if failed else []
    )
    parts += ["neither donors nor another SAE could be asked"] if alone else []
    return ", but " + ", and ".join(parts)


def _sentences(about: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[str]:
    """What the feature is, by its class, then its genes and its gene set."""
    label, kind = about.get("top_label"), _plain(about.get("top_label_kind"))
    identity, genes = (_list(about.get(name)) for name in ("top_identity_genes", "top_genes"))
    of_class = about.get("class")
    named = True
    if of_class == "gene-identity" and identity:
        yield f"It fires on tokens of {_join(identity)}, in whatever cells they are expressed."
    elif of_class == "batch":
        yield "It tells batches apart within cell types, so its cause is most likely technical."
    elif label:
        yield f"Its code is larger in cells of {label} ({kind}) than in other cells."
    else:
        named = False
    if of_class in ("gene-identity", "batch") and label:
        yield f"Its code is also larger in cells of {label} ({kind})."
    if genes:
        start = "It" if named else "No label stands out, but it"
        yield f"{start} goes with the expression of {_join(genes)}."
    found = _best_set(document)
    if found is not None:
        yield f"Its genes overlap with the gene set {_plain(found['gene_set'])}."
    if not named and not genes and found is None:
        yield "Nothing that was tested explains it: it goes with no label, gene or gene set at q <= 0.05 on test cells."
    if of_class == "mixed" and (named or genes):
        yield "Neither genes, nor a label, nor the batch explains it alone."


def _of_label(data: AtlasData, feature: int, about: Mapping[str, Any]) -> Iterator[Check]:
    """The checks of its best label, if one is named."""
    label, kind = about.get("top_label"), about.get("top_label_kind")
    if not label or not data.has("feature_label"):
        return
    found = data.rows("feature_label", feature, _best_labels)
    row = next((row for row in found if (row["label_kind"], row["label"]) == (kind, label)), None)
    if row is None:
        return
    yield Check(
        f"AUROC {row['auroc']:.3f} for {label} on test cells, q {_p(row['q'])} "
        f"({about['top_label_auroc_select']:.3f} on select cells, where it was chosen)",
        row["q"] is not None and row["q"] <= ALPHA,
    )
    if row["p_max"] is not None:
        yield Check(f"p {_p(row['p_max'])} as the best of all features under permuted labels", row["p_max"] <= ALPHA)
    n, agree = row["n_donors"], row["n_agree"]
    if n is None or agree is None or n < LEAST_DONORS:
        known = 0 if n is None or agree is None else n
        yield Check(f"{known} {data.units} of test cells can be compared, too few to ask whether they agree", None)
    else:
        low, high = (None if row[name] is None else (1 + row[name]) / 2 for name in ("low", "high"))
        interval = "" if low is None else f", AUROC {low:.2f} to {high:.2f} (95 %) across them"
        holds = agree == n and (row["low"] is None or row["low"] > 0)
        yield Check(f"{agree} of {n} {data.units} agree{interval}", holds, is_independent=data.unit == "donor")


def _best_labels(data: AtlasData, rows: pl.DataFrame) -> pl.DataFrame:
    """The figures on `test` cells of the label that each feature is named after."""
    best = data.features.select("feature_id", label_kind="top_label_kind", label="top_label")
    return rows.filter(split="test").join(best, on=["feature_id", "label_kind", "label"], how="semi")


def _of_genes(about: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Check]:
    """The figures of the first gene by identity, where its class is that of a gene, and by expression otherwise."""
    genes = document["genes"]
    if about.get("class") == "gene-identity" and (first := _row(genes, "identity", about.get("top_identity_genes"))):
        if first["identity_precision"] is not None:
            yield Check(
                f"{100 * first['identity_precision']:.0f} % of its firing on test cells is on {first['gene']}, "
                f"{first['lift']:.3g} times what chance gives",
                first["lift"] > 1,
            )
    elif first := _row(genes, "expression", about.get("top_genes")):
        if first["pearson"] is not None:
            within = first.get("pearson_within_type")
            inside = "" if within is None else f", {within:.2f} within cell types"
            yield Check(
                f"correlation {first['pearson']:.2f} with {first['gene']} on test cells{inside}, q {_p(first['q'])}",
                first["q"] is not None and first["q"] <= ALPHA,
            )


def _of_batch(about: Mapping[str, Any]) -> Iterator[Check]:
    """The share of its variance that batches explain, where its class is that of batches."""
    if about.get("class") == "batch" and about.get("batch_effect") is not None:
        share = 100 * about["batch_effect"]
        yield Check(f"batches explain {share:.0f} % of the rank variance of its code within cell types", True)


def _further(about: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[Check]:
    """Whether resampled cells give the same class, and whether another SAE has the feature."""
    if about.get("class_confidence") is not None:
        share = about["class_confidence"]
        text = f"the class {about['class']} in {100 * share:.0f} % of resampled data sets"
        yield Check(text, share >= LEAST_CONFIDENCE)
    rows = [row for row in document["matches"].get("rows", []) if row["other_feature_id"] is not None]
    if not rows:
        yield Check("not compared with another SAE", None)
        return
    found = [row for row in rows if row["mutual"] and row["p"] is not None and row["p"] <= ALPHA]
    best = max(found or rows, key=lambda row: row["similarity"] or 0)
    how = "mutual" if best["mutual"] else "not mutual"
    yield Check(
        f"{len(found)} of {len(rows)} nearest features in other SAEs are mutual and beyond chance; the most similar "
        f"is {best['other_feature_id']} of {best['other']} ({how}, similarity {best['similarity']:.2f}, "
        f"p {_p(best['p'])})",
        bool(found),
        is_independent=True,
    )


def _row(genes: Mapping[str, Any], how: str, named: str | None) -> dict[str, Any] | None:
    """The row of the first gene that the feature is named after, among those of the page."""
    names = _list(named)
    return next((row for row in genes.get(how, []) if names and row["gene"] == names[0]), None)


def _best_set(document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The first gene set that is significant on `test` cells, also against sets of genes like its own where known."""
    for row in document["gene_sets"].get("rows", []):
        if all(row[name] is not None and row[name] <= ALPHA for name in ("q", "q_matched")):
            return dict(row)
    return None


def _list(text: str | None) -> list[str]:
    return (text or "").replace(",", " ").split()[:N_GENES]


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _plain(name: str | None) -> str:
    return (name or "label").removeprefix("obs_").replace("_", " ")


def _p(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1e}" if value < 0.001 else f"{value:.3f}"
