"""The benchmark: honest turns, early refusals, and a table that says what was measured."""

import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from flaxkd import pretrained
from flaxkd.bench import benchmark, works
from flaxkd.bench.works import Prepared
from flaxkd.pretrained import Folder
from tests import tiny
from tests.running import ROOT
from tests.test_configs import load


def small(tiny_pipeline, **changes):
    config = load("small")
    config.teacher, config.batch_size = str(tiny_pipeline), 4
    config.update(changes)
    return config


def test_who_is_compared_takes_turns(monkeypatch):
    order, clock = [], iter(np.arange(0, 100, 0.5))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(clock)))
    ready = {name: Prepared(lambda name=name: order.append(name), 0.0) for name in "ab"}

    class Bar:
        update = staticmethod(lambda: None)

    assert benchmark.interleaved(ready, 3, Bar) == {"a": [0.5] * 3, "b": [0.5] * 3}
    assert order == list("ababab")


def rows() -> list[dict]:
    def row(model, by, seconds, flops):
        work = {"all_seconds": [seconds] * 5, "seconds": seconds, "first_seconds": 9.0}
        of = lambda flops: {**work, "flops": flops, "peak_bytes": flops and 3 * 2**20}
        return {
            "model": model,
            "by": by,
            "parameters": 1234567,
            "image_flops": 1.5e9 if model == "teacher" else 2e9,
            "denoise": of(flops and 4e9),
            "image": of(None),
            "few_steps": of(None),
            "train": of(flops),
        }

    return [row("teacher", "flaxkd", 2.0, 6e9), row("sd_small", "flaxkd", 1.0, 8.4e9),
            row("sd_small", "torch eager", 1.5, None)]  # fmt: skip


def test_what_follows_from_the_measures():
    teacher, student, torch = benchmark.derive(rows(), 4, peak=84e9)
    assert teacher["train"]["of_least"] == pytest.approx(6 / (4 * 1.5))
    assert student["train"]["of_least"] == pytest.approx(8.4 / (4 * 2))
    assert student["train"]["of_peak"] == pytest.approx(8 / 84)
    assert torch["train"]["of_peak"] == pytest.approx(8 / 84 / 1.5) and "of_least" not in torch["train"]
    assert student["image"]["images_per_second"] == student["few_steps"]["images_per_second"] == 4
    assert torch["train"]["images_per_second"] == 4 / 1.5


def test_the_table_has_ratios_only_against_somebody(tmp_path):
    every = benchmark.derive(rows(), 4, None)
    text = benchmark.markdown({"settings": {"machine": "two cores"}, "rows": every})
    assert "| sd_small | torch eager | 1.50 | 1.50 | 1.50 | 1.50 |" in text
    assert "| sd_small | 1,234,567 | 4.0 | 3 | 8.4 | 1.050 | 3 | 9.0 |" in text and "peak |" not in text
    alone = benchmark.markdown({"settings": {}, "rows": every[:2]})
    assert "divided" not in alone and "| by |" not in alone
    benchmark.write(tmp_path, {"settings": {}, "rows": every})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bench.json", "bench.md", "bench.png"]


def refused(tiny_pipeline, match: str, changes=(), **options):
    arguments = dict(names=[], against=[], unet={}, rounds=5, steps=2, out=Path("nowhere"))
    with pytest.raises(ValueError, match=match):
        benchmark.run(small(tiny_pipeline, **dict(changes)), **arguments | options)


def test_what_cannot_be_measured_is_refused_before_any_compute(tiny_pipeline):
    refused(tiny_pipeline, "rounds = 4", rounds=4)
    refused(tiny_pipeline, "unknown student 'sd_smal'", names=["sd_smal"])
    refused(tiny_pipeline, "--unet: unknown widths", unet={"widths": [8]})
    with pytest.raises(ValueError, match="'\\[64' is not JSON"):
        benchmark.changes(["block_out_channels=[64"])
    assert benchmark.changes(["block_out_channels=[64]", "sample_size=8"]) == {
        "block_out_channels": [64],
        "sample_size": 8,
    }


def test_the_command_begins():
    """In a process of its own: the number of CPU devices is set before anything computes."""
    command = [sys.executable, "-m", "flaxkd.bench", "--rounds", "4"]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1 and ended.stderr.startswith("error: rounds = 4: a median needs at least 5"), ended


@pytest.mark.slow
def test_the_training_step_costs_little_more_than_it_must(monkeypatch):
    """As wide as the miniature, by XLA's count before compilation, which the compiled program's is within 1 % of."""
    flops = {}
    config = load("small")
    config.batch_size = jax.device_count()
    miniature = Folder.open(None)
    unet = miniature.config("unet") | {name: tiny.UNET[name] for name in ("down_block_types", "up_block_types")}
    folder = miniature.replace({"unet": unet}, {"unet": lambda: tiny.weights(pretrained.shapes("unet", unet), 0)})
    subject = works.subject("sd_small", config, folder, steps=2)
    monkeypatch.setattr(jax.stages.Lowered, "compile", lambda lowered: lowered)
    flops["step"] = works._train(subject)[1].cost_analysis()["flops"]
    for name in ("teacher", "sd_small"):
        student = works.subject(name, config, folder, steps=2)
        flops[name] = works._denoise(student)[1].cost_analysis()["flops"] / 2
    # 1.067 with attention in one stage, since the optimizer's share is larger there; one more forward pass is 1.2.
    assert 1 < flops["step"] / (flops["teacher"] + 3 * flops["sd_small"]) < 1.1


def test_what_fails_is_listed_and_the_others_go_on(tiny_pipeline, tmp_path, monkeypatch):
    """PyTorch's and XLA's allocators raise RuntimeError."""

    def prepare(subject, work, by=None):
        if by is None:
            return Prepared(lambda: None, 3.0, 7e9, 2**20)
        raise RuntimeError("out of memory\nmuch more")

    monkeypatch.setattr(benchmark.works, "prepare", prepare)
    monkeypatch.setattr(benchmark.torch_works, "prepare", prepare)
    monkeypatch.setattr(benchmark.torch_works, "check", lambda config: None)
    monkeypatch.setattr(benchmark.torch_works, "machine", lambda: "a GPU")
    monkeypatch.setattr(benchmark, "versions", lambda against: {})
    arguments = dict(names=[], against=["torch eager"], unet={}, rounds=5, steps=2, out=tmp_path)
    rows = benchmark.run(small(tiny_pipeline), **arguments)["rows"]
    assert rows[1]["train"]["seconds"] is None and rows[0]["train"]["seconds"] is not None
    text = (tmp_path / "bench.md").read_text()
    assert "- teacher, train, torch eager: RuntimeError: out of memory\n" in text
    assert "| teacher | torch eager | – | – | – | – | – | – | – |" in text
