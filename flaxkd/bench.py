"""How fast are a teacher and its students? One table and one bar chart; also beside PyTorch.

    python -m flaxkd.bench                                   the embedded teacher and all of its students
    python -m flaxkd.bench --config configs/small.py:sd15 --students sd_small,sd_tiny --config.batch_size=8
    python -m flaxkd.bench --against torch                   the same work in PyTorch, eager and torch.compile
    python -m flaxkd.bench --unet block_out_channels=[64,128,256,256] --unet sample_size=32

What is timed: a denoising step (the UNet on twice the batch, as guidance needs it), a batch of pictures (from the text
to the pixels), and the training step of the configuration, which for the teacher is training it on the noise alone.
Each is the median of --rounds, in which whoever is compared takes turns. Weights do not matter for it: students are
as cut, and with --unet, which replaces keys of the teacher's unet/config.json, they are random.
"""

import importlib.metadata
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import jax
from tqdm import tqdm

from flaxkd import against_torch, blank, devices, pretrained, standings, students, workload
from flaxkd.command import keep_compiled_programs, keep_memory, told
from flaxkd.workload import Prepared, Subject

OURS = "flaxkd"
PAUSE = (
    0.05  # seconds; threads of another library that spin for a while after their work would slow the next one
)


def run(
    config, *, names: list[str], against: list[str], unet: dict, rounds: int, steps: int, out: Path
) -> dict:
    """Times all, writes bench.json, .md and .png into `out`, and returns what is in the first.

    names: students. against: of against_torch.EAGER and COMPILED. unet: keys of the teacher's configuration to
    replace. steps: of the sampler. Raises ValueError before any compute for what does not fit."""
    if rounds < 5:
        raise ValueError(f"rounds = {rounds}: a median of at least 5 is worth telling")
    if against:
        against_torch.check(config)
    with tempfile.TemporaryDirectory() as scratch:
        source = pretrained.resolve(config.teacher)
        if unet:
            source = other_architecture(source, unet, Path(scratch) / "pipeline", config.seed)
        teacher_config = pretrained.read_config(source, "unet")
        for name in names:
            students.config(students.get(name), teacher_config)
        rows = []
        with tqdm(
            total=(1 + len(names)) * len(workload.WORKS) * (1 + len(against)) * (1 + rounds), unit="run"
        ) as bar:
            for name in ("teacher", *names):
                subject = workload.subject(name, config, source, steps=steps)
                rows += measure(subject, [OURS, *against], rounds, bar)
    settings = {
        "teacher": config.teacher or "the embedded miniature",
        "unet": ", ".join(f"{key} {value}" for key, value in unet.items()) or "the teacher's",
        "latents": "{0} x {0} x {1}".format(teacher_config["sample_size"], teacher_config["in_channels"]),
        "batch": f"{config.batch_size} images, twice that in a denoising step",
        "sampler": f"{steps} steps of DPM-Solver++, guidance 7.5",
        "timing": f"median of {rounds}" + ", in turns" * bool(against),
        "precision": str(subject.dtype),
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions(against).items()),
    }
    one = devices.peak(jax.devices()[0])
    peak = one and one.flops_per_second * jax.device_count()
    result = {"settings": settings, "rows": standings.derive(rows, config.batch_size, peak)}
    paths = standings.write(out, result)
    print(standings.markdown(result).partition("\n## Settings")[0])
    print("\n".join(f"wrote {path}" for path in paths))
    return result


def versions(against: list[str]) -> dict[str, str]:
    names = ("jax", "flax", "python") + ("torch", "diffusers") * bool(against)
    return {n: platform.python_version() if n == "python" else importlib.metadata.version(n) for n in names}


