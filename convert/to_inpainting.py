"""A text-to-image model -> an inpainting model to train: its UNet also sees a mask and the rest of the picture.

    python -m convert.to_inpainting --model DIR|FILE|HUB_ID --out DIR
    python -m flaxkd.train --config configs/... --config.teacher=DIR --config.student=None

The kernel of `conv_in` gets five more input channels, of zeros, as Stable Diffusion Inpainting began: until it is
trained, the model draws as before. Without --model, the embedded teacher is widened."""

import numpy as np

from flaxkd.machine import command
from flaxkd.pretrained import Folder, families, save


def widened(folder: Folder) -> tuple[dict, dict]:
    """(config.json, parameters) of the UNet. Raises ValueError if it is an inpainting one already."""
    if folder.beside:
        raise ValueError(f"{folder.path} is an inpainting model already")
    config, params = folder.config("unet"), folder.params("unet")
    kernel = params["conv_in"]["kernel"]
    more = np.zeros((*kernel.shape[:2], families.INPAINTING, kernel.shape[3]), kernel.dtype)
    conv_in = params["conv_in"] | {"kernel": np.concatenate([kernel, more], axis=2)}
    return config | {"in_channels": kernel.shape[2] + families.INPAINTING}, params | {"conv_in": conv_in}


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_inpainting", __doc__)
    command.add(parser, "model", help=f"{command.PIPELINE}; default: the embedded teacher")
    command.add(parser, "vae")
    command.add(parser, "out", required=True, help="new folder")
    args = parser.parse_args(arguments)
    source = Folder.open(args.model, args.vae)
    save(args.out, source=source, parts={"unet": widened(source)})
    typed = f"python -m flaxkd.train --config configs/small.py:sd15 --config.teacher={args.out} --config.student=None"
    print(f"wrote {args.out}; to train it: {typed} --config.data.source=DIR")


if __name__ == "__main__":
    main()
