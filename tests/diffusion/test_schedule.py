"""What the noise schedule refuses."""

import pytest

from flaxkd import diffusion
from tests.tasks.test_losses import SD


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type = 'sample' is not supported"):
        diffusion.NoiseSchedule.from_config(SD, "sample")
