"""Three hosts on one machine: Linux network namespaces on one bridge, whose links can be cut and healed.

They share the file system and the processes of the machine, so that a store is seen by all and a process can be stopped
by its id. Making them needs root and the command `ip` (iproute2).
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "SCSAE_TEST_HOST"


def why_not() -> str | None:
    """Return why no network namespace can be made here, or None if one can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "there is no command `ip`; install iproute2"
    name = f"scsae{os.getpid()}"
    tried = _ip("netns", "add", name, check=False)
    if tried.returncode != 0:
        return f"network namespaces are not allowed: {tried.stderr.strip()}"
    # a bridge needs a right of its own
    bridge = _ip("-n", name, "link", "add", "b0", "type", "bridge", check=False)
    _ip("netns", "del", name)
    return None if bridge.returncode == 0 else f"bridges are not allowed: {bridge.stderr.strip()}"


class Hosts:
    """Hosts 0, 1, ... with an address each, and the processes that run on them."""

    def __init__(self, n: int) -> None:
        self.tag = f"s{os.getpid() % 100_000}"
        self.net = f"10.{os.getpid() // 250 % 250}.{os.getpid() % 250}"
        self.n = n
        self._started: list[subprocess.Popen[bytes]] = []

    def ip(self, host: int) -> str:
        """Address of a host."""
        return f"{self.net}.{host + 1}"

    def make(self) -> None:
        """Make the namespaces, the bridge and the links."""
        _ip("netns", "add", f"{self.tag}b")
        bridge = ("-n", f"{self.tag}b", "link")
        _ip(*bridge, "add", "b0", "type", "bridge")
        _ip(*bridge, "set", "b0", "up")
        for host in range(self.n):
            name, link = f"{self.tag}h{host}", f"{self.tag}v{host}"
            _ip("netns", "add", name)
            _ip("link", "add", link, "netns", f"{self.tag}b", "type", "veth", "peer", "name", "eth0", "netns", name)
            _ip(*bridge, "set", link, "master", "b0")
            _ip(*bridge, "set", link, "up")
            _ip("-n", name, "addr", "add", f"{self.ip(host)}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                _ip("-n", name, "link", "set", device, "up")
            # with a default route a process finds the address of its host
            _ip("-n", name, "route", "add", "default", "via", f"{self.net}.254")

    def cut(self, host: int) -> None:
        """Take the link of a host down."""
        _ip("-n", f"{self.tag}b", "link", "set", f"{self.tag}v{host}", "down")

    def heal(self, host: int) -> None:
        """Take the link of a host up again."""
        _ip("-n", f"{self.tag}b", "link", "set", f"{self.tag}v{host}", "up")

    def start(self, host: int, *command: object, log: Path, env: dict[str, str]) -> subprocess.Popen[bytes]:
        """Start a command on a host; its output goes to a file."""
        with log.open("ab") as out:
            started = subprocess.Popen(
                ["ip", "netns", "exec", f"{self.tag}h{host}", *map(str, command)],
                env={**env, MARK: f"{self.tag}h{host}"},
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._started.append(started)
        return started

    def processes(self, host: int) -> list[int]:
        """Ids of all processes that were started on a host, and of their children."""
        found, mark = [], f"{MARK}={self.tag}h{host}".encode()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
        return found

    def kill(self, host: int) -> None:
        """Kill every process of a host."""
        deadline = time.monotonic() + 120
        while (left := self.processes(host)) and time.monotonic() < deadline:
            for process in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            for started in self._started:
                started.poll()
            time.sleep(0.05)

    def remove(self) -> None:
        """Kill all processes and remove all namespaces; their links go with them."""
        for host in range(self.n):
            self.kill(host)
            _ip("netns", "del", f"{self.tag}h{host}", check=False)
        for started in self._started:
            started.wait(30)
        _ip("netns", "del", f"{self.tag}b", check=False)


@contextlib.contextmanager
def hosts(n: int) -> Iterator[Hosts]:
    """Make hosts and remove them at the end of the block, whatever happens in it."""
    made = Hosts(n)
    try:
        made.make()
        yield made
    finally:
        made.remove()


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done
