"""Trains what a configuration describes: a student, a teacher, an autoencoder, or a task of your own.

    python -m flaxkd.train --config configs/small.py [--workdir DIR] [--config.key=value ...]

Read `run` from the top: set up, loop, end. What is trained is a `Task` (training/task.py); nothing here knows which.
Several processes, on one host or many, all run this; --distributed announces the others (see machine/hosts.py).
"""

import contextlib
import dataclasses
import logging
import shlex
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from PIL import Image

from flaxkd import choosing, export, tasks
from flaxkd.data import collages, encoding, loader, sources
from flaxkd.drawing import class_pictures, grids
from flaxkd.machine import checkpoints, command, configuration, cpu, gpu, hosts, progress, sharding, streams
from flaxkd.pretrained import Folder, fresh
from flaxkd.pretrained.writing import check_replaceable
from flaxkd.tasks.samples import Sheet
from flaxkd.training import checkpoint, curves, metrics, settings
from flaxkd.training.signals import Stopped, stop_signals
from flaxkd.training.step import State, init_state, make_step, optimizer, state_shapes
from flaxkd.training.task import Task


class Setup(NamedTuple):
    """What a run uses and does not change."""

    config: Any
    workdir: Path
    mesh: jax.sharding.Mesh
    folder: Folder  # of the teacher, with the sampler and the guidance of the export
    task: Task
    batches: Any  # endless iterator of this process's rows of a batch, with a position
    held_out: list[dict[str, jax.Array]]  # batches of one size each
    frozen: dict  # on the devices
    key: jax.Array
    train_steps: dict[tuple, Future]  # by `shape`: the compiled step of a batch
    evaluate: Any
    manager: Any  # of checkpoints
    sheet: Sheet
    writer: metrics.Writer


def run(config, workdir: Path, typed: str | None = None, watchers: tuple[str, ...] = ()) -> dict[str, float]:
    """Trains until `config.steps`, and returns the last validation figures. Resumes what `workdir` holds.

    All processes compute, and the first one writes. `workdir` is one folder, shared by all processes.
    typed: the command as typed, for the report. watchers: rows of metrics.WATCHERS, besides those that always watch.

    Raises ValueError and FileNotFoundError for a bad configuration before any compute, FloatingPointError after
    config.bad_steps.in_a_row skipped steps in a row, OSError if a checkpoint or the export cannot be written or another
    process trains in `workdir`, Stopped after SIGTERM, SIGHUP or Ctrl-C."""
    started = time.monotonic()
    settings.check(config)
    config = choosing.settled(config, workdir)
    before = checkpoint.check_claim(workdir, config.to_dict())
    if not hosts.any_of(export.exported_step(workdir) != config.steps):
        figures = last_figures(workdir)
        if hosts.is_first():
            conclude(config, workdir, figures, f"all {config.steps:,} steps were done before")
        return figures
    with contextlib.ExitStack() as held:
        setup, state = set_up(config, workdir, typed, before, held, watchers)
        state, figures = loop(setup, state)
        end(setup, state, figures, started)
    return figures


# -- Set up ----------------------------------------------------------------------------------------------------------


