"""LoRA as a task: what learns, what stays, runs that resume, the files they leave, the teacher's on a student."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict

from configs import lora as lora_config
from configs import repair
from flaxkd import export, students, tasks, train
from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.pretrained import Folder, lora_files, lora_writing, save
from flaxkd.training import step
from flaxkd.weights import lora
from tests import tiny
from tests.running import assert_same_bits, records, state, write_pictures, write_plain


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_pictures(home / "pictures")
    return home


@pytest.fixture(scope="module")
def plain(home):
    """With weights of unit scale: those of a new UNet end in zeros, and would give no gradient."""
    keys = write_plain(home)
    folder = Folder.open(keys["teacher"])
    weights = {part: (folder.config(part), tiny.weights(folder.shapes(part), 1)) for part in ("unet", "text_encoder")}
    return keys | {"teacher": save(home / "model", source=folder, parts=weights)}


def config_of(plain, home, **changes):
    config = lora_config.get_config()
    keys = {"teacher": str(plain["teacher"]), "data.source": str(home / "pictures"), "data.resolution": 32}
    keys |= {"batch_size": 4, "steps": 4, "validation.examples": 4, "sample.every": 0, "sample.steps": 2}
    keys |= {"train": ("unet",), "data.caption": None}
    keys |= {"checkpoint.every": 2, "validation.every": 2, "log_every": 1, "compilation_cache": ""}
    config.update_from_flattened_dict(keys | changes)
    return config


BOTH = {
    "train": ("unet", "text_encoder"),
    "lora.rank": 4,
    "lora.alpha": 2.0,
    "lora.text_encoder.rank": 2,
    "lora.text_encoder.alpha": 4.0,
    "lora.text_encoder.targets": ("q_proj",),
}


@pytest.fixture(scope="module")
def run(plain, home):
    """(config, workdir) of a run of UNet and text encoder, with scales of 0.5 and 2."""
    config = config_of(plain, home, **BOTH, text_encoder_rate=0.5, ema_decay=0.9)
    train.run(config, home / "toy")
    return config, home / "toy"


def test_the_base_stays_exact_and_only_adapters_learn(plain, home):
    folder = Folder.open(plain["teacher"])
    whole = tasks.make(config_of(plain, home, **{"lora.rank": None}), folder, jnp.bfloat16)
    task = tasks.make(config_of(plain, home), folder, jnp.bfloat16)
    base = flatten_dict(task.frozen["base"]["unet"])
    adapted = {(*module, "kernel") for module in lora.layers(task.trained["unet"])}
    assert len(adapted) == 8 and {path[-2] for path in adapted} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert {path for path, x in base.items() if x.dtype == np.float32} == adapted
    exact = flatten_dict(whole.trained["unet"])
    assert all(np.array_equal(base[path], exact[path]) for path in adapted)
    tx = step.optimizer(config_of(plain, home))
    sizes = [x.size for x in jax.tree.leaves(step.state_shapes(task, config_of(plain, home), tx).opt_state) if x.ndim]
    assert sum(sizes) == 2 * sum(x.size for x in jax.tree.leaves(task.trained))  # both moments of Adam


def test_before_the_first_step_the_loss_is_that_of_the_base(plain, home):
    folder = Folder.open(plain["teacher"])
    whole = tasks.make(config_of(plain, home, **{"lora.rank": None}), folder, jnp.float32)
    task = tasks.make(config_of(plain, home), folder, jnp.float32)

    @jax.jit
    def measured(trained, exact):
        inputs = task.prepare(jax.random.key(0), task.random_batch(4, 0))
        (loss, _), grads = jax.value_and_grad(task.loss, has_aux=True)(trained, task.frozen, {}, inputs)
        return loss, grads, whole.loss(exact, whole.frozen, {}, inputs)[0]

    loss, grads, expected = measured(task.trained, whole.trained)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    moved = {path[-2] for path, x in flatten_dict(grads["unet"]).items() if np.abs(x).max() > 0}
    assert moved == {"lora_B"}  # of A the gradient is B's, which is 0


@pytest.mark.slow
def test_a_run_resumes_bit_for_bit_and_leaves_files_that_say_the_same(run, plain, home):
    config, workdir = run
    assert {"validation/loss_noise", "loss_noise"} <= {name for record in records(workdir) for name in record}
    again = home / "again"
    shutil.copytree(workdir, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "diffusers")
    train.run(config, again)
    assert_same_bits(state(again, 4), state(workdir, 4))

    average = jax.tree.map(np.asarray, state(workdir, 4)["ema"])  # numpy multiplies as the readers of files do
    folder, exported = Folder.open(plain["teacher"]), Folder.open(workdir / "diffusers")
    found = {}
    for name in (lora_files.NAME, "toy.safetensors"):
        file = lora_files.read(workdir / "lora" / name)
        assert {scale for scales in file.scales.values() for scale in scales.values()} == {1.0}
        found[name] = lora_files.applied(folder, [workdir / "lora" / name])
    for part, scale in {"unet": 0.5, "text_encoder": 2.0}.items():
        expected = lora.merge(folder.params(part), average[part], np.float32(scale))
        assert_same_bits(found[lora_files.NAME].params(part), expected)
        assert_same_bits(found["toy.safetensors"].params(part), expected)
        half = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), expected)
        assert_same_bits(exported.params(part), half)
    ranks = {part: {a.shape[-1] for a, _ in lora.layers(tree).values()} for part, tree in file.parts.items()}
    assert ranks == {"unet": {4}, "text_encoder": {2}}
    assert file.metadata["ss_base_model_version"] == "sd_v1" and file.metadata["ss_steps"] == "4"
    card = (workdir / "lora" / "README.md").read_text()
    assert 'load_lora_weights("PATH' in card and "| text_encoder | 1 | 2 |" in card


@pytest.mark.slow
def test_a_run_in_bfloat16_exports_its_base_as_stored(plain, home):
    """The step computes with it rounded to bfloat16."""
    train.run(config_of(plain, home, **{"dtype": "bfloat16", "steps": 1, "validation.every": 0}), home / "short")
    base, exported = (flatten_dict(Folder.open(x).params("unet")) for x in (plain["teacher"], home / "short/diffusers"))
    half = {path: x.astype(np.float16).astype(np.float32) for path, x in base.items()}
    moved = {path for path, x in exported.items() if not np.array_equal(x, half[path])}
    assert moved and all(path[-1] == "kernel" and "attentions" in ".".join(path) for path in moved)


def test_a_checkpoint_in_between_is_a_whole_model(run, plain, home):
    _, workdir = run
    shutil.copytree(workdir, home / "between")
    shutil.rmtree(home / "between" / "diffusers")
    model = export.open_model(home / "between")
    average = jax.tree.map(np.asarray, state(workdir, 4)["ema"])
    expected = lora.merge(Folder.open(plain["teacher"]).params("unet"), average["unet"], 0.5)
    assert_same_bits(model.params("unet"), expected)
    assert_same_bits(export.checkpoint(home / "between").params("unet"), expected)


def test_a_run_goes_on_from_a_file(run, plain, home):
    _, workdir = run
    file, folder = workdir / "lora" / "toy.safetensors", Folder.open(plain["teacher"])
    config = config_of(plain, home, **{"lora.rank": None, "lora.init": f"{file}:0.25", "train": BOTH["train"]})
    task = tasks.make(config, folder, jnp.float32)
    expected = lora_files.applied(folder, [f"{file}:0.25"])
    for part, tree in task.assemble(task.trained, task.frozen).items():
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-7), tree, expected.params(part))
    with pytest.raises(ValueError, match=r"adapts the text_encoder too: train them, --config.train=\('unet', 'text_"):
        tasks.make(config_of(plain, home, **{"lora.init": str(file)}), folder, jnp.float32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": "random"}, "not one with blank or init = 'random'"),
        ({"lora.targets": ("to_z",)}, r"lora of the unet: targets: 'to_z' names no module"),
        ({"train": ("vae",), "task": None}, "lora is for UNets and text encoders"),
    ],
)
def test_what_cannot_be_adapted_is_refused(plain, home, changes, message):
    with pytest.raises(ValueError, match=message):
        train.run(config_of(plain, home, **changes), home / "none")


def test_the_rate_of_text_encoders_is_a_share_of_the_unets(plain, home):
    params = {"unet": {"a": jnp.ones(3)}, "text_encoder": {"a": jnp.ones(3)}}
    grads = jax.tree.map(lambda x: jnp.arange(3.0), params)
    changes = {"learning_rate": {"schedule": "constant_schedule", "value": 1e-2}, "optimizer.weight_decay": 0.1}
    updates = {}
    for rate in (1.0, 0.25):
        tx = step.optimizer(config_of(plain, home, **changes, text_encoder_rate=rate))
        updates[rate], _ = tx.update(grads, tx.init(params), params)
    assert_same_bits(updates[1.0]["unet"], updates[0.25]["unet"])
    jax.tree.map(np.testing.assert_array_equal, updates[0.25]["text_encoder"]["a"], updates[1.0]["unet"]["a"] / 4)
    assert optax.tree.norm(updates[1.0]) > 0


def test_a_student_learns_its_teachers_adapter(tiny_pipeline, tmp_path):
    """The teacher wears the file, the student begins with what fits, and its adapter is written as one of a student."""
    folder, row = Folder.open(tiny_pipeline), students.get("sd_small")
    adapter = lora.init(folder.shapes("unet"), "feed_forward", 2, 0)
    adapter = jax.tree.map(lambda x: x + np.float32(0.1), adapter)
    file = tmp_path / "toy.safetensors"
    lora_writing.write(file, {"unet": adapter}, "kohya", lora_writing.header(folder, "toy", {"unet": adapter}))
    config = students.config(row, folder.config("unet"))
    own = tiny.weights(Folder(folder.path, {"unet": config}).shapes("unet"), 7)
    small = save(tmp_path / "small", source=folder, parts={"unet": (config, own)})

    settings = repair.get_config()
    changes = {"teacher": str(tiny_pipeline), "init": str(small), "lora.init": f"{file}:0.5", "data.resolution": 32}
    settings.update_from_flattened_dict(changes)
    task = tasks.make(settings, folder, jnp.float32)
    assert_same_bits(task.frozen["teacher"], lora_files.applied(folder, [f"{file}:0.5"]).params("unet"))
    mapped, left_out = students.take_adapter(row, adapter, own)
    assert len(left_out) > 0 and {*lora.layers(task.trained["unet"])} == {*lora.layers(mapped)}
    assert_same_bits(task.assemble(task.trained, task.frozen)["unet"], lora.merge(own, lora.scaled(mapped, 0.5)))
    assert task.adapted == (str(small), {"unet": 1.0}, None)

    texts = {"text_encoder": lora.init(folder.shapes("text_encoder"), "attention", 2, 0)}
    settings.lora.init = str(lora_writing.write(tmp_path / "texts.safetensors", texts, "kohya", {}))
    with pytest.raises(ValueError, match=r"lora.init does not adapt the unet: give lora.rank too"):
        tasks.make(settings, folder, jnp.float32)
    settings.lora.init = f"{file}:0.5"
    settings.init = "teacher"
    with pytest.raises(ValueError, match=r"cannot mend a student as cut.*--config.init=runs/small"):
        tasks.make(settings, folder, jnp.float32)
    settings.init = str(small)
    settings.train = ("unet", "text_encoder")
    with pytest.raises(ValueError, match=r"share text encoders.*--config.train=unet"):
        tasks.make(settings, folder, jnp.float32)
    settings.train = ("unet",)
    both = {"unet": adapter, "text_encoder": lora.init(folder.shapes("text_encoder"), "attention", 2, 0)}
    both["text_encoder"] = jax.tree.map(lambda x: x + np.float32(0.1), both["text_encoder"])
    file = lora_writing.write(tmp_path / "both.safetensors", both, "kohya", {})
    settings.lora.init = f"{file}:0.5"
    task = tasks.make(settings, folder, jnp.float32)
    worn = lora_files.applied(folder, [f"{file}:0.5"]).params("text_encoder")
    assert_same_bits(task.frozen["text_encoder"], worn)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text(settings.to_json())
    export.write_record(tmp_path / "run", task.drawn_as, task.configs, adapted=task.adapted)
    assert_same_bits(export.read_record(tmp_path / "run")[1].params("text_encoder"), worn)
    own = task.drawn_as.replace(task.configs, {})
    out = export.write_adapters(tmp_path / "run", own, task.trained, task.adapted, 1)
    parts = lora_files.read(out / "run.safetensors").parts
    assert_same_bits(parts, {"text_encoder": lora.scaled(both["text_encoder"], 0.5), "unet": task.trained["unet"]})


@pytest.mark.slow
def test_a_step_at_rank_4_on_attention_costs_at_most_2_25_forward_passes():
    """By XLA's count. At SD 1.5's sizes, sd_small needs 2.20, and 2.99 without adapters."""
    folder = Folder.open(None)
    c = UNetConfig.from_dict(folder.config("unet"))
    unet, shapes = UNet2DCondition(c), folder.shapes("unet")
    of = lambda kind, *shape: jax.ShapeDtypeStruct(shape, kind)
    seen = of(jnp.float32, 1, *folder.latent_shape()), of(jnp.int32, 1), of(jnp.float32, 1, 77, c.cross_attention_dim)
    forward = lambda params, *seen: jnp.sum(jnp.square(unet.apply({"params": params}, *seen)))
    step = jax.grad(lambda adapter, params, *seen: forward(lora.merge(params, adapter), *seen))
    flops = lambda function, *x: jax.jit(function).trace(*x).lower(lowering_platforms=("tpu",)).cost_analysis()["flops"]
    adapter = jax.tree.map(lambda x: of(x.dtype, *x.shape), lora.init(shapes, "attention", 4, 0))
    assert 2 < flops(step, adapter, shapes, *seen) / flops(forward, shapes, *seen) <= 2.25
