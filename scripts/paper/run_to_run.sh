#!/usr/bin/env bash
# How far gates differ that differ in nothing but their seed: the same bank, the same problems. SEEDS="1 2".
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
for seed in ${SEEDS:-0 1}; do
    gates=$OUT/gates-seed-$seed
    [ -f "$gates/gates.json" ] || meteora train gates --base "$BASE" --bank "$OUT/bank" --tasks "$TASKS" --out "$gates" \
        --seed "$seed"
    judge=(meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$gates" --tasks "$TASKS" --max-prompt 2048)
    "${judge[@]}" --systems oracle,gates-top1,gates-top2 --limit "${LIMIT:-100}" \
        --out "$OUT/evaluation/single-seed-$seed"
    "${judge[@]}" --systems gates-top1-t1,gates-top2-t1 --composite "${COMPOSITE:-3,5,10}" \
        --out "$OUT/evaluation/composite-seed-$seed"
done
