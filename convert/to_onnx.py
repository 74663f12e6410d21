"""A pipeline -> ONNX files of its networks, for onnxruntime, OpenVINO, TensorRT and others.

    python -m convert.to_onnx --model DIR|FILE|HUB_ID|WORKDIR --out DIR [--lora FILE[:SCALE]] [--quantize w8]

OUT has unet/, vae_decoder/, vae_encoder/, text_encoder/ (of SDXL also text_encoder_2/), each with a model.onnx in
float32 for any batch, tokenizers, and the sampler as arrays. docs/export.md has the lines that draw with onnxruntime.
PyTorch's exporter must be there: pip install "flaxkd[onnx]"."""

from pathlib import Path

from flaxkd import export
from flaxkd.diffusion import samplers
from flaxkd.export import onnx
from flaxkd.machine import command
from flaxkd.pretrained import lora_files
from flaxkd.weights import quantize


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.to_onnx", __doc__)
    command.add(parser, "model", "vae", "lora")
    command.add(parser, "steps", help=samplers.USUAL)
    parser.add_argument("--sampler", help=f"{', '.join(samplers.KINDS)}; default: the model's own")
    parser.add_argument("--width", type=int, help="pixels; default: as in training")
    parser.add_argument("--height", type=int, help="pixels; default: as in training")
    rounding = "weights of the UNet in few bits; default: as it was trained. docs/quantization.md"
    parser.add_argument("--quantize", choices=[*quantize.SCHEMES], help=rounding)
    command.add(parser, "out", required=True, type=Path, help="new folder, or an earlier export to replace")
    args = parser.parse_args(arguments)
    folder = export.open_model(args.model, args.vae)
    folder = lora_files.applied(folder, args.lora)
    sizes = onnx.write(args.out, folder, args.height, args.width, args.steps, args.sampler, args.quantize)
    for name, size in sizes.items():
        print(f"{name:30} {size:14,} bytes")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
