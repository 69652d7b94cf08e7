#!/usr/bin/env bash
# Environment, install, lint, types, tests. Arguments go to pytest: scripts/test.sh -k gates
# --all adds the tests marked exhaustive and runs the random ones with many examples.
# PYTHON=python3.12 chooses the interpreter, WORKERS=4 the number of test processes (one a core otherwise),
# TORCH=torch==2.11.0 the PyTorch that the tests compare with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh

SECONDS=0
environment convert eval test dev docs

say "ruff"
"$PY" -m ruff check .
"$PY" -m ruff format --check .

say "pyright, beside the tests: it runs on one core; what it says comes after them"
export PYRIGHT_PYTHON_IGNORE_WARNINGS=1  # it would look for a newer version of itself
types=$(mktemp)
"$PY" -m pyright --pythonpath "$PY" > "$types" 2>&1 &
checking=$!
trap 'kill "$checking" 2> /dev/null || true; rm -f "$types"' EXIT

say "base model"
# the parity tests read the real file; without a network they are skipped
"$PY" -c 'from pathlib import Path; from meteora_jax.cli.demo import fetch_base; print(fetch_base(Path("runs/demo/download")))' 2>&1 | tail -1 ||
    say "not fetched: tests/test_real_model.py will be skipped"

say "pytest"
unset PYTHONDONTWRITEBYTECODE  # every worker and child would compile the package and rewrite the tests again
# files in the order that tests/conftest.py gives them: the longest first
"$PY" -m pytest -n "${WORKERS:-logical}" --maxprocesses 8 --dist loadscope --no-loadscope-reorder --durations 15 "$@"
wait "$checking" || { cat "$types"; exit 1; }
cat "$types"
say "all passed in $((SECONDS / 60)) min $((SECONDS % 60)) s"
