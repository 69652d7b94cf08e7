#!/usr/bin/env bash
# Single tasks and composite-3, 5 and 10: base, oracle, gates, and one LoRA on all tasks (F: as they come, B: balanced).
set -euo pipefail
cd "$(dirname "$0")" && here=$PWD && cd - > /dev/null
"$here/adapters.sh"
seed=(--seed "${SEED:-0}")
[ -f "$OUT/gates/gates.json" ] || meteora train gates --base "$BASE" --bank "$OUT/bank" --tasks "$TASKS" --out "$OUT/gates" "${seed[@]}"
mapfile -t tasks < <(cd "$TASKS" && ls -d -- */train.jsonl | xargs -n 1 dirname)
large=$((8 * ${#tasks[@]}))  # as many numbers as the whole bank has
banks=
for rank in 8 "$large"; do
    for lora in f b; do
        name=lora-$lora-r$rank
        how=(--mixture natural)
        [ "$lora" = f ] || how=(--mixture balanced --samples-per-task 1000)  # MeteoRA, section 4.1
        [ -f "$OUT/$name/bank.json" ] || meteora train adapter --base "$BASE" --tasks "$TASKS" --out "$OUT/$name" \
            --task "${tasks[@]}" --name "$name" "${seed[@]}" \
            --rank "$rank" "${how[@]}" --steps 470 --rows 16 --max-length 2048 --learning-rate 1e-3 --warmup 0.03 \
            --clip 1 --composite 0.1 --composite-sizes 2 10 --composite-shots 2 --remat "${REMAT:-all}"
        banks+=,$name=$OUT/$name
    done
done
judge=(meteora evaluate --base "$BASE" --bank "$OUT/bank" --gates "$OUT/gates" --tasks "$TASKS" --max-prompt 2048)
"${judge[@]}" --systems "base,oracle,gates-top1,gates-top2$banks" --limit "${LIMIT:-100}" \
    --out "$OUT/evaluation/single"
"${judge[@]}" --systems "base,gates-top1-t1,gates-top2-t1$banks" --composite "${COMPOSITE:-3,5,10}" \
    --out "$OUT/evaluation/composite"
