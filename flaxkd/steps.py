"""How many steps does a model need? Compares pictures of few steps with the teacher's of 25, from the same noise.

    python -m flaxkd.steps [--model DIR|HUB_ID|WORKDIR] [--out steps]

Draws training captions of OpenMoji with the teacher in 25 steps; then with the teacher and every --model in 1, 2, 4 and
8 steps of ddim and dpmsolver++, or with a model of few steps of its own sampler and ddim, which adds no noise between
its steps. The table has the distance to the teacher's 25 steps, and the share of pictures with their own original among
the 5 nearest, as `flaxkd.recall` has it.
"""

import argparse
import dataclasses
from pathlib import Path

import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.drawing import grids, same_noise
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.evaluate import fidelity, originals, results
from flaxkd.machine import command, progress

SHOWN = 3
TRAILING = {"timestep_spacing": "trailing", "steps_offset": 0}  # the right spacing for few steps (arXiv:2305.08891)


def samplers_of(pipeline: Pipeline) -> tuple[str, ...]:
    if samplers.few_steps(pipeline.scheduler_config) is None:
        return ("ddim", "dpmsolver++")
    return tuple(dict.fromkeys((samplers.own(pipeline.scheduler_config), "ddim")))


def draw(pipeline: Pipeline, captions: list[str], seed: int, sampler: str, steps: int) -> np.ndarray:
    """Pictures uint8[n, H, W, 3] of captions; picture i has the same noise for all models and steps."""
    config = pipeline.scheduler_config | (TRAILING if sampler == "ddim" else {})
    pipeline = dataclasses.replace(pipeline, scheduler_config=config)
    return same_noise.draw(pipeline, captions, seed, sampler=sampler, num_inference_steps=steps, progress=False)


def run(args: argparse.Namespace) -> list[dict]:
    """The rows of the table, written to `args.out`. Raises ValueError for wrong numbers."""
    captions, known = originals.read(args.captions, args.originals, args.seed)
    pipelines = [Pipeline.from_pretrained(model) for model in [args.teacher, *(args.model or [])]]
    for pipeline in pipelines:
        originals.check(pipeline.name, pipeline.folder.resolution, known)
    teacher, wanted, rows, shown = pipelines[0], None, [], {}
    asked = [(teacher, samplers.own(teacher.scheduler_config), samplers.STEPS)]
    asked += [(p, kind, n) for p in pipelines for kind in samplers_of(p) for n in args.steps or (1, 2, 4, 8)]
    with progress.Bar(len(asked), "drawing", " rows") as bar:
        for pipeline, kind, n in asked:
            drawn = draw(pipeline, captions, args.seed, kind, n)
            wanted = drawn if wanted is None else wanted
            order = originals.nearest(drawn, known)
            rows.append({"model": pipeline.name, "sampler": kind, "steps": n} | measure(drawn, wanted, order))
            if len(rows) > 1:
                name, first = f"{pipeline.name}, {kind}", {"teacher": wanted[:SHOWN]}
                shown.setdefault(name, first)[f"{n} step{'s' * (n > 1)}"] = drawn[:SHOWN]
            bar.update()
    numbers = {"captions": args.captions, "seed": args.seed, "rows": rows}
    results.report(args.out, "steps", table(rows), numbers, lambda path: sheet(shown, captions[:SHOWN], path))
    return rows


def sheet(shown: dict[str, dict[str, np.ndarray]], captions: list[str], path: Path) -> None:
    """A grid of {model and sampler: {steps: pictures of the captions}}: a row is one of the first, for one caption."""
    titles = next(iter(shown.values()))
    columns = {n: np.stack([drawn[n][i] for i in range(len(captions)) for drawn in shown.values()]) for n in titles}
    labels = [f"{name}: {caption}" for caption in captions for name in shown]  # a long one loses its end
    grids.grid(columns, labels, path, scale=1)


def measure(drawn: np.ndarray, wanted: np.ndarray, order: np.ndarray) -> dict[str, float]:
    """distance: the root mean square of the pixels' differences, of 255, on the mean over pictures."""
    squares = np.square(drawn.astype(np.float64) - wanted.astype(np.float64)).mean((1, 2, 3))
    return {
        "distance": float(np.sqrt(squares).mean()),
        "psnr": float(fidelity.psnr(drawn, wanted).mean()),
        "recall": originals.recall(order, 5),
    }


def table(rows: list[dict]) -> str:
    lines = ["| model | sampler | steps | distance | PSNR, dB | recall |", "|---|---|---:|---:|---:|---:|"]
    for row in rows:
        near = f"{row['distance']:.1f} | {row['psnr']:.1f}" if row["distance"] else "0 | "
        lines.append(f"| {row['model']} | {row['sampler']} | {row['steps']} | {near} | {row['recall']:.0%} |")
    return "\n".join(lines) + "\n"


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.steps", __doc__)
    command.add(parser, "model", action=command.Several, help=f"{command.MODEL}; repeat for several")
    command.add(parser, "teacher")
    command.add(parser, "steps", action=command.Several, type=int, help="repeat for several; default: 1, 2, 4, 8")
    parser.add_argument("--captions", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--originals", type=int, default=512, help="default: %(default)s")
    command.add(parser, "seed")
    command.add(parser, "out", default=Path("steps"), help="result folder; default: %(default)s")
    args = parser.parse_args(arguments)
    command.keep_compiled_programs()
    run(args)


if __name__ == "__main__":
    main()
