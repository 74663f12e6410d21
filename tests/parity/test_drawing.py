"""Pictures are those that the pipelines of diffusers draw."""

import dataclasses
import warnings

import numpy as np
import pytest
from flax.core import FrozenDict
from PIL import Image

from flaxkd import pretrained
from flaxkd.diffusion import phases, samplers, sampling
from flaxkd.drawing import batches
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.pretrained import Folder, families
from tests import tiny
from tests.running import write_plain
from tests.test_generate import levels

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.mark.parametrize("kind", ["ddim", "dpmsolver++"])
def test_the_same_picture_as_diffusers_from_the_same_latents(diffusers_pipeline, kind):
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(diffusers_pipeline)
    scheduler = diffusers.DDIMScheduler if kind == "ddim" else diffusers.DPMSolverMultistepScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    prompts = ["red apple", "grinning face"]
    expected = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=3.0,
        latents=torch.tensor(latents.transpose(0, 3, 1, 2)),
        output_type="np",
    ).images

    folder = Folder.open(diffusers_pipeline)
    modules, params = {}, {}
    for part in folder.parts:
        modules[part], params[part] = folder.load(part)
    drawn = sampling.text_to_image(
        FrozenDict(modules),
        folder.family.condition,
        params,
        inputs=folder.conditions(prompts, (32, 32)),
        negative_inputs=folder.conditions([None, None], (32, 32)),
        latents=latents,
        schedule=samplers.schedule(kind, folder.config("scheduler"), 4),
        guidance=3.0,
    )
    assert np.std(expected) > 0.05  # not a blank picture
    np.testing.assert_allclose(drawn, expected, atol=2e-3)


@pytest.mark.parametrize("guidance", [1.0, 6.0])
def test_a_model_of_few_steps_is_drawn_from_its_folder_alone(tmp_path, monkeypatch, guidance):
    """Without guidance, or with a UNet whose input the guidance is: its folder holds the sampler and the guidance."""
    source = Folder.open(write_plain(tmp_path)["teacher"])
    unet = source.config("unet") | ({"time_cond_proj_dim": 32} if guidance > 1 else {})
    scheduler = source.config("scheduler") | {"_class_name": "LCMScheduler"}
    source = dataclasses.replace(source.replace({"scheduler": scheduler}, {}), drawn_with=guidance)
    params = tiny.weights(pretrained.shapes("unet", unet), 0)
    folder = pretrained.save(tmp_path / "few", source=source, parts={"unet": (unet, params)})

    shape, schedule = (8, 8, 4), samplers.schedule("lcm", scheduler, 4)
    first, between = batches.noise_of(0, shape, schedule)
    nchw = lambda x: torch.tensor(x[None].transpose(0, 3, 1, 2))
    drawn = iter(between)
    monkeypatch.setattr("diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *_, **__: nchw(next(drawn)))
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    theirs.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance}
    expected = theirs("red apple", latents=nchw(first), output_type="np", **settings).images[0]
    (ours,) = Pipeline.from_pretrained(folder)("red apple", progress=False)
    assert (ours.info["sampler"], ours.info["num_inference_steps"]) == ("lcm", "4")
    assert np.std(expected) > 0.05
    assert levels(ours, np.round(expected * 255)) <= 1


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_a_model_of_phases_is_drawn_from_its_folder_alone(tmp_path, kind):
    """Steps, guidance and spacing are in its folder, and diffusers takes the rest of it for what it is."""
    source = Folder.open(write_plain(tmp_path)["teacher"])
    scheduler = phases.scheduler_config(source.config("scheduler"), kind, 4)
    source = dataclasses.replace(source.replace({"scheduler": scheduler}, {}), drawn_with=1.0)
    unet = source.config("unet"), tiny.weights(source.shapes("unet"), 0)
    folder = pretrained.save(tmp_path / "few", source=source, parts={"unet": unet})
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="(?s).*outdated", category=FutureWarning)
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
    assert type(theirs.scheduler) is diffusers.DDIMScheduler
    theirs.set_progress_bar_config(disable=True)
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    start = torch.tensor(latents.transpose(0, 3, 1, 2))
    expected = theirs("red apple", latents=start, output_type="np", num_inference_steps=4, guidance_scale=1).images[0]
    (ours,) = Pipeline.from_pretrained(folder)("red apple", latents=latents, progress=False)
    settings = [ours.info[name] for name in ("sampler", "num_inference_steps", "guidance_scale")]
    assert settings == ["ddim", "4", "1.0"] and np.std(expected) > 0.05
    assert levels(ours, np.round(expected * 255)) <= 1
    assert theirs.scheduler.timesteps.tolist() == phases.learner(scheduler).timesteps[:, 0].tolist()


