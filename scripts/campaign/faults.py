"""Faults that are no kill: the server away, the network cut, the disk full. Each is one `Fault`: what was done, and whether all came right.

After each the atlas, or the server's graph, is compared with that of an undisturbed run.
"""

import os
import random
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.proxy import Proxy

from .forks import Ended, Forks, Order
from .jobs import Command, Place, Workload, copied, differences
from .kills import Whole
from .servers import Server

MB = 2**20


@dataclass(frozen=True)
class Fault:
    """A disturbance and its verdict: passed, failed, or (None) not to be tried here; what was said."""

    name: str
    passed: bool | None
    seconds: float
    said: str


@dataclass(frozen=True)
class Surroundings:
    """What the faults work with."""

    forks: Forks
    work: Workload
    folder: Path
    server: Server | None
    seed: int
    say: Callable[[str], None]

    def judged(self, name: str, began: float, failures: Sequence[str], said: str) -> Fault:
        fault = Fault(name, not failures, time.monotonic() - began, failures[0] if failures else said)
        self.say(f"{name}: {'passed' if fault.passed else 'FAILED'}: {fault.said}")
        return fault

    def edges(self) -> Command:
        return self.work.edges()[0]


def _order(command: Command, place: Place, **more: object) -> Order:
    words = [str(word) for word in (*command, *place.options)]
    return Order(words, environment=place.environment, **more)  # type: ignore[arg-type]


def _ended_well(ended: Ended) -> list[str]:
    return [] if ended.code == 0 else [f"ended with {ended.code}: {ended.err.strip()[-300:]}"]


# -- the server away ------------------------------------------------------------------------------------------


def stop(around: Surroundings, whole: Whole, stores: Sequence[str]) -> Iterator[Fault]:
    """The server is stopped or killed in the middle of an ingest and started again; and once it stays away."""
    if "server" in stores and around.server is not None:
        for name, end in (("stopped", around.server.stop), ("killed", around.server.kill)):
            yield _away(around, whole, name, end)
        yield _stays_away(around, whole)


def _away(around: Surroundings, whole: Whole, name: str, end: Callable[[], None]) -> Fault:
    server, began = around.server, time.monotonic()
    assert server is not None
    place = server.place(copied(around.folder / "nothing", around.folder / f"server-{name}"))
    server.wipe()
    around.forks.start(_order(around.edges(), place))
    _until_sequences(server, random.Random(around.seed).randint(5, 30))
    end()
    server.start()
    ended = around.forks.wait()
    failures = _ended_well(ended) or differences(whole.atlas, place)
    return around.judged(f"server {name} in the middle, started again", began, failures, _one_line(ended.err))


def _stays_away(around: Surroundings, whole: Whole) -> Fault:
    server, began = around.server, time.monotonic()
    assert server is not None
    place = server.place(copied(around.folder / "nothing", around.folder / "server-away"))
    server.wipe()
    around.forks.start(_order(around.edges(), place, patience=3.0))
    _until_sequences(server, 10)
    server.kill()
    ended = around.forks.wait()
    server.start()
    failures = [] if ended.code == 1 else [f"ended with {ended.code} without its server: {ended.err[-300:]}"]
    failures += [f"the message does not say {part!r}: {ended.err}" for part in (str(place.uri), "same command") if part not in ended.err]
    again = around.forks.run(*around.edges(), *place.options, environment=place.environment)
    failures += _ended_well(again) or differences(whole.atlas, place)
    return around.judged("server killed, back when the command has ended", began, failures, _one_line(ended.err))


def _until_sequences(server: Server, n: int) -> None:
    """Wait until a run has committed so many sequences."""
    until = time.monotonic() + 60
    while server.sequences() < n and time.monotonic() < until:
        time.sleep(0.01)


# -- the network ----------------------------------------------------------------------------------------------


def cut(around: Surroundings, whole: Whole, stores: Sequence[str]) -> Iterator[Fault]:
    """A proxy stands between featlas and the server."""
    if "server" not in stores or around.server is None:
        return
    dice = random.Random(f"{around.seed}:cut")
    settings: list[tuple[str, Mapping[str, object], Callable[[Proxy], None]]] = [
        ("answers to 3 commits lost", {"lose_answers": 3}, lambda proxy: None),
        ("connections reset 3 times", {}, lambda proxy: _several(3, dice, proxy.reset)),
        ("cut after so many bytes", {"cut_after": dice.randint(20_000, 60_000)}, lambda proxy: None),
        ("every piece delayed by 5 ms", {"delay": 0.005}, lambda proxy: None),
        ("silence for 6 s, given up after 3", {}, lambda proxy: _silence(proxy, 6.0)),
    ]
    for one in settings:
        yield _through(around, whole, *one)


