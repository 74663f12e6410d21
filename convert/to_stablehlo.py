"""A pipeline -> programs of jax.export (StableHLO) for CPU, CUDA and TPU, which run without flaxkd.

    python -m convert.to_stablehlo --model DIR|FILE|HUB_ID|WORKDIR --out DIR [--steps 25] [--sampler ddim]
    [--lora FILE[:SCALE]] [--dtype bfloat16]

OUT gets text_to_image.jax_export, the whole loop, and its parts: condition, unet, decode and encode. Each takes any
batch, and the parameters beside it. programs.json lists their inputs. docs/export.md has the 20 lines that draw."""

from pathlib import Path

import jax.numpy as jnp

from flaxkd import export
from flaxkd.diffusion import samplers
from flaxkd.export import stablehlo
from flaxkd.machine import command
from flaxkd.pretrained import lora_files


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_stablehlo", __doc__)
    add = parser.add_argument
    command.add(parser, "model", "vae", "lora")
    command.add(parser, "steps", help=samplers.USUAL)
    add("--sampler", help=f"{', '.join(samplers.KINDS)}; default: the model's own")
    none = "it stays an input, but 1 is none, at half the compute"
    command.add(parser, "guidance", help=f"the one to draw with by default: {none}; default: the model's own")
    add("--width", type=int, help="pixels; default: as in training")
    add("--height", type=int, help="pixels; default: as in training")
    command.add(parser, "clip-skip")
    command.add(parser, "dtype", help="of parameters and compute; default: float32")
    command.add(parser, "out", required=True, type=Path, help="new folder, or an earlier export to replace")
    args = parser.parse_args(arguments)
    folder = export.open_model(args.model, args.vae).skip_layers(args.clip_skip)
    settings = stablehlo.Settings(args.height, args.width, args.steps, args.sampler, args.guidance)
    sizes = stablehlo.write(
        args.out, lora_files.applied(folder, args.lora), settings, jnp.dtype(args.dtype or "float32")
    )
    for name, size in sizes.items():
        print(f"{name:30} {size:14,} bytes")
    print(f"wrote {args.out}; docs/export.md has the lines that load it")


if __name__ == "__main__":
    main()
