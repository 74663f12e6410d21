"""Settings that cannot work are refused with their number and the remedy, before anything else is done."""

import operator

import numpy as np
import pytest

from configs import default, small, vae
from flaxkd.machine import configuration
from flaxkd.models import unet
from flaxkd.tasks import losses
from flaxkd.training import settings, step
from tests.test_configs import CASES, leaves, load, parse

WRONG = [
    ("batch_size", 0, "batch_size = 0 must be a whole number of at least 1"),
    ("batch_size", -4, "at least 1"),
    ("accumulate", 0, "at least 1"),
    ("steps", 0, "steps = 0 must be a whole number"),
    ("seed", -1, "seed = -1 must be a whole number, 0 to 4294967295"),
    ("seed", 2**32, "0 to 4294967295"),
    ("learning_rate.peak_value", -1e-3, "learning_rate.peak_value = -0.001 must be a number of at least 0"),
    ("learning_rate.peak_value", float("nan"), "peak_value = nan"),
    ("learning_rate.warmup_steps", -1, "warmup_steps = -1 must be a whole number of at least 0"),
    ("learning_rate.decay_steps", 0, "decay_steps = 0 must be a whole number of at least 1"),
    ("learning_rate.schedule", "cosine", "learning_rate.schedule = 'cosine' is not in optax.schedules"),
    ("learning_rate", dict(schedule="cosine_decay_schedule", decay_step=3), "takes init_value, decay_steps, alpha"),
    ("learning_rate", dict(schedule="linear_schedule", init_value=1e-3, end_value=0), "takes .*transition_steps"),
    ("learning_rate", dict(value=1e-3), "learning_rate.schedule = None is not in"),
    ("learning_rate", dict(schedule="polynomial_schedule", init_value=1.0, end_value=-1.0, power=1,
                           transition_steps=9), "end_value = -1.0"),
    ("optimizer.name", "adamx", r"optimizer.name = 'adamx' is not in optax \(.*adamw"),
    ("optimizer.name", "apply_updates", "is not in optax"),
    ("optimizer.name", "sgd", "optax.sgd takes momentum, .*b1"),
    ("optimizer.name", "lbfgs", "optimizer"),
    ("optimizer", dict(name="lion", b1=0.9, b3=1), "optax.lion takes b1, b2"),
    ("optimizer.b1", 1.0, "optimizer.b1 = 1.0 must be a number of at least 0 and below 1"),
    ("optimizer.weight_decay", -1.0, "at least 0"),
    ("max_grad_norm", 0.0, "above 0; None is no clipping"),
    ("bad_steps.spike", 1.0, "above 1; None is no limit"),
    ("bad_steps.in_a_row", 0, "at least 1"),
    ("ema_decay", 1.0, "ema_decay = 1.0 must be a number of at least 0 and below 1; None is no average"),
    ("caption_dropout", 1.5, "at least 0 and of at most 1"),
    ("noise_offset", -0.1, "at least 0"),
    ("snr_gamma", 0.0, "snr_gamma = 0.0 must be a number above 0; None is off"),
    ("timestep_sampling", "snr", "'snr' is neither 'uniform' nor 'min_snr'"),
    ("timestep_sampling", "min_snr", "snr_gamma: give it"),
    ("prediction_type", "sample", "neither 'epsilon' nor 'v_prediction'"),
    ("weight.noise", -1.0, "weight.noise = -1.0"),
    ("weight.feature", float("inf"), "weight.feature = inf"),
    ("pairing", "segmint", "did you mean 'segmind'"),
    ("student", "sd_tinny", "did you mean 'sd_tiny'"),
    ("keep", 1.0, "keep = 1.0 must be a number above 0 and below 1; None is the student by its name"),
    ("prior.prompt", "a dog", "prior.prompt = 'a dog' is for fine-tuning alone.*student = 'sd_small'"),
    ("keep", 0.5, "keep = 0.5 and student = 'sd_small' are both given: --config.student=None"),
    ("init", "scratch", "neither 'teacher', 'random' nor a folder"),
    ("train", ("unnet",), "train = .'unnet',. must be a tuple of parts: unet, vae, text_encoder"),
    ("train", (), "must be a tuple of parts"),
    ("remat", "layers", "remat = 'layers' must be True, False, 'blocks' or 'transformer_blocks'"),
    ("attention", "flash", "attention = 'flash' is unknown .known: plain"),
    ("dtype", "fp8", "dtype = 'fp8' is unknown .known: float32"),
    ("dtype", "fp16", "unless the loss is scaled, .*bfloat16"),
    ("dtype", "half", "unless the loss is scaled"),
    ("data.buckets", "sdxxl", "data.buckets = 'sdxxl' must be .height, width. pairs .*did you mean 'sdxl'"),
    ("data.buckets", ((64, 64), 32), "data.buckets = .* must be .height, width. pairs in pixels, or of sdxl; None is"),
    ("mesh.fsdp", 0, "mesh.fsdp = 0 must be a whole number of at least 1, or -1 for the rest"),
    ("mesh.data", 0, "mesh.data = 0"),
    ("mesh.data", -2, "mesh.data = -2"),
    ("cpu_devices", 0, "cpu_devices = 0"),
    ("data.resolution", 0, "data.resolution = 0"),
    ("data.source", "", "data.source = '' must be a text"),
    ("data.variants", "(", "is no regular expression"),
    ("data.collages", -1, "data.collages = -1.0 must be a number of at least 0"),
    ("log_every", -1, "log_every = -1 must be a whole number of at least 0; None is never, as is 0"),
    ("validation.every", -5, "at least 0; None is never"),
    ("validation.examples", -1, "at least 0"),
    ("sample.prompts", ("red apple", " "), "a tuple of prompts"),
    ("sample.sampler", "k_euler", "did you mean 'euler'"),
    ("sample.sampler", "ddim:karras", "sample.sampler = 'ddim:karras' is unknown"),
    ("sample.steps", 0, "a whole number, 1 to 1000"),
    ("sample.guidance", float("nan"), "sample.guidance = nan"),
    ("checkpoint.keep", 0, "checkpoint.keep = 0 must be a whole number of at least 1; None is all"),
    ("checkpoint.keep_every", -1, "None is never, as is 0"),
    ("checkpoint.every", -1, "None is never, as is 0"),
]  # fmt: skip


