"""The result of an ablation: means and standard deviations over seeds, as JSON, Markdown and a picture."""

import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path

from flaxkd.drawing import figures
from flaxkd.evaluate import table
from flaxkd.machine import files

# What is compared, and whether less or more of it is better. The first three are close to terms of the loss, and a
# variant trains on some of these terms. The rest measure drawn pictures, and no variant trains on those.
MEASURES: dict[str, Callable] = {
    "loss_noise": min,
    "loss_output": min,
    "feature": min,
    "psnr": max,
    "ssim": max,
    "frechet_latent": min,
    "frechet_latent_data": min,
}
COLUMNS = {key: column for key, *column in table.COLUMNS if key in MEASURES}  # [title, decimals, meaning]
CURVE = "validation/loss_output"


def of(values: list[float]) -> dict:
    """{"mean", "sd", "values"} of one number per seed. sd: of a sample (n - 1), None for one seed."""
    sd = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "sd": sd, "values": list(values)}


def curve(runs: list[list[dict]]) -> list[list[float]]:
    """[[optimizer step, mean over seeds of loss_output on held-out captions], ...] from each seed's metrics.jsonl."""
    found: dict[int, list[float]] = {}
    for record in itertools.chain(*runs):
        if CURVE in record:
            found.setdefault(record["step"], []).append(record[CURVE])
    return [[step, statistics.fmean(values)] for step, values in sorted(found.items())]


def best(found: dict[str, dict], better: Callable) -> str | None:
    """The name with the best mean, if its mean ± sd overlaps with no other's; None if it does, or for one seed.

    found: {name: what `of` returns}; better: min or max."""
    first = better(found, key=lambda name: found[name]["mean"])
    own = found[first]
    others = [other for name, other in found.items() if name != first]
    if own["sd"] is None or any(abs(x["mean"] - own["mean"]) <= x["sd"] + own["sd"] for x in others):
        return None
    return first


def result(settings: dict, variants: dict, teacher: dict, rows: dict, curves: dict) -> dict:
    """The input of `write`, from rows of evaluations (see evaluate/table.py) and records of metrics.jsonl.

    settings: {name: value}. variants: {variant: {key of the configuration: value}}. teacher: its row. rows:
    {student: {variant: [the row of each seed]}}. curves: {student: {variant: [the records of each seed]}}.
    """
    return {
        "settings": settings,
        "variants": variants,
        "teacher": {key: teacher[key] for key in MEASURES if key in teacher},
        "students": {
            student: {
                variant: {key: of([row[key] for row in seeds]) for key in MEASURES} for variant, seeds in found.items()
            }
            for student, found in rows.items()
        },
        "curves": {
            student: {variant: curve(runs) for variant, runs in found.items()} for student, found in curves.items()
        },
    }


def write(out: Path, result: dict) -> list[Path]:
    """Writes ablation.json, .md and .png into `out`, and returns their paths."""
    paths = [Path(out) / f"ablation.{ending}" for ending in ("json", "md", "png")]
    files.write_text(paths[0], json.dumps(result, indent=2, ensure_ascii=False) + "\n")
    files.write_text(paths[1], markdown(result))
    picture(result, paths[2])
    return paths


