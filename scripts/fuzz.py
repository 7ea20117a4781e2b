"""Fuzz featlas: nearly valid inputs for everything that it reads.

    python scripts/fuzz.py --list                       the targets
    python scripts/fuzz.py --all --cases 10000          a campaign through the command line, and a table of what came of it
    python scripts/fuzz.py labels serve --cases 500     some targets only
    python scripts/fuzz.py --atheris pairs --runs 50000 one parser of bytes, guided by coverage, from the seeds in tests/fuzz/seeds

Exit code 1 where a case broke: it ended in a traceback, in a message that cannot be read, too late, or changed an atlas that it was refused.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> int:
    sys.path.insert(0, str(ROOT))
    from anyio.abc import SocketAttribute  # noqa: F401 - before nnsight, which gives every class a `save` that this one cannot bear

    asked = _arguments()
    if asked.atheris:
        from tests.fuzz.guided import fuzz

        return fuzz(asked.atheris, asked.runs, asked.seconds, ROOT / "tests" / "fuzz" / "seeds")
    from tests.fuzz.campaign import attack, shares, table, told
    from tests.fuzz.targets import TARGETS

    if asked.list:
        print("\n".join(f"{name:20} {target.run.__doc__}" for name, target in TARGETS.items()))
        return 0
    unknown = [name for name in asked.targets if name not in TARGETS]
    if unknown or not (asked.all or asked.targets):
        print(f"name targets, or --all: {', '.join(TARGETS)}{f'; there is no {unknown[0]}' if unknown else ''}", file=sys.stderr)
        return 2
    reports = []
    with tempfile.TemporaryDirectory(prefix="featlas-fuzz-") as folder:
        stage = _stage(Path(folder))
        for name, cases in shares(asked.cases, asked.targets).items():
            reports.append(attack(TARGETS[name], stage, cases, start=asked.seed))
            print(f"{told(reports[-1])}{name}: {cases} cases, {reports[-1].seconds:.0f} s", flush=True)
    print(table(reports))
    return int(any(report.broken for report in reports))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", help="targets of the campaign")
    parser.add_argument("--all", action="store_true", help="all targets")
    parser.add_argument("--cases", type=int, default=10_000, help="cases in all, shared out by the targets' weights")
    parser.add_argument("--seed", type=int, default=0, help="another seed draws other cases")
    parser.add_argument("--list", action="store_true", help="list the targets")
    parser.add_argument("--atheris", metavar="PARSER", help="fuzz one parser of bytes by coverage")
    parser.add_argument("--runs", type=int, default=20_000, help="with --atheris: inputs to try")
    parser.add_argument("--seconds", type=int, default=600, help="with --atheris: seconds at most")
    return parser.parse_args()


def _stage(folder: Path):
    from tests.fuzz.made import made
    from tests.study_atlas import _made

    (folder / "tiny").mkdir()
    (folder / "stage").mkdir()
    return made(_made(folder / "tiny"), folder / "stage")


if __name__ == "__main__":
    sys.exit(main())
