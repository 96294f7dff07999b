"""The log of a Ray job, followed to its end.

The log is streamed by Ray's own client, `JobSubmissionClient.tail_job_logs`. That alone is not enough: every connection
starts at the beginning of the log, a connection that a proxy drops is neither noticed nor renewed, and a stream that
ends does not say whether the job has ended. This module therefore counts the characters written, asks for the state of
the job when the stream ends or is silent, and connects again after an error. If a proxy lets no websocket through, the
whole log is fetched every LOG_INTERVAL_S.
"""

import asyncio
import re
import sys
import time
from typing import Any

from pipelines.errors import RunFailedError
from pipelines.runtime.progress import stderr_console
from pipelines.runtime.visible import visible

POLL_S = 1.0
LOG_INTERVAL_S = 30.0
QUIET_S = 30.0
"""Seconds without a line of the log after which the state of the job is asked for."""
SILENT_S = 600.0
"""Seconds without a line of the log after which the connection is renewed: proxies drop idle connections silently."""
RETRY_S = 600.0
"""Seconds for which a dashboard that does not answer is waited for."""
LONGEST_PAUSE_S = 30.0
MAX_EARLY_ENDS = 3
"""Number of streams that may end before their job does; after that the log is fetched instead."""


class _SilentError(Exception):
    """The log was silent for so long that a new connection is needed."""


class JobLog:
    """The log of one job, written to stdout once, over as many connections as necessary."""

    def __init__(self, client: Any, job: str) -> None:
        self._client = client
        self._job = job
        self._n_written = 0
        self._streams = True
        self._n_early_ends = 0
        self._fetched_at = self._alive_at = time.monotonic()

    def follow(self) -> Any:
        """Write the log until the job ends and return the details of the job.

        RunFailedError if the dashboard does not answer for RETRY_S, or no longer knows the job.
        """
        while True:
            try:
                if self._streams:
                    asyncio.run(self._stream())
                info = self._job_details()
                self._n_early_ends += 1
                self._streams = self._streams and self._n_early_ends < MAX_EARLY_ENDS
                if info.status.is_terminal() or time.monotonic() - self._fetched_at > LOG_INTERVAL_S:
                    self._fetch()
                if info.status.is_terminal():
                    return info
                time.sleep(POLL_S)
            except _SilentError:
                continue
            except Exception as error:
                if not _is_connection_error(error):
                    raise
                self._wait_for_dashboard(error)

    async def _stream(self) -> None:
        """Write the log as it arrives, until the dashboard ends the stream at the end of the job."""
        import aiohttp

        messages = self._client.tail_job_logs(self._job)
        n_seen = 0
        try:
            while (chunk := await self._next(messages)) is not None:
                self._write(chunk[max(self._n_written - n_seen, 0) :])
                n_seen += len(chunk)
                self._alive_at = time.monotonic()
        except aiohttp.WSServerHandshakeError as error:
            if error.status >= 500:
                raise
            self._streams = False
        finally:
            await messages.aclose()

    async def _next(self, messages: Any) -> str | None:
        """Return the next piece of the log, None at its end; _SilentError if the connection has to be replaced."""
        coming = asyncio.ensure_future(anext(messages, None))
        started = time.monotonic()
        try:
            while not (await asyncio.wait({coming}, timeout=QUIET_S))[0]:
                info = await asyncio.to_thread(self._job_details)
                # if the job has ended, the rest of its log is fetched
                self._streams = not info.status.is_terminal()
                if not self._streams or time.monotonic() - started > SILENT_S:
                    raise _SilentError
            piece: str | None = coming.result()
            return piece
        finally:
            coming.cancel()
            # careful: a generator that is still running cannot be closed
            await asyncio.wait({coming})

    def _job_details(self) -> Any:
        """Return the details of the job and note that the dashboard answers."""
        try:
            info = self._client.get_job_info(self._job)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            raise RunFailedError(
                f"the cluster no longer knows {self._job}: its head was restarted; submit it again to resume"
            ) from None
        self._alive_at = time.monotonic()
        return info

    def _fetch(self) -> None:
        """If the log cannot be streamed, fetch all of it and write the part that is new."""
        if not self._streams:
            log = self._client.get_job_logs(self._job)
            self._write(log[self._n_written :])
            self._fetched_at = time.monotonic()

    def _write(self, text: str) -> None:
        self._n_written += len(text)
        # careful: other programs of the job may print control characters
        sys.stdout.write(visible(text, keep="\n\t"))
        sys.stdout.flush()

    def _wait_for_dashboard(self, error: Exception) -> None:
        """Wait for a dashboard that does not answer; RunFailedError after RETRY_S.

        The pause is as long as the dashboard has been away, at most LONGEST_PAUSE_S.
        """
        away = time.monotonic() - self._alive_at
        if away > RETRY_S:
            raise RunFailedError(
                f"the dashboard has not answered for {away:.0f} s ({error}); {self._job} may still be running: submit "
                "it again to follow or resume it"
            ) from error
        pause = min(max(away, POLL_S), LONGEST_PAUSE_S)
        print_notice(
            f"the connection to the dashboard was lost ({error}); trying again in {pause:.0f} s, the job keeps running"
        )
        time.sleep(pause)


def _is_connection_error(error: Exception) -> bool:
    """Return whether an error is of the connection (a restarting dashboard, a proxy) and not of the job."""
    import aiohttp

    if isinstance(error, (OSError, aiohttp.ClientError)):
        return True
    return isinstance(error, RuntimeError) and bool(re.search(r"WebSocket|status code 5\d\d", str(error)))


def print_notice(text: str) -> None:
    """Print a notice about a job on stderr."""
    stderr_console().print(text, style="yellow", soft_wrap=True)