def _through(around: Surroundings, whole: Whole, name: str, set_: Mapping[str, object], disturb: Callable[[Proxy], None]) -> Fault:
    server, began = around.server, time.monotonic()
    assert server is not None
    server.wipe()
    atlas = copied(around.folder / "nothing", around.folder / "cut")
    with Proxy(server.port) as proxy:
        place = server.place(atlas, proxy.port)
        around.forks.start(_order(around.edges(), place, silence=3.0))
        _until_sequences(server, 4)
        for attribute, value in set_.items():
            setattr(proxy, attribute, value)
        disturb(proxy)
        ended = around.forks.wait()
        counts = proxy.counts
    failures = _ended_well(ended) or differences(whole.atlas, server.place(atlas))
    told = f"{counts.connections} connections, {counts.resets} resets, {counts.lost_answers} answers lost; {_one_line(ended.err)}"
    return around.judged(f"network: {name}", began, failures, told)


def _several(n: int, dice: random.Random, act: Callable[[], None]) -> None:
    for _ in range(n):
        time.sleep(dice.uniform(0.02, 0.3))
        act()


def _silence(proxy: Proxy, seconds: float) -> None:
    proxy.silent = True
    time.sleep(seconds)
    proxy.silent = False


# -- the disk -------------------------------------------------------------------------------------------------


def full(around: Surroundings, whole: Whole, stores: Sequence[str]) -> Iterator[Fault]:
    """The atlas on a disk that holds a part of what is written; then there is room, and the same command goes on."""
    if os.geteuid() != 0:
        yield Fault("disk full", None, 0.0, "a small disk can be made by root only")
        return
    if "embedded" in stores:
        for size in (48 * 1024, MB // 2, 2 * MB):
            yield _disk(around, whole, around.edges(), "edges", size)
        statistics = around.work.statistics()[0]
        atlas = around.folder / "whole-disk"
        copied(around.folder / "nothing", atlas)
        undisturbed = Whole(atlas, [around.forks.run(*statistics, "--atlas", atlas)])
        for size in (8 * 1024, 100 * 1024, 160 * 1024):
            yield _disk(around, undisturbed, statistics, "statistics", size, graph=False)
        (samples,) = around.work.samples()
        sampled = Whole(copied(around.folder / "nothing", around.folder / "whole-samples"), [])
        around.forks.run(*samples, "--atlas", sampled.atlas)
        yield _disk(around, sampled, samples, "samples", 100 * 1024, graph=False)
    if "server" in stores:
        yield _servers_disk(around, whole)


def _disk(around: Surroundings, whole: Whole, command: Command, job: str, size: int, *, graph: bool = True) -> Fault:
    began, mount = time.monotonic(), around.folder / "disk"
    with small_disk(mount, size):
        place = Place(mount / "atlas")
        ended = around.forks.run(*command, *place.options)
        failures = [] if ended.code == 1 else [f"ended with {ended.code} on a full disk: {(ended.err or ended.out)[-300:]}"]
        failures += [f"the message does not say {part!r}: {ended.err}" for part in (str(mount), "is full", "left)") if part not in ended.err]
        subprocess.run(["mount", "-o", "remount,size=256m", str(mount)], check=True)
        failures += _ended_well(around.forks.run(*command, *place.options)) or differences(whole.atlas, place, graph=graph)
    return around.judged(f"disk of {size // 1024} kB full: {job}", began, failures, _one_line(ended.err))


def _servers_disk(around: Surroundings, whole: Whole) -> Fault:
    """The server's own disk: it must be started anew when there is room."""
    began, mount = time.monotonic(), around.folder / "servers-disk"
    with small_disk(mount, 256 * MB):
        server = Server(mount / "neo4j")
        try:
            filler = mount / "filler"
            free = os.statvfs(mount)
            filler.write_bytes(b"\0" * max(0, free.f_bavail * free.f_frsize - 2 * MB))
            place = server.place(copied(around.folder / "nothing", around.folder / "servers-disk-atlas"))
            ended = around.forks.run(*around.edges(), *place.options, environment=place.environment, patience=3.0)
            failures = [] if ended.code == 1 else [f"ended with {ended.code} on the server's full disk: {(ended.err or ended.out)[-300:]}"]
            failures += [f"the message does not say {part!r}: {ended.err}" for part in (str(place.uri), "same command") if part not in ended.err]
            server.stop()  # first: room that is made while it runs spoils its log
            filler.unlink()
            server.start()
            again = around.forks.run(*around.edges(), *place.options, environment=place.environment)
            failures += _ended_well(again) or differences(whole.atlas, place)
        finally:
            server.__exit__(None, None, None)
    return around.judged("the server's disk full", began, failures, _one_line(ended.err))


@contextmanager
def small_disk(mount: Path, size: int) -> Iterator[None]:
    """A file system in memory of `size` bytes at a new folder; only root can make one."""
    mount.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(mount)], check=True)
        mount.rmdir()


def _one_line(text: str) -> str:
    lines = [line for line in text.strip().splitlines() if line.strip()]
    return (lines[-1] if lines else "nothing was said")[:300]


FAULTS: Mapping[str, Callable[[Surroundings, Whole, Sequence[str]], Iterator[Fault]]] = {"stop": stop, "cut": cut, "full": full}
