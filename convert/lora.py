"""LoRA files: from one dialect to another, from a teacher to its student and back, into a model, out of two models.

    python -m convert.lora --lora FILE --to peft|kohya --out FILE
    python -m convert.lora --lora FILE --to-student sd_small [--model TEACHER] --out FILE
    python -m convert.lora --lora FILE --to-teacher sd_small [--model TEACHER] --out FILE
    python -m convert.lora --lora FILE[:SCALE] [--lora ...] --fuse --model DIR --out DIR
    python -m convert.lora --extract BASE TUNED --rank 8 --out FILE

It reads every dialect (docs/lora_files.md). It writes PEFT names for diffusers, or kohya's for ComfyUI, A1111 and
diffusers, with all scales folded into the matrices: alpha is the rank. A teacher's file put on a student as it is lands
on other layers; --to-student renames it by the table of students. Without --model, the published model of the file's
family, or the miniature that it is for."""

import argparse
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict

from flaxkd import export, students
from flaxkd.machine import command
from flaxkd.pretrained import ARCHITECTURES, Folder, families, hub, lora_files, lora_writing, save
from flaxkd.weights import lora


def teacher(model: str | None, file: lora_files.LoraFile) -> Folder:
    """The model at `model`; None: the published one of the file's family, without weights, or a miniature."""
    if model is not None:
        return export.open_model(model)
    family = lora_files.family(file.parts)
    if family is None:
        width = lora_files.text_width(file.parts)
        for folder in map(export.open_model, (None, *hub.MINIATURES)):
            if folder.config("unet")["cross_attention_dim"] == width:
                return folder
        raise ValueError(f"{file.path} does not tell the model it is for: give --model, the teacher")
    row = ARCHITECTURES[family.shown]
    index = {"_class_name": family.pipeline, **{part: ["", families.PARTS[part].class_name] for part in family.parts}}
    return Folder(Path(row.hub_ids[-1]), {**row.configs, "model_index": index})


def rename(file: lora_files.LoraFile, args: argparse.Namespace) -> tuple[dict, dict]:
    """({part: adapter}, header) of the same adapter.

    Raises ValueError for one that only means something together with the model, without --model."""
    if args.model is not None:
        folder = export.open_model(args.model)
        parts = lora_files.fit(file, folder)
        named = {name: file.metadata.get(f"{lora_files.OWN}{name}") for name in ("student", "teacher")}
        return parts, lora_writing.header(folder, args.out.stem, parts, **named)
    if special := {"DoRA", "LoHa", "LoKr"} & {*file.dialects}:
        raise ValueError(f"{file.path} is a {' and '.join(special)}, which depends on the model: give --model")
    ranks = [a.shape[-1] for adapter in file.parts.values() for a, _ in lora.layers(adapter).values()]
    folded = dict.fromkeys(("ss_network_dim", "ss_network_alpha"), str(max(ranks)))
    family = lora_files.family(file.parts)
    named = {"ss_base_model_version": family.kohya} if family else {}
    kept = {key: value for key, value in file.metadata.items() if key != "lora_adapter_metadata"}
    return file.parts, {**named, **kept, **folded}


def to_student(file: lora_files.LoraFile, args: argparse.Namespace) -> tuple[dict, dict]:
    """The same of the student's UNet; text encoders are the teacher's. Prints what is left out."""
    folder, student = teacher(args.model, file), students.get(args.to_student)
    parts = lora_files.fit(file, folder)
    cut = folder.replace({"unet": students.config(student, folder.config("unet"))}, {})
    if "unet" in parts:
        count = len(lora.layers(parts["unet"]))
        parts["unet"], left_out = students.take_adapter(student, parts["unet"], cut.shapes("unet"))
        print(f"{count - len(left_out)} of {count} modules of the UNet; {args.to_student} lacks the others")
        print("".join(f"  left out: {'.'.join(module)}\n" for module in left_out), end="")
    named = {"student": args.to_student, "teacher": str(folder.path)}
    return parts, lora_writing.header(cut, args.out.stem, parts, **named)


def to_teacher(file: lora_files.LoraFile, args: argparse.Namespace) -> tuple[dict, dict]:
    """The same of the teacher's UNet, whose other layers stay as they are."""
    folder, student = teacher(args.model, file), students.get(args.to_teacher)
    parts = lora_files.fit(file, folder.replace({"unet": students.config(student, folder.config("unet"))}, {}))
    if "unet" in parts:
        parts["unet"] = students.give_adapter(student, parts["unet"])
    return parts, lora_writing.header(folder, args.out.stem, parts)


