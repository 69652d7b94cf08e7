#!/usr/bin/env bash
# Train a bank of the demo's eight tasks and write each adapter as a PEFT folder, as scripts/demo/adapters has them:
# rank 8, alpha 16, every projection; a quarter of the sequences are composite problems of three tasks.
#   scripts/demo/train_adapters.sh
# From a checkout, with what the demo fetches at hand (the GGUF base in runs/demo/download, or GGUF=FILE) and TASKS
# (runs/tasks). OUT (runs/demo-adapters) gets bank/, adapters/TASK/ and adapters.json. STEPS and ROWS shorten it.
# The adapters in scripts/demo/adapters were trained by peft itself: commit f0e3798 has that script.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
cd "$here/../.."
gguf=${GGUF:-$(find runs/demo -name '*.gguf' 2>/dev/null | head -n 1 || true)}
tasks=${TASKS:-runs/tasks} out=${OUT:-runs/demo-adapters}
[ -f "$gguf" ] || { echo "GGUF: expected the demo's base (scripts/demo.sh fetches it), found '$gguf'" >&2; exit 1; }
[ -d "$tasks" ] || { echo "TASKS: expected a folder of scripts/prepare_tasks.py, found '$tasks'" >&2; exit 1; }
mkdir -p "$out"
python=${PYTHON:-python3}
meteora() { "$python" -m meteora_jax.cli "$@"; }

names=(abstract_narrative_understanding disfl_qa goal_step_wikihow logical_deduction
    object_counting question_selection strategyqa winowhy)
meteora import base "$gguf" "$out/base" --overwrite
meteora train bank --base "$out/base" --tasks "$tasks" --out "$out/bank" --task "${names[@]}" \
    --steps "${STEPS:-850}" --rows "${ROWS:-32}" --max-length 2048 --learning-rate 1e-3 --warmup 0.03 \
    --composite 0.25 --validations 10 --validation-composites 40 --json "$out/adapters.json"
for name in "${names[@]}"; do
    meteora export adapter "$out/bank" "$name" "$out/adapters/$name" --overwrite
done
