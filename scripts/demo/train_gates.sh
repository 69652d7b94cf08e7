#!/usr/bin/env bash
# Train the demo's gates on the adapters of scripts/demo/train_adapters.py, and measure them.
#   scripts/demo/train_gates.sh GGUF TASKS ADAPTERS OUT
# OUT gets gates/ (as the demo keeps them: in 16 bit, so that all its files stay below 45 MB), gates.jsonl (a line a step),
# gates.json and evaluation/. Seeds are fixed.
set -euo pipefail
gguf=$1 tasks=$2 adapters=$3 out=$4
work=${WORK:-$out/work}
mkdir -p "$out" "$work"
python=${PYTHON:-python3}
meteora() { "$python" -m meteora_jax.cli "$@"; }

pairs=()
for folder in "$adapters"/*/adapter_config.json; do
    folder=$(dirname "$folder") && pairs+=("$(basename "$folder")=$folder")
done
meteora import base "$gguf" "$work/base" --dtype bfloat16 --overwrite
meteora import adapters "$work/bank" "${pairs[@]}" --base "$work/base" --overwrite
meteora train gates --base "$work/base" --bank "$work/bank" --tasks "$tasks" --out "$work/gates" \
    --steps "${STEPS:-2500}" --rows "${ROWS:-4}" --max-length "${LENGTH:-4096}" --learning-rate 3e-3 --warmup 0.03 --clip 1 \
    --gate-input embedding --gate-stream 128 --gate-depth 4 --no-lm-loss --no-prompt-loss \
    --answer-share 0.7 --turn-share 0.5 --order 0.5 --samples-per-task 2000 \
    --composite 0.8 --composite-sizes 2 5 --composite-shots 2 --composite-cut 0.6 \
    --seed 0 --log "$out/gates.jsonl" --json "$out/gates.json"
"$python" - "$work/gates" "$out/gates" <<'PY'
import shutil, sys
import numpy as np
from safetensors.numpy import load_file, save_file
source, dest = sys.argv[1:]
shutil.copytree(source, dest, dirs_exist_ok=True)
weights = {k: v.astype(np.float16) for k, v in load_file(f"{source}/weights.safetensors").items()}
save_file(weights, f"{dest}/weights.safetensors")
PY
meteora evaluate --base "$work/base" --bank "$work/bank" --gates "$out/gates" --tasks "$tasks" \
    --out "$out/evaluation" --limit "${EACH:-100}" --batch-size 50
