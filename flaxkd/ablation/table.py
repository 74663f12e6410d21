"""The result of an ablation: means and standard deviations over seeds, as JSON, Markdown and a picture."""

import itertools
import statistics
from collections.abc import Callable
from pathlib import Path

from flaxkd.drawing import figures
from flaxkd.evaluate import results, table

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


def result(settings: dict, variants: dict, teacher: dict, rows: dict, curves: dict, as_cut: dict | None = None) -> dict:
    """The input of `write`, from rows of evaluations (see evaluate/table.py) and records of metrics.jsonl.

    settings: {name: value}. variants: {variant: {key of the configuration: value}}. teacher: its row. rows:
    {student: {variant: [the row of each seed]}}. curves: {student: {variant: [the records of each seed]}}. as_cut:
    {student: its row before training}.
    """
    return {
        "settings": settings,
        "variants": variants,
        "teacher": {key: teacher[key] for key in MEASURES if key in teacher},
        "as_cut": {name: {key: row[key] for key in MEASURES if key in row} for name, row in (as_cut or {}).items()},
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
    """Writes ablation.md, .json and .png into `out`, and returns their paths."""
    return results.write(out, "ablation", markdown(result), result, lambda path: picture(result, path))


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
        fixed = {"teacher": result["teacher"]}
        fixed |= {"as cut": result["as_cut"][student]} if student in result["as_cut"] else {}
        cells = [titles]
        for row in fixed.values():
            cells.append([_number(row.get(key), digits) for key, (_, digits, _) in COLUMNS.items()])
        for variant, row in found.items():
            line = [_number(row[key]["mean"], digits, row[key]["sd"]) for key, (_, digits, _) in COLUMNS.items()]
            cells.append([f"**{x}**" if bold[key] == variant else x for key, x in zip(COLUMNS, line, strict=True)])
        blocks += [f"## {student}", table.aligned(["variant", *fixed, *found], cells)]
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

    Colours are variants, groups are students. A cross is the student as cut."""
    found, variants = result["students"], list(result["variants"])
    color = {name: figures.LINES[i % len(figures.LINES)] for i, name in enumerate(variants)}
    lines = [(student, name) for student in found for name in ("as cut", *variants)]
    lines = [(student, name) for student, name in lines if name in variants or student in result["as_cut"]]
    places = {line: y + 0.6 * list(found).index(line[0]) for y, line in enumerate(lines)}  # a gap between students
    figure, axes = figures.panels(len(COLUMNS) + len(found), height=max(2.4, 1.4 + 0.16 * len(lines)))
    words = "dots are seeds, lines are means over seeds, dashes are the teacher"
    figure.suptitle(words + ", crosses are students as cut" * bool(result["as_cut"]), fontsize=9)
    free = iter(axes)
    for key, (title, _, _) in COLUMNS.items():
        axis, values = next(free), []
        if (of_teacher := result["teacher"].get(key)) is not None:
            axis.axvline(of_teacher, color=figures.INK, linewidth=1, linestyle="--")
            values.append(of_teacher)
        for (student, name), y in places.items():
            if name == "as cut":
                before = [result["as_cut"][student][key]] if key in result["as_cut"][student] else []
                values += before
                axis.plot(before, [y] * len(before), "x", color=figures.INK)
                continue
            spread = found[student][name][key]
            values += spread["values"]
            axis.plot(spread["values"], [y] * len(spread["values"]), "o", color=color[name], alpha=0.6, ms=5)
            axis.plot([spread["mean"]] * 2, [y - 0.35, y + 0.35], color=color[name], linewidth=2)
        figures.readable(axis, "x", values, log=key not in ("psnr", "ssim"))
        labels = [f"{student}  {name}" if len(found) > 1 else name for student, name in places]
        axis.set_yticks(list(places.values()), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(f"{title} ({'less' if MEASURES[key] is min else 'more'} is better)", fontsize=10)
    for student, curves in result["curves"].items():
        axis = next(free)
        for name, points in curves.items():
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, color=color[name], label=name)
        figures.readable(axis, "y", [value for points in curves.values() for _, value in points])
        axis.set_title(f"{student}: loss_output on held-out captions", fontsize=10)
        figures.steps(axis)
    shown = {line.get_label(): line for axis in axes for line in axis.lines if line.get_label() in variants}
    if shown:  # outside: curves of many variants leave no room
        figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=len(shown), fontsize=8)
    figures.save(figure, path)
