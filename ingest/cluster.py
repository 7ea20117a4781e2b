"""Work spread over processes, and machines, by Ray: a session of workers, and shards of work that survive the death of a worker.

1. `ray_session` starts a Ray of its own on this machine, or joins a cluster; what it started ends with it.
2. Each worker is one process with one GPU or one share of the cores. It makes its tools once (`make_worker`: model, dictionaries) and then
   takes shards, one at a time; one more waits in front of it, so that it never idles while results are written.
3. A result is handed to `on_result` before more work is given out: whoever writes slowly holds the workers back.
4. A worker that dies is replaced, and its shards are done again, each alone: an answer may die with who gave it, so of two shards it is not
   known which one a worker died over. A shard over which `ATTEMPTS` workers may have died is an error that names it; so is a worker that
   cannot be made.

Results come in any order. What a worker raises ends the run: only death is tried again. Light: neither Ray nor torch is imported before use.
"""

import importlib
import importlib.util
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from ..errors import FeatlasError, UserError
from ..files import is_alive
from . import ray_guard

ATTEMPTS = 3
"""Workers that may die over one shard, or while they are made, before the run ends."""

IN_FLIGHT = 2
"""Shards that one worker has at a time: one under work, one waiting."""

REACH_SECONDS = 10.0
"""How long a cluster has to answer."""

STARTS = 3
"""How often a Ray of this machine's own is started, where it takes longer than half a minute."""

START_SECONDS = 180.0
"""How long the first worker's process may take to start; making its tools comes after."""

STORE_BYTES = 512 * 2**20
"""Memory, of each worker, for results on their way to the driver; taken only as it is used."""

FOLDER = "featlas-ray-"

Shard = TypeVar("Shard")
Result = TypeVar("Result")
Work = Callable[[Shard], Result]


class RayMissing(UserError):
    """Ray is an extra that is not installed."""


class TooManyWorkers(UserError):
    """More workers were asked for than there are cores or GPUs."""


class NoWorkers(UserError):
    """Less than one worker was asked for."""


class SpreadByWorkers(UserError):
    """The model is to be spread over several devices, of which a worker has one."""


class BadClusterAddress(UserError):
    """The address is none that a cluster can be joined by."""


class ClusterUnreachable(FeatlasError):
    """No Ray answers at the address, or it let nobody in."""


class ClusterDiffers(UserError):
    """The cluster's machines run other versions of Ray or Python."""


class WorkersNotStarted(FeatlasError):
    """The cluster has no place for a worker."""


class WorkersLost(FeatlasError):
    """Workers died again and again: over one shard, or while they were made."""


class WorkerFailed(FeatlasError):
    """A worker raised an error that is none of featlas' own."""


@dataclass(frozen=True)
class RaySession:
    """A running Ray. address: of the cluster that was joined; None: started here.

    workers: how many. threads: of each worker. gpu: whether each has a GPU of its own.
    """

    address: str | None
    workers: int
    threads: int
    gpu: bool

    @property
    def described(self) -> dict[str, object]:
        """What a manifest says of it; the cluster's address is nobody's business."""
        return {"n": self.workers, "threads": self.threads, "gpu": self.gpu, "where": "this machine" if self.address is None else "a cluster"}


# -- 1. The session ------------------------------------------------------------------------------------------


@contextmanager
def ray_session(address: str | None, workers: int, *, device: str = "cpu") -> Iterator[RaySession]:
    """A Ray for so many workers: started on this machine, or joined at `address` (`HOST:PORT`, or `auto` for the one that runs here).

    A Ray that is started here listens to this machine alone, asks for a token that only its own processes know, and leaves nothing behind.
    Where the device is a CUDA one each worker gets a GPU, else a share of the cores.

    Raises `RayMissing`, `NoWorkers`, `TooManyWorkers`, `SpreadByWorkers`, `BadClusterAddress`, `ClusterUnreachable`, `ClusterDiffers`.
    """
    check_workers(address, workers, device=device)
    gpu = device.startswith("cuda")
    if address is None:
        threads = _local_share(workers, gpu)
        with _ray_here(workers, threads, gpu):
            yield RaySession(None, workers, threads, gpu)
    else:
        with _ray_at(address) as ray:
            threads = _cluster_share([node["Resources"] for node in ray.nodes() if node["Alive"]], address, workers, gpu)
            yield RaySession(address, workers, threads, gpu)


