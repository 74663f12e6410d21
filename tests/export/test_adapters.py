"""The LoRA files of a run and their card: what to load them into, and how."""

import dataclasses
import json

import pytest

from flaxkd import export, students
from flaxkd.diffusion import consistency
from flaxkd.pretrained import Folder, lora_files
from flaxkd.weights import lora
from tests.running import ROOT


@pytest.fixture
def run(tmp_path):
    """Its config.json, in a workdir named toy."""
    (tmp_path / "toy").mkdir()
    run = {"teacher": "owner/teacher", "student": None, "blank": None, "learning_rate": {"value": 1e-3}}
    run |= {"data": {"source": "pictures", "caption": "sks cat"}, "sample": {"prompts": ["red apple"]}}
    (tmp_path / "toy" / "config.json").write_text(json.dumps(run))
    return run


@pytest.mark.parametrize(("teacher", "place"), [(None, "teacher"), ("miniature_xl", "teacher_xl")])
def test_the_card_names_a_folder_that_diffusers_finds(run, tiny_pipeline, tmp_path, teacher, place):
    (tmp_path / "toy" / "config.json").write_text(json.dumps(run | {"teacher": teacher}))
    folder = Folder.open(tiny_pipeline)
    adapters = {"unet": lora.init(folder.shapes("unet"), "attention", 2, 0)}
    out = export.write_adapters(tmp_path / "toy", folder, adapters, export.Adapted(None, {"unet": 1.0}), 7)
    assert f"from_pretrained('flaxkd/assets/{place}')" in (out / "README.md").read_text()
    assert (ROOT / "flaxkd/assets" / place / "model_index.json").is_file()


def test_the_card_of_few_steps_changes_the_sampler(run, tiny_pipeline, tmp_path):
    teacher = Folder.open(tiny_pipeline)
    scheduler = consistency.scheduler_config(teacher.config("scheduler"), "epsilon", 25)
    folder = dataclasses.replace(teacher.replace({"scheduler": scheduler}, {}), drawn_with=1.0)
    adapters = {"unet": lora.init(folder.shapes("unet"), "attention", 2, 0)}
    out = export.write_adapters(tmp_path / "toy", folder, adapters, export.Adapted(None, {"unet": 1.0}), 7)
    card = (out / "README.md").read_text()
    for line in (
        "license: other",
        "base_model: owner/teacher",
        "- lora",
        "from diffusers import LCMScheduler, StableDiffusionPipeline",
        "pipeline = StableDiffusionPipeline.from_pretrained('owner/teacher')",
        "pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=25, "
        "timestep_scaling=10.0, clip_sample=False)",
        "settings = dict(num_inference_steps=4, guidance_scale=1)",
        "pipeline('sks cat', **settings).images[0].save(\"picture.png\")",
    ):
        assert line in card.splitlines(), line


def test_a_students_file_says_so(run, tiny_pipeline, tmp_path):
    (tmp_path / "toy" / "config.json").write_text(json.dumps(run | {"student": "sd_small"}))
    teacher = Folder.open(tiny_pipeline)
    config = students.config(students.get("sd_small"), teacher.config("unet"))
    folder = teacher.replace({"unet": config}, {})
    adapters = {"unet": lora.init(folder.shapes("unet"), "attention", 2, 0)}
    out = export.write_adapters(tmp_path / "toy", folder, adapters, export.Adapted("runs/small", {"unet": 0.5}), 7)
    file = lora_files.read(out / "toy.safetensors")
    said = {name: file.metadata[f"flaxkd.{name}"] for name in ("student", "teacher")}
    assert said == {"student": "sd_small", "teacher": "owner/teacher"}
    assert json.loads(file.metadata["ss_tag_frequency"]) == {"toy": {"sks cat": 1}}
    card = (out / "README.md").read_text()
    assert "For the student `sd_small` of [owner/teacher]" in card and "LCMScheduler" not in card
    with pytest.raises(ValueError, match="is for the student sd_small"):
        lora_files.fit(file, teacher)
