"""From a workdir to a pipeline folder of diffusers.

A workdir, of a training or of `convert.from_diffusers`, holds
    export.json     {"source": pipeline folder of what was not trained, "parts": {"unet": its config.json}}
    checkpoints/    Orbax steps with the tree {"params": {"unet": ...}, "ema": {"unet": ...} or nothing, ...}
and, of a training, config.json, metrics.jsonl and samples.png, which the model card shows.
"""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from flaxkd import pretrained
from flaxkd.export.card import model_card

EXPORT = "export.json"


def plan(workdir: Path, source: Path | str | None, parts: dict[str, dict]) -> None:
    """Writes export.json: the parts that the checkpoints of this workdir hold, with their configurations.

    source: None for the embedded teacher. That one, and a folder in the workdir, are not written as absolute
    paths, so that the workdir can be moved to another machine."""
    workdir = Path(workdir)
    if source is not None and Path(source).resolve() == pretrained.EMBEDDED.resolve():
        source = None
    elif source is not None and Path(source).resolve().is_relative_to(workdir.resolve()):
        source = Path(source).resolve().relative_to(workdir.resolve())
    content = {"source": None if source is None else str(source), "parts": parts}
    (workdir / EXPORT).write_text(json.dumps(content, indent=2) + "\n")


def export(
    workdir: Path, out: Path, dtype=None, ema: bool | None = None, source: Path | str | None = None
) -> Path:
    """Writes the newest readable checkpoint of `workdir` as a whole pipeline folder `out`, and returns `out`.

    dtype: of the trained parts, None as they are. ema: the moving average or the parameters themselves, None
    for the average if there is one. source: where the other parts are, None for where export.json says.
    Raises FileNotFoundError if the workdir has no export.json, no checkpoint or its source is gone, and
    ValueError if the checkpoint lacks what is asked for (or like `pretrained.save`)."""
    workdir = Path(workdir)
    parts, folder = read_plan(workdir, source)
    step, params, averaged = restore(workdir / "checkpoints", ema)
    return write(workdir, out, params, step=step, averaged=averaged, dtype=dtype, parts=parts, source=folder)


def write(
    workdir: Path,
    out: Path,
    params: dict,
    *,
    step: int,
    averaged: bool = False,
    dtype=None,
    parts: dict[str, dict] | None = None,
    source: Path | None = None,
) -> Path:
    """Like `export`, for params {part: tree} that are in memory. parts and source: None for those of
    export.json."""
    workdir = Path(workdir)
    planned, folder = read_plan(workdir, source)
    parts, source = parts or planned, source or folder
    if missing := [part for part in parts if part not in params]:
        raise ValueError(
            f"the checkpoint holds {', '.join(params)}, but not {', '.join(missing)} of {EXPORT}"
        )
    card = model_card(workdir, source, parts, step, averaged)
    picture = workdir / "samples.png"
    return pretrained.save(
        out,
        source=source,
        parts={part: (config, params[part]) for part, config in parts.items()},
        dtype=dtype,
        card=card,
        files={picture.name: picture} if picture.is_file() else None,
    )


def restore(folder: Path, ema: bool | None = None) -> tuple[int, dict, bool]:
    """(step, params {part: tree of numpy arrays}, whether they are averages) of the newest good checkpoint.

    Only that tree is read: the optimizer state, which is larger, is neither known nor loaded."""
    steps = sorted((p for p in Path(folder).glob("*") if p.name.isdigit()), key=lambda p: -int(p.name))
    broken = {}
    for step in steps:
        try:
            name, tree = _restore_tree(step.absolute(), ema)
        except Exception as error:  # whatever Orbax makes of a file that was cut off
            broken[step] = str(error).strip().partition("\n")[0]
            logging.warning("checkpoint %s cannot be read, trying the one before: %s", step, broken[step])
        else:
            if tree is None:
                raise ValueError(
                    f"{step} holds no moving average (ema): export the parameters themselves, --no-ema"
                )
            return int(step.name), tree, name == "ema"
    if broken:
        lines = "".join(f"\n  {step}: {error}" for step, error in broken.items())
        raise ValueError(f"no checkpoint in {folder} can be read:{lines}")
    raise FileNotFoundError(f"{folder} has no checkpoint: has this training saved one yet?")


def _restore_tree(step: Path, ema: bool | None) -> tuple[str, dict | None]:
    """("params" or "ema", that tree), the latter None if it is asked for and was not saved."""
    handler = ocp.PyTreeCheckpointHandler()
    for item in sorted(path.parent for path in step.glob("*/_METADATA")):
        saved = handler.metadata(item).tree
        if not isinstance(saved, dict) or "params" not in saved:
            continue
        averaged = bool(saved.get("ema"))
        name = "ema" if (averaged if ema is None else ema) else "params"
        if name == "ema" and not averaged:
            return name, None
        tree = {name: jax.tree.map(lambda _: 0, saved[name])}
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
        request = ocp.args.PyTreeRestore(item=tree, restore_args=arguments, partial_restore=True)
        return name, ocp.Checkpointer(handler).restore(item, args=request)[name]
    raise ValueError("it holds no tree with 'params'")


def read_plan(workdir: Path, source: Path | str | None = None) -> tuple[dict[str, dict], Path]:
    """({part: its config.json} of the parts in the checkpoints, the pipeline folder of the others), of export.json.

    source: None for where export.json says. Raises FileNotFoundError with the remedy if one of them is gone."""
    path = workdir / EXPORT
    if not path.is_file():
        raise FileNotFoundError(
            f"{workdir.absolute()} has no {EXPORT}: give a workdir of flaxkd.train or convert.from_diffusers"
        )
    content = json.loads(path.read_text())
    if source is None:
        source = content["source"]
        if source is not None and (workdir / source).is_dir():  # relative to the workdir, or absolute
            source = workdir / source
    try:
        return content["parts"], pretrained.resolve(source)
    except FileNotFoundError as error:
        hint = f"{path} names it as the source of what was not trained; --source DIR gives another place."
        raise FileNotFoundError(f"{error}\n{hint}") from None
