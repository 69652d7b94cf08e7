#!/usr/bin/env bash
# The bank: an adapter a task, all side by side in one run. 850 steps of 32 rows of 2,048 tokens.
set -euo pipefail
: "${BASE:?a BASE folder}" "${TASKS:?a TASKS folder}" "${OUT:?a folder for everything}"
[ -f "$OUT/bank/bank.json" ] || meteora train bank --base "$BASE" --tasks "$TASKS" --out "$OUT/bank" --seed "${SEED:-0}" \
    --steps 850 --rows 32 --max-length 2048 --samples-per-task 8000 --learning-rate 1e-3 --warmup 0.03 \
    --composite 0.1 --composite-sizes 2 10 --composite-shots 2 --validations 16 --ema 0.97 --remat "${REMAT:-all}"
