#!/usr/bin/env bash
# What every host (on SLURM: every GPU's process) of a job runs: one meteora command, told that it is one of many.
#
#   on_host.sh evaluate --base ... --out runs/evaluation ...
#
# STORE=gs://...   where --out is kept if the hosts share no file system: fetched before, sent while it grows and after
# INPUTS=gs://...  fetched into ./inputs first (base, bank, gates, tasks)
# SYNC=60          seconds between two sendings
# METEORA=...      the command to run, .venv's meteora or the one on PATH unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out=
for ((i = 1; i < $#; i++)); do
    [[ ${!i} != --out ]] || { next=$((i + 1)) && out=${!next}; }
done
if [[ -z $out ]]; then
    echo "error: on_host.sh: --out: expected a folder, found none" >&2
    exit 2
fi
METEORA=${METEORA:-$([[ -x .venv/bin/meteora ]] && echo .venv/bin/meteora || echo meteora)}

# The hosts compile the same programs: a cache spares a job that goes on the minutes it took the first time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/meteora-jax}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

fetch() { # what is at an address that may not exist yet
    if gcloud storage ls "$1" >/dev/null 2>&1; then
        mkdir -p "$2"
        gcloud storage rsync --recursive "$1" "$2"
    fi
}

# Only what this host wrote since it began or since it last sent: the others hold older copies of the same files.
send() {
    local from=$sent name
    sent=$(mktemp)
    while IFS= read -r -d '' name; do
        gcloud storage cp "$out/$name" "${STORE%/}/$name"
    done < <(cd "$(dirname "$out")" && cd "$(basename "$out")" 2>/dev/null && find . -type f ! -name '.*' -newer "$from" -printf '%P\0')
    rm -f "$from"
}

if [[ -n ${INPUTS:-} ]]; then fetch "$INPUTS" inputs; fi
if [[ -z ${STORE:-} ]]; then
    exec "$METEORA" "$@" --distributed
fi

fetch "$STORE" "$out"
sent=$(mktemp)
"$METEORA" "$@" --distributed &
job=$!
trap 'kill -TERM "$job" 2>/dev/null || true' TERM INT
while kill -0 "$job" 2>/dev/null; do
    for ((second = 0; second < ${SYNC:-60}; second++)); do
        sleep 1
        kill -0 "$job" 2>/dev/null || break 2
    done
    send
done
status=0
wait "$job" || status=$?
send
exit "$status"
