#!/usr/bin/env bash
# What every host (on SLURM: every GPU's process) of a job runs: one meteora command, told that it is one of many.
#
#   on_host.sh evaluate --base ... --out runs/evaluation ...
#
# STORE=gs://...   where --out is kept if the hosts share no file system: fetched before, sent while it grows and after;
#                  a training's run folder (--run, else OUT-run), with its checkpoints, likewise in STORE-run
# INPUTS=gs://...  fetched into ./inputs first (base, bank, gates, tasks)
# SYNC=60          seconds between two sendings
# METEORA=...      the command to run, .venv's meteora or the one on PATH unless given
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

out='' run=''
for ((i = 1; i < $#; i++)); do
    next=$((i + 1))
    case ${!i} in
    --out) out=${!next} ;;
    --run) run=${!next} ;;
    esac
done
if [[ -z $out ]]; then
    echo "error: on_host.sh: --out: expected a folder, found none" >&2
    exit 2
fi
run=${run:-${out%/}-run}
METEORA=${METEORA:-$([[ -x .venv/bin/meteora ]] && echo .venv/bin/meteora || echo meteora)}

# The hosts compile the same programs: a cache spares a job that goes on the minutes it took the first time.
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/meteora-jax}
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} TOKENIZERS_PARALLELISM=${TOKENIZERS_PARALLELISM:-false}

fetch() { # what is at an address that may not exist yet, into a folder; more options of rsync
    if gcloud storage ls "$1" >/dev/null 2>&1; then
        mkdir -p "$2"
        gcloud storage rsync --recursive "${@:3}" "$1" "$2"
    fi
}

# Of every file and checkpoint that is in the store as it is here: what tells this state from others. Names count, not
# times alone, since what is complete is renamed into its place and keeps the times that it was written at.
declare -A known=() steps=()

files() { # a folder's files, but for checkpoints: time and size, "/", name
    [[ ! -d $1 ]] || (cd "$1" && find . -path ./checkpoints -prune -o -type f ! -name '.*' -printf '%T@ %s/%P\0')
}

checkpoints() { # the complete ones, which have a number for a name: inode and time, "/", step
    [[ ! -d $run/checkpoints ]] || (cd "$run/checkpoints" && find . -maxdepth 1 -regex './[0-9]+' -printf '%i %T@/%P\0')
}

# What was fetched: a host that did not write it does not send it, since its copies grow old.
know() {
    local state name folder
    for folder in "$out" "$run"; do
        while IFS=/ read -r -d '' state name; do known["$folder/$name"]=$state; done < <(files "$folder")
    done
    while IFS=/ read -r -d '' state name; do steps[$name]=$state; done < <(checkpoints)
}

send_files() { # folder, address
    local state name
    while IFS=/ read -r -d '' state name; do
        [[ ${known["$1/$name"]:-} != "$state" ]] || continue
        gcloud storage cp "$1/$name" "$2/$name" || return
        known["$1/$name"]=$state
    done < <(files "$1")
}

# A checkpoint is whole in the store once .whole is beside its parts. What the training removed is removed there, too.
send_checkpoints() {
    local state step
    local -A here=()
    while IFS=/ read -r -d '' state step; do
        here[$step]=1
        [[ ${steps[$step]:-} != "$state" ]] || continue
        gcloud storage rsync --recursive "$run/checkpoints/$step" "$kept/checkpoints/$step" || return
        gcloud storage cp "$whole" "$kept/checkpoints/$step/.whole" || return
        steps[$step]=$state
    done < <(checkpoints)
    for step in "${!steps[@]}"; do
        [[ -z ${here[$step]:-} ]] || continue
        gcloud storage rm --recursive "$kept/checkpoints/$step" || true # one too many does no harm
        unset "steps[$step]"
    done
}

send() { # all of it, and whether it was sent: what was not is sent the next time
    local failed=0
    send_files "$out" "$store" || failed=1
    send_checkpoints || failed=1
    send_files "$run" "$kept" || failed=1
    return "$failed"
}

if [[ -n ${INPUTS:-} ]]; then fetch "$INPUTS" inputs; fi
if [[ -z ${STORE:-} ]]; then
    exec "$METEORA" "$@" --distributed
fi

store=${STORE%/} kept=${STORE%/}-run
whole=$(mktemp)
trap 'rm -f "$whole"' EXIT
echo "every part of this checkpoint is here" >"$whole"

fetch "$STORE" "$out"
if gcloud storage ls "$kept" >/dev/null 2>&1; then
    # Every host goes on from the same checkpoints: those in the store, and of these the ones that were sent whole.
    fetch "$kept" "$run" --delete-unmatched-destination-objects
    for folder in "$run"/checkpoints/*; do
        [[ -e $folder/.whole ]] || rm -rf "$folder"
        rm -f "$folder/.whole"
    done
fi
know

"$METEORA" "$@" --distributed &
job=$!
trap 'kill -TERM "$job" 2>/dev/null || true' TERM INT
while kill -0 "$job" 2>/dev/null; do
    for ((second = 0; second < ${SYNC:-60}; second++)); do
        sleep 1
        kill -0 "$job" 2>/dev/null || break 2
    done
    send || echo "on_host.sh: not all could be sent, the next time again" >&2
done
status=0
wait "$job" || status=$?
send || exit 1
exit "$status"
