"""Configurations: which file a name means, what overrides become, and what a mistake says, in one line."""

import operator
import re
import sys

import pytest

from configs import small
from flaxkd.machine import diffusers_flags
from flaxkd.machine.configuration import OPEN, configuration, find, own, split
from tests.running import ROOT


def refused(name: str, *overrides: str) -> str:
    """What is wrong with a configuration: one line."""
    with pytest.raises(ValueError) as error:
        configuration(name, overrides)
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


@pytest.mark.parametrize(
    "name", ["small", "small.py", "configs/small", "configs/small.py", str(ROOT / "configs/small.py")]
)
def test_a_name_or_a_path_in_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small").mkdir()  # the workdir of a run, perhaps
    assert find(name) == own() / "small.py"
    assert configuration(f"{name}:sd15").batch_size == 128


def test_a_file_goes_before_a_name_and_may_have_a_colon_in_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.py").write_text(
        "from configs import default as a\n\ndef get_config(x):\n    return a.get_config()\n"
    )
    assert find("small.py") == tmp_path / "small.py" and find("small") == own() / "small.py"
    assert split("small") == ("small", None)
    assert split("a:b/c.py:sd15") == ("a:b/c.py", "sd15")
    assert configuration(f"{tmp_path}/small.py:argument").steps == 1000


