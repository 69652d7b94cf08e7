#!/usr/bin/env bash
# Train the demo's gates, a token router by its recipe with a null choice, on the adapters of scripts/demo, and measure them.
#   scripts/demo/train_gates.sh
# From a checkout, with what the demo fetches at hand (the GGUF base in runs/demo/download, or GGUF=FILE) and TASKS
# (runs/tasks). OUT (runs/demo-gates) gets gates/ in 16 bit, as scripts/demo/gates has them, gates.jsonl (a
# line a step), gates.json and evaluation/. STEPS and EACH shorten training and evaluation. Seeds are fixed.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
gguf=${GGUF:-$(find runs/demo -name '*.gguf' 2>/dev/null | head -n 1 || true)}
tasks=${TASKS:-runs/tasks} adapters=${ADAPTERS:-$here/adapters} out=${OUT:-runs/demo-gates}
work=${WORK:-$out/work}
[ -f "$gguf" ] || { echo "GGUF: expected the demo's base (scripts/demo.sh fetches it), found '$gguf'" >&2; exit 1; }
[ -d "$tasks" ] || { echo "TASKS: expected a folder of scripts/prepare_tasks.py, found '$tasks'" >&2; exit 1; }
mkdir -p "$out" "$work"
python=${PYTHON:-python3}
meteora() { "$python" -m meteora_jax.cli "$@"; }

pairs=()
for folder in "$adapters"/*/adapter_config.json; do
    folder=$(dirname "$folder") && pairs+=("$(basename "$folder")=$folder")
done
meteora import base "$gguf" "$work/base" --dtype bfloat16 --name HuggingFaceTB/SmolLM2-135M-Instruct --overwrite
"$python" scripts/paper/general_background.py "$work/base" "$work/background.jsonl"
meteora import adapters "$work/bank" "${pairs[@]}" --base "$work/base" --overwrite
meteora train gates --base "$work/base" --bank "$work/bank" --tasks "$tasks" --out "$work/gates" \
    --background "$work/background.jsonl" self ${STEPS:+--steps "$STEPS"} --seed 0 --json "$out/gates.json"
cp "$work/gates-run/log.jsonl" "$out/gates.jsonl"
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
    --out "$out/evaluation" --limit "${EACH:-100}"
