#!/usr/bin/env bash
# Builds the wheel, installs it in an empty environment and imports it from somewhere else.
# Argument: a Python that has the package `build`.
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$(cd "$(dirname "$1")" && pwd)/$(basename "$1")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$python" -m build --wheel --outdir "$work/dist" "$root" > "$work/build.log" || { cat "$work/build.log"; exit 1; }
"$python" -m venv "$work/venv"
"$work/venv/bin/pip" install -q -c "$root/constraints.txt" torch
"$work/venv/bin/pip" install -q -c "$root/constraints.txt" "$work"/dist/*.whl

cd "$work"
"$work/venv/bin/python" "$root/tests/install/check_installed.py" "$root"
"$work/venv/bin/phasewatch" --version
