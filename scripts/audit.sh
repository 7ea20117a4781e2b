#!/usr/bin/env bash
# What is known of the versions that featlas is locked to: vulnerabilities of the Python packages and of the jars, licences, the vendored scripts.
#
#   bash scripts/audit.sh [FOLDER]      writes its reports into FOLDER (build/audit unless given)
#
# Exit code 1 where a package has a known vulnerability that no entry of scripts/audit_accepted.txt names, 2 where nothing could be learnt.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-build/audit}"
mkdir -p "$out"

uv export --locked --all-extras --all-groups --no-emit-project --no-hashes --format requirements-txt --quiet > "$out/requirements.txt"
echo "$(grep -c '==' "$out/requirements.txt") Python packages are locked"

accepted=()
while read -r id _; do
    [[ -z "$id" || "$id" == \#* ]] || accepted+=(--ignore-vuln "$id")
done < scripts/audit_accepted.txt

# By what the package index tells of, or another service that PIP_AUDIT_VULNERABILITY_SERVICE names (osv); --no-deps, since the lock names all.
.venv/bin/pip-audit --requirement "$out/requirements.txt" --no-deps --disable-pip --progress-spinner off --desc on \
    --format json --output "$out/vulnerabilities.json" "${accepted[@]}" 2> "$out/pip-audit.log" || true
if [[ ! -s "$out/vulnerabilities.json" ]]; then
    echo "the vulnerability service could not be asked:" >&2
    tail -n 3 "$out/pip-audit.log" >&2
    exit 2
fi
.venv/bin/python scripts/audit_summary.py "$out/vulnerabilities.json" pages/vendor queries/pom.xml
