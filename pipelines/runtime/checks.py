"""What a stage checks before it reads or computes anything: that its store can be written and that its cluster answers.

Work of hours must not end in an error that could have been shown at its start. The checks take milliseconds; an address
that does not answer takes CONNECT_TIMEOUT_S at most.
"""

from feature_store.associations.claims import ALPHA, ENOUGH_DRAWS, least_p
from feature_store.storage import filesystem
from feature_store.storage.layout import Layout
from pipelines.runtime.cluster import check_address
from pipelines.runtime.progress import stderr_console
from pipelines.tracking import Tracking


def check_before_work(layout: Layout, *, address: str | None = None) -> None:
    """Raise if a stage could not write its results, or would find no cluster; nothing is left behind.

    Raises:
        StoreWriteError: the store cannot be written.
        UsageError: no Ray cluster answers at `address`, or at $RAY_ADDRESS.
    """
    check_address(address)
    filesystem.check_writable(layout.root)


def check_tracking(layout: Layout) -> None:
    """Raise if the tracking store cannot be written or does not answer. It is created if there is none.

    Raises:
        StoreWriteError, UsageError, RunFailedError: see `TrackingStore`.
    """
    Tracking(layout).check_writable()


def warn_of_few_draws(n_draws: int, what: str, *, enough: str) -> None:
    """Print a warning if no p against `n_draws` draws of a null can be at most ALPHA.

    `what` names the draws, and `enough` says what to give so that there are ENOUGH_DRAWS.
    """
    if n_draws < ENOUGH_DRAWS:
        text = f"with {n_draws} {what}, p is {least_p(n_draws):.2g} at best and cannot be {ALPHA:g}; {enough}"
        stderr_console().print(f"warning: {text}", style="yellow", soft_wrap=True)
