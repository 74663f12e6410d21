"""The table of an evaluation, teacher first: as JSON, Markdown and a picture."""

import itertools
import math
from pathlib import Path

from flaxkd.drawing import figures
from flaxkd.evaluate import results

# (key in a row, title, decimals, meaning)
COLUMNS = (
    ("parameters", "parameters", 0, "of the UNet"),
    ("loss_noise", "loss_noise", 4, "mean square of the predicted noise (or v) minus the true one"),
    ("loss_output", "loss_output", 4, "mean square of the prediction minus the teacher's"),
    ("feature", "features", 4, "mean over the feature pairs of |f_T - f_S|^2 / |f_T|^2"),
    ("psnr", "PSNR", 2, "dB, against the teacher's pictures from equal noise; at most 100"),
    ("ssim", "SSIM", 4, "of the same pictures, 1 for equal ones"),
    ("frechet_latent", "Fréchet (latent)", 3,
     "Fréchet distance in the VAE's latent space to the teacher's pictures, not FID"),
    ("frechet_latent_data", "Fréchet (latent, data)", 3, "the same, to the held-out pictures themselves"),
    ("fid", "FID", 2, "Fréchet distance in Inception's features to the real pictures"),
    ("inception_score", "IS", 2, "inception score"),
    ("clip_score", "CLIP", 4, "mean cosine of picture and prompt in CLIP's space"),
    ("dino", "DINO", 4, "mean cosine of pictures and the subject's own, by DINO's ViT"),
    ("clip_i", "CLIP-I", 4, "the same by CLIP"),
)  # fmt: skip


def write(out: Path, result: dict) -> list[Path]:
    """Writes evaluation.md, .json and .png into `out` and returns their paths.

    result: {"settings": {...}, "rows": [row, ...], "notes": [str, ...]}, with the teacher's row first. A row has
    "model", the measured keys of COLUMNS, and optionally "by_timestep" {name: [a number per bin]} and "features"
    {module: float}."""
    draw = lambda path: picture(result, path)
    return results.write(out, "evaluation", markdown(result), _finite(result), draw)


def _finite(value):
    """The value with null for NaN and infinity, which JSON lacks."""
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def markdown(result: dict) -> str:
    """The tables: one row per model; errors by timestep and by feature pair; the settings."""
    rows, settings = result["rows"], result["settings"]
    columns = [column for column in COLUMNS if any(column[0] in row for row in rows)]
    cells = [[title for _, title, _, _ in columns]]
    cells += [[number(row.get(key), digits) for key, _, digits, _ in columns] for row in rows]
    blocks = ["# Evaluation", aligned(["model"] + [row["model"] for row in rows], cells)]
    blocks.append("\n".join(f"- {title}: {meaning}" for _, title, _, meaning in columns))
    blocks += [f"> {note}" for note in result["notes"]]
    for name in _curves(rows):
        shown = [row for row in rows if name in row.get("by_timestep", {})]
        cells = [_ranges(settings["timesteps"])]
        cells += [[number(x, 4) for x in row["by_timestep"][name]] for row in shown]
        title = "relative error of the features" if name == "feature" else name
        blocks += [f"## {title} by timestep", aligned(["model"] + [row["model"] for row in shown], cells)]
    if shown := [row for row in rows if "features" in row]:
        modules = list(dict.fromkeys(module for row in shown for module in row["features"]))
        cells = [[row["model"] for row in shown]]
        cells += [[number(row["features"].get(module), 4) for row in shown] for module in modules]
        blocks += ["## relative error of each feature", aligned(["module", *modules], cells)]
    blocks += ["## Settings", settings_table(settings)]
    return "\n\n".join(blocks) + "\n"


def aligned(names: list[str], cells: list[list[str]]) -> str:
    """A Markdown table: a line is a name and its cells. The first line has the titles."""
    head, *others = ["| " + " | ".join([name, *line]) + " |" for name, line in zip(names, cells, strict=True)]
    return "\n".join([head, "|---|" + "---:|" * len(cells[0]), *others])


