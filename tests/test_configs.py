"""Configurations: each has the keys of default.py and a command that works, and no key is without effect."""

import ast
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from flaxkd import students
from flaxkd.machine import command
from flaxkd.machine.configuration import OPEN
from flaxkd.training import step
from tests.running import ROOT

NAMES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config(" in path.read_text())
OF_SDXL = ("ssd_1b", "vega", "koala_1b", "koala_700m")
ARGUMENTS = {"small": "sd15", "tiny": "sd15", "finetune": "portrait", "dreambooth": "bksdm", "lora": "segmind"}
ARGUMENTS |= dict.fromkeys(OF_SDXL, "sdxl")
CASES = [(name, None) for name in NAMES] + [*ARGUMENTS.items()]
CASES += [("dreambooth", "lora"), ("dreambooth", "bksdm_lora"), ("lcm", "lora"), ("lcm", "sd15"), ("lcm", "sd15_lora")]
PUBLISHED = {"small": "sd_small", "tiny": "sd_tiny"}
PUBLISHED |= {name: name for name in ("bk_base", "bk_small", "bk_tiny", *OF_SDXL)}


def module(name: str):
    return importlib.import_module(f"configs.{name}")


def load(name: str, arg: str | None = None) -> ConfigDict:
    return module(name).get_config(arg)


def leaves(config: ConfigDict, prefix: str = "") -> dict:
    """{"data.source": value, ...}; the groups of OPEN are leaves themselves."""
    found = {}
    for key, value in config.items():
        if isinstance(value, ConfigDict) and key not in OPEN:
            found |= leaves(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value
    return found


def parse(name: str, *arguments: str) -> ConfigDict:
    """The configuration as the command line of flaxkd.train makes it."""
    return command.configuration(f"{ROOT}/configs/{name}", arguments)


every_config = pytest.mark.parametrize(("name", "arg"), CASES)


def test_the_configs_are_found():
    assert {*PUBLISHED, "default", "teacher", "vae"} <= {*NAMES}


@every_config
def test_keys_are_those_of_default(name, arg):
    assert leaves(load(name, arg)).keys() == leaves(load("default")).keys()


@every_config
def test_student_pairing_and_optimizer_exist(name, arg):
    config = load(name, arg)
    if config.student is not None:
        assert config.pairing in students.get(config.student).published
        assert students.feature_pairs(students.get(config.student), config.pairing)
    assert name not in PUBLISHED or config.student == PUBLISHED[name]
    step.optimizer(config)
    rates = [float(step.learning_rate(config)(at)) for at in (0, config.steps // 2, config.steps)]
    assert 0 < max(rates) <= 1e-2 and min(rates) >= 0


@pytest.mark.parametrize("name", [name for name in NAMES if name != "default"])
def test_docstring_has_the_command(name):
    text = module(name).__doc__
    assert f"python -m flaxkd.train --config configs/{name}.py" in text
    for key in re.findall(r"--config\.([a-z_.]+)=", text):
        key = next((group for group in OPEN if key.startswith(f"{group}.")), key)
        assert key in leaves(load("default")), f"{name} advises --config.{key}"


def chains(path: Path) -> set[str]:
    """The dotted names in a program that begin with a variable: "config", "config.data", "config.data.source"."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        words = []
        while isinstance(node, ast.Attribute):
            words.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            found.add(".".join([node.id, *reversed(words)]))
            if node.id == "s":  # the Setup of a run, which holds its configuration
                found.add(".".join(reversed(words)))
    return found


def test_every_key_is_read():
    read = set().union(*(chains(path) for path in (ROOT / "flaxkd").rglob("*.py")))
    # Of a group that is handed on, the key is read as `weight.noise`.
    unread = [key for key in leaves(load("default")) if not read & {f"config.{key}", *([key] if "." in key else [])}]
    assert not unread


def test_every_key_that_is_read_exists():
    known = leaves(load("default"))
    known = {*known, *(key.rpartition(".")[0] for key in known), "blank.to_dict", "blank.values", "to_dict"}
    known |= {"copy_and_resolve_references"}
    signs = {"config.seed", "config.data", "config.learning_rate", "config.keep", "config.few_step", "config.prior"}
    takes_it = [path for path in (ROOT / "flaxkd").rglob("*.py") if signs & chains(path)]
    assert {"train", "step", "inputs", "finetune", "encoding"} <= {path.stem for path in takes_it}
    for path in takes_it:
        read = {chain.partition(".")[2] for chain in chains(path) if chain.startswith("config.")}
        assert not read - known, path.name


def test_small_is_two_runs():
    embedded, sd15 = load("small"), load("small", "sd15")
    assert embedded.teacher is None and sd15.teacher == "SG161222/Realistic_Vision_V4.0"
    assert embedded.data.source == "openmoji" != sd15.data.source
    assert (embedded.data.resolution, sd15.data.resolution) == (64, 512)
    assert (sd15.weight.noise, sd15.weight.output, sd15.weight.feature) == (1.0, 0.5, 0.5)
    assert embedded.student == sd15.student == "sd_small" and sd15.pairing == "segmind"
    assert embedded.normalize_features and not sd15.normalize_features  # distill-sd sums as they are
    recipe = importlib.import_module("configs.recipes").segmind.__doc__
    assert "1e-5" in recipe and "1e-4" in recipe  # both published learning rates
    assert sd15.learning_rate.peak_value == 1e-5


@pytest.mark.parametrize("name", ["bk_base", "bk_small", "bk_tiny"])
def test_bksdm_recipes(name):
    config = load(name)
    assert (config.weight.noise, config.weight.output, config.weight.feature) == (1.0, 1.0, 1.0)
    assert config.pairing == "bksdm" and not config.normalize_features
    assert config.batch_size == 256 and config.steps == 50_000
    assert step.learning_rate(config)(0) == step.learning_rate(config)(config.steps) == 5e-5


@pytest.mark.parametrize("name", OF_SDXL)
def test_recipes_of_sdxl(name):
    embedded, real = load(name), load(name, "sdxl")
    assert (embedded.teacher, embedded.data.resolution) == ("miniature_xl", 64) and embedded.sample.guidance is None
    assert (real.teacher, real.data.resolution) == ("stabilityai/stable-diffusion-xl-base-1.0", 1024)
    assert real.batch_size == 128 and [float(step.learning_rate(real)(at)) for at in (500, real.steps)] == (
        pytest.approx([1e-5] * 2)
    )
    weights, how = (real.weight.noise, real.weight.output, real.weight.feature), real.normalize_features
    drawn = real.steps, real.sample.guidance
    segmind = (1.0, 0.5, 0.5), False, (251_000, 9.0)
    koala = (1.0, 1.0, 1.0), True, (500_000, 7.5)
    assert (weights, how, drawn) == {"segmind_sdxl": segmind, "koala": koala}[real.pairing]


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_argument_of_a_config_is_refused(name):
    with pytest.raises(ValueError, match=rf"configs/{name}.py:sd21 is unknown: leave it out"):
        load(name, "sd21")


@pytest.mark.parametrize("name", ["small.py", "small.py:sd15", "bk_base.py"])
def test_keys_that_are_none_take_a_value_from_the_command_line(name):
    values = {
        "teacher": "owner/name",
        "student": "bk_tiny",
        "keep": 0.65,
        "quantize": "w4",
        "prediction_type": "v_prediction",
        "snr_gamma": 5.0,
        "max_grad_norm": 2.0,
        "ema_decay": 0.99,
        "dtype": "bfloat16",
        "task": "distill",
        "attention": "plain",
        "checkpoint.keep_every": 10_000,
        "data.variants": r"\d$",
        "data.collage_captions": "a|b",
        "data.caption_column": "en_text",
        "vae": "stabilityai/sd-vae-ft-mse",
        "data.image_column": "file",
        "data.buckets": ((64, 64), (96, 48)),
        "data.caption": "a sks dog",
        "lora.rank": 8,
        "lora.alpha": 4.0,
        "lora.init": "toy.safetensors:0.5",
        "lora.text_encoder.rank": 2,
        "lora.text_encoder.alpha": 1.0,
        "lora.text_encoder.targets": ("q_proj", "v_proj"),
        "prior.prompt": "a dog",
        "prior.folder": "DIR",
        "sample.sampler": "unipc",
        "sample.steps": 9,
        "sample.guidance": 3.0,
    }
    nones = {key for key, value in leaves(load("default")).items() if value is None} - {"blank"}
    assert nones <= values.keys()
    config = parse(name, *(f"--config.{key}={value}" for key, value in values.items()))
    found = leaves(config)
    assert {key: found[key] for key in values} == values


def test_groups_take_a_value_from_the_command_line():
    overrides = ["--config.weight.feature=0.25", "--config.learning_rate.peak_value=1e-4"]
    overrides += ["--config.data.source=DIR", "--config.sample.prompts=('one','two')"]
    config = parse("small.py:sd15", *overrides)
    assert (config.weight.feature, config.weight.output) == (0.25, 0.5)
    assert config.learning_rate.peak_value == 1e-4 and config.data.source == "DIR"
    assert config.sample.prompts == ("one", "two")


def test_an_unknown_key_fails_with_a_suggestion():
    command = [sys.executable, "-m", "flaxkd.train", "--config", "configs/small.py", "--config.batch_sise=8"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert result.returncode != 0
    assert 'Did you mean "batch_size"' in result.stderr
