"""Trains what a configuration describes: a student, a teacher, or an autoencoder.

    python -m flaxkd.train --config configs/small.py [--workdir DIR] [--config.key=value ...]

The only file that knows all the others. Read `run` from the top: it is the order of things. Several processes, on one
host or many, all run it; --distributed says that there are others (see hosts.py).
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from PIL import Image

from flaxkd import autoencode, blank, distill, export, pretrained
from flaxkd.data import encoding, loader, sources
from flaxkd.diffusion import sampling
from flaxkd.drawing import grids
from flaxkd.machine import hosts, sharding
from flaxkd.machine.command import keep_memory, told
from flaxkd.models.attention import DotProductAttention
from flaxkd.training import checkpoint, curves, metrics
from flaxkd.training.step import init_state, make_step, optimizer


class Stopped(Exception):
    """The run was asked to stop, and has saved."""


# That a device draws at a time. On a TPU v5e: 0.8 GiB of temporaries at 512 pixels, 1.5 for a picture of 2.1 at 768.
DRAWN_PIXELS = 512**2


def run(config, workdir: Path, command: str | None = None) -> dict[str, float]:
    """Trains until `config.steps`, and returns the last validation figures. Resumes what `workdir` holds.

    Of several processes all compute, and the first one writes; `workdir` is one folder, which all of them see.
    command: what a person typed, for the report.

    Raises ValueError and FileNotFoundError for a bad configuration before any compute, FloatingPointError when
    config.bad_steps.in_a_row steps had to be skipped, OSError when nothing can be written, Stopped after SIGTERM or
    Ctrl-C."""
    started, first = time.time(), hosts.is_first()

    # -- Mesh and precision ------------------------------------------------------------------------------------------
    mesh = sharding.make_mesh(config.mesh.data, config.mesh.fsdp)
    sharding.check_batch(mesh, config.batch_size, config.accumulate)
    dtype = sharding.compute_dtype(config.dtype)
    tx = optimizer(config)

    # -- Pictures: opened first, since a wrong folder is the likeliest mistake -----------------------------------------
    splits = ("train", "validation")
    data = {s: sources.open_source(config.data.source, s, resolution=config.data.resolution) for s in splits}

    # -- Teacher -----------------------------------------------------------------------------------------------------
    if config.blank is not None:
        captions = [picture["caption"] for picture in data["train"]]
        write = lambda: blank.write(workdir / "blank", config.blank.to_dict(), captions, config.seed)
        if first:
            write()
        hosts.wait("blank")
        source = write()  # of what is there, the name
    else:
        source = pretrained.resolve(config.teacher)
    tokenizer = pretrained.load_tokenizer(source)

    # -- What is trained ---------------------------------------------------------------------------------------------
    of_pixels = tuple(config.train) == ("vae",)
    task = (
        autoencode.task(config, source, dtype)
        if of_pixels
        else distill.task(config, source, dtype, tokenizer, mesh)
    )
    checkpoint.claim(workdir, config.to_dict())
    processes = f" in {jax.process_count()} processes" if jax.process_count() > 1 else ""
    kind = mesh.devices.flat[0].device_kind
    machine = f"{mesh.size} x {kind}{processes}, mesh {dict(mesh.shape)}, {dtype.name}"
    if first:
        export.plan(workdir, source.absolute(), task.configs)
        metrics.note_start(workdir, command=command, machine=machine)
        say(config, source, task, machine)

    # -- Data: of a batch, each process reads what its devices hold ---------------------------------------------------
    rows = sharding.rows(mesh, config.batch_size)
    if of_pixels:
        batches = loader.images(data["train"], config.batch_size, config.seed, rows=rows)
        examples = range(min(config.validation.examples, len(data["validation"])))
        validation = {"images": np.stack([data["validation"][i]["image"] for i in examples])}
    else:
        caches = [encoding.ensure(config, data[s], s, source, dtype, tokenizer) for s in splits]
        options = {"variants": config.data.variants, "flip": config.data.random_flip, "rows": rows}
        batches = loader.batches(caches[0], config.batch_size, config.seed, **options)
        validation = loader.examples(caches[1], config.validation.examples)
        validation = {name: validation[name] for name in ("moments", "input_ids")}
    validation = {name: sharding.fill(x, len(x) // mesh.size or 1, mesh) for name, x in validation.items()}
    validation = sharding.put(validation, sharding.batch(mesh))

    # -- State: the newest checkpoint, or the beginning --------------------------------------------------------------
    state = jax.eval_shape(lambda params: init_state(params, tx, bool(config.ema_decay)), task.params)
    shardings = sharding.params(mesh, state)
    manager = checkpoint.manager(workdir, config.checkpoint.keep, config.checkpoint.keep_every)
    restored = checkpoint.restore(manager, state, shardings)
    if restored is None:
        begin = jax.jit(lambda p: init_state(p, tx, bool(config.ema_decay)), out_shardings=shardings)
        state = begin(sharding.put(task.params, shardings.params))
        as_cut = state.params
    else:
        state, position = restored
        as_cut = sharding.put(jax.tree.map(lambda x: x.astype(dtype), task.params), shardings.params)
        batches.set_state(position)
        if first:
            print(f"resuming at step {int(state.step):,} of {config.steps:,}", flush=True)
    frozen = sharding.put(task.frozen, sharding.params(mesh, task.frozen))
    train_step, evaluate = make_step(task, config, tx, mesh, state)
    key = np.asarray(jax.random.key_data(jax.random.key(config.seed)))
    key = jax.random.wrap_key_data(sharding.put(key, sharding.replicated(mesh)))
    if jax.process_count() == 1:  # several would have to compile in the same order
        of = lambda x: jax.ShapeDtypeStruct((config.batch_size, *x.shape[1:]), x.dtype)
        like = {name: of(x) for name, x in validation.items()}
        train_step = compiled_meanwhile(train_step, state, frozen, like, key)

    # -- What is shown -----------------------------------------------------------------------------------------------
    start = int(state.step)
    writer = metrics.Writer(workdir if first else None, start, config.steps)
    draw = drawer(config, source, task, frozen, dtype, mesh, tokenizer, as_cut)
    del as_cut  # drawn by now; at full size it may be a gigabyte of the device

    def validate(step: int) -> dict[str, float]:
        values = evaluate(state.ema or state.params, frozen, validation)
        values = {f"validation/{name}": float(value) for name, value in values.items()}
        writer.write(step, values)
        return values

    def draw_samples(step: int) -> None:
        sheet = workdir / "samples" / f"{step:08}.png"  # all are kept, for the report
        draw(state.ema or state.params, sheet)
        if not first:
            return
        if sheet.exists():
            grids.save(Image.open(sheet), workdir / "samples.png")
        curves.draw(workdir)

    # -- Loop --------------------------------------------------------------------------------------------------------
    pending: list[tuple[int, dict]] = []
    last_log = [time.time(), start]

    def flush() -> None:
        """Fetches what the steps since the last time measured. One wait for the device, not one per step."""
        if not pending:
            return
        values = jax.device_get([m for _, m in pending])
        for (step, _), m in zip(pending, values, strict=True):
            if m["skipped_in_a_row"]:
                what = f"step {step}: loss {m['loss']}, gradient norm {m['grad_norm']}: skipped"
                writer.say(f"{what}, {m['skipped']} so far")
            if m["skipped_in_a_row"] >= config.bad_steps.in_a_row:
                checkpoint.wait(manager)
                saved = manager.latest_step()
                raise FloatingPointError(
                    f"the loss of step {step} is {m['loss']} and its gradient norm {m['grad_norm']}, where a loss of "
                    f"{float(state.health.usual):.3g} is usual; the last {m['skipped_in_a_row']} steps were skipped. "
                    f"The last good checkpoint is "
                    f"{f'{manager.directory}/{saved}' if saved is not None else 'none yet'}. Lower the learning rate "
                    "or max_grad_norm, or use float32, in a new workdir; or raise bad_steps, and go on from there."
                )
        step, now = pending[-1][0], time.time()
        rate = (step - last_log[1]) * config.batch_size / max(now - last_log[0], 1e-9)
        taken = [m for m in values if not m["skipped_in_a_row"]] or values
        mean = {name: float(np.mean([m[name] for m in taken])) for name in values[0] if "skipped" not in name}
        if skipped := int(values[-1]["skipped"]):
            mean["skipped"] = skipped
        writer.write(step, mean | {"images_per_second": rate})
        pending.clear()
        last_log[:] = [time.time(), step]

    def save() -> None:
        flush()
        checkpoint.save(manager, state, batches.get_state())

    figures, stopping = {}, False
    with stop_signals() as stop:
        if start == 0:
            figures = validate(0)
            draw_samples(0)
        for step in range(start + 1, config.steps + 1):
            state, values = train_step(
                state, frozen, sharding.put_rows(next(batches), mesh, config.batch_size), key
            )
            pending.append((step, values))
            writer.bar.update()
            meeting = step % config.log_every == 0 or step == config.steps
            if meeting:
                flush()
            if meeting or jax.process_count() == 1:  # several stop where they wait for each other anyway
                stopping = hosts.any_of(stop.asked)
            if step % config.validation.every == 0 or step == config.steps:
                flush()
                figures = validate(step)
                last_log[0] = time.time()
            if step % config.checkpoint.every == 0 or step == config.steps or stopping:
                save()
            if stopping:
                checkpoint.wait(manager)
                writer.close()
                raise Stopped(f"stopped at step {step}; the same command goes on from there")
            if step % config.sample.every == 0 and step != config.steps:
                draw_samples(step)
                last_log[0] = time.time()
    checkpoint.wait(manager)
    draw_samples(config.steps)
    writer.close()

    # -- Export ------------------------------------------------------------------------------------------------------
    params = sharding.whole(state.ema or state.params, mesh)
    if of_pixels:
        task.configs["vae"]["scaling_factor"] = autoencode.scaling_factor(
            source, params["vae"], validation["images"]
        )
    manager.close()
    if not first:
        return figures
    if of_pixels:
        export.plan(workdir, source.absolute(), task.configs)
    out = export.write(
        workdir,
        workdir / "diffusers",
        params,
        step=config.steps,
        averaged=bool(state.ema),
        dtype=np.float16,
    )
    conclude(config, workdir, out, figures, time.time() - started)
    return figures


def drawer(config, source, task, frozen, dtype, mesh, tokenizer, as_cut) -> Callable:
    """(params, path) -> None: draws the validation prompts with the network as it is, beside what it is compared with.

    All processes compute, since the parameters may lie on the devices of all; the first one writes.

    With a student the columns are the teacher, the student as cut and the student now; else the network now."""
    if tuple(config.train) == ("vae",):
        return lambda params, path: None
    vae, vae_params = pretrained.load(source, "vae", dtype)
    attend = DotProductAttention(mesh, config.attention)
    unet = pretrained.build("unet", task.configs["unet"], dtype, attend=attend)
    text_encoder = pretrained.build("text_encoder", pretrained.read_config(source, "text_encoder"), dtype)
    vae_params = sharding.put(vae_params, sharding.replicated(mesh))
    prompts = list(config.sample.prompts)
    plan = sampling.plan(
        config.sample.sampler, pretrained.read_config(source, "scheduler"), config.sample.steps
    )
    size = config.data.resolution // vae.config.factor
    noise = np.random.default_rng(config.seed).standard_normal((len(prompts), size, size, 4), np.float32)
    ids = pretrained.tokenize(tokenizer, prompts)
    empty = pretrained.tokenize(tokenizer, [""] * len(prompts))
    # All devices draw, a few each at a time: at full size, more would take more memory than training.
    together = max(DRAWN_PIXELS // config.data.resolution**2, 1)
    each = min(-(-len(prompts) // mesh.size), together)
    parts = -(-len(prompts) // (each * mesh.size))
    given = [np.split(sharding.fill(x, parts * each, mesh), parts) for x in (ids, empty, noise)]
    given = sharding.put(list(zip(*given, strict=True)), sharding.batch(mesh))

    def images(module, unet_params, text_params) -> np.ndarray:
        params = {"unet": unet_params, "vae": vae_params, "text_encoder": text_params}
        draw = lambda *of: sampling.text_to_image(
            module, vae, text_encoder, params, *of, plan, config.sample.guidance
        )
        drawn = np.concatenate([sharding.whole(draw(*part), mesh) for part in given])
        return np.round(drawn[: len(prompts)] * 255).astype(np.uint8)

    before = {}
    if config.student:
        teacher = pretrained.build("unet", pretrained.read_config(source, "unet"), dtype, attend=attend)
        text = frozen.get("text_encoder", as_cut.get("text_encoder"))
        before["teacher"] = images(teacher, frozen["teacher"], text)
        before["student as cut"] = images(unet, as_cut["unet"], text)
    now = "student, distilled" if config.student else "model"

    def draw(params, path: Path) -> None:
        text = params.get("text_encoder", frozen.get("text_encoder"))
        columns = before | {now: images(unet, params["unet"], text)}
        if hosts.is_first():
            grids.grid(columns, prompts, path)

    return draw


def compiled_meanwhile(train_step: Callable, *like) -> Callable:
    """The step, which compiles, or comes from the cache, while the first pictures are drawn: the sooner it begins."""
    pool = ThreadPoolExecutor(1)
    made = pool.submit(lambda: train_step.lower(*like).compile())
    pool.shutdown(wait=False)
    return lambda *arguments: made.result()(*arguments)


class stop_signals:
    """Within it, SIGTERM and Ctrl-C set `asked`, which the loop reads between steps; a second Ctrl-C interrupts."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        def ask(number, frame):
            if self.asked and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.asked = True
            print(f"\n{signal.Signals(number).name}: saving, then leaving", file=sys.stderr, flush=True)

        self.before = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def say(config, source: Path, task, machine: str) -> None:
    count = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    parts = ", ".join(f"{part} {count(tree):,}" for part, tree in task.params.items())
    print(
        f"teacher   {source}\nstudent   {config.student or 'none: the teacher itself is trained'}\n"
        f"trained   {parts} parameters\n"
        f"machine   {machine}\n"
        f"batch     {config.batch_size} images, {config.steps:,} steps",
        flush=True,
    )


