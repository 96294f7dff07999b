"""`scsae serve` and `scsae export-atlas`: make the maps that a store lacks, then show its atlas or write it to files.

The page reads the store and computes nothing but look-ups. The maps of cells, features and steered cells take longer:
they are made here, once, and kept. If the store cannot be written, or has too few cells for a map, the atlas is shown
without the map. An address or a folder that cannot be used is refused first. The first map of a process takes longest,
because UMAP is compiled then. A page that is opened meanwhile says which map is being made.
"""

import contextlib
import os
import shlex
import threading
import webbrowser
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

from feature_store import FeatureStore
from feature_store.storage.commit import is_intact
from feature_store.storage.filesystem import check_writable, is_local
from feature_store.storage.layout import Layout
from pipelines.errors import ON_PURPOSE
from pipelines.runtime.output import console
from pipelines.runtime.progress import ProgressCallback, activity, progress_bar, stderr_console
from pipelines.runtime.stage import Clock

ONLY_HERE = ("127.0.0.1", "localhost", "::1")


class Missing(NamedTuple):
    """A map that a store lacks, and how to make it."""

    name: str
    make: Callable[[], object]


def serve_atlas(
    root: Path, *, associations: str | None, codes: str | None, host: str, port: int, open_browser: bool
) -> None:
    """Show the atlas of a store at an address of this machine until Ctrl-C.

    Raises InputError for an address at which the server cannot listen, and the errors of `FeatureStore.open`.
    """
    from feature_store.atlas.server import listen, serve, waiting_page

    store = FeatureStore.open(root, associations=associations, codes=codes)

    def ready(url: str) -> None:
        console().print(f"the atlas of {root} is at {url} (Ctrl-C ends it)", soft_wrap=True)
        if host not in ONLY_HERE:
            stderr_console().print(
                f"everyone who reaches {host} can read this store, because there is no log-in", style="yellow"
            )
        if open_browser:
            # careful: a browser in a terminal would keep the server from starting
            threading.Thread(target=webbrowser.open, args=(url,), daemon=True).start()

    with listen(host, port) as listening:
        with waiting_page(listening) as making:
            prepared = prepare_atlas(store, making)
        # careful: the server raises the interrupt again once every answer was sent
        with contextlib.suppress(KeyboardInterrupt):
            serve(prepared, host=host, port=port, listening=listening, ready=ready)


def export_atlas(root: Path, folder: Path, *, associations: str | None, codes: str | None) -> None:
    """Write the atlas of a store to a folder, for any web host, and print how to open it.

    Raises InputError for a folder that holds something else, StoreWriteError, and the errors of `FeatureStore.open`.
    """
    from feature_store.atlas.export import check_folder, export

    store = FeatureStore.open(root, associations=associations, codes=codes)
    check_folder(folder)
    check_writable(folder)
    store = prepare_atlas(store)
    clock = Clock()
    with contextlib.ExitStack() as stack:
        bars: list[ProgressCallback] = []
        # careful: tables are read and processes started before the first bundle, which the bar could not count
        before = stack.enter_context(contextlib.ExitStack())
        before.enter_context(activity("export", "reads the tables and makes the first bundles"))

        def progress(n_done: int, n_all: int) -> None:
            if not bars:
                before.close()
                bars.append(stack.enter_context(progress_bar("export", n_all, "bundles")))
            bars[0](n_done)

        size = export(store, folder, progress=progress)
    console().print(
        f"the atlas of {root} is in {folder} ({size / 1e6:.1f} MB, {clock.seconds:.0f} s); any web host serves it, and "
        "so does",
        f"  python -m http.server --bind 127.0.0.1 --directory {shlex.quote(str(folder))}",
        sep="\n",
        soft_wrap=True,
    )


def prepare_atlas(store: FeatureStore, making: Callable[[str], None] = lambda _: None) -> FeatureStore:
    """The store with the maps that it lacked, as far as they can be made; each map is named on stderr, and to `making`
    before it is made.
    """
    out, root = stderr_console(), store.layout.root
    found = list(missing_maps(store))
    if found and is_local(root) and not os.access(root, os.W_OK):
        # careful: a map that cannot be kept would be made again at every start, which takes minutes
        names = ", ".join(missing.name for missing in found)
        out.print(f"{root} cannot be written, so the atlas goes without {names}", style="yellow", soft_wrap=True)
        return store
    for missing in found:
        clock = Clock()
        making(missing.name)
        out.print(f"making {missing.name}, once", soft_wrap=True)
        try:
            with activity("atlas", f"makes {missing.name}"):
                missing.make()
        except ON_PURPOSE as error:
            out.print(f"the atlas goes without {missing.name}: {error}", style="yellow", soft_wrap=True)
        else:
            out.print(f"made {missing.name} in {clock.seconds:.0f} s", soft_wrap=True)
    return FeatureStore(store.layout, store.lineage, named=store.named)


def missing_maps(store: FeatureStore) -> Iterator[Missing]:
    """The maps that a store lacks and for which it has the tables."""
    from feature_store.maps.cells import has_cell_map
    from feature_store.maps.features import has_feature_map
    from feature_store.maps.label_profiles import has_profile_map
    from feature_store.maps.steered_cells import has_embeddings

    layout, lineage = store.layout, store.lineage
    if (codes := lineage.codes) is not None and not has_cell_map(layout, codes):
        yield Missing("the map of the cells", partial(_map_cells, layout, codes))
    if (sae := lineage.sae) is not None and "training" in store.tables() and not has_feature_map(layout, sae):
        yield Missing("the map of the features", partial(_map_features, layout, sae))
    if (associations := lineage.associations) is not None and not has_profile_map(layout, associations):
        yield Missing("the map of the features by their labels", partial(_map_profiles, layout, associations))
    for run in lineage.steering:
        if has_embeddings(layout, run) and not is_intact(layout.steering_dir(run) / "map"):
            yield Missing(f"the map of steering run {run}", partial(_map_steering, layout, run))


def _map_cells(layout: Layout, codes: str) -> object:
    from feature_store.maps.cells import cell_map

    return cell_map(layout, codes)


def _map_features(layout: Layout, sae: str) -> object:
    from feature_store.maps.features import feature_map
    from pipelines.match import decoder_rows

    return feature_map(layout, sae, lambda: decoder_rows(layout.saes_dir(sae)))


def _map_profiles(layout: Layout, associations: str) -> object:
    from feature_store.maps.label_profiles import profile_map

    return profile_map(layout, associations)


def _map_steering(layout: Layout, run: str) -> object:
    from feature_store.maps.steered_cells import steering_map

    return steering_map(layout, run)