def check_workers(address: str | None, workers: int, *, device: str = "cpu") -> None:
    """Raise at once what `ray_session` would, as far as it can be told without starting anything."""
    if workers < 1:
        raise NoWorkers(f"--workers {workers}: there must be one at least")
    worker_device(device, gpu=device.startswith("cuda"))
    if importlib.util.find_spec("ray") is None:
        _ray()
    if address is None:
        _local_share(workers, device.startswith("cuda"))
    else:
        _check_reachable(address)


def worker_device(device: str, *, gpu: bool) -> str:
    """A `--device` as a worker has it, who sees its own GPU alone. Raises `SpreadByWorkers` for several devices: a worker has one."""
    name, plus, rest = device.partition("+")
    if name in ("auto", "balanced") or "=" in device or device.endswith(".json") or (gpu and not _GPU.fullmatch(name)):
        raise SpreadByWorkers(
            f"--device {device!r} spreads a model over devices, and a worker has one of its own: give cpu, cuda, cuda+cpu or cpu+disk, or leave "
            "--workers and --ray-address out"
        )
    return f"cuda{plus}{rest}" if gpu else device


_GPU = re.compile(r"cuda(:\d+)?")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _local_share(workers: int, gpu: bool) -> int:
    """Threads of each worker on this machine; raises `TooManyWorkers`."""
    if workers > cores():
        raise TooManyWorkers(f"--workers {workers}: this machine has {cores()} cores, and each worker wants one: ask for {cores()} at most")
    if gpu:
        import torch

        _check_gpus(workers, torch.cuda.device_count(), "this machine")
    share = cores() // workers
    wished = os.environ.get("OMP_NUM_THREADS", "")
    return min(share, int(wished)) if wished.isdigit() and int(wished) > 0 else share


