"""Data files that were moved or renamed since their extraction: `--data NEWPATH` names their new place.

Later stages read the files of a data set again: `associate` its expression, `encode --fused` and `steer` the cells of a
forward pass, `train` those that tell the recovery, `baseline` all of these. They find the files where `source.json`
says. A run does not depend on the place of its files, so a new place is written there once the digests show that the
files are the same.
"""

from collections.abc import Sequence

from feature_store.cells import (
    FileState,
    data_files,
    open_source,
    place_text,
    recorded_digests,
    source_location,
    write_source_location,
)
from feature_store.storage.addresses import DataPath
from feature_store.storage.layout import Layout
from pipelines.errors import UsageError
from pipelines.runtime.progress import delayed_progress_bar


def record_new_place(layout: Layout, dataset: str, files: Sequence[DataPath]) -> None:
    """Write the new place of a data set's files, given in any order; UsageError if they are other files."""
    if files and not record_if_same(layout, dataset, files):
        where = source_location(layout, dataset)
        digests = ", ".join(digest[:12] for digest in where.digests)
        raise UsageError(
            f"--data was {', '.join(map(str, files))}, which is not the data set {dataset} (once at "
            f"{', '.join(where.paths)}, sha256 {digests}); give the same files, or encode other data with "
            "`scsae encode --data`"
        )


def record_if_same(layout: Layout, dataset: str, files: Sequence[DataPath]) -> bool:
    """Write the new place of a data set's files if `files` are the same by their digests; return whether they are."""
    where = source_location(layout, dataset)
    files = data_files(files)
    if len(files) != len(where.digests):
        return False
    place: dict[str, tuple[str, FileState, str]] = {}
    known_digest = recorded_digests(layout)
    for file in files:
        with open_source(file, progress=delayed_progress_bar, known_digest=known_digest) as source:
            place[source.digest] = place_text(file), source.states[0], source.versions[0]
    if set(place) != set(where.digests):
        return False
    paths, states, versions = zip(*(place[digest] for digest in where.digests), strict=True)
    write_source_location(layout, dataset, where._replace(paths=paths, states=states, versions=versions))
    return True
