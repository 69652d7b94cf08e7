#!/usr/bin/env bash
# Gates of all adapters but the last four, grown by these four: every old column keeps every bit.
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
mapfile -t names < <(python3 -c "import json, sys; [print(a['name']) for a in json.load(open(sys.argv[1]))['adapters']]" \
    "$OUT/bank/bank.json")
[ -f "$OUT/bank-small/bank.json" ] || meteora export bank "$OUT/bank" "$OUT/bank-small" "${names[@]:0:${#names[@]}-4}"
train=(meteora train gates --base "$BASE" --tasks "$TASKS")
[ -f "$OUT/gates-small/gates.json" ] || "${train[@]}" --bank "$OUT/bank-small" --out "$OUT/gates-small"
[ -f "$OUT/gates-grown/gates.json" ] || "${train[@]}" --bank "$OUT/bank" --out "$OUT/gates-grown" --extend "$OUT/gates-small"
judge=(meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$OUT/gates-grown" --tasks "$TASKS" --max-prompt 2048)
"${judge[@]}" --systems gates-top1,gates-top2 --limit "${LIMIT:-100}" --out "$OUT/evaluation/grown"
"${judge[@]}" --systems gates-top2-t1 --composite "${COMPOSITE:-3,5,10}" \
    --out "$OUT/evaluation/grown-composite"
