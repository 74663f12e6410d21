"""The result of a benchmark, teacher first: as JSON, as Markdown and as a bar chart.

A row is a model by whom it was run, {"model", "by", "parameters", "denoise": {...}, "image": {...}, "train": {...}}.
Each work has "seconds" (the median), "all_seconds", "first_seconds", and where they are known "flops", "peak_bytes".
"""

import json
from pathlib import Path

from flaxkd import pictures, table

WORKS = {"denoise": "denoising step", "image": "batch of pictures", "train": "training step"}


def derive(rows: list[dict], batch_size: int, peak: float | None) -> list[dict]:
    """The rows with what follows from them: images/s, and of flaxkd's the cost of training beside its least one.

    A training step needs at least the teacher's forward pass and three of the student: forward, and twice that much
    backward. "of_least" is its FLOPs in units of that, "of_peak" its FLOP/s in units of `peak`, what
    the devices can do at most.
    """
    forward = {row["model"]: row["denoise"]["flops"] / 2 for row in rows if row["denoise"]["flops"]}
    for row in rows:
        for work in ("image", "train"):
            row[work]["images_per_second"] = batch_size / row[work]["seconds"]
        if (flops := row["train"]["flops"]) is None:
            continue
        least = 3 * forward[row["model"]] + (forward["teacher"] if row["model"] != "teacher" else 0)
        row["train"]["of_least"] = flops / least
        if peak is not None:
            row["train"]["of_peak"] = flops / row["train"]["seconds"] / peak
    return rows


def write(out: Path, result: dict) -> list[Path]:
    """Writes bench.json, .md and .png into `out` and returns their paths. result: {"settings", "rows"}."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"bench.{ending}" for ending in ("json", "md", "png")]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    paths[1].write_text(markdown(result))
    picture(result, paths[2])
    return paths


def markdown(result: dict) -> str:
    """The tables: time of each work; size and cost; how many times as long the others take; the settings."""
    rows = result["rows"]
    blocks = ["# Benchmark", times(rows), costs(rows), ratios(rows)]
    blocks += ["## Settings", table.settings_table(result["settings"])]
    return "\n\n".join(block for block in blocks if block) + "\n"


def times(rows: list[dict]) -> str:
    """Seconds are medians; images/s are of drawing whole pictures, and of training."""
    several = len({row["by"] for row in rows}) > 1
    denoise, image, train = (f"s / {work}" for work in WORKS.values())
    cells = [["by"] * several + [denoise, image, "images/s", train, "images/s"]]
    for row in rows:
        cells.append([row["by"]] * several)
        cells[-1] += [table.number(row["denoise"]["seconds"], 3)]
        for work in ("image", "train"):
            cells[-1] += [
                table.number(row[work]["seconds"], 3),
                table.number(row[work]["images_per_second"], 2),
            ]
    return table.aligned(["model", *(row["model"] for row in rows)], cells)


def costs(rows: list[dict]) -> str:
    """What XLA counts, of flaxkd alone."""
    rows = [row for row in rows if row["train"]["flops"] is not None]
    if not rows:
        return ""
    peak = any("of_peak" in row["train"] for row in rows)
    cells = [
        ["parameters", "GFLOPs / denoising step", "MiB", "GFLOPs / training step", "of the least", "MiB"]
    ]
    cells[0] += ["of the device's peak"] * peak
    for row in rows:
        cells.append([table.number(row["parameters"], 0)])
        for work in ("denoise", "train"):
            cells[-1].append(table.number(row[work]["flops"] / 1e9, 1))
            cells[-1] += [table.number(row["train"]["of_least"], 3)] * (work == "train")
            bytes_ = row[work]["peak_bytes"]
            cells[-1].append(table.number(bytes_ and bytes_ / 2**20, 0))
        cells[-1] += [f"{row['train'].get('of_peak', 0):.1%}"] * peak
    text = (
        "FLOPs and memory (arguments, results and temporaries of one device) are XLA's, of the compiled program. "
        "It counts what is in a loop once, such as the long attentions of a CPU. "
        "The least that a training step needs is the teacher's forward pass and three of the student's."
    )
    return "\n\n".join(
        ["## Size and cost", table.aligned(["model", *(row["model"] for row in rows)], cells), text]
    )


def ratios(rows: list[dict]) -> str:
    """How many times as long as flaxkd the others take."""
    ours = {row["model"]: row for row in rows if row["train"]["flops"] is not None}
    others = [row for row in rows if row["train"]["flops"] is None]
    if not others:
        return ""
    cells = [["by", *WORKS.values()]]
    for row in others:
        ratio = [row[work]["seconds"] / ours[row["model"]][work]["seconds"] for work in WORKS]
        cells.append([row["by"], *(table.number(x, 2) for x in ratio)])
    text = "Above 1, flaxkd is faster."
    return "\n\n".join(
        [
            "## Their time divided by flaxkd's",
            table.aligned(["model", *(r["model"] for r in others)], cells),
            text,
        ]
    )


def picture(result: dict, path: Path) -> None:
    """Bars of the three times, one colour for whoever ran it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = result["rows"]
    who = list(dict.fromkeys(row["by"] for row in rows))
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, axes = plt.subplots(1, 3, figsize=(13, 1.2 + 0.28 * len(rows)), layout="constrained", sharey=True)
    for axis, (work, title) in zip(axes, WORKS.items(), strict=True):
        for i, by in enumerate(who):
            own = [row for row in rows if row["by"] == by]
            places = [models.index(row["model"]) + 0.8 * (i + 0.5) / len(who) - 0.4 for row in own]
            drawn = axis.barh(
                places,
                [row[work]["seconds"] for row in own],
                0.8 / len(who),
                color=pictures.LINES[i],
                label=by,
            )
            axis.bar_label(
                drawn, [table.number(row[work]["seconds"], 3) for row in own], fontsize=7, padding=2
            )
        axis.set_title(f"seconds per {title}", fontsize=10)
        axis.set_yticks(range(len(models)), models)
        axis.margins(x=0.18)
        axis.tick_params(labelsize=8)
        axis.grid(axis="x", alpha=0.25)
        axis.set_axisbelow(True)
    axes[0].invert_yaxis()
    if len(who) > 1:
        figure.legend(
            *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(who), fontsize=8
        )
    pictures.save_figure(figure, path)
