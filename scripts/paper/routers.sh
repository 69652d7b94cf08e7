#!/usr/bin/env bash
# Every router beside each other: single tasks, with and without a problem's own adapter, and several tasks in one prompt
# in MeteoRA's layout and in others. What is trained: adapters, both forms of gates, an own gate of each adapter.
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
seed=(--seed "${SEED:-0}")
[ -f "$OUT/gates/gates.json" ] || meteora train gates --base "$BASE" --bank "$OUT/bank" --tasks "$TASKS" --out "$OUT/gates" "${seed[@]}"
[ -f "$OUT/gates-meteora/gates.json" ] || meteora train gates --recipe meteora --base "$BASE" --bank "$OUT/bank" \
    --tasks "$TASKS" --out "$OUT/gates-meteora" "${seed[@]}" --steps 480 --batch-size 64 --max-length 2048 --learning-rate 1e-3 \
    --composite 0.2 --remat "${REMAT:-all}"
[ -f "$OUT/index/ranking.json" ] || {
    meteora index build "$OUT/index" --tasks "$TASKS"
    meteora index rank "$OUT/index" --base "$BASE" --bank "$OUT/bank" --tasks "$TASKS" --limit 10
}
mapfile -t tasks < <(cd "$TASKS" && ls -d -- */train.jsonl | xargs -n 1 dirname)
[ -d "$OUT/bank-own" ] || { rm -rf "$OUT/bank-own.new"; cp -r "$OUT/bank" "$OUT/bank-own.new"; mv "$OUT/bank-own.new" "$OUT/bank-own"; }
for task in "${tasks[@]}"; do
    [ -f "$OUT/own-gates/$task" ] || meteora train adapter --base "$BASE" --tasks "$TASKS" --task "$task" --name "$task" \
        --own-gate "$OUT/bank-own" --out "$OUT/bank-own" --run "$OUT/own-gates/$task-run" "${seed[@]}" \
        --steps 100 --rows 4 --max-length 2048 --learning-rate 5e-3
    mkdir -p "$OUT/own-gates" && touch "$OUT/own-gates/$task"
done
others=uniform,arrow-top4,spectr-top4,lag-top1,logo-k20
found=retrieval-selection,retrieval-mixture,retrieval-fusion,task-retrieval
hidden() { sed -E 's/(,|$)/-unseen\1/g' <<< "$1"; }
single=(--base "$BASE" --tasks "$TASKS" --index "$OUT/index" --limit "${LIMIT:-100}" --max-prompt 2048)
meteora evaluate "${single[@]}" --bank "$OUT/bank" --gates "$OUT/gates" --out "$OUT/evaluation/routers" \
    --systems "base,oracle,gates-top1,gates-top2,gates-within-top2,$others,$found"
meteora evaluate "${single[@]}" --bank "$OUT/bank" --gates "$OUT/gates" --out "$OUT/evaluation/routers-unseen" \
    --systems "$(hidden "gates-top2,gates-within-top2,$others,$found")"
meteora evaluate "${single[@]}" --bank "$OUT/bank" --gates "$OUT/gates-meteora" --out "$OUT/evaluation/routers-meteora" \
    --systems gates-top2,gates-top2-unseen
meteora evaluate "${single[@]}" --bank "$OUT/bank-own" --out "$OUT/evaluation/routers-own" \
    --systems phatgoose-top2,phatgoose-top2-unseen
several=(--base "$BASE" --tasks "$TASKS" --index "$OUT/index" --limit "${LIMIT:-100}"
    --composite "${COMPOSITE:-3,5,10},lettered=3,lettered=5,reversed=3,reversed=5,conversations,own-conversations,unnumbered")
meteora evaluate "${several[@]}" --bank "$OUT/bank" --gates "$OUT/gates" --out "$OUT/evaluation/routers-several" \
    --systems "base,gates-top2-t1,$others,$found"
meteora evaluate "${several[@]}" --bank "$OUT/bank" --gates "$OUT/gates-meteora" \
    --out "$OUT/evaluation/routers-several-meteora" --systems gates-top2-t1
meteora evaluate "${several[@]}" --bank "$OUT/bank-own" --out "$OUT/evaluation/routers-several-own" --systems phatgoose-top2
