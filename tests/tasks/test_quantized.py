"""Runs that train a quantized network: over sharded weights, resumed, exported with what they are drawn as."""

import json
import shutil
import threading

import numpy as np
import pytest

from configs import finetune
from flaxkd import export, tasks, train
from flaxkd.drawing.pipeline import Pipeline
from flaxkd.machine import sharding
from flaxkd.pretrained import Folder
from flaxkd.training import settings
from flaxkd.weights import quantize
from flaxkd.weights.quantize import Quantization
from tests.running import assert_same_bits, records, state, write_pictures, write_plain

W4 = Quantization("w4")


def config_of(home, **changes):
    config = finetune.get_config()
    keys = {"teacher": str(home / "plain"), "data.source": str(home / "pictures"), "data.resolution": 32}
    keys |= {"batch_size": 4, "steps": 2, "validation.examples": 4, "validation.every": 1, "sample.every": 0}
    keys |= {"checkpoint.every": 1, "log_every": 1, "compilation_cache": "", "quantize": "w4", "remat": True}
    config.update_from_flattened_dict(keys | {"mesh.fsdp": 2} | changes)
    return config


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    write_plain(home)
    write_pictures(home / "pictures")
    return home


@pytest.mark.slow
def test_a_sharded_run_resumes_bit_for_bit_and_says_how_it_is_drawn(home, monkeypatch):
    monkeypatch.setenv("FLAXKD_CACHE", str(home / "cache"))
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 64)
    config, straight, again = config_of(home), home / "straight", home / "again"
    train.run(config, straight)
    assert records(straight)[0]["validation/loss"] > 0
    shutil.copytree(straight, again)
    shutil.rmtree(again / "checkpoints" / "2")
    (again / "export.json").unlink()
    train.run(config, again)
    assert_same_bits(state(again, 2), state(straight, 2))

    index = json.loads((straight / "diffusers" / "model_index.json").read_text())
    assert index["_quantization"] == {"scheme": "w4", "full": [*quantize.FULL], "on_grid": False}
    folder = export.open_model(straight)
    pipeline = Pipeline.from_folder(folder, "run")
    assert folder.quantization == W4 and hasattr(type(pipeline.modules["unet"]), "_unquantized_type")
    weights = np.asarray(folder.params("unet")["conv_in"]["kernel"])
    assert np.array_equal(weights, state(straight, 2)["params"]["unet"]["conv_in"]["kernel"].astype(np.float16))
    shutil.rmtree(again / "diffusers")
    assert export.open_model(again).quantization == W4  # by its record
    with pytest.raises(ValueError, match="holds a run of another configuration"):
        train.run(config_of(home, quantize="w8", steps=3), straight)


def test_a_run_in_full_precision_on_top_of_a_quantized_one_is_no_longer_quantized(home):
    folder = Folder.open(home / "plain")
    quantized = folder.as_quantized(W4)
    assert tasks.make(config_of(home, quantize=None), folder, np.dtype("float32")).drawn_as is None
    plain = tasks.make(config_of(home, quantize=None), quantized, np.dtype("float32"))
    assert plain.drawn_as.quantization is None and quantized.replace({}, {}).quantization == W4
    assert tasks.make(config_of(home), quantized, np.dtype("float32")).drawn_as is None
    few = tasks.make(config_of(home, task="few_step"), folder, np.dtype("float32"))
    assert few.drawn_as.quantization == W4
    [now], before = few.columns(few.trained, few.frozen).values(), few.before(few.trained, few.frozen)
    assert (now.quantization, before["as begun"].quantization, before["teacher"].quantization) == (W4, W4, None)


@pytest.mark.parametrize("alone", [True, False])
def test_a_quantized_step_is_traced_before_anything_else_in_this_thread(alone):
    """qwix swaps functions of JAX for all threads."""
    here, compiling = threading.get_ident(), threading.Event()

    class Lowered:
        def __init__(self, batch):
            self.batch, self.thread = batch, threading.get_ident()

        def compile(self):
            compiling.wait(10)
            return self.batch, self.thread == here, threading.get_ident() == here

    steps = train.compile_steps([np.zeros(1), np.zeros(2)], Lowered, alone)
    compiling.set()
    found = [step.result() for step in steps.values()]
    assert [len(batch) for batch, *_ in found] == [1, 2]
    assert [rest for _, *rest in found] == [[alone, False]] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantize": "w3"}, "quantize = 'w3' is unknown .known: w8, w8a8, w4, fp8.; None is full precision, did you"),
        ({"full_precision": ("conv_in", "(")}, "full_precision = .* ends of names of layers, as regular expressions"),
        ({"lora.rank": 4}, "quantize = 'w4' and lora are both .* Round it first, convert.to_diffusers --quantize w4"),
        ({"train": ("vae",)}, "quantize = 'w4' is for UNets: not for train = .'vae',."),
    ],
)
def test_settings_that_cannot_work_are_refused(home, changes, message):
    with pytest.raises(ValueError, match=message):
        settings.check(config_of(home, **changes))
