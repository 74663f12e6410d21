"""Stable Diffusion XL: its conditioning and its pictures are those of diffusers, and its folders load there."""

import numpy as np
import pytest
from PIL import Image

from flaxkd import pretrained
from flaxkd.diffusion import samplers
from flaxkd.drawing import batches
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.pretrained import Folder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

PROMPTS = ["red apple", "grinning face", ""]


@pytest.fixture(scope="module")
def theirs(diffusers_xl):
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(diffusers_xl)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def ours(diffusers_xl):
    return Pipeline.from_pretrained(diffusers_xl, np.float32)


def conditions(pipeline, prompts, clip_skip=None) -> dict:
    pipeline = pipeline._skip_layers(clip_skip)
    inputs = pipeline.folder.conditions(prompts, (32, 48))
    return pipeline.folder.family.condition(pipeline.modules, pipeline.params, inputs)


@pytest.mark.parametrize("clip_skip", [None, 0, 1])
def test_both_text_encoders_condition_as_in_diffusers(theirs, ours, clip_skip):
    if clip_skip:  # only the second encoder has layers to spare
        with pytest.raises(ValueError, match=r"clip_skip = 1: the text_encoder of .* has 2 layers, and 0 to 0 can"):
            conditions(ours, PROMPTS, clip_skip)
        return
    with torch.no_grad():
        states, _, pooled, _ = theirs.encode_prompt(PROMPTS, do_classifier_free_guidance=False, clip_skip=clip_skip)
    found = conditions(ours, PROMPTS, clip_skip)
    np.testing.assert_allclose(found["encoder_hidden_states"], states.numpy(), atol=2e-5)
    np.testing.assert_allclose(found["text_embeds"], pooled.numpy(), atol=2e-5)
    assert np.abs(states.numpy()[2]).max() > 0.5  # of "", which is not a missing prompt
    expected = theirs._get_add_time_ids((32, 48), (0, 0), (32, 48), torch.float32, 60 - 48)
    np.testing.assert_array_equal(found["time_ids"], np.repeat(expected.numpy(), 3, axis=0))


def test_a_missing_prompt_is_zeros(ours):
    found = conditions(ours, [None, "red apple"])
    assert not np.any(found["encoder_hidden_states"][0]) and not np.any(found["text_embeds"][0])
    assert np.abs(found["encoder_hidden_states"][1]).max() > 0.5


def drawn(ours, latents, negatives, **options) -> np.ndarray:
    schedule = samplers.schedule("euler", ours.scheduler_config, 3, options.pop("strength", None))
    noise = lambda i: (latents[i], None)
    pictures = batches.draw(ours, PROMPTS[:2], noise, schedule, 3.0, batch_size=2, negatives=negatives, **options)
    return np.stack(list(pictures))


@pytest.mark.parametrize("negative", [None, ""])
def test_the_same_picture_as_diffusers_from_the_same_latents(theirs, ours, negative):
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    pictures = theirs(
        PROMPTS[:2],
        negative_prompt=negative if negative is None else [negative] * 2,
        num_inference_steps=3,
        guidance_scale=3.0,
        latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
        height=32,
        width=32,
        output_type="np",
    ).images
    found = drawn(ours, latents, [negative] * 2)
    assert np.std(pictures) > 0.05
    np.testing.assert_allclose(found / 255, pictures, atol=3e-3)


def test_the_two_ways_to_say_nothing_draw_two_pictures(ours):
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    apart = np.abs(drawn(ours, latents, [None] * 2).astype(int) - drawn(ours, latents, [""] * 2))
    assert apart.mean() > 1  # of 255


def test_image_to_image_is_the_pipeline_of_diffusers(diffusers_xl, ours):
    theirs = diffusers.StableDiffusionXLImg2ImgPipeline.from_pretrained(diffusers_xl)
    theirs.set_progress_bar_config(disable=True)
    picture = Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8))
    with torch.no_grad():
        pixels = torch.tensor(np.asarray(picture).transpose(2, 0, 1)[None] / np.float32(127.5) - 1)
        mean = theirs.vae.encode(pixels).latent_dist.mode() * theirs.vae.config.scaling_factor
    theirs.prepare_latents = lambda image, timestep, *args, **_: theirs.scheduler.add_noise(
        mean.repeat(2, 1, 1, 1), noise, timestep[:1].repeat(2)
    )
    latents = np.random.default_rng(1).standard_normal((2, 8, 8, 4)).astype(np.float32)
    noise = torch.tensor(latents.transpose(0, 3, 1, 2))
    expected = theirs(
        PROMPTS[:2], image=[picture] * 2, strength=0.7, num_inference_steps=3, guidance_scale=3.0, output_type="np"
    ).images
    pixels = np.asarray(picture, np.float32) / 255
    found = drawn(ours, latents, [None] * 2, strength=0.7, images=[pixels] * 2)
    np.testing.assert_allclose(found / 255, expected, atol=3e-3)


def test_a_saved_folder_is_one_of_diffusers(diffusers_xl, tmp_path):
    source = Folder.open(diffusers_xl)
    assert source.family is pretrained.FAMILIES["sdxl"] and source.guidance == 5.0 and source.zeros
    pretrained.save(tmp_path / "out", source=source, parts={})
    again = diffusers.StableDiffusionXLPipeline.from_pretrained(tmp_path / "out")
    before = diffusers.StableDiffusionXLPipeline.from_pretrained(diffusers_xl)
    for part in source.parts:
        theirs, mine = (getattr(pipeline, part).state_dict() for pipeline in (before, again))
        assert theirs.keys() == mine.keys() and all(torch.equal(theirs[key], mine[key]) for key in theirs)
    ids = [[pipeline.tokenizer_2("red apple", padding="max_length").input_ids] for pipeline in (before, again)]
    assert ids[0] == ids[1] and ids[0][0][-1] == before.tokenizer_2.convert_tokens_to_ids("!")
    assert again.config.force_zeros_for_empty_prompt and Folder.open(tmp_path / "out").zeros
    assert type(again.scheduler) is diffusers.EulerDiscreteScheduler
