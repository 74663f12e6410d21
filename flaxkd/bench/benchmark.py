"""How fast are a teacher and its students? One table and one bar chart, optionally with PyTorch beside them.

    python -m flaxkd.bench                                   the embedded teacher and all of its students
    python -m flaxkd.bench --config configs/small.py:sd15 --students sd_small --config.batch_size=8
    python -m flaxkd.bench --against torch                   the same work in PyTorch, eager and torch.compile
    python -m flaxkd.bench --unet block_out_channels=[64,128,256,256] --unet sample_size=32

Four things are timed: a denoising step (the UNet on twice the batch, as guidance needs it), a batch of pictures (from
text to pixels), the same in few steps, and the training step of the configuration. The teacher trains on the noise
alone. Each time is the median of --rounds, and the compared programs take turns. Weights do not affect it: students are
as cut. With --unet, which replaces keys of the teacher's unet/config.json, weights are random. The results are written
after each model. What fails, such as for memory, is listed, and the others go on.
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

from flaxkd import export, students
from flaxkd.bench import torch_works, works
from flaxkd.bench.works import Prepared, Subject
from flaxkd.diffusion import samplers
from flaxkd.drawing import figures
from flaxkd.evaluate import results, table
from flaxkd.machine import command, progress, sharding
from flaxkd.plan import devices
from flaxkd.pretrained import Folder, fresh, save, shapes

OURS = "flaxkd"
PAUSE = 0.05  # seconds; threads of another library may spin for a while after their work and slow the next one


def run(config, *, names: list[str] | None, against: list[str], unet: dict, rounds: int, steps: int, out: Path) -> dict:
    """Times everything, writes bench.json, .md and .png to `out`, and returns the content of the first.

    names: students; None: all that the table has for the teacher. against: of torch_works.EAGER and COMPILED. unet:
    keys of the teacher's configuration to replace. steps: of the sampler. Raises ValueError before any compute for
    settings that do not fit."""
    if rounds < 5:
        raise ValueError(f"rounds = {rounds}: a median needs at least 5 to be worth reporting")
    if against:
        torch_works.check(config)
    with tempfile.TemporaryDirectory() as scratch:
        folder = export.open_model(config.teacher, config.vae).skip_layers(config.clip_skip)
        if unet:
            folder = other_architecture(folder, unet, Path(scratch) / "pipeline", config.seed)
        teacher_config = folder.config("unet")
        if names is None:
            names = [student.names[0] for student in students.of(folder.family)]
        for name in names:
            students.config(students.get(name), teacher_config)
        settings, rows = about(config, folder, unet, rounds, steps, against), []
        with progress.Bar((1 + len(names)) * len(works.WORKS) * (1 + len(against)) * rounds, unit=" runs") as bar:
            for name in ("teacher", *names):
                subject = works.subject(name, config, folder, steps=steps)
                rows += measure(subject, [OURS, *against], rounds, bar)
                result = {"settings": settings, "rows": derive(rows, config.batch_size, peak())}
                paths = write(out, result)  # after each model: what is measured is not lost with the next one
    print(markdown(result).partition("\n## Settings")[0])
    print(results.said(paths))
    return result


def about(config, folder: Folder, unet: dict, rounds: int, steps: int, against: list[str]) -> dict[str, str]:
    """What was timed, and on what, for people."""
    unet_config = folder.config("unet")
    settings = {
        "teacher": config.teacher or "the embedded miniature",
        "unet": ", ".join(f"{key} {value}" for key, value in unet.items()) or "the teacher's",
        "latents": "{0} x {0} x {1}".format(unet_config["sample_size"], unet_config["in_channels"]),
        "batch": f"{config.batch_size} images, twice that in a denoising step",
        "sampler": f"{steps} steps of {samplers.DEFAULT}, guidance {folder.guidance:g}",
        "sampler of few steps": f"{samplers.SAMPLERS[works.FEW].steps} steps of {works.FEW}, without guidance",
        "timing": f"median of {rounds}" + ", in turns" * bool(against),
        "precision": str(sharding.compute_dtype(config.dtype)),
        "machine": f"{jax.device_count()} x {jax.devices()[0].device_kind}, {os.cpu_count()} CPU cores",
        "versions": ", ".join(f"{name} {version}" for name, version in versions(against).items()),
    }
    return settings | ({"PyTorch's device": torch_works.machine()} if against else {})


def peak() -> float | None:
    """FLOP/s of all devices at most; None if unknown."""
    one = devices.peak(jax.devices()[0])
    return one and one.flops_per_second * jax.device_count()


def versions(against: list[str]) -> dict[str, str]:
    names = ("jax", "flax", "python") + ("torch", "diffusers") * bool(against)
    return {n: platform.python_version() if n == "python" else importlib.metadata.version(n) for n in names}


def other_architecture(folder: Folder, changes: dict, out: Path, seed: int) -> Folder:
    """The pipeline folder with a changed UNet configuration and random weights, written to `out`.

    Raises ValueError for an unknown key."""
    unet_config = folder.config("unet")
    known = {*unet_config, *folder.module("unet").config.__dataclass_fields__}
    if wrong := sorted(changes.keys() - known):
        raise ValueError(f"--unet: unknown {', '.join(wrong)}; keys are those of unet/config.json ({sorted(known)})")
    unet_config = unet_config | changes
    parts = {"unet": (unet_config, fresh.initial(shapes("unet", unet_config), seed))}
    return Folder(save(out, source=folder, parts=parts))


def measure(subject: Subject, rivals: list[str], rounds: int, bar: progress.Bar) -> list[dict]:
    """A row {"model", "by", "parameters", "image_flops", work: {"seconds", ...}} per rival, for every work of
    `works.WORKS`. One that fails, such as for memory, has None for its seconds, and "failed" says why."""
    size = sum(x.size for x in jax.tree.leaves(subject.unet))
    about = {"parameters": size, "image_flops": students.image_flops(subject.task.passes)}
    rows = {by: {"model": subject.name, "by": by, **about} for by in rivals}
    for work in works.WORKS:
        ready: dict[str, Prepared] = {}
        for by in rivals:
            bar.describe(f"{subject.name}, {work}" + f", {by}" * (len(rivals) > 1))
            try:
                with bar.during(progress.COMPILING):
                    ours = by == OURS
                    ready[by] = works.prepare(subject, work) if ours else torch_works.prepare(subject, work, by)
            except RuntimeError as error:  # of XLA's and PyTorch's allocators and compilers
                rows[by][work] = dict.fromkeys(MEASURED) | {"failed": command.first_line(error)}
                bar.update(rounds)
        bar.describe(f"{subject.name}, {work}")
        seconds = interleaved(ready, rounds, bar)
        for by, prepared in ready.items():
            numbers = statistics.median(seconds[by]), seconds[by], prepared.first, prepared.flops, prepared.peak_bytes
            rows[by][work] = dict(zip(MEASURED, numbers, strict=True))
    return list(rows.values())


def interleaved(ready: dict[str, Prepared], rounds: int, bar) -> dict[str, list[float]]:
    """Seconds of each call. The programs take turns, so a slow moment of the machine affects all of them."""
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
    """["sample_size=32", ...] -> {"sample_size": 32, ...}: values are JSON. ValueError if one is not."""
    found = {}
    for text in texts:
        key, _, value = text.partition("=")
        try:
            found[key] = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"--unet {text}: {value!r} is not JSON ({error}); an example is sample_size=32") from error
    return found


TITLES = {
    "denoise": "denoising step",
    "image": "batch of pictures",
    "few_steps": f"the same in {samplers.SAMPLERS[works.FEW].steps} steps",
    "train": "training step",
}
BATCHES = ("image", "few_steps", "train")  # works of a batch of pictures
MEASURED = ("seconds", "all_seconds", "first_seconds", "flops", "peak_bytes")  # of a work


def derive(rows: list[dict], batch_size: int, peak: float | None) -> list[dict]:
    """The rows with derived figures: images/s, and what training takes relative to the least FLOPs of its passes.

    "of_least" is XLA's count of a training step in units of that. "of_peak" is the least FLOPs per second in units of
    `peak`, the most that the devices can do: what others call model FLOPs utilisation."""
    for row in rows:
        for work in BATCHES:
            seconds = row[work]["seconds"]
            row[work]["images_per_second"] = seconds and batch_size / seconds
        train, least = row["train"], row["image_flops"]
        if not least:  # a task without UNets
            continue
        if train["flops"] is not None:
            train["of_least"] = train["flops"] / (least * batch_size)
        if peak is not None and train["seconds"] is not None:
            train["of_peak"] = least * train["images_per_second"] / peak
    return rows


def write(out: Path, result: dict) -> list[Path]:
    """Writes bench.md, .json and .png into `out` and returns their paths. result: {"settings", "rows"}."""
    return results.write(out, "bench", markdown(result), result, lambda path: picture(result, path))


def markdown(result: dict) -> str:
    """The tables: time of each work; size and cost; the others' times relative to flaxkd's; failures; the settings."""
    rows = result["rows"]
    blocks = ["# Benchmark", times(rows), costs(rows), ratios(rows), failures(rows)]
    blocks += ["## Settings", table.settings_table(result["settings"])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def times(rows: list[dict]) -> str:
    """Seconds are medians. images/s are for drawing whole pictures, and for training."""
    several = len({row["by"] for row in rows}) > 1
    peak = any("of_peak" in row["train"] for row in rows)
    denoise, *batches = (f"s / {work}" for work in TITLES.values())
    cells = [["by"] * several + [denoise, *(title for batch in batches for title in (batch, "images/s"))]]
    cells[0] += ["of the device's peak"] * peak
    for row in rows:
        cells.append([row["by"]] * several)
        cells[-1] += [table.number(row["denoise"]["seconds"], 3)]
        for work in BATCHES:
            cells[-1] += [
                table.number(row[work]["seconds"], 3),
                table.number(row[work]["images_per_second"], 2),
            ]
        cells[-1] += [f"{row['train']['of_peak']:.1%}" if "of_peak" in row["train"] else table.number(None, 0)] * peak
    return table.aligned(["model", *(row["model"] for row in rows)], cells)


def costs(rows: list[dict]) -> str:
    """The counts of XLA, for flaxkd alone."""
    rows = [row for row in rows if row["by"] == OURS]
    cells = [["parameters", "GFLOPs / denoising step", "MiB", "GFLOPs / training step", "of the least", "MiB"]]
    cells[0] += ["s / first training step"]
    for row in rows:
        cells.append([table.number(row["parameters"], 0)])
        for work in ("denoise", "train"):
            flops, bytes_ = row[work]["flops"], row[work]["peak_bytes"]
            cells[-1].append(table.number(flops and flops / 1e9, 1))
            cells[-1] += [table.number(row["train"].get("of_least"), 3)] * (work == "train")
            cells[-1].append(table.number(bytes_ and bytes_ / 2**20, 0))
        cells[-1].append(table.number(row["train"]["first_seconds"], 1))
    text = (
        "FLOPs and memory (arguments, results and temporaries of one device) are XLA's, for the compiled program. "
        "XLA counts the body of a loop once, such as long attention on a CPU, and on a GPU nothing of cuDNN and "
        "cuBLAS: there, FLOPs are left out. The least of a training step, also in the share of the device's peak, are "
        "the teacher's forward pass and three of the student's. The first training step compiles, or loads what an "
        "earlier run compiled."
    )
    return "\n\n".join(["## Size and cost", table.aligned(["model", *(row["model"] for row in rows)], cells), text])


def ratios(rows: list[dict]) -> str:
    """The others' times divided by flaxkd's."""
    ours = {row["model"]: row for row in rows if row["by"] == OURS}
    others = [row for row in rows if row["by"] != OURS]
    if not others:
        return ""
    cells = [["by", *TITLES.values()]]
    for row in others:
        both = [(row[work]["seconds"], ours[row["model"]][work]["seconds"]) for work in TITLES]
        cells.append([row["by"], *(table.number(None if None in pair else pair[0] / pair[1], 2) for pair in both)])
    text = "Above 1, flaxkd is faster."
    return "\n\n".join(
        [
            "## Their time divided by flaxkd's",
            table.aligned(["model", *(r["model"] for r in others)], cells),
            text,
        ]
    )


def failures(rows: list[dict]) -> str:
    found = [f"- {row['model']}, {work}, {row['by']}: {row[work]['failed']}" for row in rows for work in TITLES
             if "failed" in row[work]]  # fmt: skip
    return "\n\n".join(["## What failed", "\n".join(found)]) if found else ""


def picture(result: dict, path: Path) -> None:
    """Bars of the three times, one colour per program."""
    rows = result["rows"]
    who = list(dict.fromkeys(row["by"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = figures.panels(len(TITLES), height=1.2 + 0.28 * len(rows))
    for axis, (work, title) in zip(axes, TITLES.items(), strict=True):
        for i, by in enumerate(who):
            own = [row for row in rows if row["by"] == by and row[work]["seconds"] is not None]
            places = [models.index(row["model"]) + 0.8 * (i + 0.5) / len(who) - 0.4 for row in own]
            seconds = [row[work]["seconds"] for row in own]
            drawn = axis.barh(places, seconds, 0.8 / len(who), color=figures.LINES[i], label=by)
            axis.bar_label(drawn, [table.number(x, 3) for x in seconds], fontsize=7, padding=2)
        axis.set_title(f"seconds per {title}", fontsize=10)
        axis.set_yticks(range(len(models)), models)
        axis.set_ylim(len(models) - 0.5, -0.5)
        axis.margins(x=0.2)
        figures.readable(axis, "x", [], log=False)
    if len(who) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(who), fontsize=8)
    figures.save(figure, path)
