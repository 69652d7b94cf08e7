"""Writes slow.txt, the tests that continuous integration leaves out, from what a whole run measured.

./scripts/test.sh --junitxml=suite.xml && python tests/slow.py suite.xml
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
)
FILE = Path(__file__).with_name("slow.txt")


def main(*reports: str) -> None:
    took: dict[str, float] = {}
    for case in (case for report in reports for case in ElementTree.parse(report).iter("testcase")):
        place, name = case.attrib["classname"].rpartition(".")[2], case.attrib["name"]
        took[f"{place}.py::{name}"] = float(case.attrib["time"])
    slow = sorted(name for name, seconds in took.items() if seconds >= SECONDS and name not in KEPT)
    FILE.write_text("".join(f"{name}\n" for name in slow), encoding="utf-8")
    left = sum(took.values()) - sum(took[name] for name in slow)
    print(f"{FILE.name}: {len(slow)} of {len(took)} tests, {sum(took.values()):.0f} s; {left:.0f} s without them")


if __name__ == "__main__":
    main(*sys.argv[1:])