def set_up(
    config, workdir: Path, typed: str | None, before: int | None, held: contextlib.ExitStack, watchers: tuple[str, ...]
) -> tuple[Setup, State]:
    """Everything before the first step, and the state: that of the newest checkpoint, or a new one.

    before: the steps of the run in the workdir, as its last start had them; None without a run.
    held: gets what is released at the end: the lock of the workdir, and the progress bar.
    Cheap checks come first: a wrong setting or folder is reported before anything is computed or written."""
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    dtype, tx = sharding.compute_dtype(config.dtype), optimizer(config)
    pictures = {split: open_pictures(config, split) for split in ("train", "validation")}
    if hosts.is_first():
        checkpoint.clear(workdir, config.to_dict())
    folder = open_teacher(config, workdir, pictures["train"])
    encoding.check_sizes(folder, config.data.resolution, encoding.sizes(config), "data.")
    choosing.ensure(config, folder, pictures["train"], dtype)
    task = tasks.make(config, folder, dtype, mesh)
    folder = task.drawn_as or folder
    check_replaceable(workdir / export.EXPORT, folder)
    if config.sample.guidance is not None:
        folder = dataclasses.replace(folder, drawn_with=config.sample.guidance)

    held.enter_context(checkpoint.claimed(workdir, config.to_dict()))
    machine = describe_machine(mesh, dtype)
    if hosts.is_first():
        export.write_record(workdir, folder, task.configs, adapted=task.adapted)
        metrics.note_start(workdir, command=typed, machine=machine)
        introduce(config, folder, task, machine, before)

    prior = class_pictures.ensure(config, folder, workdir, dtype) if config.prior.prompt else None
    batches, kinds, held_out = open_examples(config, task, pictures, prior, folder, dtype, mesh)
    like = state_shapes(task, config, tx)
    frozen = sharding.put(task.frozen, sharding.params(mesh, task.frozen))
    train_step, evaluate = make_step(task, config, tx, mesh, like)
    manager = checkpoint.manager(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    state, begun = begin_or_resume(config, task, tx, mesh, like, manager, batches, dtype)

    key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    key = jax.random.wrap_key_data(sharding.put(key, sharding.replicated(mesh)))
    left = config.steps - int(state.step)  # 0: there is only an export to make
    lower = lambda batch: train_step.lower(like, frozen, batch, key)
    compiled = compile_steps(kinds if left else [], lower, alone=bool(config.quantize))
    held.callback(lambda: [step.cancel() for step in compiled.values()])  # those that have not begun
    sheet = Sheet(config, folder, task, begun, frozen, dtype, mesh)
    first = workdir if hosts.is_first() else None
    writer = metrics.Writer(first, int(state.step), config.steps, watchers, config.to_dict())
    held.callback(writer.close)  # a message must not begin within the bar
    setup = Setup(
        config, workdir, mesh, folder, task, batches, held_out, frozen, key, compiled, evaluate, manager, sheet, writer
    )
    return setup, state


def open_pictures(config, split: str) -> sources.Source:
    """The pictures of a split, by the settings of `config.data`. Those to validate with are never collages."""
    found = sources.open_source(
        config.data.source,
        split,
        resolution=config.data.resolution,
        sizes=encoding.sizes(config),
        background=config.data.background,
        caption_column=config.data.caption_column,
        image_column=config.data.image_column,
        caption=config.data.caption or None,
    )
    share = config.data.collages if split == "train" else 0
    how = (config.seed, config.data.background, config.data.collage_captions or None)
    return collages.added(found, share, split, *how) if share else found


def open_teacher(config, workdir: Path, pictures: sources.Source) -> Folder:
    """The teacher's pipeline folder; for `config.blank`, a new one in the workdir, all or some of it random."""
    if config.blank is None:
        folder = export.open_model(config.teacher, config.vae)  # a finished run stands for its export
        if folder.step is not None:
            raise ValueError(
                f"teacher = {config.teacher!r} is a run that has not finished: resume it, or export its newest "
                f"checkpoint, `python -m convert.to_diffusers --workdir {config.teacher} --out DIR`, and give DIR"
            )
        return folder.skip_layers(config.clip_skip)
    captions = pictures.all_captions()
    base = Folder.open(config.teacher, config.vae)
    write = lambda: fresh.write(workdir / "blank", config.blank.to_dict(), captions, config.seed, base)
    if hosts.is_first():
        write()
    hosts.wait("blank")
    return write()  # an existing one is left alone


def open_examples(
    config, task: Task, pictures: dict[str, sources.Source], prior: sources.Source | None, folder: Folder, dtype, mesh
) -> tuple:
    """(endless batches of this process's rows, the shapes they may have, held-out batches on the devices): the fields
    of the task's batch.

    prior: pictures of the class, for every other example; None: none. The last of the three is [] for a run that does
    not validate: then those pictures need not be encoded."""
    encoded = lambda source, split: encoding.open_data(task.batch, config, source, split, folder, dtype)
    opened = task.open_data or encoded

    def reader(split: str):
        own = opened(pictures[split], split)
        return own if prior is None else loader.Pairs(own, opened(prior, split))

    training = reader("train")
    batches = training.batches(
        config.batch_size,
        config.seed,
        variants=config.data.variants,
        flip=config.data.random_flip,
        rows=sharding.rows(mesh, config.batch_size),  # a process reads the rows of its own devices
    )
    kinds = training.shapes(config.batch_size)
    if not settings.validates(config):
        return batches, kinds, []
    held_out = reader("validation").examples(config.validation.examples)
    return batches, kinds, sharding.put(held_out, sharding.replicated(mesh))


def begin_or_resume(config, task: Task, tx, mesh, like: State, manager, batches, dtype) -> tuple[State, dict]:
    """(state, weights before the first step): those of the newest checkpoint, whose batches follow, or new ones."""
    shardings = sharding.params(mesh, like)
    if restored := checkpoint.restore(manager, like, shardings):
        state, position = restored
        batches.set_state(position)
        if hosts.is_first():
            print(f"resuming at step {int(state.step):,} of {config.steps:,}", flush=True)
        return state, sharding.put(jax.tree.map(lambda x: x.astype(dtype), task.trained), shardings.params)
    begin = jax.jit(lambda trained: init_state(trained, tx, bool(config.ema_decay)), out_shardings=shardings)
    state = begin(sharding.put(task.trained, shardings.params))
    return state, state.params


def shape(batch: dict) -> tuple:
    """The shapes of a batch, which tell one compiled step from another."""
    return tuple(x.shape for x in jax.tree.leaves(batch))


def compile_steps(kinds: list, lower: Callable, alone: bool = False) -> dict[tuple, Future]:
    """{shape: the step} for each kind of batch, one after another. lower: of the step, from a batch as shapes.

    They compile, or load stored programs, while the first pictures are drawn and while others train: training starts
    sooner. alone: they are traced before that. While qwix traces a quantized network, functions of JAX are swapped, and
    another thread that calls one as it is swapped back ends with a KeyError, once in 650 traces under stress."""
    pool = ThreadPoolExecutor(1)
    traced = [lower(batch) for batch in kinds] if alone else kinds
    compiles = lambda step: (step if alone else lower(step)).compile()
    compiled = {shape(batch): pool.submit(compiles, step) for batch, step in zip(kinds, traced, strict=True)}
    pool.shutdown(wait=False)
    if jax.process_count() > 1:  # processes must compile in the same order
        with progress.Bar(None, first=progress.COMPILING, leave=False, disable=not hosts.is_first()):
            wait(compiled.values())
    return compiled


# -- Loop ------------------------------------------------------------------------------------------------------------


LOOK = 100  # steps between two looks at bad steps and at signals, at most: `log_every` may be larger, or 0


def loop(s: Setup, state: State) -> tuple[State, dict[str, float]]:
    """Runs all steps, and what is due between them. Returns the state and the last validation figures."""
    config, start, figures = s.config, int(state.step), last_figures(s.workdir)
    look = min(config.log_every or LOOK, LOOK)
    with stop_signals() as stop:
        if start == 0:
            figures = validate(s, state)
            draw_samples(s, state)
        stopping, owed = False, False
        s.writer.restart()
        for step in range(start + 1, config.steps + 1):
            batch = sharding.put_rows(next(s.batches), s.mesh, config.batch_size)
            compiled = s.train_steps[shape(batch)]
            if not compiled.done():
                with s.writer.pause(progress.COMPILING):
                    wait([compiled])
            state, values = compiled.result()(state, s.frozen, batch, s.key)
            s.writer.add(step, values)

            if due(config, step, look):
                watch(s, state)
            if due(config, step, config.log_every):
                log(s, state)
            # Several processes stop where they wait for each other anyway.
            if due(config, step, look) or jax.process_count() == 1:
                stopping = hosts.any_of(stop.asked)
            if due(config, step, config.validation.every):
                log(s, state)
                figures = validate(s, state)
            owed |= due(config, step, config.checkpoint.every) or step == config.steps
            if owed or stopping:
                log(s, state)
                # A skipped step is saved after the next one that is taken. After the last one there is none, and its
                # parameters are those of the last good step.
                if checkpoint.is_good(state) or step == config.steps:
                    with s.writer.pause("saving"):
                        checkpoint.save(s.manager, state, s.batches.get_state())
                    owed = False
            if stopping:
                stop_here(s, step)
            if due(config, step, config.sample.every) and step != config.steps:
                draw_samples(s, state)
    return state, figures


def stop_here(s: Setup, step: int) -> None:
    """Raises Stopped, once all is saved."""
    checkpoint.wait(s.manager)
    s.writer.close()
    saved = s.manager.latest_step()
    where = "there" if saved == step else f"at step {saved}, the last good one" if saved else "from the start"
    raise Stopped(f"stopped at step {step}; the same command resumes {where}")


def due(config, step: int, every: int | None) -> bool:
    """Whether something done every `every` steps, 0 for never, is due after this step. It is after the last one."""
    return bool(every) and (step % every == 0 or step == config.steps)


def log(s: Setup, state: State) -> None:
    """Writes the measurements since the last call, unless they are never written. Raises as `watch` does."""
    watch(s, state)
    if s.config.log_every:
        s.writer.log(s.config.batch_size)
    s.writer.fetched.clear()


def watch(s: Setup, state: State) -> None:
    """Says which steps were skipped since the last call. Raises FloatingPointError if they are too many in a row."""
    for step, values in s.writer.fetch():
        if values["skipped_in_a_row"]:
            what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: skipped"
            s.writer.say(f"{what}, {values['skipped']} so far")
        if values["skipped_in_a_row"] >= s.config.bad_steps.in_a_row:
            checkpoint.wait(s.manager)
            saved = s.manager.latest_step()
            raise FloatingPointError(
                f"the loss of step {step} is {values['loss']} and its gradient norm {values['grad_norm']}, where a "
                f"loss of {float(state.health.usual):.3g} is usual; the last {values['skipped_in_a_row']} steps were "
                "skipped. The last good checkpoint is "
                f"{s.manager.folder / str(saved) if saved is not None else 'none yet'}. Lower the learning rate "
                "or max_grad_norm, or use float32, in a new workdir; or raise bad_steps and resume."
            )


def shown(state: State) -> dict:
    """The weights to measure, draw and export: the moving average, if there is one."""
    return state.ema or state.params


def validate(s: Setup, state: State) -> dict[str, float]:
    """The loss on held-out examples, written and returned: {"validation/loss": float, ...}; {} without examples.

    All examples count alike, whatever the sizes of their pictures."""
    if not s.held_out:
        return {}
    with s.writer.pause("validating"):
        found = [s.evaluate(shown(state), s.frozen, state.ema, batch) for batch in s.held_out]
        counts = [len(jax.tree.leaves(batch)[0]) for batch in s.held_out]
        mean = lambda name: float(np.average([np.float64(values[name]) for values in found], weights=counts))
        values = {f"validation/{name}": mean(name) for name in found[0]}
    s.writer.write(int(state.step), values)
    return values


def draw_samples(s: Setup, state: State) -> None:
    """Draws the sheet of this step, kept for the report, and renews samples.png and curves.png."""
    path = s.workdir / "samples" / f"{int(state.step):08}.png"
    with s.writer.pause("drawing"):
        with metrics.watching("the sheet of samples"):
            s.sheet.draw(shown(state), s.frozen, path)
            if hosts.is_first() and path.exists():
                grids.save(Image.open(path), s.workdir / "samples.png")
        if hosts.is_first():
            with metrics.watching("curves.png"):
                curves.draw(s.workdir)


# -- End -------------------------------------------------------------------------------------------------------------


def end(s: Setup, state: State, figures: dict[str, float], started: float) -> None:
    """Draws the last sheet of samples, exports, and prints what to do next."""
    checkpoint.wait(s.manager)
    draw_samples(s, state)
    s.writer.close()
    adapters = sharding.whole(shown(state), s.mesh) if s.task.adapted else {}
    if adapters:  # into the base as stored: that of the step may be in bfloat16
        params = export.merged(adapters, s.task.adapted, s.folder)
    else:
        assembled = s.task.assemble(shown(state), s.frozen)
        params = sharding.whole({part: assembled[part] for part in s.task.configs}, s.mesh)
    if s.held_out:
        held_out = s.held_out[0]
    else:
        held_out = sharding.whole(sharding.put_rows(next(s.batches), s.mesh, s.config.batch_size), s.mesh)
    configs = {**s.task.configs, **s.task.finish(params, held_out)}
    s.manager.close()
    if not hosts.is_first():
        return
    export.write_record(s.workdir, s.folder, configs, adapted=s.task.adapted)
    out, step = s.workdir / export.EXPORT, s.config.steps
    export.write(
        s.workdir, out, s.folder, configs, params, step=step, averaged=bool(state.ema), dtype=np.dtype("float16")
    )
    if adapters:
        export.write_adapters(s.workdir, s.folder.replace(configs, {}), adapters, s.task.adapted, step)
    export.write_record(s.workdir, s.folder, configs, step, s.task.adapted)
    conclude(s.config, s.workdir, figures, f"done in {(time.monotonic() - started) / 60:.1f} minutes")


# -- What a person reads ---------------------------------------------------------------------------------------------


def describe_machine(mesh, dtype) -> str:
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    return f"{mesh.size} x {kind}{processes}, mesh {dict(mesh.shape)}, {dtype.name}"


def introduce(config, folder: Folder, task: Task, machine: str, before: int | None) -> None:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    parts = ", ".join(f"{part} {count(tree):,}" for part, tree in task.trained.items())
    print(
        f"teacher   {folder.path}\n"
        + f"student   {config.student}\n" * bool(config.student)
        + f"trained   {parts} parameters\n"
        f"machine   {machine}\n"
        f"batch     {config.batch_size} images, {config.steps:,} steps"
        + (f", {before:,} before\n" if before not in (None, config.steps) else "\n")
        + f"rate      {settings.rates(config)}",
        flush=True,
    )


def last_figures(workdir: Path) -> dict[str, float]:
    """The last validation figures of a run; {} without any."""
    records = [record for record in metrics.read(workdir) if "validation/loss" in record]
    return {name: value for name, value in records[-1].items() if name != "step"} if records else {}


def conclude(config, workdir: Path, figures: dict[str, float], said: str) -> None:
    start = next((r for r in metrics.read(workdir) if "validation/loss" in r), {})
    print(f"\n{said}." + " Validation, at the start and now:" * bool(figures))
    for name in (n for n in figures if "feature/" not in n):
        print(f"  {name.removeprefix('validation/'):14} {start.get(name, float('nan')):10.5f} {figures[name]:10.5f}")
    made = {"samples.png": "drawings of the validation prompts", "curves.png": "all figures over time"}
    made |= {metrics.FILE: "the figures", export.EXPORT: "a complete pipeline folder for diffusers"}
    made |= {export.ADAPTERS: "the LoRA alone, for diffusers and for other programs"}
    for name, what in made.items():
        if (workdir / name).exists():
            print(f"  {workdir / name}  {what}")
    prompt, *_ = [*settings.listed(config.sample.prompts or ()), "red apple"]
    here, prompt = shlex.quote(str(workdir)), shlex.quote(prompt)
    sheet = workdir / ("samples.png" if (workdir / "samples.png").exists() else "curves.png")
    print(
        "\nnext:"
        + f" look at {sheet}, then" * sheet.exists()
        + f"\n  python -m flaxkd.generate --model {here} --prompt {prompt}\n"
        f"  python -m flaxkd.report --workdir {here}"
    )


# -- Command ---------------------------------------------------------------------------------------------------------


def default_workdir(config_filename: str) -> Path:
    """configs/small.py -> runs/small, configs/small.py:sd15 -> runs/small-sd15: two recipes, two folders."""
    file, argument = configuration.split(config_filename)
    return Path("runs", "-".join(filter(None, (Path(file).stem, argument))))


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.train", __doc__)
    command.add(parser, "config", required=True)
    parser.add_argument("--wandb", action="store_true", help="also report to Weights & Biases (pip install wandb)")
    parser.add_argument("--workdir", type=Path, help="folder of the run; default: runs/NAME or runs/NAME-ARGUMENT")
    hosts.add_arguments(parser)
    args, config = command.parse(parser, arguments)
    typed = shlex.join(["python", "-m", "flaxkd.train", *(sys.argv[1:] if arguments is None else arguments)])
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every file, and every error that is reported here
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    gpu.take_memory()
    if config.compilation_cache:
        command.keep_compiled_programs(config.compilation_cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    status = 0
    with checkpoints.ending_at_once(), hosts.together(args), command.reported(command.RESUMES), streams.lasting():
        cpu.keep_memory()
        try:
            watchers = ("wandb",) * args.wandb
            run(config, args.workdir or default_workdir(args.config), typed, watchers)
        except Stopped as stopped:
            print(stopped, flush=True)
            status = 143
    sys.exit(status)


if __name__ == "__main__":
    main()
