"""The table of few steps: which samplers draw, with which noise, and what is measured."""

import json

import numpy as np
import pytest
from PIL import Image

from flaxkd import steps
from flaxkd.diffusion import samplers
from flaxkd.evaluate import originals


@pytest.fixture
def asked(monkeypatch):
    """What the pipelines are asked for, which draw a grey that is lighter with fewer steps."""
    found = []

    class Drawing:
        def __init__(self, model):
            self.name, self.folder = str(model), self
            kind = {"few": "LCMScheduler", "phased": "DDIMScheduler"}.get(model, "PNDMScheduler")
            self.scheduler_config = {"_class_name": kind, "timestep_spacing": "leading"}
            self.scheduler_config |= {samplers.OWN_STEPS: 4} if model == "phased" else {}

        resolution = 32

        def latent_shape(self):
            return 4, 4, 4

    def draw(pipeline, captions, seed, sampler, n):
        found.append((pipeline.name, sampler, n))
        return np.full((len(captions), 32, 32, 3), 200 - n, np.uint8)

    monkeypatch.setattr(steps.Pipeline, "from_pretrained", Drawing)
    monkeypatch.setattr(steps, "draw", draw)
    known = np.full((8, 32, 32, 3), 100, np.uint8)
    monkeypatch.setattr(originals, "read", lambda n, m, seed: ([f"caption {i}" for i in range(n)], known))
    return found


def test_every_model_draws_with_its_samplers_in_every_number_of_steps(asked, tmp_path, monkeypatch):
    out, sheets = tmp_path / "steps", []
    grid = lambda columns, rows, *rest, real=steps.grids.grid, **more: (
        sheets.append(([*columns], rows)) or real(columns, rows, *rest, **more)
    )
    monkeypatch.setattr(steps.grids, "grid", grid)
    steps.main(
        ["--model", "few", "--model", "phased", "--steps", "1", "--steps", "4", "--captions", "7", "--out", str(out)]
    )
    plain = [("None", kind, n) for kind in ("ddim", "dpmsolver++") for n in (1, 4)]
    assert asked == [
        ("None", "pndm", 25),
        *plain,
        *(("few", kind, n) for kind in ("lcm", "ddim") for n in (1, 4)),
        ("phased", "ddim", 1),
        ("phased", "ddim", 4),
    ]
    rows = json.loads((out / "steps.json").read_text())["rows"]
    assert [row["distance"] for row in rows] == [0, *(24, 21) * 5]
    assert rows[1]["psnr"] == pytest.approx(20 * np.log10(255 / 24)) and rows[1]["recall"] == pytest.approx(5 / 7)
    assert "| few | lcm | 4 | 21.0 | 21.7 | 71% |" in (out / "steps.md").read_text()
    with Image.open(out / "steps.png") as sheet:
        assert sheet.width > 3 * 32 and sheet.height > 3 * 5 * 32  # rows: 3 captions of 5 samplers
    ((columns, labels),) = sheets
    assert columns == ["teacher", "1 step", "4 steps"]
    assert labels[:3] == ["None, ddim: caption 0", "None, dpmsolver++: caption 0", "few, lcm: caption 0"]