def settings_table(settings: dict) -> str:
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in settings.items())])


def number(value: float | None, digits: int) -> str:
    """The value with thousands separators; a dash for None."""
    return "–" if value is None else f"{value:,.{digits}f}"


def _curves(rows: list[dict]) -> list[str]:
    found = {name: None for row in rows for name in row.get("by_timestep", {})}
    return [name for name in ("loss_output", "loss_noise", "feature") if name in found]


def _ranges(edges: list[int]) -> list[str]:
    return [f"{a}–{b - 1}" for a, b in itertools.pairwise(edges)]


def picture(result: dict, path: Path) -> None:
    """Error curves by timestep, dots of the features, and bars of every other figure. One colour per model."""
    rows = result["rows"]
    color = {row["model"]: figures.LINES[i % len(figures.LINES)] for i, row in enumerate(rows)}
    curves, bars = _curves(rows), [c for c in COLUMNS[4:] if any(row.get(c[0]) is not None for row in rows)]
    features = any("features" in row for row in rows)
    panels = len(curves) + features + len(bars)
    if not panels:
        return
    figure, axes = figures.panels(panels, height=max(3.0, 1.0 + 0.28 * len(rows)))
    free = iter(axes)
    for name in curves:
        axis, edges, values = next(free), result["settings"]["timesteps"], []
        middles = [(a + b - 1) / 2 for a, b in itertools.pairwise(edges)]
        for row in rows:
            if name in row.get("by_timestep", {}):
                line = row["by_timestep"][name]
                values += line
                axis.plot(middles, line, marker="o", markersize=3, color=color[row["model"]])
        figures.readable(axis, "y", values)
        axis.set_title(("features, relative error" if name == "feature" else name) + " by timestep", fontsize=10)
        figures.steps(axis, "timestep")
    if features:
        axis, shown = next(free), [row for row in rows if "features" in row]
        modules = list(dict.fromkeys(module for row in shown for module in row["features"]))
        for row in shown:
            places = [modules.index(m) for m in row["features"]]
            axis.plot(places, row["features"].values(), "o", color=color[row["model"]])
        # The ends tell modules apart: down_blocks.2.attentions.1.proj_out
        axis.set_xticks(range(len(modules)), [end_of(m, 22) for m in modules], rotation=40, ha="right", fontsize=7)
        figures.readable(axis, "y", [value for row in shown for value in row["features"].values()])
        axis.set_title("features, relative error", fontsize=10)
    for key, title, digits, _ in bars:
        axis, shown = next(free), [row for row in rows if row.get(key) is not None]
        places = range(len(shown))
        finite = [row[key] if math.isfinite(row[key]) else 0.0 for row in shown]
        drawn = axis.barh(places, finite, color=[color[row["model"]] for row in shown])
        axis.bar_label(drawn, [number(row[key], digits) for row in shown], fontsize=8, padding=2)
        axis.set_yticks(places, [end_of(row["model"], 28) for row in shown], fontsize=7)
        axis.set_ylim(max(len(shown), 3) - 0.4, -0.6)  # one bar alone would fill the panel
        axis.set_xlim(min(0, *finite), 1.2 * max(*finite, 0) or 1)
        figures.readable(axis, "x", [], log=False)
        axis.set_title(title, fontsize=10)
    handles = [axes[0].plot([], [], color=color[row["model"]], linewidth=4)[0] for row in rows]
    names = [end_of(row["model"], 40) for row in rows]
    figure.legend(handles, names, loc="outside upper center", ncols=min(4, len(rows)), fontsize=8)
    figures.save(figure, path)


def end_of(text: str, length: int) -> str:
    """As much of the end of a text as `length` letters hold: the end tells one path from another."""
    return text if len(text) <= length else f"…{text[1 - length :]}"
