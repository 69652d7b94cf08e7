"""Writes slow.txt, the tests that continuous integration leaves out, from what a whole run measured.

./scripts/test.sh --junitxml=suite.xml && python tests/slow.py suite.xml

Of several reports, a test's longest time counts: without a slow test another is the first to wait for what both need.
"""

import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SECONDS = 6.0  # without these, CI is to stay below 15 minutes on two cores
KEPT = (  # in CI all the same: the formula, the kernels' random shapes, the command line, a run cut off
    "test_routing.py::test_gated_update_equals_the_formula",
    "test_kernels.py::test_forward_and_gradients_of_random_shapes",
    "test_cli.py::test_train_gates",
    "test_training_resume.py::test_sigterm_saves_and_says_so",
    "test_training_mesh.py::test_a_mesh_equals_torch[1x8x1]",
)
WHOLE = ("test_kernels_sharded.py", "test_sharding.py", "test_tensor_parallel.py")  # a slow fixture for all tests
FILE = Path(__file__).with_name("slow.txt")


def is_slow(name: str, seconds: float) -> bool:
    return name.startswith(WHOLE) or (seconds >= SECONDS and name not in KEPT)


def main(*reports: str) -> None:
    took: dict[str, float] = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        place, name = case.attrib["classname"].rpartition(".")[2], case.attrib["name"]
        name = f"{place}.py::{name}"
        took[name] = max(float(case.attrib["time"]), took.get(name, 0.0))
    slow = sorted(name for name, seconds in took.items() if is_slow(name, seconds))
    FILE.write_text("".join(f"{name}\n" for name in slow), encoding="utf-8")
    left = sum(took.values()) - sum(took[name] for name in slow)
    print(f"{FILE.name}: {len(slow)} of {len(took)} tests, {sum(took.values()):.0f} s; {left:.0f} s without them")


if __name__ == "__main__":
    main(*sys.argv[1:])
