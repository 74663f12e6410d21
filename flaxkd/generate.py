"""Draws pictures of prompts with a teacher or a student.

    python -m flaxkd.generate --prompt "red apple" [--model DIR|HUB_ID|WORKDIR] [--out picture.png]

One prompt makes a picture. Several prompts (--prompt again, or --prompts FILE with one a line), several models (--model
again, all with the same seeds) or several pictures of each (--num-images) make a labelled grid. --image starts from a
picture, --strength sets how much of it changes, and --mask where. --lora merges LoRA files into all models. The
settings are written into the PNG. Without --model, the embedded teacher draws.
"""

import argparse
from pathlib import Path

import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.drawing import grids
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import command
from flaxkd.pretrained import lora_files


def read_prompts(args: argparse.Namespace) -> list[str]:
    """The prompts of --prompt, then those of --prompts. Blank lines are skipped."""
    prompts = list(args.prompt)
    if args.prompts is not None:
        if not args.prompts.is_file():
            raise FileNotFoundError(f"there is no file {args.prompts.absolute()}: --prompts takes one prompt a line")
        lines = args.prompts.read_text(encoding="utf-8").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ValueError('there is no prompt: give --prompt "red apple", or --prompts FILE with one a line')
    return prompts


def draw(args: argparse.Namespace) -> None:
    prompts = read_prompts(args)
    if args.out.suffix.lower() != ".png":
        raise ValueError(f"--out {args.out} must end in .png: the settings are written into it")
    if args.sampler is not None:
        samplers.name_of(args.sampler)
    for file, scale in map(lora_files.split, args.lora):
        print(f"{lora_files.read(file).describe()}, applied {scale:g} times")
    models = dict.fromkeys(args.model or [None])
    pipelines = [
        Pipeline.from_pretrained(model, args.dtype, vae=args.vae, lora=args.lora) for model in models
    ]  # all are loaded before the first one draws
    columns: dict[str, list] = {}
    several = args.num_images > 1
    for pipeline in pipelines:
        drawn = pipeline(
            prompts,
            negative_prompt=args.negative_prompt,
            num_images_per_prompt=args.num_images,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            guidance_rescale=args.guidance_rescale,
            height=args.height,
            width=args.width,
            image=args.image,
            mask_image=args.mask,
            strength=args.strength,
            sampler=args.sampler,
            seed=args.seed,
            clip_skip=args.clip_skip,
            emphasis=args.emphasis,
            long_prompts=args.long_prompts,
            batch_size=args.batch_size,
        )
        for i in range(args.num_images):  # a column each
            columns[f"{pipeline.name}, {i + 1}" if several else pipeline.name] = drawn[i :: args.num_images]
    if len(prompts) == len(columns) == 1:
        grids.save(drawn[0], args.out)
    else:
        infos = [column[0].info for column in columns.values()]
        info = {name: ", ".join(dict.fromkeys(info[name] for info in infos)) for name in infos[0]}
        info |= {"prompt": "\n".join(prompts), "seed": infos[0]["seed"]}
        columns = {name: np.stack([np.asarray(x) for x in column]) for name, column in columns.items()}
        grids.grid(columns, prompts, args.out, info=info)
    print(f"wrote {args.out}")


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.generate", __doc__, {"--batch": "--batch-size"})
    add = parser.add_argument
    command.add(parser, "model", action=command.Several, help=f"{command.MODEL}; repeat for several columns")
    command.add(parser, "vae")
    command.add(parser, "lora")
    add("--prompt", action="append", default=[], help="what to draw")
    add("--prompts", type=Path, metavar="FILE", help="text file, one prompt a line")
    add("--negative-prompt", help='what not to draw; default: nothing, which with Stable Diffusion XL is not ""')
    add("--emphasis", action="store_true", help="read (word:1.2), ((word)) and [word] as weights; default: as text")
    add(
        "--long-prompts",
        action="store_true",
        help="read prompts of any length, in chunks; default: the rest is cut off",
    )
    add("--num-images", type=int, default=1, metavar="N", help="pictures of each prompt, a column each; default: 1")
    command.add(parser, "steps", help=samplers.USUAL)
    command.add(parser, "guidance")
    rescale = "how much of the contrast that guidance adds to take back, 0 to 1; default: 0"
    add("--guidance-rescale", type=float, default=0.0, help=rescale)
    command.add(parser, "clip-skip")
    spaced = "; dpmsolver++:karras and so on space the steps"
    add("--sampler", help=f"{', '.join(samplers.KINDS)}{spaced}; default: the model's own")
    command.add(parser, "seed", help="of the first picture; the next one has seed + 1; default: 0")
    add("--width", type=int, help="pixels; default: as in training")
    add("--height", type=int, help="pixels; default: as in training")
    command.add(parser, "batch-size", default=4)
    add("--image", type=Path, help="a picture to start from, for all prompts")
    add("--mask", type=Path, help="a picture, white where --image is drawn anew; default: everywhere")
    strength = "how much of --image to change, above 0 and at most 1; default: 0.8, with --mask 1"
    add("--strength", type=float, help=strength)
    command.add(parser, "dtype", choices=["float32", "bfloat16"])
    command.add(parser, "out", default=Path("picture.png"))
    args = parser.parse_args(arguments)
    command.keep_compiled_programs()
    draw(args)


if __name__ == "__main__":
    main()
