"""A pipeline folder of diffusers -> an Orbax checkpoint of its parameters.

    python -m convert.from_diffusers --model DIR|HUB_ID --out DIR

OUT gets the json files, tokenizer/ and scheduler/ of the model, export.json, and checkpoints/0 with the tree
{"params": {"unet": ..., "vae": ..., "text_encoder": ...}} in the dtypes of the files; `convert.to_diffusers`
makes a pipeline folder of it again. A training takes the pipeline folder itself: this is for use of the
weights elsewhere."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flaxkd import export, keys, pretrained


def convert(model: str | None, out: Path) -> dict[str, tuple[int, int]]:
    """Writes `out`; returns {part: (tensors, parameters)}. Raises ValueError if `out` exists and is not
    empty, and like `pretrained.resolve`, `read_tensors` and `keys.from_tensors`."""
    out, source = Path(out).absolute(), pretrained.resolve(model)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose a new folder")
    params, configs = {}, {}
    for part in pretrained.MODELS:
        configs[part] = pretrained.read_config(source, part)
        like = pretrained.shapes(pretrained.build(part, configs[part]), part)
        params[part] = keys.from_tensors(pretrained.read_tensors(source, part), like, f"{source}/{part}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        shutil.copyfile(source / "model_index.json", new / "model_index.json")
        shutil.copytree(source / "scheduler", new / "scheduler")
        pretrained.copy_tokenizer(source, new)
        for part in pretrained.MODELS:
            (new / part).mkdir()
            shutil.copyfile(source / part / "config.json", new / part / "config.json")
        export.plan(new, new, configs)
        (new / "converted.json").write_text(json.dumps({"model": model}) + "\n")
        with ocp.CheckpointManager(new / "checkpoints") as manager:
            manager.save(0, args=ocp.args.StandardSave({"params": params}))
        if out.exists():
            out.rmdir()
        new.rename(out)
    leaves = {part: jax.tree.leaves(tree) for part, tree in params.items()}
    return {part: (len(arrays), sum(x.size for x in arrays)) for part, arrays in leaves.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.from_diffusers",
        description="Converts a diffusers pipeline to an Orbax checkpoint.",
    )
    parser.add_argument(
        "--model", help="pipeline folder or hub id (owner/name); without it the embedded teacher"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder")
    args = parser.parse_args(arguments)
    try:
        counts = convert(args.model, args.out)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(1, f"{error}\n")
    for part, (tensors, size) in counts.items():
        print(f"{part:13} {tensors:4} tensors  {size:13,} parameters")
    print(f"wrote {args.out}; and back: python -m convert.to_diffusers --workdir {args.out} --out DIR")


if __name__ == "__main__":
    main()
