"""python -m flaxkd.plan: see table.py."""

import time
from pathlib import Path

import jax

from flaxkd.evaluate import results
from flaxkd.machine import command
from flaxkd.plan import devices, table
from flaxkd.plan.table import largest, markdown, next_size, row
from flaxkd.training import settings


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    begin = time.time()
    jax.config.update("jax_platforms", "cpu")  # a plan needs no accelerator, and a training may hold this machine's
    parser = command.parser("flaxkd.plan", table.__doc__)
    command.add(parser, "config", required=True)
    machines = "TPU topology (v5e:4x8) or GPUs (a100-80x8); repeat for several"
    parser.add_argument("--device", action="append", required=True, help=machines)
    parser.add_argument("--largest", action="store_true", help="also find the largest batch per device that fits")
    parser.add_argument("--whole", action="store_true", help="compile TPU programs to the end")
    command.add(parser, "out", default=Path("plan"), help="result folder; default: %(default)s")
    rows = []
    args, config = command.parse(parser, arguments)
    settings.check(config)
    if args.largest and args.whole:
        raise ValueError("--largest compiles several steps, which takes hours with --whole: drop one")
    targets = [devices.target(name) for name in args.device]
    for target in targets:
        if not args.largest:
            rows.append(row(config, target, args.whole))
            continue
        found = largest(config, target)
        rows += found
        if found:
            rows += next_size(config, target, found[-1]["per_device"] // config.accumulate)
    results.report(args.out, "plan", markdown(rows), rows)
    print(f"{time.time() - begin:.0f} s")


if __name__ == "__main__":
    main()