def other_architecture(source: Path, changes: dict, out: Path, seed: int) -> Path:
    """The pipeline folder `source` with a UNet of another configuration and random weights, written to `out`."""
    unet_config = pretrained.read_config(source, "unet")
    known = {*unet_config, *pretrained.build("unet", unet_config).config.__dataclass_fields__}
    if wrong := sorted(changes.keys() - known):
        raise ValueError(
            f"--unet: unknown {', '.join(wrong)}; keys are those of unet/config.json ({sorted(known)})"
        )
    unet_config |= changes
    shapes = pretrained.shapes(pretrained.build("unet", unet_config), "unet")
    parts = {"unet": (unet_config, blank.initial(shapes, seed))}
    return pretrained.save(out, source=source, parts=parts)


def measure(subject: Subject, rivals: list[str], rounds: int, bar: tqdm) -> list[dict]:
    """A row {"model", "by", "parameters", work: {...}} for each rival: see `standings.COLUMNS`."""
    size = sum(x.size for x in jax.tree.leaves(subject.task.params["unet"]))
    rows = {by: {"model": subject.name, "by": by, "parameters": size} for by in rivals}
    for work in workload.WORKS:
        ready: dict[str, Prepared] = {}
        for by in rivals:
            bar.set_description(f"{subject.name}, {work}: {by} compiles")
            ours = by == OURS
            ready[by] = workload.prepare(subject, work) if ours else against_torch.prepare(subject, work, by)
            bar.update()
        bar.set_description(f"{subject.name}, {work}")
        seconds = interleaved(ready, rounds, bar)
        for by, prepared in ready.items():
            rows[by][work] = {
                "seconds": statistics.median(seconds[by]),
                "all_seconds": seconds[by],
                "first_seconds": prepared.first,
                "flops": prepared.flops,
                "peak_bytes": prepared.peak_bytes,
            }
    return list(rows.values())


def interleaved(ready: dict[str, Prepared], rounds: int, bar) -> dict[str, list[float]]:
    """Seconds of each call, in which all take turns, so that a slow moment of the machine meets all of them."""
    seconds: dict[str, list[float]] = {by: [] for by in ready}
    for _ in range(rounds):
        for by, prepared in ready.items():
            time.sleep(PAUSE)
            begin = time.perf_counter()
            prepared.call()
            seconds[by].append(time.perf_counter() - begin)
            bar.update()
    return seconds


def changes(texts: list[str]) -> dict:
    """["sample_size=32", ...] -> {"sample_size": 32, ...}: values are JSON. ValueError for what is not."""
    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"--unet {text}: {value!r} is not JSON ({error}); an example is sample_size=32"
            ) from error
    return found


def main(_=None) -> None:
    config = FLAGS.config
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    keep_compiled_programs()
    keep_memory()
    rivals = {
        None: [],
        "eager": [against_torch.EAGER],
        "torch": [against_torch.EAGER, against_torch.COMPILED],
    }
    with told(ValueError, FileNotFoundError, ModuleNotFoundError):
        run(
            config,
            names=FLAGS.students,
            against=rivals[FLAGS.against],
            unet=changes(FLAGS.unet),
            rounds=FLAGS.rounds,
            steps=FLAGS.steps,
            out=Path(FLAGS.out),
        )


if __name__ == "__main__":
    from absl import app, flags
    from ml_collections import config_flags

    everyone = [student.names[0] for student in students.TABLE]
    config_flags.DEFINE_config_file(
        "config", "configs/small.py", "Whose training step; its student does not matter"
    )
    flags.DEFINE_list("students", everyone, "Rows of python -m flaxkd.students, beside the teacher")
    flags.DEFINE_enum("against", None, ["eager", "torch"], "PyTorch, eager or also with torch.compile")
    flags.DEFINE_multi_string("unet", [], "KEY=JSON of the teacher's unet/config.json, with random weights")
    flags.DEFINE_integer("rounds", 7, "Times that each is done")
    flags.DEFINE_integer("steps", 25, "Denoising steps of a picture")
    flags.DEFINE_string("out", "bench", "Folder of the result")
    FLAGS = flags.FLAGS
    app.run(main)
