"""The list of slow tests names tests that are there: one renamed would come back into CI unnoticed."""

from pathlib import Path

HERE = Path(__file__).parent


def test_every_slow_test_is_there():
    lines = (HERE / "slow.txt").read_text(encoding="utf-8").splitlines()
    assert lines == sorted(set(lines))
    for line in lines:
        file, _, name = line.partition("::")
        assert f"def {name.partition('[')[0]}(" in (HERE / file).read_text(encoding="utf-8"), line
