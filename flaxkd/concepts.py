"""Which concepts of a prompt does a model draw? Finds objects and their colors, alone and two in one picture.

    python -m flaxkd.concepts [--model DIR|HUB_ID|WORKDIR] [--out concepts]

Draws with the teacher and every --model, from the same noise: objects in colors that training captions of OpenMoji give
them ("blue heart"), in colors that none gives them ("blue apple"), and two objects ("red apple and blue heart"). What a
picture shows is read off the nearest original, of every object in every color, alone and in pairs. The table has the
share of objects and of colors that are found, of both in one place, and of pictures with all of their concepts; in
brackets what the same pictures reach in any order.
"""

import argparse
from pathlib import Path

import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.drawing import grids, same_noise
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.evaluate import concepts, results
from flaxkd.machine import command

SHOWN = 5  # prompts of each kind
SHARES = ("object", "color", "both", "all")


def run(args: argparse.Namespace) -> list[dict]:
    """The rows of the table, written to `args.out`. Raises ValueError for wrong numbers."""
    if args.pictures < 1:
        raise ValueError(f"--pictures is {args.pictures}, must be at least 1")
    models = [args.teacher, *(args.model or [])]
    pipelines = [Pipeline.from_pretrained(model) for model in models]
    prompts = concepts.prompts(concepts.training_captions())
    asked = [prompt for prompt in prompts for _ in range(args.pictures)]
    options = {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
    known, rows, drawn = concepts.originals(), [], {}
    for pipeline in pipelines:
        print(f"{pipeline.name}:", flush=True)
        found = same_noise.draw(pipeline, [prompt.text for prompt in asked], args.seed, **options)
        drawn[pipeline.name] = found[:: args.pictures]
        rows += [{"model": pipeline.name} | row for row in concepts.shares(asked, concepts.found(found, known))]
    about = {"seed": args.seed, "pictures": args.pictures, "prompts": [prompt.text for prompt in prompts]}
    draw = lambda path: sheet(drawn, prompts, path)
    results.report(args.out, "concepts", table(rows), about | {"rows": rows}, draw)
    return rows


def sheet(drawn: dict[str, np.ndarray], prompts: list[concepts.Prompt], path: Path) -> None:
    """A grid of {model: the first picture of each prompt}: a few prompts of each kind, evenly spread."""
    kinds = [[i for i, prompt in enumerate(prompts) if prompt.kind == kind] for kind in concepts.KINDS]
    chosen = [i for kind in kinds for i in kind[:: -(-len(kind) // SHOWN) or 1]]
    columns = {name: pictures[chosen] for name, pictures in drawn.items()}
    grids.grid(columns, [prompts[i].text for i in chosen], path, scale=1)


def table(rows: list[dict]) -> str:
    """Percentages with their standard errors (binomial), and in brackets by chance."""
    heads = ["model", "prompts", "pictures", "object", "color", "both", "all"]
    lines = [f"| {' | '.join(heads)} |", "|---|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        n, chance = row["pictures"], row["chance"]
        cells = [f"{100 * row[key]:.0f} ± {100 * error(row[key], n):.0f} ({100 * chance[key]:.0f})" for key in SHARES]
        lines.append(f"| {' | '.join([row['model'], row['kind'], str(n), *cells])} |")
    lines += ["", *(f"- {kind}: {what}" for kind, what in concepts.KINDS.items())]
    return "\n".join(lines) + "\n"


def error(share: float, n: int) -> float:
    """The standard error of a share of n pictures; an upper bound where a picture has several concepts."""
    return float(np.sqrt(share * (1 - share) / n))


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.concepts", __doc__)
    command.add(parser, "model", action=command.Several, help=f"{command.MODEL}; repeat for several")
    command.add(parser, "teacher")
    parser.add_argument("--pictures", type=int, default=2, help="of each prompt; default: %(default)s")
    command.add(parser, "steps", help=samplers.USUAL)
    command.add(parser, "guidance")
    command.add(parser, "seed")
    command.add(parser, "out", default=Path("concepts"), help="result folder; default: %(default)s")
    args = parser.parse_args(arguments)
    command.keep_compiled_programs()
    run(args)


if __name__ == "__main__":
    main()