def conclude(config, workdir: Path, out: Path, figures: dict[str, float], seconds: float) -> None:
    start = next((r for r in metrics.read(workdir) if "validation/loss" in r), {})
    print(f"\ndone in {seconds / 60:.1f} minutes. Validation, at the start and now:")
    for name in (n for n in figures if "feature/" not in n):
        print(
            f"  {name.removeprefix('validation/'):14} {start.get(name, float('nan')):10.5f} {figures[name]:10.5f}"
        )
    made = {"samples.png": "the validation prompts, drawn", "curves.png": "all figures over time"}
    made |= {"metrics.jsonl": "the figures", "diffusers": "a whole pipeline folder, for diffusers"}
    for name, what in made.items():
        if (workdir / name).exists():
            print(f"  {workdir / name}  {what}")
    here, prompt = shlex.quote(str(workdir)), shlex.quote(config.sample.prompts[0])
    sheet = workdir / ("samples.png" if (workdir / "samples.png").exists() else "curves.png")
    print(
        f"\nnext: look at {sheet}, then\n"
        f"  python -m flaxkd.generate --model {here} --guidance {config.sample.guidance} --prompt {prompt}\n"
        f"  python -m flaxkd.report --workdir {here}"
    )


def default_workdir(config_filename: str) -> Path:
    """configs/small.py -> runs/small, configs/small.py:sd15 -> runs/small-sd15: two recipes, two folders."""
    file, _, argument = config_filename.partition(":")
    return Path("runs", "-".join(filter(None, (Path(file).stem, argument))))


def main(_=None) -> None:
    from absl import flags, logging

    logging.set_verbosity(logging.WARNING)  # Orbax tells of every file that it writes
    config, workdir = FLAGS.config, FLAGS.workdir
    workdir = Path(workdir) if workdir else default_workdir(flags.FLAGS["config"].config_filename)
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    if config.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(config.compilation_cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    typed = shlex.join(["python", "-m", "flaxkd.train", *sys.argv[1:]])
    status = 0
    with hosts.together(FLAGS), told(ValueError, OSError, FloatingPointError):
        keep_memory()
        try:
            run(config, workdir, command=typed)
        except Stopped as stopped:
            print(stopped, flush=True)
            status = 143
    sys.exit(status)


if __name__ == "__main__":
    from absl import app, flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/small.py", lock_config=True)
    flags.DEFINE_string("workdir", None, "Folder of the run; default runs/NAME or runs/NAME-ARGUMENT")
    hosts.define_flags()
    flags.mark_flag_as_required("config")
    FLAGS = flags.FLAGS
    app.run(main)