@pytest.mark.parametrize("package", ["configs", "flaxkd.configs"])
def test_a_file_of_one_s_own_imports_flaxkd_s_from_any_folder(package, tmp_path, monkeypatch):
    """And what lies beside it, if its folder is called configs too."""
    folder = tmp_path / "configs"
    folder.mkdir()
    monkeypatch.chdir(folder)
    (folder / "base.py").write_text("STEPS = 7\n")
    code = f"from {package} import base, default, recipes\n\ndef get_config():\n    config = default.get_config()\n"
    (folder / "mine.py").write_text(f"{code}    recipes.embedded(config).steps = base.STEPS\n    return config\n")
    before = {name for name in sys.modules if "configs" in name}
    assert configuration("mine.py").steps == 7
    assert {name for name in sys.modules if "configs" in name} == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/none.py", "there is no file configs/none.py"),
        ("configs/smal.py", 'there is no file configs/smal.py: Did you mean "configs/small.py"'),
        ("smal:sd15", 'there is no file smal: Did you mean "configs/small.py"'),
        ("mime.py", 'there is no file mime.py: Did you mean "mine.py"'),
        ("", r"is a folder: .*configs/small\.py"),
        ("folder", r"folder is a folder: .*configs/small\.py"),
        ("recipes", "there is no file recipes"),
        ("config.yaml", r"config.yaml is no Python file"),
        (
            "configs/small.py:sd21",
            r"cannot be read: ValueError: configs/small\.py:sd21 is unknown: leave it out or sd15",
        ),
        ("bk_tiny:sd15", r"configs/bk_tiny\.py:sd15 is unknown: leave it out"),
        ("mine.py", r"SyntaxError|mine\.py, line 1: "),
    ],
)
def test_a_file_that_is_none_says_which_is(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "mine.py").write_text("def get_config(:\n")
    assert re.search(message, refused(name))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config = default.get_config()", "returns a NoneType, and not a ConfigDict"),
        ("return {}", "returns a dict, and not a ConfigDict"),
        ("config = default.get_config(); config.batch_sise = 8; return config", 'Did you mean "batch_size"'),
        ("return default.get_confg()", r"AttributeError: .*get_confg.*mine\.py, line 4\)"),
        ("return default.get_config().nothing", r"AttributeError: .*nothing.*mine\.py, line 4\)"),
        ("raise OSError('two\\nlines')", r"OSError: two lines \(.*mine\.py, line 4\)"),
        ("config = default.get_config()\n    config.steps = 'ten'\n    return config", r"TypeError: .*steps.*line 5\)"),
        ("config = default.get_config(); config.sample.step = 8; return config", 'Did you mean "sample.steps"'),
        ("config = default.get_config(); del config.sample.every; return config", "lacks sample.every"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_file_names_its_line_or_key(body, message, tmp_path):
    (tmp_path / "mine.py").write_text(f"from configs import default\n\ndef get_config():\n    {body}\n")
    assert re.search(message, refused(f"{tmp_path}/mine.py"))
    (tmp_path / "mine.py").write_text("x = 1\n")
    assert "it has no function get_config" in refused(f"{tmp_path}/mine.py")


def test_a_task_of_one_s_own_may_have_keys_of_its_own(tmp_path):
    code = "from configs import default\n\ndef get_config():\n    config = default.get_config()\n"
    code += "    config.task = 'my_module:my_task'\n    config.{} = 8\n    return config\n"
    (tmp_path / "mine.py").write_text(code.format("rank"))
    assert configuration(f"{tmp_path}/mine.py").rank == 8
    (tmp_path / "mine.py").write_text(code.format("batch_sise"))
    assert 'Did you mean "batch_size"' in refused(f"{tmp_path}/mine.py")


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["steps=7"], "steps", 7),
        (["steps", "7"], "steps", 7),
        (["steps=7", "steps=8"], "steps", 8),
        (["steps=1e5"], "steps", 100_000),
        (["remat"], "remat", True),
        (["remat=false"], "remat", False),
        (["remat=transformer_blocks"], "remat", "transformer_blocks"),
        (["weight.noise", "-1"], "weight.noise", -1.0),
        (["few_step.guidance=4"], "few_step.guidance", (4.0,)),
        (["teacher=a b=c"], "teacher", "a b=c"),
        (["train=vae"], "train", ("vae",)),
        (["sample.prompts=('red apple','x')"], "sample.prompts", ("red apple", "x")),
        (["sample.prompts=['red apple','x']"], "sample.prompts", ("red apple", "x")),
        (["sample.prompts=red apple", "sample.prompts=x"], "sample.prompts", ("red apple", "x")),
        (["sample.prompts=(apple:1.2) on a table (red)"], "sample.prompts", ("(apple:1.2) on a table (red)",)),
        (["optimizer={'name': 'sgd', 'momentum': 1}", "optimizer.momentum=2"], "optimizer.momentum", 2),
    ],
)  # fmt: skip
def test_a_value_gets_the_type_of_its_key(overrides, key, value):
    overrides = [word if i and "=" not in word else f"--config.{word}" for i, word in enumerate(overrides)]
    found = operator.attrgetter(key)(configuration("small", overrides))
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stepz=3", 'there is no key stepz. Did you mean "steps"'),
        ("batch-size=3", 'Did you mean "batch_size"'),
        ("learning_rat.peak_value=3", 'Did you mean "learning_rate.peak_value"'),
        ("learning_rate.peak_valu=3", 'Did you mean "learning_rate.peak_value"'),
        ("guidance=3", 'Did you mean "few_step.guidance" or "sample.guidance"'),
        ("sample.zzz=3", "sample has sample.every, sample.guidance, "),
        ("zzz=3", r"default\.py has all keys"),
        ("steps.x=3", 'Did you mean "steps"'),
        ("steps=many", "--config.steps=many: invalid literal: a whole number is needed"),
        ("steps=1.5", "a whole number is needed"),
        ("steps=", "a whole number is needed"),
        ("steps", "--config.steps has no value"),
        ("weight.noise=much", "a number is needed"),
        ("remat=maybe", "True or False is needed"),
        ("sample=3", "it is a group of keys, every, guidance, "),
        ("sample.prompts=('red", "a list in quotes is needed"),
        ("sample.prompts=(red,x)", "a list in quotes is needed"),
        ("sample.prompts=(1,2)", "1 is not a text"),
        ("sample={'every': 3}", "lacks sample.guidance"),
        ("num_train_epochs=3", "num_train_epochs of other training scripts .*: steps, "),
        ("report-to=wandb", "report-to of other training scripts .*TensorBoard"),
        ("learning_rate.value=1", "peak_value.*schedule': 'constant_schedule', 'value'"),
        ("learning_rate=1", "peak_value.*schedule': 'constant_schedule', 'value'"),
        ("optimizer=lion", "weight_decay.*--config.optimizer="),
    ],
)
def test_an_override_that_is_wrong_says_what_is_right(override, message):
    assert re.search(message, refused("configs/small.py", f"--config.{override}"))


def test_none_is_none_for_a_key_of_any_type():
    keys = ("checkpoint.every", "max_grad_norm", "student", "data.variants", "sample.prompts", "blank")
    overrides = [*(f"--config.{key}=None" for key in keys), "--config.bad_steps.spike", "None"]
    config = configuration("configs/small.py", overrides)
    assert operator.attrgetter(*keys, "bad_steps.spike")(config) == (None,) * 7


def test_the_table_of_other_training_scripts_is_that_of_the_errors():
    table = (ROOT / "docs" / "finetuning.md").read_text("utf-8").partition("| there | here |\n|---|---|\n")[2]
    assert table.splitlines() == [f"| `{name}` | {here} |" for name, here in diffusers_flags.HERE.items()]


def test_the_names_of_other_training_scripts_lead_to_keys_that_exist():
    config = small.get_config()
    for name, here in diffusers_flags.HERE.items():
        assert name not in config
        key = re.match(r"[a-z_.]*", here).group()
        if key not in ("none", "the") and key.partition(".")[0] not in OPEN:
            operator.attrgetter(key)(config)  # raises if there is no such key
