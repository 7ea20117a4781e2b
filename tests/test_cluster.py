"""Workers: who does which shard when some die, what is refused before anything starts, and a real Ray on this machine."""

import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from featlas.errors import FeatlasError
from featlas.ingest import cluster
from featlas.ingest.cluster import (
    ATTEMPTS,
    BadClusterAddress,
    ClusterUnreachable,
    NoWorkers,
    RayMissing,
    RaySession,
    SpreadByWorkers,
    TooManyWorkers,
    WorkerFailed,
    WorkersLost,
    WorkersNotStarted,
    check_workers,
    ray_session,
    run_shards,
)
from featlas.queries.store import SchemaVersionMismatch

from .cluster_work import LongWay, squares, unmade

ROOT = Path(__file__).parents[1]
SESSION = RaySession(None, 2, 1, False)


class ActorDied(Exception):
    """What the simulated Ray raises for a worker that is gone."""


@dataclass
class SimulatedActor:
    """A worker that answers in its order, one step of `SimulatedRay.wait` at a time; it dies when the dice say so, or over a cursed shard.

    With it die its calls, and by the toss of a coin the answer that it gave last, as it would on its way out of a process that is gone.
    """

    ray: "SimulatedRay"
    calls: deque = field(default_factory=deque)
    answered: str | None = None
    alive: bool = True

    def __getattr__(self, name):
        return SimpleNamespace(remote=partial(self._call, name))

    def _call(self, name, *arguments):
        reference = f"{name}-{self.ray.n}"
        self.ray.n += 1
        self.ray.results[reference] = None if self.alive else ActorDied()
        self.calls.append((reference, arguments[0] if arguments else None))
        return reference

    def step(self):
        """Answer the oldest call, or die with all of them unanswered."""
        while self.calls and self.ray.results[self.calls[0][0]] is not None:
            self.calls.popleft()
        if not self.calls or not self.alive:
            return
        reference, shard = self.calls.popleft()
        if shard in self.ray.cursed or self.ray.dice.random() < self.ray.mortality:
            self.alive = False
            last = [self.answered] if self.answered not in (None, *self.ray.taken) and self.ray.dice.random() < 0.5 else []
            for lost in [*last, reference, *(r for r, _ in self.calls)]:
                self.ray.results[lost] = ActorDied()
        else:
            self.ray.begun[shard] += shard is not None
            self.ray.results[reference] = ("done", shard) if shard is not None else 0
            self.answered = reference


class SimulatedRay:
    """As much of Ray as a crew asks for, in one thread, with workers that die by dice."""

    def __init__(self, seed, mortality=0.0, cursed=()):
        self.dice, self.mortality, self.cursed = random.Random(seed), mortality, cursed
        self.actors, self.results, self.n = [], {}, 0
        self.begun = Counter()
        self.taken: set[str] = set()

    def remote(self, cls):
        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=self._start))

    def _start(self, *_):
        self.actors.append(SimulatedActor(self))
        return self.actors[-1]

    def wait(self, references, num_returns, timeout):
        assert len(set(references)) == len(references) <= 2
        for actor in self.dice.sample(self.actors, len(self.actors)):
            actor.step()
        return [r for r in references if self.results[r] is not None][:1], []

    def get(self, reference):
        result = self.results[reference]
        if isinstance(result, ActorDied):
            raise result
        self.taken.add(reference)
        return None if result == 0 else result

    def kill(self, actor):
        actor.alive = False


@pytest.fixture
def simulated(monkeypatch):
    """Put a simulated Ray in the place of the library."""

    def put(*arguments, **options):
        ray = SimulatedRay(*arguments, **options)
        monkeypatch.setattr(cluster, "_ray", lambda: ray)
        monkeypatch.setattr(cluster, "_deaths_of", lambda _: (ActorDied,))
        return ray

    return put


@pytest.mark.parametrize("seed", range(12))
def test_every_shard_has_one_result_whoever_dies(simulated, seed):
    ray = simulated(seed, mortality=0.04)
    got, lost = [], []
    shards = [f"s{i}" for i in range(25)]
    run_shards(SESSION, lambda: None, shards, lambda i, r: got.append((i, r)), on_loss=lost.append)
    assert sorted(got) == [(i, ("done", f"s{i}")) for i in range(25)]
    assert len(ray.actors) == 2 + len(lost)
    assert not any(actor.alive for actor in ray.actors)


