"""A workdir of a run, or of `convert.from_diffusers` -> a whole pipeline folder of diffusers.

    python -m convert.to_diffusers --workdir DIR --out DIR [--dtype float16|float32] [--ema|--no-ema]
    [--source DIR] [--push-to-hub OWNER/NAME [--private]]

The parts in the newest readable checkpoint replace those of the source. StableDiffusionPipeline.from_pretrained
loads the folder. A run exports itself at its end: this command is for checkpoints in between. --push-to-hub
uploads the folder too; log in with `hf auth login` first."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flaxkd.export import export
from flaxkd.machine import command


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_diffusers", __doc__)
    add = parser.add_argument
    add("--workdir", type=Path, required=True, help="of flaxkd.train or convert.from_diffusers")
    command.add(parser, "out", required=True, help="new folder, or an earlier export to replace")
    command.add(parser, "dtype", choices=["float16", "float32"], help="of the trained parts; default: unchanged")
    add("--ema", action=argparse.BooleanOptionalAction, help="the moving average; default: if there is one")
    add("--source", help="pipeline folder or hub id of the other parts; default: as in export.json")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    add("--private", action="store_true", help="make the repository private if it is new")
    args = parser.parse_args(arguments)
    dtype = None if args.dtype is None else np.dtype(args.dtype)
    upload = uploader(args.push_to_hub, args.private) if args.push_to_hub else None
    export(args.workdir, args.out, dtype, args.ema, args.source)
    address = upload(args.out) if upload else None
    for path in sorted(args.out.glob("*/*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    print(f'wrote {args.out}; try: StableDiffusionPipeline.from_pretrained("{args.out}")')
    if address:
        print(f"uploaded to {address}")


def uploader(name: str, private: bool) -> Callable[[Path], str]:
    """Creates the hub repository `name` if it is new. Returns a function that uploads a folder and returns its address.

    Called before the export: a missing login or a misspelt name is reported first. Raises ValueError."""
    from huggingface_hub import HfApi

    api = HfApi()

    def attempt(what: Callable, *args, **kwargs) -> None:
        try:
            what(*args, **kwargs)
        except Exception as error:  # from hub, login, network or name: the remedies are the same
            reason = str(error).strip().splitlines()[0]
            raise ValueError(
                f"{name} cannot be written on {api.endpoint}:\n  {type(error).__name__}: {reason}\n"
                "Log in with `hf auth login`, give OWNER/NAME with an owner that is yours, unset HF_HUB_OFFLINE, "
                "and run the same command again."
            ) from error

    def upload(folder: Path) -> str:
        message = "Upload of a flaxkd export"
        attempt(api.upload_folder, repo_id=name, folder_path=folder, commit_message=message)
        return f"{api.endpoint}/{name}"

    attempt(api.create_repo, name, private=private, exist_ok=True)
    return upload


if __name__ == "__main__":
    main()
