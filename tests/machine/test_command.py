"""Flags, configurations and errors, as every command has them."""

from pathlib import Path

import jax
import pytest

from flaxkd.machine import command, files


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


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ModuleNotFoundError, FloatingPointError])
def test_a_mistake_is_one_message_and_a_defect_is_a_traceback(error, monkeypatch):
    with pytest.raises(SystemExit, match=r"^error: the reason$"), command.reported():
        raise error("the reason")
    monkeypatch.setenv("FLAXKD_TRACEBACK", "1")
    with pytest.raises(error), command.reported():
        raise error("the reason")
    with pytest.raises(KeyError), command.reported():
        raise KeyError("a defect of flaxkd")


def test_ctrl_c_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended, command.reported("stopped; the same command resumes"):
        raise KeyboardInterrupt
    assert ended.value.code == 130 and capsys.readouterr().err == "\nstopped; the same command resumes\n"


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["-config", "small"], 'unrecognized argument: -config. Did you mean "--config"?'),
        (["--config=small", "--config=tiny"], "--config is given twice: small and tiny"),
        (["--seed=1"], "the following arguments are required: --config, e.g. --config configs/small.py"),
        (["--config=small", "config.steps=2"], 'config.steps=2. Did you mean "--config.steps=2"?'),
        (["--config=small", "-config.steps=2"], '-config.steps=2. Did you mean "--config.steps=2"?'),
        (["--config=small", "--config.sample.prompts=('red", "apple','x')"], "argument: apple','x'); a value"),
        (["--config=small", "--sedd=3"], 'unrecognized argument: --sedd=3. Did you mean "--seed=3"?'),
        (["--config=small", "--learning_rat"], 'Did you mean "--config.learning_rate"'),
        (["--config=small", "--report_to", "wandb"], "report_to of other training scripts is here: "),
        (["--config=small", "--qqq"], "unrecognized argument: --qqq; --help lists all flags"),
        (["--config=small", "--batch-size=x"], "argument --batch-size: invalid int value: 'x'"),
    ],
)  # fmt: skip
def test_a_mistake_on_the_command_line_is_one_line(typed, message, capsys):
    made = command.parser("flaxkd.something", "Does something.")
    command.add(made, "config", required=True)
    command.add(made, "seed", "batch-size")
    with pytest.raises(SystemExit) as ended, command.reported():
        command.parse(made, typed)
    said = capsys.readouterr().err if ended.value.code == 2 else f"{ended.value.code}\n"
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


def test_a_home_that_cannot_be_written_costs_a_warning(monkeypatch, capsys):
    """For compiled programs; pictures and latents need a folder."""
    for name in ("FLAXKD_CACHE", "JAX_COMPILATION_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/dev/null")
    before = jax.config.jax_compilation_cache_dir
    command.keep_compiled_programs()
    command.keep_compiled_programs("~/jax")
    assert capsys.readouterr().err.count("warning: compiled programs are not kept") == 2
    assert jax.config.jax_compilation_cache_dir == before
    with pytest.raises(OSError, match=r"/dev/null/\.cache.*FLAXKD_CACHE"):
        files.cache_home()
