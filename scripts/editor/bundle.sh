#!/usr/bin/env bash
# Make pages/vendor/codemirror.min.js anew from editor.js and the versions in package.json. Needs npm; the file is committed, so that users do not.
set -euo pipefail
here="$(cd "$(dirname "$0")" && pwd)"
vendor="$here/../../pages/vendor"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
cp "$here/editor.js" "$here/package.json" "$work"
cd "$work"
npm install --no-audit --no-fund --silent
npx --no-install esbuild editor.js --bundle --minify --format=iife --global-name=featlasEditor --target=es2020 --charset=utf8 \
  --legal-comments=none --outfile="$vendor/codemirror.min.js"
cp node_modules/@codemirror/view/LICENSE "$vendor/codemirror.LICENSE"
