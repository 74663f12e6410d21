"""A training on this machine's device gives the same bits twice, and after a resume."""

from pathlib import Path

import numpy as np
import pytest

from convert import to_diffusers
from flaxkd import train
from flaxkd.pretrained import Folder
from tests.test_configs import load

pytestmark = pytest.mark.device

STEPS = 20


def trained(workdir: Path, *stops: int) -> dict[str, np.ndarray]:
    """The student's weights in float32 after the last of `stops`; before, the run ends at each, and is resumed."""
    for steps in stops:
        config = load("small")
        config.steps, config.learning_rate = steps, dict(schedule="constant_schedule", value=1e-3)
        config.sample.every = config.validation.examples = 0
        train.run(config, workdir)
    out = workdir.with_name(f"{workdir.name}_float32")
    to_diffusers.main(["--workdir", str(workdir), "--out", str(out), "--dtype", "float32"])
    return Folder.open(out).tensors("unet")


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("once") / "run", STEPS)


@pytest.mark.parametrize("stops", [(STEPS,), (STEPS // 2, STEPS)], ids=["twice", "resumed"])
def test_a_training_repeats_bit_for_bit(once, stops, tmp_path):
    again = trained(tmp_path / "run", *stops)
    different = {name for name in once if not np.array_equal(once[name], again[name])}
    assert not different, f"{len(different)} of {len(once)} tensors differ"
    begun = Folder.open().tensors("unet")
    assert any(x.shape == begun[name].shape and not np.array_equal(x, begun[name]) for name, x in once.items())
