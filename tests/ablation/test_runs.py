"""The ablation: its runs as commands, what is skipped, and its arithmetic by hand. Trainings are stood in for."""

import json
import os
import signal
import sys
import threading

import pytest

from flaxkd.ablation import runs, table
from flaxkd.ablation.__main__ import main
from flaxkd.evaluate import evaluation
from tests.test_configs import parse

# Does to its workdir what a training does: steps, and an export at the end; fails or waits if a file says so.
TRAINER = """
import json, pathlib, signal, sys, time
workdir = next(pathlib.Path(a[10:]) for a in sys.argv if a.startswith("--workdir="))
said = workdir.parent / "trained"
said.open("a").write(workdir.name + "\\n")
if (workdir.parent / "fails").exists():
    sys.exit("the loss of step 7 is nan")
with (workdir / "metrics.jsonl").open("w") as file:
    for step in (0, 10):
        file.write(json.dumps({"step": step, "validation/loss_output": 1 / (1 + step)}) + "\\n")
if (workdir.parent / "waits").exists():
    signal.signal(signal.SIGTERM, lambda *_: ((workdir / "saved").touch(), sys.exit(143)))
    (workdir / "ready").touch()
    time.sleep(60)
(workdir / "diffusers").mkdir()
(workdir / "diffusers" / "model_index.json").touch()
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """The folder of an ablation whose trainings and evaluations are stood in for."""
    script = tmp_path / "trainer.py"
    script.write_text(TRAINER)
    monkeypatch.setattr(runs, "TRAINER", [sys.executable, str(script)])
    monkeypatch.setattr(runs, "POLL", 0.1)
    out = tmp_path / "out"
    monkeypatch.setattr(table, "picture", lambda result, path: None)  # it takes a second: drawn once, below
    monkeypatch.setattr(evaluation, "run", lambda args: answer(args, out))
    before = signal.getsignal(signal.SIGTERM)
    yield out
    signal.signal(signal.SIGTERM, before)


def answer(args, out) -> dict:
    """An evaluation: all measures of a model are a number that its variant and seed make."""
    (out / "asked").open("a").write(f"{args.out.name} {args.examples} {args.steps} {args.guidance}\n")
    rows = [{"model": "teacher", "loss_noise": 0.5, "frechet_latent_data": 0.1}]
    for model in args.models:
        _, variant, seed = model.rpartition("/")[2].split("-")
        value = 1 + [*runs.VARIANTS].index(variant) + int(seed) / 10
        rows.append({"model": model} | dict.fromkeys(table.MEASURES, value))
    args.out.mkdir(exist_ok=True)
    (args.out / "evaluation.json").write_text(json.dumps({"rows": rows}))
    return {"rows": rows}


def arguments(out, *more: str) -> list[str]:
    return ["--config=configs/small.py", f"--out={out}", "--students", "sd_small", *more]


def lines(path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("variant", runs.VARIANTS)
def test_the_command_of_a_run_sets_what_its_row_says(variant, tmp_path):
    overrides = ["--config.steps=7", "--config.learning_rate.decay_steps=7", "--config.checkpoint.keep=2"]
    planned = runs.plan(runs.parse(arguments(tmp_path, "sd_tiny", "--seeds=2", *overrides)))
    assert len({run.workdir for run in planned}) == len(planned) == 2 * 2 * len(runs.VARIANTS)
    for run in (run for run in planned if run.variant == variant):
        assert run.command[1:3] == ["-m", "flaxkd.train"] and f"--workdir={run.workdir}" in run.command
        config = parse("small.py", *(word for word in run.command if word.startswith("--config.")))
        weight, row = config.weight, runs.VARIANTS[variant]
        said = config.init, weight.noise, weight.output, weight.feature, config.normalize_features
        assert said == row and [type(x) for x in said] == [type(x) for x in row]
        assert (config.student, config.seed) == (run.student, run.seed)
        assert config.steps == config.learning_rate.decay_steps == 7
        assert config.checkpoint.keep == 2 and config.sample.every > config.steps
        assert run.config.to_dict() == config.to_dict()


def test_variants_are_chosen_by_name(tmp_path, capsys):
    chosen = ["--variant", "noise", "--variant", "token", "--seeds=1"]
    planned = runs.plan(runs.parse(arguments(tmp_path, *chosen)))
    assert [run.variant for run in planned] == ["noise", "token"]
    with pytest.raises(SystemExit):
        runs.parse(arguments(tmp_path, "--variant", "tokens"))
    assert "invalid choice: 'tokens'" in capsys.readouterr().err


def test_no_two_variants_are_the_same():
    assert len({*runs.VARIANTS.values()}) == len(runs.VARIANTS)


@pytest.mark.slow
def test_an_ablation_from_the_trainings_to_the_result(home, capsys):
    typed = arguments(home, "sd_tiny", "--examples=8", "--config.sample.steps=3")
    main([*typed, "--seeds=2"])
    names = {f"{s}-{v}-{i}" for s in ("sd_small", "sd_tiny") for v in runs.VARIANTS for i in (0, 1)}
    trained, asked = lines(home / "trained"), lines(home / "asked")
    assert sorted(trained) == sorted(names) and all(name.endswith("-0") for name in trained[: len(names) // 2])
    assert asked == ["sd_small-evaluation 8 3 None", "sd_tiny-evaluation 8 3 None"]
    result = json.loads((home / "ablation.json").read_text())
    assert result["students"]["sd_tiny"]["feature"]["psnr"] == {
        "mean": pytest.approx(3.05),
        "sd": pytest.approx(0.1 / 2**0.5),
        "values": [3.0, 3.1],
    }
    assert result["curves"]["sd_small"]["noise"] == [[0, 1.0], [10, pytest.approx(1 / 11)]]
    assert result["teacher"] == {"loss_noise": 0.5, "frechet_latent_data": 0.1}
    assert "--seeds=2" in result["settings"]["command"] and "ablation.md" in capsys.readouterr().out

    main([*typed, "--seeds=2"])
    assert lines(home / "trained") == trained and lines(home / "asked") == asked  # all is there

    main([*typed, "--seeds=1"])
    assert lines(home / "trained") == trained and len(lines(home / "asked")) == 4  # of other models
    assert "one seed" in (home / "ablation.md").read_text()


def test_what_is_half_done_goes_on_and_what_is_done_does_not(home):
    args = runs.parse(arguments(home, "--seeds=1"))
    done, half, *rest = planned = runs.plan(args)
    for run in (done, half):
        run.workdir.mkdir(parents=True)
        (run.workdir / "metrics.jsonl").write_text('{"step": 10}\n')
        (run.workdir / "checkpoints").mkdir()
    (done.workdir / "diffusers").mkdir()
    (done.workdir / "diffusers" / "model_index.json").touch()
    (half.workdir / ".diffusers.x1y2").mkdir()  # a killed export
    runs.run(args, "")
    assert lines(home / "trained") == [run.workdir.name for run in (half, *rest)]
    assert all(runs.finished(run) for run in planned)


def test_a_training_that_fails_ends_the_ablation_with_its_last_words(home):
    home.mkdir()
    (home / "fails").touch()
    with pytest.raises(SystemExit, match=r"sd_small-noise-0 ended with status 1, see .*train\.log:\nthe loss of"):
        main(arguments(home, "--seeds=1"))
    assert lines(home / "trained") == ["sd_small-noise-0"]
    (home / "fails").unlink()
    main(arguments(home, "--seeds=1"))
    assert lines(home / "trained")[:2] == ["sd_small-noise-0"] * 2


def test_who_stops_the_ablation_stops_the_training(home):
    home.mkdir()
    (home / "waits").touch()
    workdir = home / "sd_small-noise-0"

    def stop() -> None:
        while not (workdir / "ready").exists():
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    with pytest.raises(SystemExit) as stopped:
        main(arguments(home, "--seeds=1"))
    assert stopped.value.code == 143 and (workdir / "saved").exists()


@pytest.mark.parametrize(
    "more, message",
    [
        (["--seeds=0"], "--seeds 0: 1 is needed"),
        (["--students", "sd_smal"], "unknown student 'sd_smal', did you mean 'sd_small'"),
        (["--config.weight.output=2"], "the runs differ in weight.output"),
        (["--config.batch_sise=2"], 'Did you mean "batch_size"'),
        (["--config.steps=many"], "invalid literal"),
        (["--config=configs/nowhere.py"], "nowhere.py"),
    ],
)
def test_mistakes_are_found_before_any_training(home, more, message):
    with pytest.raises(SystemExit, match=f"^error: (?s:.*){message}"):
        main(arguments(home, *more))
    assert not home.exists()


def test_a_folder_of_other_settings_is_refused(home):
    main(arguments(home, "--seeds=1"))
    trained = lines(home / "trained")
    with pytest.raises(SystemExit, match=r"holds a run of another configuration:\n  steps: 300 there, 9 here"):
        main(arguments(home, "--seeds=1", "--config.steps=9"))
    assert lines(home / "trained") == trained


def test_an_argument_that_nobody_knows_is_refused(capsys):
    with pytest.raises(SystemExit):
        runs.parse([*arguments("out"), "--steps=9"])
    assert "unrecognized argument: --steps=9" in capsys.readouterr().err
