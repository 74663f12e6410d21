"""What the noise schedule refuses."""

import pytest

from flaxkd import diffusion
from tests.tasks.test_losses import SD


def test_unknown_prediction_type():
    with pytest.raises(ValueError, match="prediction_type = 'sample' is not supported"):
        diffusion.NoiseSchedule.from_config(SD, "sample")


def test_the_noise_cannot_be_learnt_where_there_is_nothing_else():
    zero = SD | {"rescale_betas_zero_snr": True}
    with pytest.raises(ValueError, match="does not go with rescale_betas_zero_snr"):
        diffusion.NoiseSchedule.from_config(zero)
    assert diffusion.NoiseSchedule.from_config(zero, "v_prediction").alphas_cumprod[-1] == 0
