"""The adapters of a run as LoRA files, with a card for the hub."""

from collections.abc import Mapping
from pathlib import Path

from flaxkd.diffusion import samplers
from flaxkd.diffusion.schedule import BETAS
from flaxkd.export.card import MINIATURES, front_and_licence, names, origin
from flaxkd.export.workdir import Adapted
from flaxkd.machine import files
from flaxkd.pretrained import Folder, hub, lora_files, lora_writing
from flaxkd.weights import lora

ADAPTERS = "lora"  # the folder of a workdir


def write_adapters(workdir: Path, folder: Folder, adapters: Mapping[str, dict], adapted: Adapted, step: int) -> Path:
    """Writes WORKDIR/lora, and returns it: PEFT names for diffusers, kohya's for other programs, and a card.

    folder: the pipeline with the adapted parts' own configurations. adapters: {part: adapter}, as trained; their scales
    go into the files' matrices, so that every program applies the same. step: of the checkpoint."""
    run, teacher = origin(workdir, folder)
    out, name = workdir / ADAPTERS, workdir.resolve().name
    parts = {part: lora.scaled(adapter, adapted.scales[part]) for part, adapter in adapters.items()}
    if adapted.worn:
        path, scale = lora_files.split(adapted.worn)
        worn = lora_files.fit(lora_files.only(lora_files.read(path), folder.family.encoders), folder)
        parts |= {part: lora.scaled(adapter, scale) for part, adapter in worn.items()}
    trained = {"steps": step, "learning_rate": str(run["learning_rate"])}
    if caption := run["data"]["caption"]:  # what user interfaces show as the words that call it
        trained["tag_frequency"] = {name: {caption: 1}}
    student = run["student"] and Path(run["student"]).stem
    plain = names(teacher)[1]
    header = lora_writing.header(
        folder, name, parts, student=student, teacher=plain if student else None, trained=trained
    )
    lora_writing.write(out / lora_files.NAME, parts, "peft", header)
    lora_writing.write(out / f"{name}.safetensors", parts, "kohya", header)
    files.write_text(out / "README.md", _card(run, teacher, folder, parts, adapted, name, step))
    return out


def _card(
    run: dict, teacher: str | None, folder: Folder, parts: Mapping[str, dict], adapted: Adapted, name: str, step: int
) -> str:
    """The text of README.md. run, teacher: from `origin`."""
    front, licence = front_and_licence(run, teacher, folder, ["lora"])
    called, student = names(teacher)[0], run["student"]
    of = f"the student `{Path(student).stem}` of {called}" if student else called
    base = adapted.base or teacher
    in_clone = f"flaxkd/assets/{hub.MINIATURES.get(base, hub.EMBEDDED).name}"  # where diffusers finds a miniature
    base = in_clone if base in MINIATURES else names(base)[1]
    rows = []
    for part, adapter in parts.items():
        pairs = lora.layers(adapter).values()
        ranks = ", ".join(map(str, sorted({a.shape[-1] for a, _ in pairs})))
        rows.append(f"| {part} | {len(pairs)} | {ranks} | {sum(a.size + b.size for a, b in pairs):,} |")
    prompt = run["data"]["caption"] or (run["sample"]["prompts"] or ["a photograph of a red bicycle"])[0]
    pipeline, sampler = folder.pipeline, folder.config("scheduler").get("_class_name")
    steps = samplers.usual_steps(None, folder.config("scheduler"))
    other = samplers.few_steps(folder.config("scheduler")) is not None  # it draws with another sampler than its model
    lines = [
        f"from diffusers import {', '.join(sorted({pipeline, *([sampler] * other)}))}",
        "",
        f"pipeline = {pipeline}.from_pretrained({base!r})",
        *[f"pipeline.scheduler = {sampler}.from_config(pipeline.scheduler.config, {_options(folder)})"] * other,
        f'pipeline.load_lora_weights("PATH OR HUB ID OF THIS FOLDER", weight_name={lora_files.NAME!r})',
        f"settings = dict(num_inference_steps={steps}, guidance_scale={folder.guidance:g})",
        f'pipeline({prompt!r}, **settings).images[0].save("picture.png")',
    ]
    blocks = [
        front,
        f"# {name}, a LoRA",
        f"For {of}. Trained by flaxkd, in JAX, {step:,} optimizer steps. All scales are in the matrices: "
        "alpha is the rank.",
        "\n".join(["| part | modules | rank | parameters |", "|---|---:|---:|---:|", *rows]),
        "\n".join(["## Use", "```python", *lines, "```"]),
        f"ComfyUI and other programs take `{name}.safetensors`, which has the names of kohya's scripts.",
        licence,
    ]
    return "\n\n".join(blocks) + "\n"


def _options(folder: Folder) -> str:
    """The options of its sampler as keyword arguments: the pipeline that a LoRA is loaded into may have others."""
    config = folder.config("scheduler")
    known = {*samplers.SAMPLERS[samplers.own(config)].defaults} - {*BETAS, "prediction_type", "rescale_betas_zero_snr"}
    return ", ".join(f"{name}={value!r}" for name, value in config.items() if name in known)
