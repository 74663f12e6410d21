"""A workdir of a training, or of `convert.from_diffusers` -> a whole pipeline folder of diffusers.

    python -m convert.to_diffusers --workdir DIR --out DIR [--dtype float16|float32] [--ema|--no-ema]
    [--source DIR]

What the newest readable checkpoint holds replaces the same parts of the source; the folder loads with
StableDiffusionPipeline.from_pretrained. A training writes one itself at its end: this is for checkpoints in
between."""

import argparse
from pathlib import Path

import numpy as np

from flaxkd.export import export
from flaxkd.pretrained import MODELS


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m convert.to_diffusers",
        description="Exports a workdir as a pipeline folder of diffusers.",
    )
    parser.add_argument(
        "--workdir", type=Path, required=True, help="of flaxkd.train or convert.from_diffusers"
    )
    parser.add_argument("--out", type=Path, required=True, help="new folder, or an earlier export to replace")
    parser.add_argument(
        "--dtype", choices=["float16", "float32"], help="of the trained parts; default: unchanged"
    )
    parser.add_argument(
        "--ema", action=argparse.BooleanOptionalAction, help="the moving average; default: if there is one"
    )
    parser.add_argument(
        "--source", help="pipeline folder or hub id of the other parts; default: as export.json says"
    )
    args = parser.parse_args(arguments)
    dtype = None if args.dtype is None else np.dtype(args.dtype)
    try:
        export(args.workdir, args.out, dtype, args.ema, args.source)
    except (ValueError, FileNotFoundError) as error:
        parser.exit(1, f"{error}\n")
    for part in MODELS:
        for path in sorted((args.out / part).glob("*.safetensors")):
            print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    print(f'wrote {args.out}; try: StableDiffusionPipeline.from_pretrained("{args.out}")')


if __name__ == "__main__":
    main()