def of_small(key: str, value, **others):
    config = small.get_config()
    for name, setting in {key: value, **others}.items():
        *groups, last = name.split(".")
        group = operator.attrgetter(".".join(groups))(config) if groups else config
        with group.ignore_type():
            group[last] = setting
    return config


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_setting_that_cannot_work_is_refused(key, value, message):
    with pytest.raises(ValueError, match=message) as error:
        settings.check(of_small(key, value))
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, never) for key in settings.RULES if key.rpartition(".")[2] in ("every", "log_every", "keep_every")
          for never in (0, None)),
        ("batch_size", 1),
        ("remat", "transformer_blocks"),
        ("sample.prompts", ()),
        ("sample.prompts", "red apple"),
        ("sample.prompts", ["red apple"]),
        ("validation.examples", 0),
        ("dtype", "bf16"),
        ("dtype", "fp32"),
        ("ema_decay", 0.0),
        ("sample.sampler", "dpmsolver++:karras"),
        ("max_grad_norm", None),
        ("bad_steps.spike", None),
        ("checkpoint.keep", None),
        ("student", ""),
        ("student", "mine.json"),
        ("optimizer", dict(name="sgd", momentum=0.9)),
        ("optimizer", dict(name="adafactor")),
        ("learning_rate", dict(schedule="piecewise_constant_schedule", init_value=1e-3)),
        ("learning_rate.decay_steps", 10),
        ("learning_rate.peak_value", 1e30),
    ],
)  # fmt: skip
def test_a_setting_that_works_is_not(key, value):
    settings.check(of_small(key, value))


def test_every_key_has_its_rule_and_every_config_keeps_them():
    assert settings.RULES.keys() == leaves(default.get_config()).keys()
    for name, arg in CASES:
        settings.check(load(name, arg))


def test_all_faults_are_told_at_once_and_unknown_keys_are_among_them():
    config = of_small("steps", 0, batch_size=0, num_train_epochs=3, batch_sise=4)
    with pytest.raises(ValueError) as error:
        settings.check(config)
    head, *faults = str(error.value).splitlines()
    assert head == "4 settings:" and len(faults) == 4
    assert any("no key num_train_epochs; here it is: steps" in fault for fault in faults)
    assert any("no key batch_sise, did you mean 'batch_size'" in fault for fault in faults)
    own = of_small("task", "my_module:my_task", my_weight=1.0)
    settings.check(own)  # a task from outside has settings of its own


def test_words_of_switches_are_those_that_the_code_knows():
    assert (False, True, *configuration.WORDS["remat"]) == unet.REMAT
    assert [False, True, *configuration.WORDS["normalize_features"]] == [*losses.FEATURE_TERMS]


def test_a_new_pipeline_has_no_teacher():
    config = vae.get_config()
    config.teacher = "runs/small"
    with pytest.raises(ValueError, match="blank=None trains the teacher"):
        settings.check(config)


@pytest.mark.parametrize(("name", "peak"), [("small.py", 1e-3), ("tiny.py:sd15", 1e-5), ("vae.py", 1.2e-3)])
@pytest.mark.parametrize("steps", [50, 1000, 3000])
def test_the_schedule_follows_the_steps(name, peak, steps):
    config = parse(name, f"--config.steps={steps}", "--config.learning_rate.warmup_steps=20")
    rate = step.learning_rate(config)
    assert float(rate(20)) == pytest.approx(peak)
    assert float(rate(10 + steps // 2)) == pytest.approx((peak + config.learning_rate.end_value) / 2, rel=1e-3)
    assert float(rate(steps)) == pytest.approx(config.learning_rate.end_value, abs=1e-9)
    assert "decay_steps" not in settings.rates(config)


def test_a_horizon_of_its_own_stays_and_is_told():
    config = parse("small.py", "--config.learning_rate.decay_steps=100", "--config.steps=3000")
    assert (config.steps, config.learning_rate.decay_steps) == (3000, 100)
    assert settings.rates(config).endswith("1e-05 at last (learning_rate.decay_steps is 100, steps is 3,000)")


def test_a_run_shorter_than_its_warm_up_only_warms_up():
    rate = step.learning_rate(parse("small.py", "--config.steps=2"))
    np.testing.assert_allclose([rate(0), rate(1), rate(10)], [0, 5e-5, 5e-4], rtol=1e-6)
