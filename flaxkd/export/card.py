"""The model card of an exported pipeline: README.md with front matter for the hub."""

import json
import re
from pathlib import Path

from huggingface_hub import ModelCardData

from flaxkd.diffusion import samplers
from flaxkd.machine import files
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import Folder, count
from flaxkd.weights.quantize import SCHEMES, Quantization

PREVIEW = "samples.png"
MINIATURES = {None: "the miniature teacher of flaxkd", "miniature_xl": "the miniature of Stable Diffusion XL in flaxkd"}

OPENMOJI = """\
Pictures of [OpenMoji](https://openmoji.org), the open-source emoji and icon project, went into these weights.
Their licence is [CC BY-SA 4.0](https://creativecommons.org/licenses/by-sa/4.0/). Captions are Unicode names
and the short names of the Python package `emoji`."""

FOREIGN = """\
The weights derive from those of {teacher}, whose licence{licence} goes with them: read it before you use or
publish this model."""

OWN = "These weights were trained on the trainer's own pictures; the trainer chooses the licence."


def model_card(workdir: Path, source: Folder, parts: dict[str, dict], step: int, averaged: bool) -> str:
    """The text of README.md for the exported `parts` {part: config.json}.

    workdir: its config.json, metrics.jsonl and samples.png are shown if they exist. source: the pipeline folder
    of the teacher. step: of the checkpoint. averaged: whether the weights are the moving average."""
    run, teacher = origin(workdir, source)
    name, plain = names(teacher)
    title, text = headline(run, name, plain, list(parts))
    front, licence = front_and_licence(run, teacher, source, ["knowledge-distillation"] * bool(run.get("student")))
    blocks = [front, f"# {title}", text]
    if (workdir / PREVIEW).is_file():
        columns = "The columns are the teacher, the student as cut, and the student after distillation. "
        columns = columns if run.get("student") else ""
        blocks.append(f"![samples]({PREVIEW})")
        blocks.append(f"A row is a prompt. {columns}The seeds are the same in a row.")
    prompts = run.get("sample", {}).get("prompts") or ["a photograph of a red bicycle leaning on a wall"]
    blocks += [
        counts(parts, source),
        depths(parts.get("unet", source.config("unet"))),
        quantized(source.quantization),
        _usage(parts, source, prompts[0]),
        figures(files.read_jsonl(workdir / "metrics.jsonl")),
        measured(workdir, "evaluation"),
        measured(workdir, "bench"),
    ]
    blocks.append(_making(run | {"teacher": teacher and plain}, step, averaged) if run else "")
    return "\n\n".join(block for block in [*blocks, licence] if block) + "\n"


def origin(workdir: Path, source: Folder) -> tuple[dict, str | None]:
    """(config.json of the run, {} for a workdir of convert.from_diffusers; the name of its teacher in a config)."""
    run = _read_json(workdir / "config.json")
    return run, run["teacher"] if run else _read_json(workdir / "converted.json").get("model", str(source.path))


def front_and_licence(run: dict, teacher: str | None, source: Folder, tags: list[str]) -> tuple[str, str]:
    """The front matter of a card, and its last section. run, teacher: from `origin`. tags: besides the usual ones."""
    name, plain = names(teacher)
    miniature = teacher in MINIATURES
    openmoji = (miniature and not run.get("blank")) or run.get("data", {}).get("source") == "openmoji"
    inherited = _licence(source.path)
    licences = {"cc-by-sa-4.0"} if openmoji else set()
    licences |= {inherited} if inherited else set() if miniature else {"other"}
    [licence] = licences if len(licences) == 1 else ["other"]  # two licences together have no name
    front = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        base_model=teacher if name != plain else None,
        tags=["text-to-image", "diffusers", source.family.tag, *tags],
    )
    foreign = FOREIGN.format(teacher=name, licence=f" ({inherited})" if inherited else "")
    notes = [foreign] if not miniature else [] if openmoji else [OWN]
    notes = "\n\n".join(["## Licence", *notes, *([OPENMOJI] if openmoji else [])])
    return f"---\n{front.to_yaml()}\n---", notes


def names(teacher: str | None) -> tuple[str, str]:
    """The name of `config.teacher` for a reader: (in Markdown, as plain text)."""
    if teacher in MINIATURES:
        return (MINIATURES[teacher],) * 2
    path = Path(teacher)
    if not path.exists() and teacher.count("/") == 1:
        return f"[{teacher}](https://huggingface.co/{teacher})", teacher
    return (path.parent.name if path.name == "diffusers" else path.name,) * 2  # others do not have this path


def headline(run: dict, name: str, plain: str, parts: list[str]) -> tuple[str, str]:
    """(title, one or two sentences). run: its config.json; {} for a conversion. name, plain: from `names`."""
    student, what = run.get("student"), ", ".join(parts)
    if student:
        student = Path(student).stem  # the name of a row, or its file
        title = f"{student}, distilled from {plain}"
        text = (
            f"The UNet is the student `{student}`, distilled from {name}: whole blocks and layers were taken "
            "away, and the rest learnt to reproduce the outputs and features of the original."
        )
    elif run:
        title, text = "A text-to-image pipeline trained with flaxkd", f"Trained here: {what}."
    else:
        title, text = "A converted text-to-image pipeline", f"Converted from {name}, unchanged."
    if run:
        text += f" New in this folder: {what}. All else is as in the source."
    return title, text


