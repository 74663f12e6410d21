"""python -m flaxkd.ablation: see runs.py."""

import shlex
import signal
import sys

from flaxkd.ablation.runs import parse, run
from flaxkd.machine import command


@command.reported(command.RESUMES)
def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    command.keep_compiled_programs()
    signal.signal(signal.SIGTERM, terminated)
    run(args, shlex.join(["python", "-m", "flaxkd.ablation", *arguments]))


def terminated(*_) -> None:
    print(f"\n{command.RESUMES}", file=sys.stderr, flush=True)
    sys.exit(143)


if __name__ == "__main__":
    main()