def extract(base: Folder, tuned: Folder, targets: list[str], rank: int) -> dict[str, dict]:
    """{part: adapter}: the nearest of this rank to tuned - base, of every module of `targets` that differs.

    Prints the share of the squared difference that is kept, by module and in all, and how much is in what a LoRA has
    not: norms, biases, embeddings, and other modules. Raises ValueError for networks of other shapes."""
    parts, total, kept_in_all, outside = {}, 0.0, 0.0, 0.0
    for part in ("unet", *base.family.encoders):
        one, two = (flatten_dict(folder.params(part)) for folder in (base, tuned))
        if {path: x.shape for path, x in one.items()} != {path: x.shape for path, x in two.items()}:
            raise ValueError(f"the {part} of {base.path} and of {tuned.path} differ in their layers or shapes")
        squares = {path: float(np.square(two[path] - x, dtype=np.float64).sum()) for path, x in one.items()}
        total += sum(squares.values())
        pairs = {}
        for module in lora.modules(base.shapes(part), targets) if any(squares.values()) else ():
            path = (*module, "kernel")
            if squares[path]:
                a, b, kept = lora.nearest(two[path] - one[path], rank)
                pairs[module] = a, b
                kept_in_all += kept * squares.pop(path)
                print(f"  {part} {'.'.join(module):80} {kept:7.2%} kept")
        outside += (lost := sum(squares.values()))  # those of `pairs` are gone from it
        if lost:
            most = ".".join(max(squares, key=squares.get))
            print(f"  {part}: |D|^2 of {lost:.3g} is outside, most of it in {most}")
        if pairs:
            parts[part] = lora.tree(pairs)
    if not parts:
        raise ValueError(f"{base.path} and {tuned.path} have the same weights in all modules of {', '.join(targets)}")
    print(
        f"kept of |D|^2 in all: {kept_in_all / total:.2%} at rank {rank}; {outside / total:.2%} are of what a LoRA has "
        f"not, norms, biases and embeddings, or of modules other than {', '.join(targets)}"
    )
    return parts


def fuse(args: argparse.Namespace) -> None:
    folder = export.open_model(args.model)
    merged = lora_files.applied(folder, args.lora)
    parts = {part: (folder.config(part), read()) for part, read in merged.weights.items()}
    save(args.out, source=folder, parts=parts, dtype=args.dtype and np.dtype(args.dtype))


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("convert.lora", __doc__)
    add = parser.add_argument
    command.add(parser, "lora", help="LoRA file of any dialect, and how much of it; repeat for several with --fuse")
    add("--to", choices=["peft", "kohya"], default="kohya", help="names to write; default: %(default)s")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--to-student", metavar="STUDENT", help="make it one of this student; a row or FILE.json")
    what.add_argument("--to-teacher", metavar="STUDENT", help="make it, from one of this student, one of its teacher")
    what.add_argument("--fuse", action="store_true", help="write --model with the files merged, as a folder")
    what.add_argument("--extract", nargs=2, metavar=("BASE", "TUNED"), help="the LoRA nearest to their difference")
    usual = "default: the published one or miniature it is for; with --fuse the embedded teacher"
    command.add(parser, "model", help=f"{command.MODEL}; {usual}")
    add("--rank", type=int, default=8, help="of --extract; default: %(default)s")
    targets = f"modules to --extract: {', '.join(lora.TARGETS)}, or ends of names; default: all"
    add("--targets", action=command.Several, default=("all",), help=targets)
    command.add(parser, "dtype", choices=["float32", "float16"], help="default: float32, and with --fuse as it is")
    command.add(parser, "out", required=True, help="FILE.safetensors, and with --fuse a folder")
    args = parser.parse_args(arguments)
    if not args.lora and not args.extract:
        raise ValueError("there is nothing to read: give --lora FILE, or --extract BASE TUNED")
    if args.extract:
        command.refuse(parser, args, ["--lora", "--model"], "not of --extract, which reads BASE and TUNED alone")
    else:
        command.refuse(parser, args, ["--rank", "--targets"], "of --extract")
    if args.fuse:
        command.refuse(parser, args, ["--to"], "not of --fuse, which writes a model")
    elif args.out.suffix != ".safetensors":
        parser.error(f"--out {args.out} must end in .safetensors")
    if args.rank < 1:
        parser.error(f"--rank {args.rank} must be at least 1")
    if args.fuse:
        fuse(args)
    else:
        write(args)
    print(f"wrote {args.out}")


def write(args: argparse.Namespace) -> None:
    if args.extract:
        base, tuned = map(export.open_model, args.extract)
        parts = extract(base, tuned, list(args.targets), args.rank)
        header = lora_writing.header(base, args.out.stem, parts)
    else:
        if len(args.lora) != 1:
            raise ValueError(f"give one --lora, not {len(args.lora)}: only --fuse takes several")
        path, scale = lora_files.split(args.lora[0])
        file = lora_files.read(path)
        print(file.describe())
        make = to_student if args.to_student else to_teacher if args.to_teacher else rename
        parts, header = make(file, args)
        parts = {part: lora.scaled(adapter, scale) for part, adapter in parts.items()}
    lora_writing.write(args.out, parts, args.to, header, np.dtype(args.dtype or "float32"))


if __name__ == "__main__":
    main()
