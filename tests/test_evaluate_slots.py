"""`meteora evaluate --adapter-slots`: more tasks than slots."""

import json

import converters
from meteora_jax.cli import main
from meteora_jax.evaluation.tasks import Example, write_splits

TASKS = ("first", "second", "third", "fourth")


def test_the_oracle_of_four_tasks_has_two_slots(world, tmp_path):
    """Each answer is the one of a model that has all four adapters on the device."""
    converters.import_adapters(tmp_path / "bank", world["base"], dict(zip(TASKS, world["peft"].values(), strict=True)))
    for task in TASKS:
        examples = [Example(f"{task} {'so ' * (i % 3)}{i}?\n", "ab"[i % 2]) for i in range(4)]
        write_splits(tmp_path / "tasks" / task, {"test": examples})
    given = ["--base", str(world["base"]), "--bank", str(tmp_path / "bank"), "--tasks", str(tmp_path / "tasks")]
    found = []
    for slots in ([], ["--adapter-slots", "2"]):
        out = tmp_path / f"run{len(slots)}"
        main(["evaluate", *given, "--out", str(out), "--systems", "base,oracle", "--max-new-tokens", "6", *slots])
        records = map(json.loads, (out / "records.jsonl").read_text().splitlines())
        found.append({(r["system"], r["id"]): r["answer"] for r in records})
    assert found[0] == found[1]
    assert len(found[1]) == 2 * 4 * 4
    assert len({answer for (system, _), answer in found[1].items() if system == "oracle"}) > 4
