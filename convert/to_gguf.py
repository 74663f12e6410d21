"""A pipeline -> one .gguf for stable-diffusion.cpp, with linear layers in blocks of integers.

    python -m convert.to_gguf --model DIR|FILE|HUB_ID|WORKDIR --out FILE.gguf [--type Q8_0|Q4_0|F16]
    [--lora FILE[:SCALE]]

It prints what is in the file by type, with the bits a weight. stable-diffusion.cpp builds the teachers, sd_tiny, ssd_1b
and vega: a warning names a student that it cannot build."""

import warnings
from pathlib import Path

from flaxkd import export
from flaxkd.export import gguf, single_file
from flaxkd.machine import command
from flaxkd.pretrained import lora_files


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_gguf", __doc__)
    command.add(parser, "model", "vae", "lora")
    parser.add_argument("--type", choices=gguf.TYPES, default="Q8_0", help="of linear layers; default: %(default)s")
    command.add(parser, "out", required=True, type=Path, metavar="FILE", help="new file *.gguf")
    args = parser.parse_args(arguments)
    folder = lora_files.applied(export.open_model(args.model, args.vae), args.lora)
    held, able = gguf.write(args.out, folder, args.type)
    for kind, row in sorted(held.items()):
        print(f"{kind:5} {row.tensors:5} tensors {row.weights:15,} weights {row.bits:6.2f} bits a weight")
    whole = gguf.Held(*map(sum, zip(*held.values(), strict=True)))
    print(f"all   {whole.tensors:5} tensors {whole.weights:15,} weights {whole.bits:6.2f} bits a weight")
    if "sd.cpp" not in able:
        titles = ", ".join(single_file.PROGRAMS[name].title for name in able)
        warnings.warn(
            f"stable-diffusion.cpp has no UNet like this one; it is read by: {titles or 'diffusers'}", stacklevel=1
        )
    print(f"wrote {args.out}, {args.out.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
