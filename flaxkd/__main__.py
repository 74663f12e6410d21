"""All commands of flaxkd under one name: `flaxkd train` is `python -m flaxkd.train`.

flaxkd COMMAND [flags]        flaxkd COMMAND --help lists its flags
"""

import difflib
import importlib
import importlib.util
import sys
from collections.abc import Sequence

import flaxkd
from flaxkd.machine import command
from flaxkd.machine.configuration import suggestion

# {command: (module, what it does)}
COMMANDS = {
    "train": ("flaxkd.train", "trains what a configuration describes: a student, a teacher, an autoencoder"),
    "generate": ("flaxkd.generate", "draws pictures of prompts with a teacher or a student"),
    "serve": ("flaxkd.serve.__main__", "serves models over HTTP, with a page to draw on"),
    "report": ("flaxkd.report", "puts a run on one page"),
    "cache": ("flaxkd.cache", "encodes a large image set beforehand"),
    "evaluate": ("flaxkd.evaluate.__main__", "compares students with their teacher; FID, inception and CLIP score"),
    "bench": ("flaxkd.bench.__main__", "times teacher and students"),
    "blank": ("flaxkd.blank", "writes a pipeline with random weights, to time a machine or to rehearse a run"),
    "plan": ("flaxkd.plan.__main__", "says whether a run fits on a machine, and what it will cost"),
    "ablation": ("flaxkd.ablation.__main__", "measures the worth of each term of the loss"),
    "recall": ("flaxkd.recall", "asks whether a model draws what its training captions say"),
    "steps": ("flaxkd.steps", "asks how many steps a model needs"),
    "concepts": ("flaxkd.concepts", "asks which objects and colors of its prompts a model draws"),
    "quantized": ("flaxkd.quantized", "asks what it costs to round a model's weights to 8 or 4 bits"),
    "students": ("flaxkd.students.__main__", "prints the table of students"),
    "blocks": ("flaxkd.blocks", "draws the table of students"),
    "to-diffusers": ("convert.to_diffusers", "exports a checkpoint as a pipeline folder of diffusers"),
    "to-inpainting": ("convert.to_inpainting", "widens the UNet of a model, to be trained for inpainting"),
    "to-stablehlo": ("convert.to_stablehlo", "exports a pipeline as programs for JAX without flaxkd"),
    "to-onnx": ("convert.to_onnx", "exports the networks of a pipeline as ONNX"),
    "to-gguf": ("convert.to_gguf", "exports a pipeline as a GGUF file for stable-diffusion.cpp"),
    "lora": ("convert.lora", "converts LoRA files, also to a student, and merges or extracts them"),
    "from-diffusers": ("convert.from_diffusers", "turns a pipeline folder into an Orbax checkpoint"),
}


def module(name: str) -> str:
    """The module of a command. A clone has the folder convert/ beside the package, an installation inside it."""
    path, _ = COMMANDS[name]
    inside = path.startswith("convert.") and importlib.util.find_spec("flaxkd.convert")
    return f"flaxkd.{path}" if inside else path


@command.reported()
def main(arguments: Sequence[str] | None = None) -> None:
    name, *flags = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-V", "--version"):
        print(f"flaxkd {flaxkd.__version__}")
    elif name in ("-h", "--help"):
        print(f"{__doc__}\ncommands:\n" + "\n".join(f"  {each:15} {what}" for each, (_, what) in COMMANDS.items()))
    elif name.replace("_", "-") in COMMANDS:
        name = name.replace("_", "-")
        sys.argv = [f"flaxkd {name}", *flags]
        importlib.import_module(module(name)).main(flags)
    else:
        meant = suggestion(difflib.get_close_matches(name, COMMANDS, 1))
        raise ValueError(f"there is no command {name}. {meant or 'flaxkd --help lists all commands'}")


if __name__ == "__main__":
    main()
