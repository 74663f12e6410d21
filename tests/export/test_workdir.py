"""The workdir of a training becomes a pipeline folder."""

import json
import shutil

import jax
import numpy as np
import pytest

from convert import from_diffusers, to_diffusers
from flaxkd import export
from flaxkd.pretrained import Folder
from tests.export.trainings import same, shift


@pytest.mark.parametrize("flags, shifted", [([], -20), (["--ema"], -20), (["--no-ema"], 20)])
def test_a_training_is_exported_with_what_was_trained(workdir, student, tiny_pipeline, flags, shifted):
    out = workdir / "diffusers"
    to_diffusers.main(["--workdir", str(workdir), "--out", str(out), "--dtype", "float32", *flags])
    _, params = Folder.open(out).load("unet")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, shift(student[1], shifted)))
    for part in ("vae", "text_encoder"):
        assert same({part: Folder.open(out).tensors(part)}, {part: Folder.open(tiny_pipeline).tensors(part)})


def test_a_broken_checkpoint_gives_way_to_the_one_before(workdir):
    for path in (workdir / "checkpoints" / "20").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    step, params, averaged = export.restore(workdir / "checkpoints")
    assert (step, list(params), averaged) == (10, ["unet"], True)
    shutil.rmtree(workdir / "checkpoints" / "10")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        export.restore(workdir / "checkpoints")


def test_errors_of_export_say_what_to_do(workdir, tiny_pipeline, tmp_path):
    converted = tmp_path / "converted"
    from_diffusers.convert(str(tiny_pipeline), converted)
    with pytest.raises(FileNotFoundError, match="give a workdir"):
        export.export(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no moving average"):
        export.export(converted, tmp_path / "out", ema=True)
    plan = json.loads((workdir / "export.json").read_text())
    (workdir / "export.json").write_text(json.dumps(plan | {"source": "/gone"}))
    with pytest.raises(FileNotFoundError, match="--source DIR"):
        export.export(workdir, tmp_path / "out")
    assert export.export(workdir, tmp_path / "out", source=tiny_pipeline).is_dir()
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        export.export(workdir, tmp_path / "out", source=tiny_pipeline)
