"""Does a training step fit, how fast may it be, and what does it cost? For machines you have not rented yet.

    python -m flaxkd.plan --config configs/small.py:sd15 --device v5e:4x8 --device a100-80x8
    python -m flaxkd.plan --config configs/small.py:sd15 --device v5e:2x2 --config.batch_size=32 --largest

Compiles the training step of `flaxkd.train` for the named TPU topology or GPUs on this machine's CPU, until its memory
is known: a minute or two at full size. Results are stored, so repeating a plan costs nothing. The speed is an estimate,
from the least FLOPs of the step and the published share of a device's peak. --largest finds the largest batch per
device that fits, and tries ways to fit twice that. --whole compiles TPU programs to the end, up to an hour, for the
bytes of the machine code. Needs `pip install "flaxkd[plan]"`.
"""

import math

from flaxkd import students
from flaxkd.machine import gpu, progress
from flaxkd.models.unet import REMAT
from flaxkd.plan import compiling, devices

GIB = 2**30
USABLE = 0.984  # of a TPU's: libtpu reports 15.75 of a v5e's 16 GiB
CODE = GIB  # reserved for a TPU's machine code, if not compiled to the end. Complete programs had at most 0.85 GiB
ATTEMPTS = 5  # compilations per search
# Ways to save memory, in the order to try them. attention=None, the default, picks the form that pays on the device.
KNOBS = (
    {"attention": None},
    {"remat": True},
    {"remat": "transformer_blocks"},
    {"fsdp": True},
    {"remat": True, "fsdp": True},
    {"remat": "transformer_blocks", "fsdp": True},
)


def row(config, target: devices.Target, whole: bool = False) -> dict:
    """Needs of the configuration's training step on one device of `target`, and its estimated speed: see COLUMNS.

    Raises ValueError for a configuration that cannot run there, or without a compiler for `target`."""
    what = f"{target.name}, {config.batch_size // target.count} images per device"
    with progress.Bar(None, what, first="tracing", leave=False):
        lowered = compiling.lower(config, target)
    with progress.Bar(None, what, first=progress.COMPILING, leave=False):
        make = compiling.whole if whole or target.platform == "gpu" else compiling.assigned
        compiled = compiling.kept(make, config, lowered, target)
    fits = compiled.fits and compiled.needed <= room(target, make is compiling.whole)
    flops = image_flops(lowered)
    kind = devices.KINDS[target.kind]
    rate = target.count * target.peak.flops_per_second * kind.utilisation / flops
    hours = config.steps * config.batch_size / rate / 3600
    return {
        "device": target.name,
        "devices": target.count,
        "student": config.student,
        "resolution": config.data.resolution,
        "mesh": shape_of(config.mesh, target),
        "attention": lowered.attention,
        "remat": config.remat,
        "batch_size": config.batch_size,
        "per_device": config.batch_size // target.count,
        "held": lowered.held,
        "temporary": compiled.temporary,
        "needed": compiled.needed,
        "memory": target.peak.memory,
        "whole": make is compiling.whole,
        "fits": bool(fits),
        "step_flops": compiled.flops,
        "image_flops": flops,
        "collectives": compiled.collectives,
        "images_per_second": rate,
        "hours": hours,
        "device_hours": hours * target.count,
        "utilisation": kind.utilisation,
        "source": kind.source,
        "compile_seconds": compiled.seconds,
    }


def room(target: devices.Target, whole: bool = False) -> float:
    """Bytes that a step may need on a device. whole: as reported by `compiling.whole`, machine code included."""
    if target.platform == "gpu":
        return gpu.MEMORY * target.peak.memory
    return USABLE * target.peak.memory - (0 if whole else CODE)


def image_flops(lowered: compiling.Lowered) -> float:
    """The least FLOPs of training on one image, by the passes of its task; for a task without UNets, XLA's count."""
    if not lowered.passes:
        return lowered.program.cost_analysis()["flops"] / lowered.batch_size
    return students.image_flops(lowered.passes)


def per_device(config, target: devices.Target, images: int):
    """The configuration with `images` images per device and accumulation step."""
    config = config.copy_and_resolve_references()
    config.batch_size = images * target.count * config.accumulate
    return config


