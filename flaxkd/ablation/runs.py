"""Does each term of the loss earn its place? Trains students with and without it, and measures all alike.

    python -m flaxkd.ablation --config configs/small.py --students sd_small --seeds 3 --out runs/ablation
    python -m flaxkd.ablation ... --config.steps=1000     for every run

A run is an ordinary training in OUT/STUDENT-VARIANT-SEED, and flaxkd.evaluate measures it on held-out captions.
Finished runs are reused: the same command resumes, and it may ask for more seeds or students. The result is
ablation.md, ablation.json and ablation.png: see table.py.
"""

import argparse
import contextlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from flaxkd import export, students
from flaxkd.ablation import table
from flaxkd.evaluate import evaluation, results
from flaxkd.machine import command, files, progress
from flaxkd.training import checkpoint, metrics, settings

# The keys in which the runs differ. A row sets all of them, so it does not change with the defaults.
KEYS = ("init", "weight.noise", "weight.output", "weight.feature", "normalize_features")
VARIANTS = {
    "noise":      ("teacher", 1.0, 0.0, 0.0, False),
    "output":     ("teacher", 1.0, 1.0, 0.0, False),
    "feature":    ("teacher", 1.0, 1.0, 1.0, False),  # the whole loss of BK-SDM
    "normalised": ("teacher", 1.0, 1.0, 1.0, True),
    "token":      ("teacher", 1.0, 1.0, 1.0, "token"),  # PPCL
    "no_noise":   ("teacher", 0.0, 1.0, 1.0, True),  # the teacher's word alone
    "random":     ("random",  1.0, 1.0, 1.0, False),
    "random_normalised": ("random", 1.0, 1.0, 1.0, True),
    "scratch":    ("random",  1.0, 0.0, 0.0, False),  # no distillation at all
}  # fmt: skip
OWN = ("student", "seed", *KEYS)

# Dozens of runs: each draws only at its start and end, and keeps one checkpoint to resume from.
SPARING = {"sample.every": 10**9, "checkpoint.keep": 1}

TRAINER = [sys.executable, "-m", "flaxkd.train"]
POLL = 5.0  # seconds between two checks of a training


class Run(NamedTuple):
    """One training."""

    student: str
    variant: str
    seed: int
    workdir: Path
    command: list[str]
    config: ConfigDict  # with the command's overrides


def run(args: argparse.Namespace, typed: str) -> dict:
    """Trains and measures the missing runs, writes the result to `args.out`, and returns it: see `table.write`.

    typed: the command, to be reported. Raises ValueError and FileNotFoundError before any compute, and
    ChildProcessError for a failed training."""
    runs = plan(args)
    for each in runs:
        checkpoint.claim(each.workdir, each.config.to_dict())  # or a skipped run may have other settings
    train_all(runs)  # all before the first evaluation: otherwise two processes would share an accelerator
    rows, curves, teacher, as_cut = {}, {}, {}, {}
    for student in dict.fromkeys(each.student for each in runs):
        own = [each for each in runs if each.student == student]
        measured = measure(args, own)["rows"]
        teacher = measured[0]
        before = [row for row in measured if row.get("as_cut")]
        as_cut |= {student: before[0]} if before else {}
        trained = [row for row in measured[1:] if row not in before]
        for each, row in zip(own, trained, strict=True):
            rows.setdefault(student, {}).setdefault(each.variant, []).append(row)
            records = metrics.read(each.workdir)
            curves.setdefault(student, {}).setdefault(each.variant, []).append(records)
    config = runs[0].config
    settings = {"command": typed, "steps": config.steps, "batch size": config.batch_size, "seeds": args.seeds}
    settings |= {"teacher": config.teacher or "the embedded miniature", "data": config.data.source}
    settings |= {"held-out captions": args.examples}
    own = {name: value or "the default" for name, value in drawn_with(config).items()}
    settings |= {"sampler": own["sampler"], "sampler steps": own["steps"], "guidance": own["guidance"]}
    variants = {each.variant: dict(zip(KEYS, VARIANTS[each.variant], strict=True)) for each in runs}
    result = table.result(settings, variants, teacher, rows, curves, as_cut)
    print(results.said(table.write(args.out, result)))
    return result