def _licence(source: Path) -> str | None:
    """The licence named in the model card of the pipeline folder `source`, if any."""
    card = Path(source) / "README.md"
    front = card.read_text(encoding="utf-8", errors="replace").split("---\n")[1:2] if card.is_file() else []
    named = re.search(r"^license: *(\S+)", "".join(front), re.MULTILINE)
    return named and named[1]


def _read_json(path: Path) -> dict:
    return files.read_json(path) if path.is_file() else {}


def counts(parts: dict[str, dict], source: Folder) -> str:
    """A table of the parameters of `parts` {part: config.json}, and of the parts they replace in `source`."""
    lines = ["| part | parameters | of the source |", "|---|---:|---:|"]
    for part, config in parts.items():
        lines.append(f"| {part} | {count(part, config):,} | {source.count(part):,} |")
    return "\n".join(lines)


def depths(unet: dict) -> str:
    """The transformer blocks of a UNet's attentions, for those who build it elsewhere; "" if each has one.

    unet: its config.json. Until diffusers 0.22 an up block was as deep as its twin, and a mid block had attention."""
    c = UNetConfig.from_dict(unet)
    numbers = lambda stages: ", ".join(" ".join("-" if n is None else str(n) for n in stage.depths) for stage in stages)
    paths = {"down": c.down, "mid": [c.mid] if c.mid else [], "up": c.up}
    if all(n in (None, 1) for stages in paths.values() for stage in stages for n in stage.depths):
        return ""
    found = "; ".join(f"{path} {numbers(stages) or 'none'}" for path, stages in paths.items())
    new = c.reverse_transformer_layers_per_block or c.mid_block_type == "UNetMidBlock2D"
    needed = " It needs diffusers 0.22 or newer: older versions build other layers." if new else ""
    return f"Transformer blocks of each layer, `-` for a layer without attention: {found}.{needed}"


def quantized(how: Quantization | None) -> str:
    """What the weights of a quantized UNet are; "" for full precision."""
    if how is None:
        return ""
    scheme, kept = SCHEMES[how.scheme], ", ".join(f"`{end}`" for end in how.full)
    words = f"{scheme.weights} weights" + f" and {scheme.activations} activations" * bool(scheme.activations)
    if how.on_grid:
        text = (
            f"The weights of the UNet are rounded for {words} (`{how.scheme}`): each is a number of {scheme.weights} "
            "times the scale of its group, stored as a float, so that any program draws with them as they are."
        )
    else:
        text = (
            f"The UNet was trained to compute with {words} (`{how.scheme}`). Stored are the weights before rounding, "
            "and flaxkd rounds them as it draws. For other programs, "
            f"`python -m convert.to_diffusers --workdir DIR --quantize {how.scheme} --out NEW` writes them rounded."
        )
    return f"## Quantization\n{text} In full precision are {kept or 'no layers'}."


def _usage(parts: dict[str, dict], source: Folder, prompt: str) -> str:
    pipeline, steps = source.pipeline, samplers.usual_steps(None, source.config("scheduler"))
    few = f"It draws in few steps, {steps} are usual, and has learnt its guidance: leave it at {source.guidance:g}.\n"
    few = "" if samplers.few_steps(source.config("scheduler")) is None else few
    try:
        pixels = "{} x {} pixels".format(*source.replace(parts, {}).size)
    except ValueError:  # its configuration has no size
        pixels = "give it height and width in pixels"
    return f"""\
## Use
```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("PATH OR HUB ID OF THIS FOLDER")
settings = dict(num_inference_steps={steps}, guidance_scale={source.guidance:g})
pipeline({prompt!r}, **settings).images[0].save("picture.png")  # {pixels}
```
{few}There is no safety checker in this folder."""


def figures(records: list[dict]) -> str:
    """A table of every logged figure, except single feature pairs: its first and last value."""
    seen: dict[str, list] = {}
    for record in records:
        for name, value in record.items():
            if name != "step" and "feature/" not in name:
                seen.setdefault(name, []).append((record["step"], value))
    if not seen:
        return ""
    rows = [f"| {name} | {v[0][1]:.4g} | {v[-1][1]:.4g} | {v[-1][0]} |" for name, v in seen.items()]
    return "\n".join(["## Figures", "| | first | last | at step |", "|---|---:|---:|---:|", *rows])


def measured(workdir: Path, name: str) -> str:
    """Heading and first table of WORKDIR/NAME/NAME.md, by flaxkd.evaluate or flaxkd.bench; "" without the file."""
    path = workdir / name / f"{name}.md"
    return "\n".join(f"#{path.read_text(encoding='utf-8')}".split("\n\n")[:2]) if path.is_file() else ""


def _making(run: dict, step: int, averaged: bool) -> str:
    weights = "the moving average of the weights (EMA)" if averaged else "the weights themselves"
    return f"""\
## How it was made
By flaxkd, in JAX, {step:,} optimizer steps; stored are {weights}. The whole configuration of the run:
<details><summary>config.json</summary>

```json
{json.dumps(run, indent=2)}
```
</details>"""
