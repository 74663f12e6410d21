"""A pipeline folder of diffusers -> an Orbax checkpoint of its parameters.

    python -m convert.from_diffusers --model DIR|FILE|HUB_ID [--vae DIR|FILE|HUB_ID] --out DIR

OUT gets the JSON files, tokenizers and scheduler/ of the model, export.json, and checkpoints/0 with the tree
{"params": {"unet": ..., "vae": ..., "text_encoder": ...}} of all networks, in the dtypes of the files.
`convert.to_diffusers` turns it back into a pipeline folder. Training takes the pipeline folder itself: this is for use
of the weights elsewhere."""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flaxkd import export
from flaxkd.machine import command, files
from flaxkd.pretrained import Folder
from flaxkd.pretrained.folder import CONFIGS, SHARED
from flaxkd.pretrained.writing import write_tokenizer


def convert(model: str | None, out: Path, vae: str | None = None) -> dict[str, tuple[int, int]]:
    """Writes `out`; returns {part: (tensors, parameters)}. Raises ValueError if `out` exists and is not
    empty, and as `Folder.open` and `Folder.stored` do."""
    out, source = Path(out).absolute(), Folder.open(model, vae)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not empty: choose a new folder")
    configs = {part: source.config(part) for part in source.parts}
    params = {part: source.stored(part) for part in source.parts}
    with files.whole_folder(out) as new:
        index = {name: value for name, value in source.index.items() if name != SHARED}  # all of it is here now
        files.write_json(new / "model_index.json", index)
        write_tokenizer(source, new)
        for part, config in (configs | {"scheduler": source.config("scheduler")}).items():
            files.write_json(new / part / CONFIGS[part], config)
        export.write_record(new, Folder(new), configs)
        files.write_json(new / "converted.json", {"model": model})
        with ocp.CheckpointManager(new / "checkpoints") as manager:
            manager.save(0, args=ocp.args.StandardSave({"params": params}))
    leaves = {part: jax.tree.leaves(tree) for part, tree in params.items()}
    return {part: (len(arrays), sum(x.size for x in arrays)) for part, arrays in leaves.items()}


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.from_diffusers", __doc__)
    command.add(parser, "model", help=f"{command.PIPELINE}; default: the embedded teacher")
    command.add(parser, "vae")
    command.add(parser, "out", required=True, help="new folder")
    args = parser.parse_args(arguments)
    counts = convert(args.model, args.out, args.vae)
    for part, (tensors, size) in counts.items():
        print(f"{part:13} {tensors:4} tensors  {size:13,} parameters")
    print(f"wrote {args.out}; to go back: python -m flaxkd to-diffusers --workdir {args.out} --out DIR")


if __name__ == "__main__":
    main()
