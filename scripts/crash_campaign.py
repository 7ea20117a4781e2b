"""A crash campaign: featlas is killed, its server stopped, its network cut, its disk filled; what is resumed must equal what was never disturbed.

    python scripts/crash_campaign.py --kills 20 --output table.json

The real commands run on a tiny model, each in a process of its own. After every disturbance and resume the whole atlas is compared with the one
of an undisturbed run: every label, every edge, every property of the graph, every table of the statistics. Ends with 1 where anything differs.
Faults: kill (SIGKILL at random moments of each job), stop (the server is stopped, or killed, and started again), cut (the network, by a proxy),
full (a small disk, which only root can make). Everything lies in a temporary folder and goes with it.
"""

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from scripts.campaign.faults import FAULTS, Fault, Surroundings  # noqa: E402
from scripts.campaign.forks import Forks  # noqa: E402
from scripts.campaign.jobs import Place, Workload, workload  # noqa: E402
from scripts.campaign.kills import Unexpected, Verdict, Whole, campaign, measure_whole  # noqa: E402
from scripts.campaign.servers import Server  # noqa: E402

JOBS = ("edges", "statistics", "writeback")
STORES = ("embedded", "server")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="kills of each job on each store")
    parser.add_argument("--jobs", default=",".join(JOBS), help="what is killed")
    parser.add_argument("--stores", default=",".join(STORES), help="where the graph is: in its file, on a Neo4j server")
    parser.add_argument("--faults", default="kill,stop,cut,full", help="kill, stop, cut, full")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="save the table as JSON")
    asked = parser.parse_args()
    for name, known in (("jobs", JOBS), ("stores", STORES), ("faults", ("kill", *FAULTS))):
        chosen = [one for one in getattr(asked, name).split(",") if one]
        if wrong := [one for one in chosen if one not in known]:
            parser.error(f"--{name}: {', '.join(wrong)} is none of {', '.join(known)}")
        setattr(asked, name, chosen)
    if asked.kills < 1:
        parser.error(f"--kills {asked.kills}: at least 1")
    return asked


def main() -> int:
    asked, began = arguments(), time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):  # also in the background: server, disks and folder go in any case
        signal.signal(number, signal.default_int_handler)
    say = lambda text: print(f"[{time.monotonic() - began:6.1f} s] {text}", file=sys.stderr, flush=True)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="featlas-crashes-")))
        forks = stack.enter_context(Forks(folder))
        work = workload(folder)
        needs_server = "server" in asked.stores and (set(asked.faults) & {"kill", "stop", "cut", "full"})
        server = stack.enter_context(Server(folder / "neo4j")) if needs_server else None
        wholes = Wholes(forks, work, folder)
        verdicts: list[Verdict] = []
        faults: list[Fault] = []
        around = Surroundings(forks, work, folder, server, asked.seed, say)
        if "kill" in asked.faults:
            for verdict in _kills(asked, forks, work, wholes, server, folder, say):
                verdicts.append(verdict)
                save(asked.output, verdicts, faults)
        for name in asked.faults:
            for fault in FAULTS.get(name, _none)(around, wholes.of("edges"), asked.stores):
                faults.append(fault)
                save(asked.output, verdicts, faults)
    show(verdicts, faults, time.monotonic() - began)
    return 0 if all(one.equal for one in verdicts) and all(one.passed is not False for one in faults) else 1


def _none(*_: object) -> list[Fault]:
    """Kills are no fault of the others' form."""
    return []


def save(output: Path | None, verdicts: list[Verdict], faults: list[Fault]) -> None:
    """Save the tables as far as they are."""
    if output is not None:
        rows = {"kills": [{**asdict(one), "equal": one.equal} for one in verdicts], "faults": [asdict(one) for one in faults]}
        output.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


class Wholes:
    """The undisturbed runs, each made when it is first asked for; they lie in embedded atlases, with which a server's are compared too."""

    def __init__(self, forks: Forks, work: Workload, folder: Path) -> None:
        self.forks, self.work, self.folder = forks, work, folder
        self._made: dict[str, Whole] = {}

    def base(self, job: str) -> Path:
        """The atlas that a job begins with: nothing, or for the write-back one of edges, statistics and samples."""
        if job != "writeback":
            return self.folder / "nothing"
        return self.of("base").atlas

    def of(self, job: str) -> Whole:
        if job not in self._made:
            commands = {
                "edges": self.work.edges, "statistics": self.work.statistics, "writeback": self.work.writeback,
                "base": lambda: [*self.work.edges(), *self.work.statistics(), *self.work.samples()],
            }[job]  # fmt: skip
            self._made[job] = measure_whole(self.forks, commands(), self.base(job), self.folder / f"whole-{job}")
        return self._made[job]


def _kills(
    asked: argparse.Namespace, forks: Forks, work: Workload, wholes: Wholes, server: Server | None, folder: Path, say: Callable[[str], None]
) -> Iterator[Verdict]:
    for job in asked.jobs:
        commands = getattr(work, job)()
        for store in asked.stores if job != "statistics" else ["DuckDB"]:
            atlas = folder / f"{job}-{store}"
            place, fresh = Place(atlas), None
            if store == "server":
                assert server is not None
                place = server.place(atlas)
                # the statistics are in the copied atlas, and are but written onto the graph's nodes
                begin = [*work.edges(), *work.statistics()] if job == "writeback" else []
                fresh = partial(server.refill, forks, begin, place)
            try:
                whole, base = wholes.of(job), wholes.base(job)
            except Unexpected as error:
                yield Verdict(job, store, failures=[f"undisturbed: {error}"])
                continue
            yield campaign(
                forks, job, commands, whole, base, kills=asked.kills, seed=asked.seed, place=place, store=store, fresh=fresh,
                graph=job != "statistics", say=say,
            )


def show(verdicts: list[Verdict], faults: list[Fault], seconds: float) -> None:
    """The tables, on standard output."""
    if verdicts:
        print(f"{'job':<11}{'store':<10}{'kills':>6}{'goes':>6}{'late':>6}{'whole s':>9}{'lost s a kill':>15}  verdict")
    for one in verdicts:
        lost = one.seconds_lost / one.kills if one.kills else 0.0
        verdict = "equal" if one.equal else f"DIFFERENT: {one.failures[0]}"
        print(f"{one.job:<11}{one.store:<10}{one.kills:>6}{one.goes:>6}{one.late:>6}{one.seconds_whole:>9.1f}{lost:>15.2f}  {verdict}")
        print("".join(f"    killed in {phase}: {n}\n" for phase, n in sorted(one.phases.items(), key=lambda item: -item[1])), end="")
    for fault in faults:
        verdict = {None: "skipped", True: "passed", False: "FAILED"}[fault.passed]
        print(f"{fault.name:<45} {verdict}, {fault.seconds:.1f} s: {fault.said}")
    print(f"{seconds:.0f} s in all")


if __name__ == "__main__":
    sys.exit(main())
