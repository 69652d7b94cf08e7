#!/usr/bin/env bash
# Token routers of all adapters but the last 4, 8 and 14, grown by these: old columns keep every bit, and of each old task
# 100 examples are read again. Beside them the router that learnt all at once. ADDED="4", SAMPLE=100.
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
mapfile -t names < <(python3 -c "import json, sys; [print(a['name']) for a in json.load(open(sys.argv[1]))['adapters']]" \
    "$OUT/bank/bank.json")
train=(meteora train gates --base "$BASE" --tasks "$TASKS" --seed "${SEED:-0}")
[ -f "$OUT/gates/gates.json" ] || "${train[@]}" --bank "$OUT/bank" --out "$OUT/gates"
judge() {
    meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$1" --tasks "$TASKS" --max-prompt 2048 \
        --systems gates-top1,gates-top2 --limit "${LIMIT:-100}" --out "$OUT/evaluation/$2"
    meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$1" --tasks "$TASKS" --max-prompt 2048 \
        --systems gates-top2-t1 --composite "${COMPOSITE:-3,5,10}" --out "$OUT/evaluation/$2-composite"
}
judge "$OUT/gates" joint
for added in ${ADDED:-4 8 14}; do
    grown=$OUT/grown-by-$added
    old=("${names[@]:0:${#names[@]}-$added}")
    for task in "${old[@]}"; do
        mkdir -p "$grown/replay/$task"
        shuf -n "${SAMPLE:-100}" --random-source=<(yes) "$TASKS/$task/train.jsonl" > "$grown/replay/$task/train.jsonl"
    done
    [ -f "$grown/bank/bank.json" ] || meteora export bank "$OUT/bank" "$grown/bank" "${old[@]}"
    [ -f "$grown/old/gates.json" ] || "${train[@]}" --bank "$grown/bank" --out "$grown/old"
    [ -f "$grown/gates/gates.json" ] || "${train[@]}" --bank "$OUT/bank" --out "$grown/gates" --extend "$grown/old" \
        --replay "$grown/replay"
    judge "$grown/gates" "grown-by-$added"
done
