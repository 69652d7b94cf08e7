#!/usr/bin/env bash
# Train the demo's gates on the adapters of scripts/demo/train_adapters.py, and measure them.
#   scripts/demo/train_gates.sh GGUF TASKS ADAPTERS OUT
# OUT gets gates/, gates.jsonl (a line a step), gates.json and evaluation/. Seeds are fixed.
set -euo pipefail
gguf=$1 tasks=$2 adapters=$3 out=$4
work=${WORK:-$out/work}
mkdir -p "$out" "$work"
meteora() { "${PYTHON:-python3}" -m meteora_jax.cli "$@"; }

pairs=()
for folder in "$adapters"/*/adapter_config.json; do
    folder=$(dirname "$folder") && pairs+=("$(basename "$folder")=$folder")
done
meteora import base "$gguf" "$work/base" --dtype bfloat16 --overwrite
meteora import adapters "$work/bank" "${pairs[@]}" --base "$work/base" --overwrite
meteora train gates --base "$work/base" --bank "$work/bank" --tasks "$tasks" --out "$out/gates" \
    --steps "${STEPS:-700}" --batch-size "${BATCH:-32}" --learning-rate 2e-3 --warmup 0.03 --composite 0.4 \
    --max-length 1500 --seed 0 --log "$out/gates.jsonl" --json "$out/gates.json"
meteora evaluate --base "$work/base" --bank "$work/bank" --gates "$out/gates" --tasks "$tasks" \
    --out "$out/evaluation" --limit "${EACH:-100}" --batch-size 50