def markdown(result: dict) -> str:
    """A table per student with a row per variant; the meaning of the columns and the variants; the settings."""
    settings, variants = result["settings"], result["variants"]
    seeds = "one seed, so the spread is unknown"
    if settings["seeds"] > 1:
        seeds = (
            f"mean ± standard deviation over {settings['seeds']} seeds. Bold: the best mean, where its mean ± "
            "standard deviation overlaps with no other's"
        )
    blocks = ["# Ablation", f"{settings['steps']:,} steps of {settings['batch size']} images; {seeds}."]
    titles = [title for title, _, _ in COLUMNS.values()]
    for student, found in result["students"].items():
        bold = {key: best({name: row[key] for name, row in found.items()}, better) for key, better in MEASURES.items()}
        cells = [
            titles,
            [_number(result["teacher"].get(key), digits) for key, (_, digits, _) in COLUMNS.items()],
        ]
        for variant, row in found.items():
            line = [_number(row[key]["mean"], digits, row[key]["sd"]) for key, (_, digits, _) in COLUMNS.items()]
            cells.append([f"**{x}**" if bold[key] == variant else x for key, x in zip(COLUMNS, line, strict=True)])
        blocks += [f"## {student}", table.aligned(["variant", "teacher", *found], cells)]
    arrows = {min: "less is better", max: "more is better"}
    blocks.append("\n".join(f"- {title}: {what}; {arrows[MEASURES[key]]}" for key, (title, _, what) in COLUMNS.items()))
    keys = list(next(iter(variants.values())))
    cells = [[str(row[key]) for key in keys] for row in variants.values()]
    blocks += ["## Variants", table.aligned(["variant", *variants], [keys, *cells])]
    blocks += ["## Settings", table.settings_table(settings)]
    return "\n\n".join(blocks) + "\n"


def _number(value: float | None, digits: int, sd: float | None = None) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" + ("" if sd is None else f" ± {sd:.{digits}f}")


def picture(result: dict, path: Path) -> None:
    """A panel per measure: a dot per seed, a line at the mean, dashes for the teacher. Then loss_output by step.

    Colours are variants, groups are students."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator

    found, variants = result["students"], list(result["variants"])
    color = {name: figures.LINES[i % len(figures.LINES)] for i, name in enumerate(variants)}
    places = {}  # from the top, with a gap between students
    for i, student in enumerate(found):
        places |= {(student, name): i * (len(variants) + 1) + j for j, name in enumerate(variants)}
    panels = len(COLUMNS) + len(found)
    figure, axes = plt.subplots(
        -(-panels // 3), 3, figsize=(15, 3.6 * -(-panels // 3)), squeeze=False, layout="constrained"
    )
    figure.suptitle("dots are seeds, lines are means over seeds, dashes are the teacher", fontsize=9)
    free = iter(axes.flat)
    for key, (title, _, _) in COLUMNS.items():
        axis = next(free)
        if (of_teacher := result["teacher"].get(key)) is not None:
            axis.axvline(of_teacher, color=figures.INK, linewidth=1, linestyle="--")
        for (student, name), y in places.items():
            spread = found[student][name][key]
            axis.plot(spread["values"], [y] * len(spread["values"]), "o", color=color[name], alpha=0.6, ms=5)
            axis.plot([spread["mean"]] * 2, [y - 0.35, y + 0.35], color=color[name], linewidth=2)
        if all(x > 0 for line in axis.lines for x in line.get_xdata()) and key not in ("psnr", "ssim"):
            axis.set_xscale("log")
        axis.set_yticks(list(places.values()), [f"{student}  {name}" for student, name in places], fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{title} ({'less' if MEASURES[key] is min else 'more'} is better)", fontsize=10)
    for student, curves in result["curves"].items():
        axis = next(free)
        for name, points in curves.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=color[name], label=name)
        if all(y > 0 for line in axis.lines for y in line.get_ydata()):
            axis.set_yscale("log")
        axis.set_title(f"{student}: loss_output on held-out captions", fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        axis.legend(fontsize=7)
    for axis in axes.flat:
        axis.tick_params(labelsize=7, which="both")
        for scale in (axis.xaxis, axis.yaxis):
            if scale.get_scale() == "log":  # numbers as in the tables, where there is room
                scale.set_minor_locator(LogLocator(subs=(2, 5)))
                scale.set_major_formatter("{x:g}")
                scale.set_minor_formatter("{x:g}")
        axis.grid(alpha=0.25)
        axis.set_axisbelow(True)
    for axis in free:
        axis.remove()
    figures.save(figure, path)
