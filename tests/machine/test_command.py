"""Flags, configurations and errors, as every command has them."""

import operator
import re
from pathlib import Path

import pytest

from configs import small
from flaxkd.machine import command, diffusers_flags


@pytest.fixture
def parser():
    before = {"--reference": "--teacher", "--batch": "--batch-size"}
    made = command.parser("flaxkd.something", "Does something.", before)
    command.add(made, "model", action="extend", nargs="+")
    command.add(made, "teacher", "seed", "dtype")
    command.add(made, "batch-size", default=4)
    command.add(made, "out", default=Path("here"))
    command.add(made, "config")
    return made


@pytest.mark.parametrize(
    "typed",
    [
        ["--teacher", "a/b", "--batch-size", "8"],
        ["--reference", "a/b", "--batch_size", "8"],
        ["--reference=a/b", "--batch=8"],
        ["--teacher=a/b", "--batch_size=8"],
    ],
)
def test_today_s_spelling_and_those_before_mean_the_same(parser, typed):
    args = parser.parse_args(typed)
    assert (args.teacher, args.batch_size, args.seed, args.out) == ("a/b", 8, 0, Path("here"))


def test_a_value_is_left_as_it_is_typed(parser):
    args = parser.parse_args(["--teacher", "my_folder", "--out=an_out--batch_size"])
    assert (args.teacher, args.out) == ("my_folder", Path("an_out--batch_size"))


def test_a_list_is_repeated_or_in_one_go(parser):
    assert parser.parse_args(["--model", "a", "--model", "b"]).model == ["a", "b"]
    assert parser.parse_args(["--model", "a", "b"]).model == ["a", "b"]


def test_overrides_go_to_the_configuration_with_or_without_an_equals_sign(parser):
    typed = ["--config", "configs/small.py", "--config.batch_size=8", "--config.steps", "7", "--seed=3"]
    args, config = command.parse(parser, typed)
    assert (config.batch_size, config.steps, args.seed) == (8, 7, 3)


@pytest.mark.parametrize("typed", [["--sedd=3"], ["7"], ["--config.steps=7", "8"], ["--config.steps", "--sedd"]])
def test_what_is_no_flag_is_refused(parser, typed, capsys):
    with pytest.raises(SystemExit):
        command.parse(parser, ["--config=configs/small.py", *typed])
    assert "unrecognized argument" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "override", "message"),
    [
        ("configs/none.py", "", "there is no file configs/none.py"),
        ("configs/small.py:sd21", "", r"cannot be read: ValueError: configs/small\.py:sd21 is unknown"),
        ("configs/small.py", "--config.stepz=3", r"'stepz'\nDid you mean \"steps\""),
        ("configs/small.py", "--config.steps=many", "--config.steps=many: invalid literal"),
        ("configs/small.py", "--config.num_train_epochs=3", "num_train_epochs of other training scripts .*: steps, "),
        ("configs/small.py", "--config.report-to=wandb", "report-to of other training scripts .*TensorBoard"),
        ("configs/small.py", "--config.learning_rate.value=1", "peak_value.*schedule': 'constant_schedule', 'value'"),
        ("configs/small.py", "--config.learning_rate=1", "peak_value.*schedule': 'constant_schedule', 'value'"),
        ("configs/small.py", "--config.optimizer=lion", "weight_decay.*--config.optimizer="),
    ],
)
def test_a_configuration_that_cannot_be_read_says_why_in_a_line_or_two(file, override, message):
    with pytest.raises(ValueError, match=message) as error:
        command.configuration(file, [override] if override else [])
    assert len(str(error.value).splitlines()) <= 2


def test_none_is_none_for_a_key_of_any_type():
    keys = ("checkpoint.every", "max_grad_norm", "student", "data.variants", "sample.prompts", "blank")
    overrides = [*(f"--config.{key}=None" for key in keys), "--config.bad_steps.spike", "None"]
    config = command.configuration("configs/small.py", overrides)
    assert operator.attrgetter(*keys, "bad_steps.spike")(config) == (None,) * 7


def test_the_names_of_other_training_scripts_lead_to_keys_that_exist():
    config = small.get_config()
    for name, here in diffusers_flags.HERE.items():
        assert name not in config
        key = re.match(r"[a-z_.]*", here).group()
        if key not in ("none", "the") and key.partition(".")[0] not in command.OPEN:
            operator.attrgetter(key)(config)  # raises if there is no such key


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ModuleNotFoundError, FloatingPointError])
def test_a_mistake_is_one_message_and_a_defect_is_a_traceback(error, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: the reason$"), command.reported():
        raise error("the reason")
    monkeypatch.setenv("FLAXKD_TRACEBACK", "1")
    with pytest.raises(error), command.reported():
        raise error("the reason")
    with pytest.raises(KeyError), command.reported():
        raise KeyError("a defect of flaxkd")
