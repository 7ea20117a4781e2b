"""Where a real Neo4j comes from on a machine without Docker: a Java and a folder of jars.

1. `find_java`: a Java that Neo4j 5.26 runs on (17 to 21), from JAVA_HOME, the PATH or the system's usual folder.
2. `distribution`: the jars named in pom.xml, resolved by Maven once per version into the user's cache and shared by all atlases.
3. `gds_plugin`: the jars of the open edition of Graph Data Science, those that Neo4j itself has left out.

Maven decides where the jars come from (its own settings name the repositories and mirrors). Two processes may ask at the
same time: one downloads behind a file lock, into a temporary folder that is renamed when it is complete.
"""

import fcntl
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from ..errors import FeatlasError

POM = Path(__file__).with_name("pom.xml")
JAVA_VERSIONS = range(17, 22)  # what Neo4j 5.26 supports: 17 and 21, and what lies between
SYSTEM_JAVAS = Path("/usr/lib/jvm")
DOWNLOAD_LIMIT_S = 900.0
GDS_FOLDER = "-gds-"
"""In the name of the folder of Graph Data Science's jars."""


class JavaMissing(FeatlasError):
    """No Java that Neo4j runs on."""


class MavenMissing(FeatlasError):
    """The jars are not in the cache, and there is no Maven to resolve them."""


class DownloadFailed(FeatlasError):
    """Maven could not resolve the jars."""


def neo4j_version() -> str:
    """The version of Neo4j that pom.xml names, like `5.26.30`."""
    return _version("neo4j.version")


def _version(name: str) -> str:
    version = ElementTree.parse(POM).findtext(f"properties/{name}")
    if version is None:
        raise FeatlasError(f"{POM} names no {name}: install featlas again")
    return version


def cache_folder() -> Path:
    """The folder that holds the jars of this version, there or not: `$XDG_CACHE_HOME/featlas/neo4j-<version>`."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "featlas" / f"neo4j-{neo4j_version()}"


def gds_plugin() -> Path:
    """The folder of the Graph Data Science library's jars without those of `distribution`; downloaded on the first call (about 30 MB)."""
    own = distribution()
    folder = own.with_name(f"{own.name}{GDS_FOLDER}{_version('gds.version')}")
    if not folder.is_dir():
        _resolve(folder, f"proc-{_version('gds.version')}.jar", profile="gds", without=own)
    return folder


def find_java() -> Path:
    """A `java` program of version 17 to 21; raises JavaMissing with what was found instead and what to install."""
    rejected = []
    for java in _javas():
        version = java_version(java)
        if version in JAVA_VERSIONS:
            return java
        rejected.append(f"{java} is version {version or 'unknown'}")
    found = "; ".join(rejected) or "none was found"
    raise JavaMissing(
        f"Neo4j needs Java 17 or 21 ({found}): install openjdk-17-jre-headless or openjdk-21-jre-headless (Debian, Ubuntu), "
        "`brew install openjdk@21` (macOS) or `conda install -c conda-forge openjdk=17`, or set JAVA_HOME"
    )


def _javas() -> Iterator[Path]:
    """Candidates, best first, each once."""
    home, on_path = os.environ.get("JAVA_HOME"), shutil.which("java")
    candidates = [Path(home) / "bin" / "java"] if home else []
    candidates += [Path(on_path)] if on_path else []
    candidates += sorted(SYSTEM_JAVAS.glob("*/bin/java"))
    seen = set()
    for java in candidates:
        real = java.resolve()
        if real not in seen and os.access(real, os.X_OK):
            seen.add(real)
            yield java


def java_version(java: Path) -> int | None:
    """The major version that `java -version` states, None when it states none (macOS has a `java` that only says so)."""
    try:
        done = subprocess.run([str(java), "-version"], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    stated = re.search(r'version "(?:1\.)?(\d+)', done.stderr + done.stdout)
    return int(stated[1]) if stated else None


def distribution() -> Path:
    """The folder of Neo4j's jars, downloaded on the first call for this version (about 140 MB, 10 s), then only looked up."""
    folder = cache_folder()
    if not folder.is_dir():
        _resolve(folder, f"neo4j-{neo4j_version()}.jar")
    return folder


def _resolve(folder: Path, jar: str, *, profile: str | None = None, without: Path | None = None) -> None:
    """Have Maven fill `folder`, behind a lock. jar: one that must be among them; without: a folder whose jars are left out."""
    maven = shutil.which("mvn")
    if maven is None:
        raise MavenMissing(
            f"Neo4j's jars are not in {folder} yet and Maven, which resolves them, is missing: install maven (Debian, Ubuntu: "
            "`apt-get install maven`; macOS: `brew install maven`; else `conda install -c conda-forge maven`)"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with exclusive(folder.with_name(folder.name + ".lock")):
        if not folder.is_dir():
            _download(maven, folder, jar, profile, without)


def _download(maven: str, folder: Path, jar: str, profile: str | None, without: Path | None) -> None:
    """Resolve the jars beside `folder` and rename: `folder` is either complete or not there."""
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=folder.name + ".part-") as part:
        jars = Path(part) / "jars"
        goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={jars}", *(["-P", profile] if profile else [])]
        # a copy of the pom: Maven may write a target folder beside it, and an installed package is not ours to write to
        pom = shutil.copy(POM, part)
        try:
            done = subprocess.run(
                [maven, "-B", "-q", "-f", str(pom), *goal],
                capture_output=True, text=True, timeout=DOWNLOAD_LIMIT_S, check=False, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise DownloadFailed(f"Maven had not resolved Neo4j's jars after {DOWNLOAD_LIMIT_S:.0f} s: try again") from error
        if done.returncode or not (jars / jar).is_file():
            last_lines = "\n".join((done.stdout + done.stderr).strip().splitlines()[-8:])
            raise DownloadFailed(f"Maven could not resolve Neo4j's jars into {folder}; it said:\n{last_lines}")
        for known in without.iterdir() if without is not None else ():
            (jars / known.name).unlink(missing_ok=True)
        jars.rename(folder)


@contextmanager
def exclusive(lock: Path) -> Iterator[None]:
    """Hold an advisory lock on the file `lock` among processes (and threads) of this machine; waits for it."""
    with lock.open("a") as held:
        fcntl.flock(held, fcntl.LOCK_EX)  # freed when the file is closed, also by a crash
        yield
