#!/usr/bin/env bash
# Installs what featlas needs.
#   scripts/setup.sh python   uv (where there is none) and the Python environment .venv, exactly as uv.lock says
#   scripts/setup.sh system   the programs that the full tests need: Java, Maven, Chromium, graph-tool;
#                             on Debian and Ubuntu, as root or with sudo that asks for no password; elsewhere it says what to install
set -euo pipefail
cd "$(dirname "$0")/.."
export DEBIAN_FRONTEND=noninteractive

say() { printf '%s\n' "$*" >&2; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"; else sudo -n "$@"; fi
}

can_apt() {
    command -v apt-get >/dev/null && command -v dpkg >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

# ---- the Python environment

has_python() { # a Python 3.11 or newer under the name $1?
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_uv() { # print the path of a uv that works
    local uv
    for uv in uv .make/uv/bin/uv "$HOME/.local/bin/uv"; do
        if "$uv" --version >/dev/null 2>&1; then command -v "$uv"; return; fi
    done
    return 1
}

make_private_uv() { # in an environment of its own: a system's Python may refuse to be written to (PEP 668)
    local python
    python="$(command -v python3 || command -v python || true)"
    if [ -z "$python" ] && can_apt; then
        as_root apt-get -o DPkg::Lock::Timeout=300 update -q && as_root apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends python3
        python=python3
    fi
    if [ -z "$python" ]; then say "Python 3.11 or newer is missing: install it, or uv, and run this again."; return 1; fi
    if ! "$python" -m venv .make/uv >/dev/null 2>&1 && can_apt; then # Debian ships venv as a package of its own
        as_root apt-get -o DPkg::Lock::Timeout=300 update -q && as_root apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends python3-venv
        "$python" -m venv --clear .make/uv
    fi
    .make/uv/bin/python -m pip install -q uv
}

set_up_python() {
    local uv
    if ! uv="$(find_uv)"; then
        say "Installing uv into .make/uv ..."
        mkdir -p .make
        if ! make_private_uv || ! uv="$(find_uv)"; then
            say "uv could not be installed. Install it in one of these ways and run this again:"
            say "  Debian, Ubuntu:  apt-get install pipx && pipx install uv"
            say "  macOS:           brew install uv"
            say "  conda:           conda install -c conda-forge uv"
            exit 1
        fi
    fi
    say "Making the Python environment in .venv ..."
    "$uv" sync --frozen --all-extras
    if ! has_python .venv/bin/python; then say ".venv holds a Python older than 3.11: delete .venv and run this again."; exit 1; fi
}

# ---- the system's programs

has_java() { .venv/bin/python -c 'from featlas.queries.neo4j_distribution import find_java; find_java()' >/dev/null 2>&1; }
has_maven() { command -v mvn >/dev/null; }
has_chromium() { .venv/bin/python -c 'import sys; sys.path.insert(0, "tests"); from chromium import CHROMIUM; sys.exit(CHROMIUM is None)' 2>/dev/null; }
has_graph_tool() { # found without importing it, which takes seconds
    /usr/bin/python3 -c 'import importlib.util as u, sys; sys.exit(u.find_spec("graph_tool") is None)' 2>/dev/null
}

missing() { # the names of what is missing, one a line
    has_java || echo java
    has_maven || echo maven
    has_chromium || echo chromium
    has_graph_tool || echo graph-tool
}

candidates() { # Debian's and Ubuntu's package names for $1, best first
    case "$1" in
        java) echo openjdk-17-jre-headless openjdk-21-jre-headless ;;
        maven) echo maven ;;
        chromium) echo chromium chromium-browser ;;
        graph-tool) echo python3-graph-tool ;;
    esac
}

install_by_apt() {
    local name package
    say "Installing: $* ..."
    as_root apt-get -o DPkg::Lock::Timeout=300 update -q >/dev/null || say "apt-get update failed; trying with the lists there are."
    for name in "$@"; do
        for package in $(candidates "$name"); do
            if [ -n "$(apt-cache policy "$package" 2>/dev/null | sed -n 's/^ *Candidate: *//p' | grep -v '(none)')" ]; then
                as_root apt-get -o DPkg::Lock::Timeout=300 install -y -q --no-install-recommends "$package" >/dev/null && break
            fi
        done || true
    done
}

explain() { # how to install $1 by hand
    case "$1" in
        java) say "  Java 17 or 21   Debian, Ubuntu: apt-get install openjdk-17-jre-headless (or openjdk-21-jre-headless)
                  macOS: brew install openjdk@21, then export JAVA_HOME=\"\$(brew --prefix openjdk@21)\"
                  conda: conda install -c conda-forge openjdk=17" ;;
        maven) say "  Maven           Debian, Ubuntu: apt-get install maven
                  macOS: brew install maven
                  conda: conda install -c conda-forge maven" ;;
        chromium) say "  Chromium        Debian: apt-get install chromium; Ubuntu: snap install chromium
                  macOS: brew install --cask google-chrome
                  anywhere: .venv/bin/playwright install --with-deps chromium" ;;
        graph-tool) say "  graph-tool      Debian, Ubuntu: apt-get install python3-graph-tool (imported by /usr/bin/python3)
                  macOS: brew install graph-tool
                  conda: conda create -n graph-tool -c conda-forge graph-tool" ;;
    esac
}

set_up_system() {
    local names
    names="$(missing)"
    if [ -z "$names" ]; then return; fi
    if can_apt; then
        # shellcheck disable=SC2086
        install_by_apt $names
        names="$(missing)"
    fi
    if [ -z "$names" ]; then return; fi
    say "These programs, which the full tests need, are missing and could not be installed from here:"
    for name in $names; do explain "$name"; done
    if [ "$names" = graph-tool ]; then say "Going on without graph-tool: the tests that need it are skipped."; return; fi
    say "Then run this again. \`make demo\` and \`make check\` need none of them."
    exit 1
}

case "${1:-}" in
    python) set_up_python ;;
    system) set_up_system ;;
    *) say "usage: scripts/setup.sh python|system"; exit 2 ;;
esac