def _cluster_share(machines: Sequence[Mapping[str, float]], address: str, workers: int, gpu: bool) -> int:
    """Threads of each worker on a cluster's machines: the most with which all find a place, for one has all of its on one machine.

    Raises `TooManyWorkers`.
    """
    n = sum(int(found.get("CPU", 0)) for found in machines)
    if workers > n:
        raise TooManyWorkers(f"--workers {workers}: the cluster at {address} has {n} cores, and each worker wants one")
    if gpu:
        _check_gpus(workers, sum(int(found.get("GPU", 0)) for found in machines), f"the cluster at {address}")

    def places(found: Mapping[str, float], threads: int) -> int:
        of_cores = int(found.get("CPU", 0)) // threads
        return min(of_cores, int(found.get("GPU", 0))) if gpu else of_cores

    fitting = (threads for threads in range(n // workers, 0, -1) if sum(places(found, threads) for found in machines) >= workers)
    share = next(fitting, None)
    if share is None:  # GPUs on machines that have fewer cores than those
        raise TooManyWorkers(f"--workers {workers}: the cluster at {address} has not a core beside each of so many GPUs: ask for fewer")
    return share


def _check_gpus(workers: int, gpus: int, where: str) -> None:
    if workers > gpus:
        raise TooManyWorkers(f"--workers {workers}: {where} has {gpus} GPU{'' if gpus == 1 else 's'}, and each worker wants one")


def _ray() -> Any:
    """The library; raises `RayMissing`."""
    try:
        import ray
    except ImportError:
        raise RayMissing('several workers need Ray: pip install "featlas[cluster]"') from None
    return ray


@contextmanager
def _ray_here(workers: int, threads: int, gpu: bool) -> Iterator[None]:
    """A Ray of this process' own, on the loopback interface, its files in a folder that goes away."""
    own = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # by this name Ray knows the choice between the loopback and the outer interface
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    }
    _remove_left_folders()
    ray = _ray()
    with _folder() as folder, _guarded(folder), _own_settings(ray, own | {ray_guard.MARK: str(folder)}), _connected(ray):
        _started_here(
            ray, folder, num_cpus=workers * threads, num_gpus=workers if gpu else 0, object_store_memory=_store_bytes(workers),
            # Ray's own agents look for a dead head this long before they end, too.
            _system_config={"gcs_rpc_server_reconnect_timeout_s": 5},
        )  # fmt: skip
        yield


def _started_here(ray: Any, folder: Path, **options: object) -> None:
    """Start Ray; again where it took longer than Ray allows itself, which it does on a machine that is busy. Raises `WorkersNotStarted`."""
    for attempt in range(1, STARTS + 1):
        try:
            _begin(ray, "local", include_dashboard=False, _temp_dir=str(folder), **options)
            return
        except Exception as error:  # Ray raises a bare one for what takes too long
            # What it has begun it does not end itself.
            ray.shutdown()
            ray_guard.end(str(folder))
            if attempt == STARTS or "timed out" not in str(error):
                raise WorkersNotStarted(f"Ray did not start on this machine: {_first_line(error)}") from error


def _store_bytes(workers: int) -> int:
    """Shared memory for results: what the workers may need, as far as a quarter of the machine's memory goes."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(80 * 2**20, min(workers * STORE_BYTES, memory // 4))


@contextmanager
def _settings(ray: Any, values: Mapping[str, str]) -> Iterator[None]:
    """Variables by which Ray is set, while this is open. It read them when it was imported, which may be long ago: it reads them again."""
    from ray._private.authentication.authentication_token_setup import AuthenticationTokenLoader

    def read() -> None:
        ray._raylet.Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()

    try:
        with _environment(values):
            read()
            yield
    finally:
        read()


@contextmanager
def _own_settings(ray: Any, values: Mapping[str, str]) -> Iterator[None]:
    """`_settings` of a Ray that is alone on this machine."""
    from ray._private import ray_constants

    outward, ray_constants.ENABLE_RAY_CLUSTER = ray_constants.ENABLE_RAY_CLUSTER, False
    try:
        with _settings(ray, values):
            yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = outward


@contextmanager
def _ray_at(address: str) -> Iterator[Any]:
    """The Ray at an address, joined; it goes on when this process leaves it."""
    ray = _ray()
    from ray.exceptions import AuthenticationError

    with _settings(ray, {"RAY_USAGE_STATS_ENABLED": "0", **_token_mode()}), _connected(ray):
        try:
            _begin(ray, address)
        except AuthenticationError as error:
            raise ClusterUnreachable(
                f"the Ray at {address} wants another token ({_first_line(error)}): {_TOKEN}"
            ) from None
        except RuntimeError as error:
            if "ersion mismatch" in str(error):
                raise ClusterDiffers(f"the Ray at {address} is another one than this: {_one_line(error)}: install the same on all machines") from None
            raise ClusterUnreachable(f"the Ray at {address} did not let this process in: {_one_line(error)}") from error
        except (ConnectionError, ValueError, TimeoutError) as error:
            wants = "" if _token_mode() or "RAY_AUTH_MODE" in os.environ else f"; if it wants a token: {_TOKEN}"
            raise ClusterUnreachable(f"no Ray answers at {address} ({_one_line(error)}): {_JOINING}{wants}") from None
        yield ray


def _token_mode() -> dict[str, str]:
    """`ray start` makes a cluster ask for a token unless it is told otherwise; a process that joins has to say itself that it has one."""
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    path = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    there = "RAY_AUTH_TOKEN" in os.environ or path.is_file()
    return {"RAY_AUTH_MODE": "token"} if there and "RAY_AUTH_MODE" not in os.environ else {}


_TOKEN = "set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH to that of the head (its ~/.ray/auth_token)"
_JOINING = "start one with `ray start --head`, let this machine join it with `ray start --address HOST:PORT`, and name that address"


def _check_reachable(address: str) -> None:
    """Raises `BadClusterAddress`, or `ClusterUnreachable` where nobody listens: Ray itself would go on asking for a minute."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise BadClusterAddress(f"--ray-address {address!r}: write HOST:PORT, as `ray start --head` prints it, or auto for the Ray that runs here")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ClusterUnreachable(f"no Ray answers at {address} ({_one_line(error)}): {_JOINING}") from None


@contextmanager
def _connected(ray: Any) -> Iterator[None]:
    """While this is open Ray prints nothing; at the end this process leaves Ray, and ends what it started."""
    from ray._private import worker

    if ray.is_initialized():
        raise FeatlasError("this process is connected to a Ray already: leave it first (ray.shutdown())")
    printing, worker._worker_logs_enabled = worker._worker_logs_enabled, False
    breakpoints = "PYTHONBREAKPOINT" in os.environ
    try:
        yield
    finally:
        ray.shutdown()
        worker._worker_logs_enabled = printing
        if not breakpoints:  # Ray puts its own debugger there
            os.environ.pop("PYTHONBREAKPOINT", None)


def _begin(ray: Any, *arguments: object, **options: object) -> None:
    """`ray.init`, which takes SIGTERM for itself: whoever listened before listens again."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(*arguments, log_to_driver=False, logging_level=logging.ERROR, **options)
    finally:
        with suppress(ValueError):  # only the main thread has handlers
            for number, handler in handlers.items():
                signal.signal(number, handler)


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Variables that hold while this is open; what is started meanwhile inherits them."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextmanager
def _folder() -> Iterator[Path]:
    """Where Ray puts its sockets and logs; a socket's path may have 107 letters, so a long TMPDIR is passed over."""
    base = tempfile.gettempdir() if len(tempfile.gettempdir()) <= 12 else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix=f"{FOLDER}{os.getpid()}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _guarded(folder: Path) -> Iterator[None]:
    """With a process beside this one that ends what is left of Ray where this one is killed."""
    command = [sys.executable, "-I", "-S", str(Path(ray_guard.__file__)), str(folder)]
    guard = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    assert guard.stdin is not None
    try:
        yield
    finally:
        with suppress(OSError):
            guard.stdin.write(b".")
            guard.stdin.close()
        guard.wait()


def _remove_left_folders() -> None:
    """The folders of processes that were killed before they could remove their own."""
    for base in {tempfile.gettempdir(), "/tmp"}:
        for folder in Path(base).glob(f"{FOLDER}*-*"):
            pid = folder.name.removeprefix(FOLDER).partition("-")[0]
            if pid.isdigit() and not is_alive(int(pid)) and folder.lstat().st_uid == os.getuid():
                shutil.rmtree(folder, ignore_errors=True)


# -- 2. A worker ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Failure:
    """An error as plain text: exceptions with arguments of their own do not travel well."""

    module: str
    name: str
    message: str
    trace: str

    @staticmethod
    def of(error: BaseException) -> "_Failure":
        return _Failure(type(error).__module__, type(error).__qualname__, str(error), traceback.format_exc())

    def error(self) -> FeatlasError:
        """The error again, of its own kind where that is featlas'."""
        if self.module.split(".")[0] == __name__.split(".")[0]:
            kind = getattr(importlib.import_module(self.module), self.name, None)
            if isinstance(kind, type) and issubclass(kind, FeatlasError):
                known = kind.__new__(kind)
                known.args = (self.message,)
                return known
        failed = WorkerFailed(f"a worker failed: {self.name}: {_one_line(self.message)}")
        failed.add_note(self.trace)
        return failed


class _Worker:
    """What lives in a worker's process."""

    def __init__(self, make_worker: Callable[[], Work[Any, Any]], threads: int, folder: str) -> None:
        # Ctrl-C reaches every process of a terminal: the driver alone answers it.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
            os.environ[name] = str(threads)
        with suppress(OSError):  # another machine may not have the folder: then only absolute paths lead anywhere
            os.chdir(folder)
        self._make, self._threads = make_worker, threads
        self._work: Work[Any, Any] | None = None

    def started(self) -> int:
        """The process' number: it runs."""
        return os.getpid()

    def prepare(self) -> _Failure | None:
        """Make the tools."""
        try:
            self._work = self._make()
            if "torch" in sys.modules:  # it counts its threads by the variables as it is imported, which may have been before
                sys.modules["torch"].set_num_threads(self._threads)
        except Exception as error:  # noqa: BLE001 - carried over to the driver, which raises it
            return _Failure.of(error)
        return None

    def work(self, shard: Any) -> Any:
        """One shard's result, or what went wrong."""
        assert self._work is not None
        try:
            return self._work(shard)
        except Exception as error:  # noqa: BLE001 - carried over to the driver, which raises it
            return _Failure.of(error)


# -- 3. and 4. Shards ----------------------------------------------------------------------------------------


def run_shards(
    session: RaySession,
    make_worker: Callable[[], Work[Shard, Result]],
    shards: Sequence[Shard],
    on_result: Callable[[int, Result], None],
    *,
    label: Callable[[Shard], str] = repr,
    on_loss: Callable[[str], None] | None = None,
) -> None:
    """Do every shard once, by the session's workers; `on_result` gets the shard's place in `shards` and its result, in any order, in this thread.

    make_worker: called once in each worker's process; gives the function that does a shard. It travels by pickle: a function of a module, or a
    `functools.partial` of one. label: a shard's name in messages. on_loss: hears, in a sentence, of each worker that died.

    A shard may be begun more than once, where a worker died over it; its result is handed over once. Raises `WorkersLost`,
    `WorkersNotStarted`, what `on_result` raises, and what a worker raises: an error of featlas' as itself, another one as `WorkerFailed`.
    """
    if not shards:
        return
    crew = _Crew(session, make_worker, shards, on_result, label, on_loss)
    try:
        crew.run()
    finally:
        crew.dismiss()


@dataclass
class _Place:
    """One worker's place: the process that fills it now, and its shards in the order in which it does them."""

    actor: Any
    starting: Any  # the reference of `started`, then of `prepare`; None once it can work
    is_up: bool = False
    pending: "deque[tuple[int, Any]]" = field(default_factory=deque)  # (shard, reference)


class _Crew(Generic[Shard, Result]):
    """The workers of one `run_shards`."""

    def __init__(
        self, session: RaySession, make_worker: Callable[[], Work[Shard, Result]], shards: Sequence[Shard],
        on_result: Callable[[int, Result], None], label: Callable[[Shard], str], on_loss: Callable[[str], None] | None,
    ) -> None:  # fmt: skip
        self.ray = _ray()
        self.shards, self.on_result, self.label, self.on_loss = shards, on_result, label, on_loss
        self.waiting = deque(range(len(shards)))
        self.deaths: dict[int, int] = {}
        self.lost_starting = 0
        self.began = time.monotonic()
        self._died = _deaths_of(self.ray)
        options = {"num_cpus": session.threads, "num_gpus": 1 if session.gpu else 0, "max_restarts": 0, "max_task_retries": 0}
        actor = self.ray.remote(_Worker).options(**options)
        self._start = lambda: actor.remote(make_worker, session.threads, str(Path.cwd()))
        self.places = [self._filled() for _ in range(min(session.workers, len(shards)))]

    def _filled(self) -> _Place:
        actor = self._start()
        return _Place(actor, actor.started.remote())

    def run(self) -> None:
        """Until every shard has its result."""
        while self.waiting or any(place.pending for place in self.places):
            for place in self.places:
                self._give(place)
            heads = {self._head(place): place for place in self.places if self._head(place) is not None}
            ready, _ = self.ray.wait(list(heads), num_returns=1, timeout=0.5)
            for reference in ready:
                self._take(heads[reference], reference)
            if not ready:
                self._check_started()

    @staticmethod
    def _head(place: _Place) -> Any:
        """What a worker is at."""
        if place.starting is not None:
            return place.starting
        return place.pending[0][1] if place.pending else None

    def _give(self, place: _Place) -> None:
        """Fill a worker's hands; the last shards are not laid in front of one worker while another has none, nor any beside a suspect."""
        if place.starting is not None:
            return
        limit = IN_FLIGHT if len(self.waiting) > len(self.places) else 1
        while self.waiting and len(place.pending) < limit:
            if place.pending and not {self.waiting[0], place.pending[0][0]}.isdisjoint(self.deaths):
                return
            shard = self.waiting.popleft()
            place.pending.append((shard, place.actor.work.remote(self.shards[shard])))

    def _take(self, place: _Place, reference: Any) -> None:
        """One answer of a worker, or the news of its death."""
        try:
            answer = self.ray.get(reference)
        except self._died as error:
            self._replace(place, error)
            return
        if isinstance(answer, _Failure):
            raise answer.error()
        if place.starting is not None:
            self._advance(place)
        else:
            shard, _ = place.pending.popleft()
            del reference
            self.on_result(shard, answer)

    def _advance(self, place: _Place) -> None:
        if place.is_up:
            place.starting, self.lost_starting = None, 0
        else:
            place.is_up, place.starting = True, place.actor.prepare.remote()

    def _replace(self, place: _Place, error: Exception) -> None:
        """A new worker in a dead one's place, unless too many have died."""
        reason = _reason(error)
        if place.starting is not None:
            self.lost_starting += 1
            if self.lost_starting >= ATTEMPTS:
                raise WorkersLost(f"{ATTEMPTS} workers died while they loaded ({reason}): {_LESS}") from error
            told = f"a worker died while it loaded ({reason}); another takes its place"
        else:
            suspects = [shard for shard, _ in place.pending]
            self.deaths.update({shard: self.deaths.get(shard, 0) + 1 for shard in suspects})
            name = " or ".join(self.label(self.shards[shard]) for shard in suspects)
            if self.deaths[suspects[0]] >= ATTEMPTS:  # which is alone: no suspect has company
                raise WorkersLost(f"{ATTEMPTS} workers died over {name} ({reason}): {_LESS}") from error
            told = f"a worker died over {name} ({reason}); another does it again"
        # First, in their order, what the dead one was at.
        self.waiting.extendleft(shard for shard, _ in reversed(place.pending))
        with suppress(Exception):
            self.ray.kill(place.actor)
        self.places[self.places.index(place)] = self._filled()
        self.began = time.monotonic()  # a process in its place has as long to start as the first had
        if self.on_loss is not None:
            self.on_loss(told)

    def _check_started(self) -> None:
        """Where not one process runs a while after the last was asked for, there is no place for any."""
        if time.monotonic() - self.began > START_SECONDS and not any(place.is_up for place in self.places):
            free = {name: value for name, value in self.ray.available_resources().items() if name in ("CPU", "GPU")}
            raise WorkersNotStarted(f"no worker has started in {START_SECONDS:g} s: the cluster has {free or 'nothing'} free; wait, or ask for fewer")

    def dismiss(self) -> None:
        """End all workers; what they hold is dropped."""
        for place in self.places:
            with suppress(Exception):
                self.ray.kill(place.actor)


_LESS = "if it was for want of memory ask for fewer --workers or a smaller --memory; the same command goes on from here"


def _deaths_of(ray: Any) -> tuple[type[Exception], ...]:
    """The errors by which Ray tells that a worker, its machine, or a result on it is gone."""
    names = ("RayActorError", "OutOfMemoryError", "ObjectLostError", "WorkerCrashedError", "NodeDiedError", "LocalRayletDiedError")
    return tuple(getattr(ray.exceptions, name) for name in names)


def _reason(error: BaseException) -> str:
    """Why a worker died, from Ray's long text."""
    text = str(error)
    if "OutOfMemory" in type(error).__name__ or ("out of memory" in text.lower() and "Some common causes" not in text):
        return "out of memory"
    for line in reversed(text.splitlines()):
        if "Error: " in line and "Actor" not in line:
            return line.strip()
    if "node" in type(error).__name__.lower() or "node has died" in text or "node was terminated" in text:
        return "its machine is gone"
    return "its process was killed or crashed"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _one_line(error: object) -> str:
    return " ".join(str(error).split())
