"""What a request may ask for, and how its mistakes are named."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from flaxkd.serve.requests import Limits, Refused, checked
from tests.serve.conftest import LIMITS


def png(width=40, height=20, form="PNG") -> str:
    file = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(file, form)
    return base64.b64encode(file.getvalue()).decode()


def test_a_prompt_is_enough(models):
    request = checked({"prompt": "red apple"}, models, Limits())
    assert (request.model, request.width, request.height, request.steps) == ("teacher", 32, 32, 25)
    assert (request.sampler, request.guidance, request.count) == ("pndm", 7.5, 1)
    assert request.negative_prompt is request.image is request.strength is None
    assert checked({"prompt": "red apple"}, models, Limits()).seed != request.seed


def test_an_image_is_scaled_and_cropped(models):
    request = checked(
        {"prompt": "x", "image": f"data:image/jpeg;base64,{png(form='JPEG')}", "steps": 10}, models, LIMITS
    )
    assert request.image.shape == (32, 32, 3) and request.image[..., 0].min() > 0.9 and request.strength == 0.8
    assert len(request.schedule.timesteps) == 9  # pndm's


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": ""}, "prompt", "is missing"),
        ({"prompt": ["x"]}, "prompt", "must be a text of at most 100 letters"),
        ({"prompt": "x" * 101}, "prompt", "must be a text of at most 100 letters"),
        ({"steps": 21}, "steps", "a whole number from 1 to 20"),
        ({"steps": True}, "steps", "a whole number from 1 to 20"),
        ({"steps": 10**400}, "steps", "a whole number from 1 to 20"),
        ({"count": 7}, "count", "from 1 to 6"),
        ({"guidance": "7"}, "guidance", "a number from 0 to 100"),
        ({"guidance": float("nan")}, "guidance", "a number from 0 to 100"),
        ({"seed": 2**32}, "seed", "a whole number from -1 to"),
        ({"width": 40}, "width", r"not served at 40 x 32 pixels \(sizes: 32 x 32\)"),
        ({"sampler": "nosuch"}, "sampler", "'nosuch' is unknown"),
        ({"model": "../secret"}, "model", r"not served \(served: teacher, student\)"),
        ({"strength": 0.5}, "strength", "give one, or no strength"),
        ({"image": "/etc/passwd"}, "image", "addresses and paths are not read"),
        ({"image": "http://127.0.0.1/a.png"}, "image", "addresses and paths are not read"),
        ({"image": "file:///etc/passwd"}, "image", "addresses and paths are not read"),
        ({"image": png(5000, 5000)}, "image", "at most 16777216 are read"),
        ({"image": png(form="GIF")}, "image", "no PNG, JPEG or WebP"),
        ({"image": png()[:60]}, "image", "no PNG, JPEG or WebP"),
        ({"image": png(), "strength": 0.01, "steps": 2}, "sampler", "leaves none of 2 steps"),
        ({"__class__": 1}, "__class__", "is no field"),
    ],
)
def test_mistakes_are_named(models, fields, field, message):
    with pytest.raises(Refused, match=message) as refused:
        checked({"prompt": "x"} | fields, models, LIMITS)
    assert refused.value.field == field and refused.value.status == (404 if field == "model" else 422)


def test_only_pictures_that_share_a_schedule_are_drawn_together(models):
    ask = lambda **fields: checked({"prompt": "x", "seed": 1, "steps": 5} | fields, models, LIMITS).together
    assert ask() == ask(prompt="y", seed=9, guidance=3, negative_prompt="z", count=4)
    others = [ask(steps=6), ask(sampler="ddim"), ask(guidance=1), ask(model="student"), ask(image=png(), strength=0.6)]
    assert len({ask(), *others}) == 6
    assert np.isfinite(checked({"prompt": "x"}, models, LIMITS).schedule.timesteps).all()