@pytest.mark.parametrize("seed", range(12))
def test_a_shard_that_kills_is_named_and_others_are_not_blamed(simulated, seed):
    """Whoever was with it when a worker died is done alone, before or after it."""
    ray = simulated(seed, cursed=("s7",))
    got, lost = [], []
    with pytest.raises(WorkersLost, match=f"^{ATTEMPTS} workers died over s7 .*the same command goes on") as caught:
        run_shards(SESSION, lambda: None, [f"s{i}" for i in range(20)], lambda i, _: got.append(i), label=str, on_loss=lost.append)
    assert len(ray.actors) == 2 + ATTEMPTS - 1
    assert isinstance(caught.value.__cause__, ActorDied)
    assert 7 not in got
    assert len(set(got)) == len(got) >= 7
    assert re.match(r"a worker died over (s\d or )?s7( or s\d)? \(", lost[0])
    assert all(told.startswith("a worker died over s7 (") for told in lost[1:])


def test_workers_that_cannot_be_made_end_the_run(simulated):
    simulated(0, mortality=1.0)
    with pytest.raises(WorkersLost, match=f"{ATTEMPTS} workers died while they loaded"):
        run_shards(SESSION, lambda: None, ["a", "b"], lambda *_: None)


class SlowRay(SimulatedRay):
    """Each look takes a minute; the third that a worker is asked for is its death; later processes need `starting` looks to be there."""

    def __init__(self, starting):
        super().__init__(0)
        self.now, self.starting, self.looks = 0.0, starting, 0

    def wait(self, references, num_returns, timeout):
        self.now, self.looks = self.now + 60, self.looks + 1
        if self.looks == 5:
            self.mortality = 1.0
        if len(self.actors) > 1 and self.starting:
            self.starting -= 1
            return [], references
        ready = super().wait(references, num_returns, timeout)
        self.mortality = 0.0
        return ready

    def available_resources(self):
        return {"CPU": 0.0}


@pytest.mark.parametrize(("starting", "begins"), [(2, True), (99, False)])
def test_who_dies_late_is_replaced_while_nobody_else_is_there(monkeypatch, starting, begins):
    ray = SlowRay(starting)
    monkeypatch.setattr(cluster, "_ray", lambda: ray)
    monkeypatch.setattr(cluster, "_deaths_of", lambda _: (ActorDied,))
    monkeypatch.setattr(cluster, "time", SimpleNamespace(monotonic=lambda: ray.now))
    got, lost, alone = [], [], RaySession(None, 1, 1, False)
    do = partial(run_shards, alone, lambda: None, [f"s{i}" for i in range(6)], lambda i, _: got.append(i), on_loss=lost.append)
    if begins:
        do()
        assert sorted(got) == list(range(6))
    else:
        with pytest.raises(WorkersNotStarted, match="no worker has started in 180 s"):
            do()
    assert len(lost) == 1
    assert ray.now > cluster.START_SECONDS


def test_no_shard_is_no_work(simulated):
    ray = simulated(0)
    run_shards(SESSION, lambda: None, [], lambda *_: None)
    assert ray.actors == []


def test_errors_travel_as_themselves():
    for error in (LongWay(3, to="the shop"), SchemaVersionMismatch("bolt://x", 4)):
        back = cluster._Failure.of(error).error()
        same = type(error).__module__.startswith("featlas")
        assert (type(back) is type(error)) == same  # those of tests are none of the package's
        assert str(error) in str(back)
        assert back.exit_code == (2 if same else 1)
    back = cluster._Failure.of(KeyError("x\ny")).error()
    assert (type(back), str(back)) == (WorkerFailed, "a worker failed: KeyError: 'x\\ny'")


