"""Where the files of a data set are, beside its cells: `source.json`, and the data set opened again from there.

A run's id does not depend on the place of its files, so moving a file does not make another run. A data file is hashed
once: `source.json` holds its digest with its state (`file_digests`).
"""

from collections.abc import Sequence
from contextlib import suppress
from functools import cache
from typing import Any, NamedTuple

from feature_store.cells.file_digests import FileState, KnownDigest
from feature_store.cells.source import Progress, Source, no_progress, open_source
from feature_store.cells.turning import use_turned
from feature_store.errors import InputError, StoreError
from feature_store.storage import commit, filesystem
from feature_store.storage.addresses import DataPath, RemotePath, data_path
from feature_store.storage.hashing import sealed
from feature_store.storage.layout import SOURCE_FILE, Layout
from feature_store.storage.plans import CellsPlan
from feature_store.storage.remote_protocols import is_there


def save_source_location(layout: Layout, dataset: str, source: Source) -> None:
    """Write the present location of the data set's files beside its cells; later stages read expression from there."""
    where = SourceLocation(
        tuple(map(place_text, source.paths)),
        source.matrix,
        source.where,
        source.digests,
        source.states,
        versions=source.versions,
        obs=tuple(map(place_text, source.obs_tables)),
    )
    write_source_location(layout, dataset, where)


def place_text(path: DataPath) -> str:
    """The absolute path of a file, or its address, as it is written into a store."""
    return path.address if isinstance(path, RemotePath) else str(path.resolve())


class SourceLocation(NamedTuple):
    """Where the files of a data set were when they were last used, their matrix, the condition by which cells were
    taken (None without one), the digest of each, and the state that it had when it was hashed; of one at an address,
    the version in words too. `obs` are the places of the tables that columns of obs were joined from.
    """

    paths: tuple[str, ...]
    matrix: str
    where: str | None
    digests: tuple[str, ...]
    states: tuple[FileState, ...]
    versions: tuple[str, ...]
    obs: tuple[str, ...]

    def known_digest(self, path: DataPath, state: FileState) -> str | None:
        """The digest of a file that has been in this state since it was hashed, else None."""
        known = dict(zip(zip(self.paths, self.states, strict=True), self.digests, strict=True))
        return known.get((place_text(path), state))

    @property
    def places(self) -> tuple[str | RemotePath, ...]:
        """The paths, and the addresses with the version that was used."""
        found = zip(map(data_path, self.paths), self.digests, strict=True)
        return tuple(one.of_version(digest) if isinstance(one, RemotePath) else str(one) for one, digest in found)


def write_source_location(layout: Layout, dataset: str, where: SourceLocation) -> None:
    """Write the location of a data set's files beside its cells."""
    content = {
        "path": _one_or_all(where.paths),
        "matrix": where.matrix,
        "where": where.where,
        "digest": _one_or_all(where.digests),
        "state": [list(state) for state in where.states],
        "version": list(where.versions),
        "obs": list(where.obs),
    }
    filesystem.replace_text(layout.cells_dir(dataset) / SOURCE_FILE, sealed(content))


def source_location(layout: Layout, dataset: str) -> SourceLocation:
    """What `write_source_location` wrote.

    Raises:
        OutdatedRunError: another version wrote it, which says other things of the files.
        IntegrityError, NotFoundError: as from `load_source_location`.
    """
    CellsPlan.of(commit.Run.open(layout.cells_dir(dataset)))
    content = load_source_location(layout, dataset)
    paths, digests = (
        (value,) if isinstance(value, str) else tuple(value) for value in (content["path"], content["digest"])
    )
    states = tuple(FileState(*state) for state in content["state"])
    return SourceLocation(
        paths,
        content["matrix"],
        content["where"],
        digests,
        states,
        versions=tuple(content["version"]),
        # a store of a version that did not keep these places
        obs=tuple(content.get("obs", ())),
    )


def recorded_digests(layout: Layout) -> KnownDigest:
    """What gives the digest of a file that a data set of the store was made of, if its state is the same."""

    @cache
    def locations() -> list[SourceLocation]:
        found = []
        for info in layout.runs("cells"):
            with suppress(StoreError):
                found.append(source_location(layout, info.run))
        return found

    def digest(path: DataPath, state: FileState) -> str | None:
        return next((one for where in locations() if (one := where.known_digest(path, state))), None)

    return digest


def load_source_location(layout: Layout, dataset: str) -> dict[str, Any]:
    """What `save_source_location` wrote beside the cells of a data set. IntegrityError."""
    return filesystem.read_required(layout.cells_dir(dataset) / SOURCE_FILE)


def missing_files(layout: Layout, dataset: str) -> list[str]:
    """The files of a data set that are not where they were."""
    return [str(path) for path in map(data_path, source_location(layout, dataset).paths) if not is_there(path)]


def changed_files(source: Source, where: SourceLocation) -> list[str]:
    """For each file of an opened data set that is another than it was, a text with both digests."""
    return [
        f"{path} changed since its extraction ({version or f'sha256 {now[:12]}'}, was {old or then[:12]})"
        for path, now, then, version, old in zip(
            source.paths, source.digests, where.digests, source.versions, where.versions, strict=True
        )
        if now != then
    ]


def open_recorded(where: SourceLocation, *, progress: Progress = no_progress) -> Source:
    """The data set, opened at its recorded location. A file whose state is the recorded one is not hashed."""
    return open_source(
        where.paths, matrix=where.matrix, where=where.where, progress=progress, known_digest=where.known_digest
    )


def read_again(layout: Layout, dataset: str) -> Source:
    """The data set, opened to read its cells again; nothing is written. It is a context manager.

    Raises:
        InputError: a file is gone or changed, or its matrix has to be turned first.
    """
    if missing := missing_files(layout, dataset):
        raise InputError(
            f"the cells of {dataset} are read again from {missing[0]}, which is not there; if it was moved, name its "
            f"new place: `scsae associate --data NEWPATH {layout.store_option}`"
        )
    where = source_location(layout, dataset)
    source = open_recorded(where)
    try:
        if changed := changed_files(source, where):
            raise InputError(f"{'; '.join(changed)}; bring back the file as it was, or extract it again")
        use_turned(layout, source)
    except InputError:
        source.close()
        raise
    return source


def _one_or_all(values: Sequence[str]) -> str | list[str]:
    """A single value itself, which is the format from before data sets had several files, else a list."""
    return values[0] if len(values) == 1 else list(values)
