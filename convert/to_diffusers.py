"""A workdir of a run, or of `convert.from_diffusers` -> a whole pipeline folder of diffusers, or a single file.

    python -m convert.to_diffusers --workdir DIR --out DIR [--dtype float16|float32] [--ema|--no-ema]
    [--quantize w4 [--sdnq]] [--source DIR] [--push-to-hub OWNER/NAME [--private]]
    python -m convert.to_diffusers --workdir DIR --single-file FILE.safetensors [--for comfyui|a1111|sd.cpp]
    python -m convert.to_diffusers --model DIR|FILE|HUB_ID [--vae DIR|FILE|HUB_ID] --out DIR or --single-file FILE

The parts in the newest readable checkpoint replace those of the source. diffusers loads the folder. A run exports
itself at its end: this command is for checkpoints in between. --push-to-hub uploads the folder too; log in with
`hf auth login` first. --single-file writes one file by the original names, for ComfyUI and other programs;
docs/using.md says who reads which student."""

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flaxkd import export
from flaxkd.export import sdnq, single_file
from flaxkd.machine import command
from flaxkd.pretrained import Folder, save
from flaxkd.weights import quantize


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_diffusers", __doc__)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--workdir", type=Path, help="of flaxkd.train or convert.from_diffusers")
    command.add(source, "model", help=f"{command.PIPELINE}, in place of a workdir")
    command.add(parser, "vae")
    command.add(parser, "out", help="new folder, or an earlier export to replace")
    add("--single-file", type=Path, metavar="FILE", help="new file *.safetensors by the original names")
    add("--for", dest="program", choices=single_file.PROGRAMS, help="the program that must read the single file")
    half = "of a workdir's trained parts, or of all of a --model or single file; default: unchanged"
    command.add(parser, "dtype", choices=["float16", "float32"], help=half)
    add("--ema", action=argparse.BooleanOptionalAction, help="the moving average; default: if there is one")
    rounding = "round the UNet's weights, as flaxkd.train --config.quantize does; docs/quantization.md"
    add("--quantize", choices=[*quantize.SCHEMES], help=rounding)
    add("--sdnq", action="store_true", help="write few bits a weight of the UNet, for diffusers with the package sdnq")
    add("--source", help="pipeline folder or hub id of the other parts; default: as in export.json")
    add("--push-to-hub", metavar="OWNER/NAME", help="upload the folder to this repository of the hub")
    add("--private", action="store_true", help="make the repository private if it is new")
    args = parser.parse_args(arguments)
    if args.out is None and (args.single_file is None or args.push_to_hub):
        parser.error("give --out DIR" + " or --single-file FILE" * (args.push_to_hub is None))
    if args.sdnq and args.single_file is not None:
        parser.error("--sdnq writes a folder, and no --single-file")
    if args.workdir is None:
        command.refuse(parser, args, ["--ema", "--source"], "of --workdir, and not of --model")
    if args.push_to_hub is None:
        command.refuse(parser, args, ["--private"], "of --push-to-hub")
    if args.single_file is None and args.program:
        parser.error("--for: of --single-file")
    if args.single_file is not None and args.single_file.suffix != ".safetensors":
        parser.error(f"--single-file {args.single_file} must end in .safetensors")
    dtype = None if args.dtype is None else np.dtype(args.dtype)
    if args.out is not None:
        write_folder(args, dtype)
    if args.single_file is not None:
        write_single_file(args, dtype)


def write_folder(args: argparse.Namespace, dtype) -> None:
    upload = uploader(args.push_to_hub, args.private) if args.push_to_hub else None
    if args.sdnq:
        others = dtype if args.workdir is None else None
        sdnq.write(args.out, opened(args), args.quantize, dtype, source_dtype=others)
    elif args.workdir is None:
        save(args.out, source=rounded(opened(args), args.quantize, dtype), parts={}, source_dtype=dtype)
    else:
        export.export(args.workdir, args.out, dtype, args.ema, args.source, args.vae, args.quantize)
    address = upload(args.out) if upload else None
    for path in sorted(args.out.glob("*/*.safetensors")):
        print(f"{path}  {path.stat().st_size / 1e6:,.1f} MB")
    pipeline = Folder(args.out).index["_class_name"]
    print(f'wrote {args.out}; try: {pipeline}.from_pretrained("{args.out}")')
    if address:
        print(f"uploaded to {address}")


def write_single_file(args: argparse.Namespace, dtype) -> None:
    folder = rounded(opened(args), args.quantize, dtype)
    able = single_file.write(args.single_file, folder, program=args.program, dtype=dtype)
    titles = ", ".join(single_file.PROGRAMS[name].title for name in able)
    print(f"wrote {args.single_file}, {args.single_file.stat().st_size / 1e6:,.1f} MB, read by: {titles or 'flaxkd'}")


def opened(args: argparse.Namespace) -> Folder:
    if args.workdir is None:
        return export.open_model(args.model, args.vae)
    return export.checkpoint(args.workdir, args.ema, args.source, args.vae)


def rounded(folder: Folder, scheme: str | None, dtype) -> Folder:
    """Rounded in float32 where a dtype is asked for: a scale in float16 would round once more."""
    return folder if scheme is None else export.rounded(folder, scheme, None if dtype is None else np.float32)


def uploader(name: str, private: bool) -> Callable[[Path], str]:
    """Creates the hub repository `name` if it is new. Returns a function that uploads a folder and returns its address.

    Called before the export: a missing login or a misspelt name is reported first. Raises ValueError."""
    from huggingface_hub import HfApi

    api = HfApi()

    def attempt(what: Callable, *args, **kwargs) -> None:
        try:
            what(*args, **kwargs)
        except Exception as error:  # from hub, login, network or name: the remedies are the same
            raise ValueError(
                f"{name} cannot be written on {api.endpoint}:\n  {command.first_line(error)}\n"
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
