"""A run as one page, report.html, with all its pictures inside, to keep or to send.

    python -m flaxkd.report --workdir runs/small [--out FILE.html]

It also works during a run. If run first, `python -m flaxkd.evaluate --model DIR --out DIR/evaluation` adds how the
student compares with its teacher, and `python -m flaxkd.bench --out DIR/bench` adds its speed.
"""

import base64
import html
import io
import json
import statistics
import string
from pathlib import Path

from markdown_it import MarkdownIt
from PIL import Image

from flaxkd import export, students
from flaxkd.export import card
from flaxkd.machine import command, files
from flaxkd.pretrained import Folder, count
from flaxkd.students import picture
from flaxkd.training import metrics

TEMPLATE = Path(__file__).parent / "assets" / "report.html"
FRAMES = 12  # of the drawings over time
WIDEST = 1400  # pixels: a sheet of 512-pixel drawings is wider than any page
SCROLLS = 'class="wide" tabindex="0"'  # of what may be wider than the page; by keyboard too


def write(workdir: Path, out: Path | None = None) -> Path:
    """Writes the page, by default to WORKDIR/report.html, and returns its path.

    Raises FileNotFoundError if `workdir` is not the workdir of a run."""
    workdir = Path(workdir)
    if not (workdir / "config.json").is_file():
        raise FileNotFoundError(f"{workdir.absolute()} has no config.json: give a workdir of flaxkd.train")
    out = Path(out or workdir / "report.html")
    files.write_text(out, page(workdir))
    return out


def page(workdir: Path) -> str:
    """The HTML of the report."""
    run = files.read_json(workdir / "config.json")
    parts, source = export.read_record(workdir)
    name, plain = card.names(run["teacher"])
    title, lead = card.headline(run, name, plain, list(parts))
    sections = {
        "": [f"<h1>{html.escape(title)}</h1>", markdown(lead), tiles(workdir, run, parts, source)],
        "What was distilled from what": [blocks_of(run, source, plain), markdown(card.counts(parts, source))],
        "Drawings over time": [frames(workdir)],
        "Figures over time": [figure(workdir / "curves.png", "curves of every loss, training and validation")],
        "First and last figures": [markdown(card.figures(metrics.read(workdir)).partition("\n")[2])],
        "Evaluation": [measured(workdir, "evaluation", "evaluation of teacher and student")],
        "Benchmark": [measured(workdir, "bench", "times of teacher and student")],
        "Made by": [commands(workdir)],
        "Configuration": [code(json.dumps(run, indent=2), "config.json")],
    }
    body = []
    for heading, content in sections.items():
        if found := [block for block in content if block]:
            body.append("\n".join([f"<h2>{heading}</h2>" * bool(heading), *found]))
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=html.escape(title), body="\n".join(body)
    )


def markdown(text: str) -> str:
    """Markdown with tables as HTML. Tables scroll within the page, and say so: it may be open on a phone."""
    rendered = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    rendered = rendered.replace("<table>", f"<div {SCROLLS}><table>")
    return rendered.replace("</table>", "</table></div>")


def tiles(workdir: Path, run: dict, parts: dict[str, dict], source: Folder) -> str:
    """The few numbers people ask for first."""
    records = metrics.read(workdir)
    step = max((record["step"] for record in records), default=0)
    facts = {
        "optimizer steps": f"{step:,} of {run['steps']:,}",
        "images seen": f"{step * run['batch_size']:,}",
    }
    for part, config in parts.items():
        own, before = count(part, config), source.count(part)
        share = f", {own / before:.0%} of the teacher's" if own != before else ""
        facts[f"parameters of the {part}{share}"] = f"{own / 1e6:,.1f} M"
    for loss in ("loss_output", "loss_feature", *(() if run["student"] else ("loss",))):
        values = [r[f"validation/{loss}"] for r in records if r.get(f"validation/{loss}")]
        if len(values) > 1:
            facts[f"{loss} on held-out captions, share of its starting value"] = f"{values[-1] / values[0]:.1%}"
    if rates := [record["images_per_second"] for record in records if "images_per_second" in record]:
        facts["images/s, median"] = f"{statistics.median(rates):,.1f}"
    cells = [f'<div class="tile"><b>{value}</b><span>{what}</span></div>' for what, value in facts.items()]
    return f'<div class="tiles">{"".join(cells)}</div>'


