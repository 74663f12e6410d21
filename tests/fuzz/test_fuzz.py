"""300 damaged inputs, twenty or so of each kind. `python -m tests.fuzz --count 3000` by hand has room for more."""

import numpy as np
import pytest

from tests.fuzz import mutations, running, targets

COUNT = 300


@pytest.mark.slow
def test_damaged_input_is_read_right_or_refused_with_its_name():
    names = list(targets.TARGETS)
    outcomes = list(running.run([(name, i) for name in names for i in range(COUNT // len(names))], seed=0))
    faults = [f"{x.target} {x.number}: {x.kind}: {x.text}" for x in outcomes if x.is_fault]
    assert not faults, "\n".join(faults)
    ended = {name: {x.kind for x in outcomes if x.target == name} for name in names}
    assert {name for name in names if "refused" in ended[name]} >= {
        "parquet",
        "safetensors",
        "configurations",
        "overrides",
    }
    assert {name for name in names if "read" in ended[name]} >= {"metadata", "pictures", "tar", "checkpoint"}


def _loses(folder, scratch, victim):
    raise targets.Wrong("a sample is lost")


def _breaks(folder, scratch, victim):
    raise KeyError("source")


def _says_little(folder, scratch, victim):
    raise ValueError("bad input")


@pytest.mark.parametrize(("use", "error"), [(_loses, "is lost"), (_breaks, "source"), (_says_little, "names no file")])
def test_a_fault_is_seen(tmp_path, use, error):
    """Or the test above could not fail."""
    pristine = tmp_path / "pristine"
    pristine.mkdir()
    (pristine / "file").write_bytes(b"content")
    with pytest.raises((targets.Wrong, KeyError), match=error):
        targets.case(targets.Target(None, use), pristine, tmp_path / "scratch", np.random.default_rng(0))
    assert (pristine / "file").read_bytes() == b"content"


def test_a_process_that_dies_or_hangs_is_told(monkeypatch):
    """Both are cases of the process that runs them: here it is never told to begin, there it ends with an error."""
    never = lambda worker, case: vars(worker).update(case=case, since=float("-inf"))
    monkeypatch.setattr(running._Worker, "begin", never)
    (outcome,) = running.run([("overrides", 0)], seed=0)
    assert outcome.kind == "hangs" and outcome.is_fault
    monkeypatch.undo()
    (outcome,) = running.run([("no such target", 0)], seed=0)
    assert outcome.kind == "died" and outcome.is_fault


def test_the_same_seed_damages_alike():
    same = [mutations.damage(b"0123456789" * 9, np.random.default_rng([1, 2])) for _ in range(2)]
    assert same[0] == same[1] != b"0123456789" * 9