def test_a_model_without_signal_at_the_start_is_drawn_as_diffusers_does(tmp_path):
    """v-prediction, `rescale_betas_zero_snr`, trailing timesteps and a rescaled guidance."""
    source = Folder.open(write_plain(tmp_path)["teacher"])
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    unet = source.config("unet"), tiny.weights(source.shapes("unet"), 0)
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    settings = {"num_inference_steps": 4, "guidance_scale": 3.0, "guidance_rescale": 0.7}
    for kind in ("ddim", "euler", "dpmsolver++"):
        scheduler = {"_class_name": samplers.SAMPLERS[kind].scheduler, "clip_sample": False}
        made = source.replace({"scheduler": source.config("scheduler") | zero | scheduler}, {})
        folder = pretrained.save(tmp_path / kind, source=made, parts={"unet": unet})
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        assert theirs.scheduler.config.rescale_betas_zero_snr and type(theirs.scheduler).__name__ in scheduler.values()
        theirs.set_progress_bar_config(disable=True)
        start = torch.tensor(latents.transpose(0, 3, 1, 2))
        expected = theirs("red apple", latents=start, output_type="np", **settings).images[0]
        (ours,) = Pipeline.from_pretrained(folder)("red apple", latents=latents, progress=False, **settings)
        assert ours.info["sampler"] == kind and np.std(expected) > 0.05
        assert levels(ours, np.round(expected * 255)) <= 1


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "before.png"
    Image.fromarray(np.random.default_rng(0).integers(256, size=(48, 64, 3), dtype=np.uint8)).save(path)
    return path


@pytest.mark.parametrize("sampler", ["ddim", "pndm"])
def test_image_to_image_is_the_pipeline_of_diffusers(diffusers_pipeline, picture, sampler):
    pipeline = Pipeline.from_pretrained(diffusers_pipeline)
    theirs = diffusers.StableDiffusionImg2ImgPipeline.from_pretrained(diffusers_pipeline, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    if sampler == "ddim":
        theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    image = Image.open(picture).crop((0, 0, 32, 32))
    mean = mean_of(theirs.vae, image)
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(0))
    steps = 4 if sampler == "ddim" else 3  # 2 calls of the UNet either way: int(4 * 0.5), int(3 * 0.5) + 1
    settings = dict(prompt="red apple", num_inference_steps=steps, guidance_scale=3.0, strength=0.5)
    generator = torch.Generator().manual_seed(0)
    expected = theirs(image=mean, generator=generator, output_type="np", **settings).images[0]
    latents = noise.numpy().transpose(0, 2, 3, 1)
    (ours,) = pipeline(image=image, latents=latents, sampler=sampler, progress=False, **settings)
    assert ours.info["strength"] == "0.5"
    assert np.std(expected) > 0.05
    assert levels(ours, np.round(expected * 255)) <= 1


XL = pytest.param("sdxl", 9, marks=pytest.mark.slow)


@pytest.mark.parametrize(("family", "channels"), [("sd1", 4), ("sd1", 9), XL])
def test_a_masked_part_of_a_picture_is_drawn_as_diffusers_does(request, tmp_path, picture, family, channels):
    """What stays is put back after each step, or seen by the UNet."""
    path = request.getfixturevalue("diffusers_xl") if family == "sdxl" else write_plain(tmp_path)["teacher"]
    source = Folder.open(path)
    unet = source.config("unet") | {"in_channels": channels}
    params = tiny.weights(pretrained.shapes("unet", unet), 0)
    folder = pretrained.save(tmp_path / "pipeline", source=source, parts={"unet": (unet, params)})
    kind = diffusers.DiffusionPipeline if channels == 9 else diffusers.StableDiffusionInpaintPipeline
    theirs = kind.from_pretrained(folder, **{"requires_safety_checker": False} if family == "sd1" else {})
    assert type(theirs).__name__ == families.FAMILIES[family].pipelines[families.INPAINTING]
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    image, mask = Image.open(picture).crop((0, 0, 32, 32)), Image.new("L", (32, 32))
    mask.paste(200, (5, 8, 24, 20))  # neither at latents nor white
    seen = np.where(np.asarray(mask)[..., None] > 127, 127.5, np.asarray(image))
    noise = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
    settings = dict(prompt="red apple", num_inference_steps=4, guidance_scale=3.0, strength=1.0)
    given = dict(image=mean_of(theirs.vae, image), masked_image_latents=mean_of(theirs.vae, seen), mask_image=mask)
    expected = theirs(**given, generator=torch.Generator().manual_seed(0), output_type="np", **settings).images[0]
    latents = noise.numpy().transpose(0, 2, 3, 1)
    given = dict(image=image, mask_image=mask, latents=latents, sampler="ddim")
    (ours,) = Pipeline.from_pretrained(folder)(**given, progress=False, **settings)
    assert np.std(expected) > 0.05
    assert levels(ours, np.round(expected * 255)) <= 1


def mean_of(vae, image):
    """Scaled latents of a picture. diffusers takes them for a picture too: its own would be drawn around the mean."""
    pixels = torch.tensor(np.asarray(image, np.float32).transpose(2, 0, 1)[None] / 127.5 - 1)
    with torch.no_grad():
        return vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
