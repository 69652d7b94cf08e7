#!/usr/bin/env bash
# A real model switches real adapters token by token: environment, install, fetch, import, answer, measure.
# Arguments go to `meteora demo` (--serve: a server in place of the figures). Safe to run again; offline the second time.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source scripts/environment.sh
environment convert eval serve
exec "$PY" -m meteora_jax.cli demo "$@"
