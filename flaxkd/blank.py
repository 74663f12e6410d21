"""Writes a pipeline folder with random weights: to time a machine, or to rehearse a run on it, without a download.

    python -m flaxkd.blank --architecture sd15 --out blank/sd15
    python -m flaxkd.bench --config configs/small.py:sd15 --config.teacher=blank/sd15 --students sd_small

Networks, shapes and latents are those of the published pipeline. Only the tokenizer is new: it knows letters, and the
text encoder's vocabulary is as small. A training begun with such a folder is one from scratch.
"""

import time

import numpy as np

from flaxkd.machine import command, files
from flaxkd.pretrained import ARCHITECTURES, fresh

VOCABULARY = 520  # tokens: the letters and a few pairs of them


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.blank", __doc__)
    add = parser.add_argument
    add("--architecture", choices=ARCHITECTURES, default="sd15", help="default: %(default)s")
    command.add(parser, "out", required=True, help="the new folder")
    command.add(parser, "seed")
    command.add(parser, "dtype", default="float16", help="of the stored weights; default: %(default)s")
    args = parser.parse_args(arguments)
    if (args.out / "model_index.json").exists():
        raise ValueError(f"{args.out} is a pipeline folder already: choose a new one")
    begin = time.time()
    architecture = ARCHITECTURES[args.architecture]
    print(f"{args.out}: {architecture.title} with random weights", flush=True)
    configs = architecture.configs | {"vocab_size": VOCABULARY}
    folder = fresh.write(args.out, configs, ["a picture"], args.seed, dtype=np.dtype(args.dtype))
    size = sum(file.stat().st_size for file in folder.path.rglob("*") if file.is_file())
    print(f"wrote {folder.path}   ({files.size(size)}, {time.time() - begin:.0f} s)")


if __name__ == "__main__":
    main()