def blocks_of(run: dict, source: Folder, teacher: str) -> str:
    """The picture of teacher and student, block by block; "" for a run without a student."""
    if not run["student"]:
        return ""
    drawn = io.StringIO()
    student, config = students.get(run["student"]), source.config("unet")
    picture.draw(drawn, (student,), config, teacher, format="svg")
    svg = drawn.getvalue()[drawn.getvalue().index("<svg") :]
    return f'<figure {SCROLLS} role="img" aria-label="blocks of the teacher and of the student">{svg}</figure>'


def frames(workdir: Path) -> str:
    """The sheets of drawings, evenly spread over the run, with a slider. Without scripts, the newest shows."""
    sheets = sorted((workdir / "samples").glob("*.png"))
    if len(sheets) > FRAMES:
        sheets = [sheets[round(i * (len(sheets) - 1) / (FRAMES - 1))] for i in range(FRAMES)]
    if not sheets:
        return figure(workdir / "samples.png", "drawings of the validation prompts")
    shown = [
        figure(
            sheet,
            f"drawings after {int(sheet.stem):,} steps",
            f' data-step="step {int(sheet.stem):,}"' + hidden,
        )
        for sheet, hidden in zip(sheets, [" hidden"] * (len(sheets) - 1) + [""], strict=True)
    ]
    last = len(sheets) - 1
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="optimizer step">'
    return f'<div><div class="time" hidden>{slider}<output></output></div>{"".join(shown)}</div>'


def figure(path: Path, alternative: str, attributes: str = "") -> str:
    """The picture at `path` as WebP within the page, no wider than WIDEST; "" if it is missing."""
    if not path.is_file():
        return ""
    with Image.open(path) as image:
        image.thumbnail((WIDEST, 20 * WIDEST))
        data = io.BytesIO()
        image.convert("RGB").save(data, "WEBP", quality=88)
        size = f'width="{image.width}" height="{image.height}"'
    url = f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
    return f'<figure {SCROLLS}{attributes}><img src="{url}" {size} alt="{html.escape(alternative)}"></figure>'


def measured(workdir: Path, name: str, alternative: str) -> str:
    """Pictures and tables of `flaxkd.evaluate` or `flaxkd.bench`: samples.png, NAME.png and NAME.md in WORKDIR/NAME."""
    path = workdir / name / f"{name}.md"
    if not path.is_file():
        return ""
    tables = markdown(path.read_text(encoding="utf-8").partition("\n")[2]).replace("h2>", "h3>")
    drawn = figure(path.with_name("samples.png"), f"{alternative}: pictures of held-out captions, a column per model")
    return drawn + figure(path.with_suffix(".png"), alternative) + tables


def commands(workdir: Path) -> str:
    """How to reproduce the run: the commands as typed, each with its time, machine and versions."""
    found = []
    for start in files.read_jsonl(workdir / metrics.STARTS):
        versions = ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        found.append(f"<p>{html.escape(start['time'])}, {html.escape(start['machine'])}; {versions}</p>")
        found.append(f"<pre><code>{html.escape(start['command'])}</code></pre>" if start["command"] else "")
    return "\n".join(found)


def code(text: str, summary: str) -> str:
    return f"<details><summary>{summary}</summary><pre><code>{html.escape(text)}</code></pre></details>"


@command.reported()
def main(arguments: list[str] | None = None) -> None:
    parser = command.parser("flaxkd.report", __doc__)
    parser.add_argument("--workdir", type=Path, required=True, help="workdir of a run, finished or not")
    command.add(parser, "out", help="default: WORKDIR/report.html")
    args = parser.parse_args(arguments)
    out = write(args.workdir, args.out)
    print(f"wrote {out} ({out.stat().st_size / 1e6:.1f} MB): open it in a browser")


if __name__ == "__main__":
    main()
