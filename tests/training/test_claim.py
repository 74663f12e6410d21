"""Whose a workdir is: a run may get more steps there, and one that never took a step claims nothing."""

import json

import numpy as np
import pytest

from flaxkd.data import loader
from flaxkd.training import checkpoint

COSINE = {"schedule": "warmup_cosine_decay_schedule", "decay_steps": 300}
CONFIG = {"steps": 300, "batch_size": 16, "learning_rate": COSINE, "data": {"source": "a"}, "log_every": 10}


@pytest.fixture
def begun(tmp_path):
    """A workdir whose run took 20 steps."""
    checkpoint.claim(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 20}\n')
    return tmp_path


def test_steps_may_change_down_to_those_taken_and_the_horizon_follows(begun):
    for steps in (600, 20):
        more = CONFIG | {"steps": steps, "learning_rate": COSINE | {"decay_steps": steps}}
        assert checkpoint.check_claim(begun, more) == 300
        assert checkpoint.check_claim(begun, CONFIG | {"steps": steps}) == 300  # the former horizon, given explicitly
    with pytest.raises(ValueError, match="another configuration:\n  steps: 300 there, 19 here"):
        checkpoint.check_claim(begun, CONFIG | {"steps": 19, "learning_rate": COSINE | {"decay_steps": 19}})
    with pytest.raises(ValueError, match="learning_rate: "):
        checkpoint.check_claim(begun, CONFIG | {"learning_rate": COSINE | {"decay_steps": 77}})


def test_other_settings_are_refused_but_not_those_younger_than_the_run(begun):
    checkpoint.claim(begun, CONFIG | {"log_every": 0, "vae": "x", "data": {"source": "a", "background": "white"}})
    with pytest.raises(ValueError, match="batch_size: 16 there, 8 here"):
        checkpoint.claim(begun, CONFIG | {"batch_size": 8})


def test_a_workdir_with_the_student_that_keep_chose_may_move(begun):
    chosen = CONFIG | {"keep": 0.65, "student": "/old/student.json"}
    (begun / "config.json").write_text(json.dumps(chosen))
    assert checkpoint.check_claim(begun, chosen | {"student": "/new/student.json"}) == 300
    with pytest.raises(ValueError, match=r"keep: 0\.65 there, 0\.5 here"):
        checkpoint.check_claim(begun, chosen | {"keep": 0.5})
    (begun / "config.json").write_text(json.dumps(named := chosen | {"keep": None}))
    with pytest.raises(ValueError, match=r"student: .*/old/student\.json.* there, "):
        checkpoint.check_claim(begun, named | {"student": "/new/student.json"})


def test_a_run_without_a_step_claims_nothing(tmp_path):
    checkpoint.claim(tmp_path, CONFIG)
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    (tmp_path / "blank").mkdir()
    other = CONFIG | {"batch_size": 8}
    checkpoint.clear(tmp_path, CONFIG)
    assert (tmp_path / "blank").is_dir()
    checkpoint.clear(tmp_path, other)
    assert [path.name for path in tmp_path.iterdir() if path.name[0] != "."] == ["config.json"]
    checkpoint.claim(tmp_path, other)
    assert json.loads((tmp_path / "config.json").read_text())["batch_size"] == 8


def test_batches_of_one_have_each_example_once_an_epoch():
    order = iter(loader._endless(11, 0).batch(1).to_iter_dataset())
    epochs = np.concatenate([next(order) for _ in range(22)]).reshape(2, 11)
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(11)) and list(epochs[0]) != list(epochs[1])


@pytest.mark.parametrize("content", [{"model_type": "clip", "steps": 3}, ["not", "an", "object"]])
def test_a_folder_with_a_config_of_something_else_is_left_alone(tmp_path, content):
    """Each part of a model has a config.json, and a folder of one's own may have `samples`."""
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "wedding.jpg").write_bytes(b"mine")
    checkpoint.clear(tmp_path, CONFIG)
    with pytest.raises(ValueError, match=r"config\.json is no configuration of a run: choose another --workdir"):
        checkpoint.claim(tmp_path, CONFIG)
    assert json.loads((tmp_path / "config.json").read_text()) == content
    assert (tmp_path / "samples" / "wedding.jpg").read_bytes() == b"mine"
