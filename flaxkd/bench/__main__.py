"""python -m flaxkd.bench: see benchmark.py."""

from pathlib import Path

import jax

from flaxkd import students
from flaxkd.bench import benchmark, torch_works
from flaxkd.machine import command, cpu

RIVALS = {None: [], "eager": [torch_works.EAGER], "torch": [torch_works.EAGER, torch_works.COMPILED]}


def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.bench", benchmark.__doc__, allow_abbrev=False)
    add = parser.add_argument
    command.add(parser, "config", default="configs/small.py", help="whose training step; its student does not matter")
    everyone = [student.names[0] for student in students.TABLE]
    rows = "a row of python -m flaxkd.students; repeat it for several, default: all of them"
    add("--students", action="extend", type=lambda names: [name for name in names.split(",") if name], help=rows)
    add("--against", choices=["eager", "torch"], help="PyTorch, eager or also with torch.compile")
    changes = "a key of the teacher's unet/config.json, with random weights; repeat it for several"
    add("--unet", action="append", default=[], metavar="KEY=JSON", help=changes)
    add("--rounds", type=int, default=7, help="times that each is done; default: %(default)s")
    command.add(parser, "steps", help="denoising steps of a picture; default: %(default)s")
    command.add(parser, "out", default=Path("bench"), help="folder of the result; default: %(default)s")
    with command.reported():
        args, config = command.parse(parser, arguments)
        jax.config.update("jax_num_cpu_devices", config.cpu_devices)
        command.keep_compiled_programs()
        cpu.keep_memory()
        benchmark.run(
            config,
            names=everyone if args.students is None else args.students,
            against=RIVALS[args.against],
            unet=benchmark.changes(args.unet),
            rounds=args.rounds,
            steps=args.steps,
            out=args.out,
        )


if __name__ == "__main__":
    main()
