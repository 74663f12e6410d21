"""The noise schedule is that of diffusers."""

import numpy as np
import pytest

from flaxkd import diffusion
from tests.tasks.test_losses import SD, normal

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("kind", "zero"), [("epsilon", False), ("v_prediction", False), ("v_prediction", True)])
def test_forward_process_equals_diffusers(kind, zero):
    from diffusers import DDPMScheduler
    from diffusers.training_utils import compute_snr

    config = SD | {"prediction_type": kind, "rescale_betas_zero_snr": zero}
    scheduler, schedule = DDPMScheduler.from_config(config), diffusion.NoiseSchedule.from_config(config)
    latents, noise, timesteps = normal(0, 5, 2, 2, 4), normal(1, 5, 2, 2, 4), np.array([0, 1, 250, 600, 999])
    tensors = [torch.tensor(x) for x in (latents, noise, timesteps)]
    np.testing.assert_allclose(
        diffusion.add_noise(schedule, latents, noise, timesteps), scheduler.add_noise(*tensors), atol=2e-6
    )
    velocity = scheduler.get_velocity(*tensors)
    np.testing.assert_allclose(
        diffusion.target(schedule, latents, noise, timesteps),
        noise if kind == "epsilon" else velocity,
        atol=2e-6,
    )
    snr = compute_snr(scheduler, tensors[2]).numpy()
    expected = np.minimum(snr, 5.0) / (snr if kind == "epsilon" else snr + 1)  # as train_text_to_image.py has it
    np.testing.assert_allclose(diffusion.min_snr_weights(schedule, timesteps, 5.0), expected, rtol=2e-4)
