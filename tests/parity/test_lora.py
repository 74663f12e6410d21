"""diffusers loads the LoRA files that flaxkd writes, and flaxkd reads those of others, with the same effect."""

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from flaxkd import Pipeline, students
from flaxkd.pretrained import Folder, keys, lora_files, lora_writing, save
from flaxkd.weights import lora

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")

NOISE = 1e-5  # of float32, as a share of the largest number of the prediction: from 2e-6 to 5e-6, by the machine


@pytest.fixture(scope="module", params=[None, "sd_small"], ids=["teacher", "student"])
def model(request, diffusers_pipeline, tmp_path_factory) -> Folder:
    teacher = Folder.open(diffusers_pipeline)
    if request.param is None:
        return teacher
    student = students.get(request.param)
    config = students.config(student, teacher.config("unet"))
    params = students.take(student, teacher.params("unet"), students.shapes(config)["params"])
    return Folder.open(save(tmp_path_factory.mktemp("cut") / "s", source=teacher, parts={"unet": (config, params)}))


@pytest.fixture(scope="module")
def pipeline(model):
    return diffusers.StableDiffusionPipeline.from_pretrained(model.path)


def adapter(shapes: dict, targets: str) -> dict:
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), lora.init(shapes, targets, 4, 0))


def predict(unet) -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    x, states = (torch.randn(shape, generator=generator) for shape in ((1, 4, 8, 8), (1, 16, 16)))
    with torch.no_grad():
        return unet(x, 500, states).sample.numpy()


def merged(pipeline, folder: Folder) -> np.ndarray:
    """The prediction with the UNet's weights of `folder`; the pipeline's own are put back."""
    base = {key: x.clone() for key, x in pipeline.unet.state_dict().items()}
    tensors = keys.to_tensors(folder.params("unet"))
    pipeline.unet.load_state_dict({key: torch.tensor(x) for key, x in tensors.items()})
    predicted = predict(pipeline.unet)
    pipeline.unet.load_state_dict(base)
    return predicted


@pytest.mark.parametrize("targets", ["attention", "feed_forward", "lcm", "all"])
@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_what_is_written_changes_the_prediction_as_when_merged(model, pipeline, tmp_path, dialect, targets):
    parts = {"unet": adapter(model.shapes("unet"), targets)}
    path = lora_writing.write(tmp_path / "x.safetensors", parts, dialect, lora_writing.header(model, "x", parts))
    base, expected = predict(pipeline.unet), merged(pipeline, lora_files.applied(model, [path]))
    pipeline.load_lora_weights(path)
    try:
        loaded = predict(pipeline.unet)
        wrapped = sum(hasattr(module, "lora_A") for module in pipeline.unet.modules())
    finally:
        pipeline.unload_lora_weights()
    assert wrapped == len(lora.layers(parts["unet"]))
    change = np.abs(expected - base).max()
    print(f"{dialect} {targets}: {wrapped} modules, error {np.abs(loaded - expected).max():.1e}, change {change:.2g}")
    assert change > 0.05 and np.abs(loaded - expected).max() < NOISE * max(1, np.abs(expected).max())
    np.testing.assert_array_equal(predict(pipeline.unet), base)


def test_weights_of_several_files_are_those_of_set_adapters(model, pipeline, tmp_path):
    """As set_adapters: W + sum of weight * alpha / rank * B A. One alpha in all, which diffusers reads right."""
    parts = {"unet": adapter(model.shapes("unet"), "attention")}
    one = lora_writing.write(tmp_path / "one.safetensors", parts, "peft", {})
    two = tmp_path / "two.safetensors"
    tensors = {}
    for module, (a, b) in lora.layers(parts["unet"]).items():
        name = "lora_unet_" + "_".join(module).replace(".", "_")
        tensors |= {f"{name}.lora_down.weight": np.ascontiguousarray(a.T) * 2, f"{name}.alpha": np.array(2, np.float32)}
        tensors |= {f"{name}.lora_up.weight": np.ascontiguousarray(b.T)}
    save_file(tensors, two)
    assert {*lora_files.read(two).scales["unet"].values()} == {0.5}
    pipeline.load_lora_weights(one, adapter_name="a")
    pipeline.load_lora_weights(two, adapter_name="b")
    pipeline.set_adapters(["a", "b"], [0.7, 0.3])
    loaded = predict(pipeline.unet)
    pipeline.unload_lora_weights()
    expected = merged(pipeline, lora_files.applied(model, [f"{one}:0.7", f"{two}:0.3"]))
    assert np.abs(loaded - expected).max() < NOISE * max(1, np.abs(expected).max())


@pytest.mark.parametrize("dialect", ["peft", "kohya"])
@pytest.mark.parametrize("family", ["diffusers_pipeline", pytest.param("diffusers_xl", marks=pytest.mark.slow)])
def test_text_encoders_too_of_every_family(family, dialect, request, tmp_path):
    """UNet and all text encoders in one file. The pictures of diffusers are those of flaxkd, and without it others."""
    folder = Folder.open(request.getfixturevalue(family))
    trained = ("unet", *folder.family.encoders)
    parts = {part: adapter(folder.shapes(part), "feed_forward") for part in trained}
    path = lora_writing.write(tmp_path / "x.safetensors", parts, dialect, lora_writing.header(folder, "x", parts))
    ours = Pipeline.from_pretrained(folder.path, np.float32, lora=[path])
    theirs = diffusers.DiffusionPipeline.from_pretrained(folder.path)
    theirs.set_progress_bar_config(disable=True)
    theirs.scheduler = diffusers.DDIMScheduler.from_config(theirs.scheduler.config)
    theirs.load_lora_weights(path)
    for part in trained:
        wrapped = sum(hasattr(module, "lora_A") for module in getattr(theirs, part).modules())
        assert wrapped == len(lora.layers(parts[part])), part

    noise = np.random.default_rng(0).standard_normal((1, *folder.latent_shape()), np.float32)
    latents = torch.from_numpy(noise.transpose(0, 3, 1, 2))
    settings = {"num_inference_steps": 2, "guidance_scale": 2.0, "negative_prompt": "green apple"}
    draw = lambda: np.asarray(theirs("red apple", latents=latents, **settings).images[0], np.int16)
    expected = draw()
    found = np.asarray(ours("red apple", latents=noise, sampler="ddim", progress=False, **settings)[0], np.int16)
    assert np.abs(found - expected).max() <= 1
    theirs.unload_lora_weights()
    assert np.abs(draw() - expected).max() > 20
