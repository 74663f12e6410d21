"""python -m flaxkd.bench: see benchmark.py."""

import os
from pathlib import Path

import jax

from flaxkd.bench import benchmark, torch_works
from flaxkd.diffusion import samplers
from flaxkd.machine import command, cpu, gpu
from flaxkd.training import settings

RIVALS = {None: [], "eager": [torch_works.EAGER], "torch": [torch_works.EAGER, torch_works.COMPILED]}


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.bench", benchmark.__doc__)
    add = parser.add_argument
    command.add(parser, "config", default="configs/small.py", help="its training step is timed, its student ignored")
    command.add(parser, "students")
    add("--against", choices=["eager", "torch"], help="compare with PyTorch: eager, or also torch.compile")
    changes = "replace a key of the teacher's unet/config.json, with random weights; repeat for several"
    add("--unet", action="append", default=[], metavar="KEY=JSON", help=changes)
    add("--rounds", type=int, default=7, help="repetitions of each measurement; default: %(default)s")
    command.add(parser, "steps", default=samplers.STEPS, help="denoising steps per picture; default: %(default)s")
    command.add(parser, "out", default=Path("bench"), help="result folder; default: %(default)s")
    args, config = command.parse(parser, arguments)
    if args.against:  # PyTorch needs memory of the same GPU, of which JAX would reserve three quarters
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        gpu.take_memory()
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)  # before anything computes, as the check does
    settings.check(config)
    command.keep_compiled_programs()
    cpu.keep_memory()
    benchmark.run(
        config,
        names=args.students if config.student or args.students else [],
        against=RIVALS[args.against],
        unet=benchmark.changes(args.unet),
        rounds=args.rounds,
        steps=args.steps,
        out=args.out,
    )


if __name__ == "__main__":
    main()
