"""The sheet of samples never ends a training."""

import warnings

import pytest

from flaxkd.diffusion import samplers
from flaxkd.pretrained import Folder
from flaxkd.tasks import samples
from tests.diffusion.stand_ins import SD15


def schedule(scheduler, **sample):
    return samples.schedule(Folder(None, {"scheduler": SD15 | scheduler}), **sample)


def test_it_follows_the_teacher():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(schedule({"_class_name": "PNDMScheduler"}).timesteps) == samplers.STEPS + 1
        assert len(schedule({"_class_name": "PNDMScheduler"}, sampler="heun", steps=4).timesteps) == 7


UNKNOWN = [
    ({"_class_name": "TCDScheduler"}, {}, "TCDScheduler, is not supported"),
    ({"_class_name": "PNDMScheduler", "skip_prk_steps": False}, {}, "skip_prk_steps = False"),
    ({"thresholding": True}, {"sampler": "ddim"}, "thresholding = True"),
]


@pytest.mark.parametrize(("scheduler", "sample", "message"), UNKNOWN[:2])
def test_a_scheduler_that_is_not_known_is_a_warning(scheduler, sample, message):
    with pytest.warns(UserWarning, match=f"{message}.*drawn with dpmsolver"):
        found = schedule(scheduler, **sample)
    assert len(found.timesteps) == samplers.STEPS


@pytest.mark.parametrize(("scheduler", "sample", "message"), [UNKNOWN[2], ({}, {"steps": 2000}, "steps = 2000")])
def test_where_nothing_can_draw_there_are_no_pictures(scheduler, sample, message):
    with pytest.warns(UserWarning) as said:
        assert schedule(scheduler, **sample) is None
    assert message in str(said[0].message) and "goes on, without pictures" in str(said[-1].message)


def test_a_sampler_that_does_not_exist_is_an_error():
    with pytest.raises(ValueError, match="'dpm3' is unknown"):
        schedule({}, sampler="dpm3")
