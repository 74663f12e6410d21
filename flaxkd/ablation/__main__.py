"""python -m flaxkd.ablation: see runs.py."""

import shlex
import signal
import sys

from flaxkd.ablation.runs import parse, run
from flaxkd.machine import command


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(arguments)
    command.keep_compiled_programs()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C
    try:
        with command.reported():
            run(args, shlex.join(["python", "-m", "flaxkd.ablation", *arguments]))
    except KeyboardInterrupt:
        print("\nstopped; the same command resumes", flush=True)
        sys.exit(143)


if __name__ == "__main__":
    main()
