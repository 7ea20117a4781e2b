#!/usr/bin/env bash
# mypy over the package. The root of the repository is the package `featlas`, whatever its folder is called:
# mypy finds it by that name through a link in an empty folder.
set -euo pipefail
root="$(cd "$(dirname "$0")/.." && pwd)"
folder="$(mktemp -d)"
trap 'rm -f "$folder/featlas"; rmdir "$folder"' EXIT
ln -s "$root" "$folder/featlas"
cd "$folder"
"$root/.venv/bin/mypy" --config-file "$root/pyproject.toml" --cache-dir "$root/.mypy_cache" -p featlas
