"""Round trips of what diffusers wrote are exact, and diffusers draws with an export."""

import jax
import numpy as np
import pytest

from convert import from_diffusers, to_diffusers
from flaxkd import export
from flaxkd.pretrained import Folder
from tests.export import trainings
from tests.export.trainings import same, tensors

diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("pipeline", ["diffusers_pipeline", "diffusers_xl"])
def test_round_trip_is_exact(request, pipeline, tmp_path):
    diffusers_pipeline = request.getfixturevalue(pipeline)
    from_diffusers.convert(str(diffusers_pipeline), tmp_path / "converted")
    to_diffusers.main(["--workdir", str(tmp_path / "converted"), "--out", str(tmp_path / "back")])
    assert same(tensors(tmp_path / "back"), tensors(diffusers_pipeline))
    for part in ("unet", "vae", "scheduler"):
        before, after = (Folder.open(folder).config(part) for folder in (diffusers_pipeline, tmp_path / "back"))
        assert {k: v for k, v in after.items() if k[0] != "_"} == {k: v for k, v in before.items() if k[0] != "_"}


def test_an_exported_student_loads_in_diffusers_and_draws(diffusers_pipeline, tmp_path):
    student = trainings.random_student(diffusers_pipeline)
    workdir = trainings.leave(tmp_path / "run", diffusers_pipeline, student)
    out = export.export(workdir, tmp_path / "out", np.float16)
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.num_parameters() == sum(x.size for x in jax.tree.leaves(student[1]))
    assert pipeline.unet.mid_block is None and len(pipeline.unet.down_blocks[0].resnets) == 1
    assert pipeline("red apple", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)