def largest(config, target: devices.Target) -> list[dict]:
    """Fitting rows of a search for the largest batch per device. The last row is the largest; [] if none fits.

    Every image adds the same amount of memory: two compilations show where it runs out."""
    images = max(config.batch_size // (target.count * config.accumulate), 1)
    seen: dict[int, dict] = {}
    fitting, low = [], 0
    while images > low and len(seen) < ATTEMPTS:
        seen[images] = row(per_device(config, target, images), target)
        fitting = sorted(n for n, r in seen.items() if r["fits"])
        low = max(fitting, default=0)
        too_many = min((n for n, r in seen.items() if not r["fits"]), default=math.inf)
        images = min(predicted(seen, target), too_many - 1)
    return [seen[n] for n in fitting]


def predicted(seen: dict[int, dict], target: devices.Target) -> int:
    """The number of images that fills the memory, by a line through the last two compiled sizes."""
    points = sorted((n, r["needed"]) for n, r in seen.items())
    if len(points) == 1:
        held = seen[points[0][0]]["held"]
        points.insert(0, (0, sum(held.values()) + held["parameters"]))  # plus the gradients
    (a, at_a), (b, at_b) = points[-2:]
    slope = max((at_b - at_a) / (b - a), 1)
    return int(b + (room(target) - at_b) / slope)


def next_size(config, target: devices.Target, images: int) -> list[dict]:
    """Rows for twice as many images per device, one for each unused way of KNOBS to save memory.

    "fsdp" shards parameters, optimizer state and teacher over all devices."""
    settings = lambda c: (c.attention, c.remat, shape_of(c.mesh, target))
    rows, tried = [], {settings(config)}
    for knobs in KNOBS:
        changed = per_device(config, target, 2 * images)
        with changed.ignore_type():
            changed.remat = max(config.remat, knobs.get("remat", False), key=REMAT.index)  # each saves more
        changed.attention = knobs.get("attention", config.attention)
        if knobs.get("fsdp"):
            changed.mesh.data, changed.mesh.fsdp = 1, target.count
        if settings(changed) not in tried:
            tried.add(settings(changed))
            rows.append(row(changed, target))
    return rows


def shape_of(mesh, target: devices.Target) -> str:
    return f"{target.count // mesh.fsdp if mesh.data == -1 else mesh.data} x {mesh.fsdp}"


def size(count: float) -> str:
    return "–" if count is None else f"{count / GIB:.2f}"


def sent(collectives: dict | None) -> str:
    if collectives is None:
        return "not told"
    return ", ".join(f"{n} {kind} {size(b)}" for kind, (n, b) in collectives.items()) or "–"


COLUMNS = {
    "device": lambda r: r["device"],
    "student": lambda r: r["student"] or "none",
    "px": lambda r: str(r["resolution"]),
    "images a device": lambda r: str(r["per_device"]),
    "attention": lambda r: r["attention"],
    "remat": lambda r: {False: "no", True: "yes"}.get(r["remat"], r["remat"]),
    "data x fsdp": lambda r: r["mesh"],
    "parameters": lambda r: size(r["held"]["parameters"]),
    "optimizer, average": lambda r: size(r["held"]["optimizer"] + r["held"]["average"]),
    "teacher": lambda r: size(r["held"]["teacher"]),
    "batch": lambda r: size(r["held"]["batch"]),
    "temporaries": lambda r: size(r["temporary"]),
    "needed": lambda r: size(r["needed"]),
    "there is": lambda r: size(r["memory"]),
    "fits": lambda r: "yes" if r["fits"] else "no",
    "TFLOP an image": lambda r: f"{r['image_flops'] / 1e12:.2f}",
    "collectives": lambda r: sent(r["collectives"]),
    "images/s": lambda r: f"{r['images_per_second']:,.0f}",
    "hours": lambda r: f"{r['hours']:,.1f}",
    "device-hours": lambda r: f"{r['device_hours']:,.0f}",
}


def markdown(rows: list[dict]) -> str:
    """The rows as a table, with the sources of its figures below."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * 7 + "---:|" * (len(COLUMNS) - 7)]
    lines += ["| " + " | ".join(cell(r) for cell in COLUMNS.values()) + " |" for r in rows]
    lines += [
        "",
        "Sizes are GiB on one device, by the compiler; `needed` of a step that does not fit is its request.",
    ]
    if not all(r["whole"] for r in rows):
        lines += [f"For a TPU, `needed` excludes the machine code, for which {CODE / GIB:.0f} GiB is reserved."]
    lines += ["images/s, hours and device-hours are **estimates**, not measurements: the least FLOPs of the step at"]
    lines += ["the published utilisation of the bfloat16 peak:", ""]
    sources = {r["device"].split(":")[0]: f"{r['utilisation']:.0%} ({r['source']})" for r in rows}
    return "\n".join(lines + [f"- {name}: {text}" for name, text in sources.items()]) + "\n"
