"""A LoRA of few steps draws in diffusers, by the words of its card, what its run draws in flaxkd."""

import numpy as np
import pytest

from configs import lcm
from flaxkd import export, pretrained, train
from flaxkd.drawing import batches
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.pretrained import Folder
from flaxkd.tasks.samples import schedule
from tests import tiny
from tests.running import write_pictures, write_plain
from tests.test_generate import levels

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")


@pytest.mark.slow
def test_the_card_of_an_lcm_lora_draws_its_picture(tmp_path, monkeypatch, one_device):
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path / "cache"))
    config = lcm.get_config()
    plain = Folder.open(write_plain(tmp_path)["teacher"])
    unet = plain.config("unet"), tiny.weights(plain.shapes("unet"), 0)  # those of a new one predict nothing
    teacher = str(pretrained.save(tmp_path / "teacher", source=plain, parts={"unet": unet}))
    keys = {"teacher": teacher, "data.source": str(write_pictures(tmp_path / "pictures"))}
    keys |= {"data.resolution": 32, "batch_size": 4, "steps": 1, "validation.every": 0, "sample.every": 0}
    keys |= {"compilation_cache": "", "lora.rank": 2, "lora.targets": ("lcm",), "few_step.ode_steps": 20}
    # One step of a rate at which the adapter is seen in the picture.
    keys |= {"learning_rate": {"schedule": "constant_schedule", "value": 0.3}}
    config.update_from_flattened_dict(keys)
    train.run(config, tmp_path / "run")

    folder = export.open_model(tmp_path / "run")
    steps = schedule(folder)
    first, between = batches.noise_of(0, (8, 8, 4), steps)
    nchw = lambda x: torch.tensor(x[None].transpose(0, 3, 1, 2))
    drawn = iter(between)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: nchw(next(drawn)))
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    *code, call = card.partition("```python\n")[2].partition("\n```")[0].splitlines()
    places = {"'teacher'": repr(teacher), "PATH OR HUB ID OF THIS FOLDER": str(tmp_path / "run" / "lora")}
    text, named = "\n".join(code), {}
    for name, place in places.items():
        assert name in text
        text = text.replace(name, place)
    exec(text, named)
    theirs, settings = named["pipeline"], named["settings"]
    assert call.startswith("pipeline('red apple', **settings)") and settings == {
        "num_inference_steps": 4,
        "guidance_scale": 1,
    }
    theirs.set_progress_bar_config(disable=True)
    expected = theirs("red apple", latents=nchw(first), output_type="np", **settings).images[0]
    (ours,) = Pipeline.from_pretrained(tmp_path / "run")("red apple", progress=False)
    assert levels(ours, np.round(expected * 255)) <= 1
    alone = Folder.open(teacher).replace({"scheduler": folder.config("scheduler")}, {})
    (without,) = Pipeline.from_folder(alone, "teacher")("red apple", guidance_scale=1.0, progress=False)
    assert levels(without, np.round(expected * 255)) > 3