def test_what_cannot_be_started_is_said_before(monkeypatch):
    monkeypatch.setattr(cluster, "cores", lambda: 4)
    check_workers(None, 4)
    for workers, address, error, message in [
        (0, None, NoWorkers, "--workers 0"),
        (5, None, TooManyWorkers, "--workers 5: this machine has 4 cores"),
        (2, "nonsense", BadClusterAddress, "'nonsense': write HOST:PORT"),
        (2, "ray://h:10001", BadClusterAddress, "ray://h:10001"),
        (2, "127.0.0.1:1", ClusterUnreachable, "no Ray answers at 127.0.0.1:1 .*refused"),
    ]:
        with pytest.raises(error, match=message):
            check_workers(address, workers)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(RayMissing, match=r'pip install "featlas\[cluster\]"'):
        check_workers(None, 2)


def test_a_worker_has_its_share_of_the_cores(monkeypatch):
    monkeypatch.setattr(cluster, "cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [cluster._local_share(n, False) for n in (1, 2, 3, 8)] == [8, 4, 2, 1]
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert [cluster._local_share(n, False) for n in (1, 2, 8)] == [3, 3, 1]
    assert cluster._cluster_share([{"CPU": 20.0, "GPU": 2.0}], "h:1", 2, True) == 10
    with pytest.raises(TooManyWorkers, match="--workers 3: the cluster at h:1 has 2 GPUs"):
        cluster._cluster_share([{"CPU": 20.0, "GPU": 2.0}], "h:1", 3, True)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=SimpleNamespace(device_count=lambda: 1)))
    with pytest.raises(TooManyWorkers, match="--workers 2: this machine has 1 GPU,"):
        check_workers(None, 2, device="cuda")


def test_every_worker_finds_its_place_on_one_machine_of_a_cluster():
    share = partial(cluster._cluster_share, address="h:1", gpu=False)
    assert share([{"CPU": 4.0}] * 3, workers=2) == 4  # 12 // 2 = 6 are on none
    assert share([{"CPU": 8.0}] * 2, workers=3) == 4  # with 16 // 3 = 5 only two would find a place
    assert share([{"CPU": 8.0}, {"CPU": 2.0}, {}], workers=3) == 2
    assert share([{"CPU": 16.0}, {"CPU": 4.0, "GPU": 2.0}], workers=2, gpu=True) == 2
    with pytest.raises(TooManyWorkers, match=r"--workers 2: .* not a core beside each"):
        share([{"CPU": 16.0}, {"CPU": 1.0, "GPU": 2.0}], workers=2, gpu=True)
    with pytest.raises(TooManyWorkers, match="--workers 13: the cluster at h:1 has 12 cores"):
        share([{"CPU": 4.0}] * 3, workers=13)


def test_a_worker_has_one_device():
    """It sees its own GPU alone, by whatever number; what is to be spread is refused before anything starts, and not quietly put on one."""
    worker = cluster.worker_device
    assert [worker(text, gpu=True) for text in ("cuda", "cuda:1", "cuda:3+cpu", "cuda+disk")] == ["cuda", "cuda", "cuda+cpu", "cuda+disk"]
    assert [worker(text, gpu=False) for text in ("cpu", "cpu+disk", "mps")] == ["cpu", "cpu+disk", "mps"]
    for text in ("auto", "balanced", "map.json", "cuda:0=0-15,cuda:1=16-31", "cpu=0-3,disk=4-7"):
        with pytest.raises(SpreadByWorkers, match="leave --workers and --ray-address out"):
            check_workers(None, 1, device=text)


def test_somebody_who_is_no_ray_is_not_waited_for(monkeypatch):
    """A port on which nothing answers, of a machine that lets packets fall: the limit holds."""
    monkeypatch.setattr(cluster, "REACH_SECONDS", 0.2)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        began = time.monotonic()
        with pytest.raises(ClusterUnreachable, match=f"127.0.0.1:{port}"):
            check_workers(f"127.0.0.1:{port}", 1)
    assert time.monotonic() - began < 5


# -- a real Ray ----------------------------------------------------------------------------------------------


def processes():
    """Ray's processes below this one."""
    return [p for p in psutil.Process().children(recursive=True) if "ray" in " ".join(p.cmdline()).lower()]


