"""python -m flaxkd.evaluate: see evaluation.py."""

from flaxkd.evaluate.evaluation import parse, run
from flaxkd.machine import command, hosts


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    args = parse(arguments)
    command.keep_compiled_programs()
    with hosts.together(args), command.reported(command.RESUMES):
        run(args)


if __name__ == "__main__":
    main()
