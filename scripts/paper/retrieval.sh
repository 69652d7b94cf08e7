#!/usr/bin/env bash
# LoraRetriever: what an index of the tasks' inputs finds, composed in three ways, beside gates; seen and unseen tasks.
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
[ -f "$OUT/gates/gates.json" ] || meteora train gates --base "$BASE" --bank "$OUT/bank" --tasks "$TASKS" --out "$OUT/gates" \
    --seed "${SEED:-0}"
[ -f "$OUT/index/index.json" ] || meteora index build "$OUT/index" --tasks "$TASKS"
seen=(retrieval-selection retrieval-mixture retrieval-fusion gates-top2 gates-within-top2)
systems=$(IFS=, && echo "${seen[*]},${seen[*]/%/-unseen}")
meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$OUT/gates" --index "$OUT/index" --tasks "$TASKS" \
    --systems "$systems" \
    --limit "${LIMIT:-40}" --max-prompt 2048 --out "$OUT/evaluation/retrieval"