def outward():
    """Ports on which these processes listen to other machines."""
    found = [c for p in processes() for c in p.net_connections() if c.status == psutil.CONN_LISTEN]
    return [c for c in found if c.laddr.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")]


def test_who_has_a_token_of_a_cluster_says_so(monkeypatch, tmp_path):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cluster._token_mode() == {}
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("secret")  # as `ray start` leaves it
    assert cluster._token_mode() == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "nowhere"))
    assert cluster._token_mode() == {}
    monkeypatch.setenv("RAY_AUTH_TOKEN", "secret")
    assert cluster._token_mode() == {"RAY_AUTH_MODE": "token"}
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")  # what is said counts
    assert cluster._token_mode() == {}


def test_folders_of_the_killed_go(tmp_path, monkeypatch):
    monkeypatch.setattr(cluster.tempfile, "gettempdir", lambda: str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    for name in (f"{ended.pid}-abc", f"{os.getpid()}-abc", "abc"):
        (tmp_path / f"{cluster.FOLDER}{name}").mkdir()
    cluster._remove_left_folders()
    assert {path.name for path in tmp_path.iterdir()} == {f"{cluster.FOLDER}{os.getpid()}-abc", f"{cluster.FOLDER}abc"}


@pytest.mark.slow
@pytest.mark.usefixtures("by_value")
def test_a_real_ray_does_the_work_and_leaves_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SECRET_OF_TESTS", "xyzzy-never-logged")
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    environment = dict(os.environ)
    got, lost = {}, []
    shards = [("plain", 0), ("plain", 1), ("once", 2), *(("plain", i) for i in range(3, 9))]
    with ray_session(None, 2) as session:
        assert (session.workers, session.gpu, session.address) == (2, False, None)
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
        assert (len(processes()) > 2, outward()) == (True, [])
        run_shards(session, partial(squares, tmp_path), shards, lambda i, r: got.update({i: r}), label=str, on_loss=lost.append)
        assert {i: r[0] for i, r in got.items()} == {i: i**2 for i in range(9)}
        assert all(r[2] == Path.cwd() and r[3] == str(session.threads) and r[4] == "xyzzy-never-logged" for r in got.values())
        (told,) = lost
        # one that waited beside it, or whose answer died with the worker, may be under suspicion too
        assert re.fullmatch(r"a worker died over .*\('once', 2\).* \(its process was killed or crashed\); another does it again", told)
        assert (tmp_path / "once-2").read_text() == "xx"
        with pytest.raises(WorkersLost, match=r"3 workers died over \('always', 1\)"):
            run_shards(session, partial(squares, tmp_path), [("always", 1)], lambda *_: None, label=str)
        with pytest.raises(WorkersLost, match="3 workers died while they loaded"):
            run_shards(session, unmade, [1], lambda *_: None)
        with pytest.raises(WorkerFailed, match="LongWay: 5 m to go"):
            run_shards(session, partial(squares, tmp_path), [("refuse", 5)], lambda *_: None)
        with pytest.raises(FeatlasError, match="connected to a Ray already"), ray_session(None, 1):
            pass
        (folder,) = list(Path("/tmp").glob(f"{cluster.FOLDER}{os.getpid()}-*")) or [None]
        if folder is not None:  # unless TMPDIR is elsewhere
            texts = [path.read_bytes() for path in folder.rglob("*") if path.is_file()]
            assert not any(b"xyzzy-never-logged" in text for text in texts)
    assert processes() == []
    assert not list(Path("/tmp").glob(f"{cluster.FOLDER}{os.getpid()}-*"))
    assert dict(os.environ) == environment
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


DRIVER = """
import sys, time
from functools import partial
from featlas.ingest.cluster import ray_session, run_shards
from tests.cluster_work import squares
with ray_session(None, 1) as session:
    def took(i, r):
        print(i, flush=True)
        time.sleep(600)
    run_shards(session, partial(squares, sys.argv[1]), [("plain", i) for i in range(4)], took)
"""


@pytest.mark.slow
def test_a_killed_driver_leaves_no_process(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "0\n"
    started = psutil.Process(child.pid).children(recursive=True)
    assert len(started) > 3
    child.send_signal(signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(started, timeout=120)  # Ray's agents look after their parents now and then
    assert [p.cmdline() for p in alive] == []
    assert not list(Path("/tmp").glob(f"{cluster.FOLDER}{child.pid}-*"))