def plan(args: argparse.Namespace) -> list[Run]:
    """All runs, seed by seed: every variant has one before any has two.

    Raises ValueError for an unknown student or key, for an override of a key in OWN, and for no seeds."""
    if args.seeds < 1:
        raise ValueError(f"--seeds {args.seeds}: 1 is needed, and 2 for a standard deviation")
    for override in args.overrides:
        key = override.removeprefix("--config.").partition("=")[0]
        if key in OWN:
            raise ValueError(f"{override}: the runs differ in {key}, so it cannot be the same for all")
    runs = []
    for seed in range(args.seeds):
        for student in dict.fromkeys(args.students):
            students.get(student)
            for variant in dict.fromkeys(args.variants):
                row = VARIANTS[variant]
                own = dict(zip(OWN, (student, seed, *row), strict=True))
                options = [f"--config.{key}={value}" for key, value in SPARING.items()]
                options += args.overrides
                options += [f"--config.{key}={value}" for key, value in own.items()]
                config = command.configuration(args.config, options)
                settings.check(config)
                workdir = args.out / f"{student}-{variant}-{seed}"
                arguments = [*TRAINER, f"--config={args.config}", f"--workdir={workdir}", *options]
                runs.append(Run(student, variant, seed, workdir, arguments, config))
    return runs


def drawn_with(config) -> dict:
    """The options of flaxkd.evaluate for drawing as the training's sheets do; None is the default of both."""
    return {name: config.sample[name] for name in ("sampler", "steps", "guidance")}


def finished(run: Run) -> bool:
    """Whether a training has finished: its export comes last, and is renamed into place when complete."""
    whole = (run.workdir / "diffusers" / "model_index.json").is_file()
    return whole and export.exported_step(run.workdir) in (None, run.config.steps)


def train_all(runs: list[Run]) -> None:
    """Trains the unfinished runs one by one, with a bar over the steps of all runs."""
    steps = [checkpoint.reached(run.workdir) for run in runs]
    total = sum(run.config.steps for run in runs)
    with progress.Bar(total, initial=sum(steps)) as bar:
        bar.begin()  # every run compiles: it belongs to the time left
        for i, run in enumerate(runs):
            if finished(run):
                continue

            def tick(i=i, run=run) -> None:
                steps[i] = checkpoint.reached(run.workdir)
                bar.update(sum(steps) - bar.n)
                bar.refresh()  # for its clock: the step stays the same while a run compiles

            bar.describe(f"run {i + 1} of {len(runs)}, {run.workdir.name}")
            train(run, tick)


def train(run: Run, tick: Callable[[], None]) -> None:
    """Runs one training in its own process, which writes to train.log. tick: called every POLL seconds.

    Raises ChildProcessError with the end of the log if it fails."""
    log = run.workdir / "train.log"
    with (
        log.open("a", encoding="utf-8") as file,
        subprocess.Popen(run.command, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(POLL)
                tick()
        except BaseException:  # stopping this command stops the training, which saves first
            progress.write(f"stopping; {run.workdir.name} saves after its current step")
            process.terminate()
            process.wait()
            raise
    if process.returncode or not finished(run):
        end = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
        raise ChildProcessError(f"{run.workdir.name} ended with status {process.returncode}, see {log}:\n{end}")


def measure(args: argparse.Namespace, runs: list[Run]) -> dict:
    """The result of `evaluation.run` for all runs of one student. Reuses the result of an equal request."""
    config = runs[0].config
    out = args.out / f"{runs[0].student}-evaluation"
    options = {"out": out, "data": config.data.source, "resolution": config.data.resolution}
    options |= {"pairing": config.pairing, "examples": args.examples}
    options |= {name: value for name, value in drawn_with(config).items() if value is not None}
    options |= {"teacher": config.teacher} if config.teacher else {}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    arguments += ["--model", *(str(run.workdir) for run in runs)]
    exports = [(run.workdir / "diffusers").stat().st_mtime_ns for run in runs]
    asked = {"arguments": arguments, "exports": exports}
    note = out / "asked.json"
    if note.is_file() and files.read_json(note) == asked:
        return files.read_json(out / "evaluation.json")
    note.unlink(missing_ok=True)
    result = evaluation.run(evaluation.parse(arguments))
    files.write_json(note, asked)
    return result


def parse(arguments: list[str]) -> argparse.Namespace:
    epilog = f"--config.KEY=VALUE applies to all runs. They differ in {', '.join(OWN)}."
    parser = command.parser("flaxkd.ablation", __doc__, epilog=epilog)
    add = parser.add_argument
    command.add(parser, "config", required=True, help="configuration of all runs, e.g. configs/small.py")
    students = "a row of python -m flaxkd.students; repeat for several, default: sd_small and sd_tiny"
    command.add(parser, "students", default=["sd_small", "sd_tiny"], help=students)
    known = [*VARIANTS]
    variants = "what to train; repeat for several, default: all"
    add("--variant", dest="variants", action=command.Several, choices=known, default=known, help=variants)
    add("--seeds", type=int, default=3, help="runs per variant (default: %(default)s)")
    add("--examples", type=int, default=128, help="number of held-out captions (default: %(default)s)")
    command.add(parser, "out", default=Path("runs/ablation"), help="result folder (default: %(default)s)")
    return command.parse(parser, arguments)[0]
