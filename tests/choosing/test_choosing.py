"""Units, the knapsack against brute force, errors against networks that are really cut, and the student in a run."""

import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default, keep
from flaxkd import choosing, pretrained, students, tasks
from flaxkd.choosing import solving, units
from flaxkd.choosing.keep import published
from flaxkd.data import sources
from flaxkd.machine import sharding
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained import FAMILIES, Folder
from flaxkd.pretrained.families import count
from flaxkd.students import __main__ as command
from flaxkd.training import checkpoint, metrics, settings
from tests import tiny

XL = tiny.XL["unet"] | {"transformer_layers_per_block": [1, 2, 3]}
TEACHERS = {"sd1": tiny.SD["unet"], "sdxl": XL}


@pytest.fixture(scope="module", params=TEACHERS)
def teacher(request):
    """(family, unet/config.json, units, rules) of a tiny teacher."""
    family, config = FAMILIES[request.param], TEACHERS[request.param]
    found = units.of(family, config)
    return family, config, found, list(solving.rules(found, config))


def test_units_are_what_shapes_allow(teacher):
    family, _, found, _ = teacher
    layers = {place: [unit.label for unit in found if unit.place == place] for place in (u.place for u in found)}
    if family is FAMILIES["sd1"]:  # equally wide stages leave more choices than Stable Diffusion's
        assert layers["down 0 and up 3, layers"] == ["0+1", "0+2", "1+1", "1+2"]
        assert layers["down 1 and up 2, layers"] == ["1+0", "1+1"] and layers["mid block"] == [
            "all but resnet 0",
            "all",
        ]
        assert layers["down 3, mid block and up 0"] == ["all"] and not [unit for unit in found if unit.residual]
    else:
        assert layers["down 2 and up 0, layers"] == ["1+0", "1+1"] and "down 2, mid block and up 0" not in layers
        assert layers["mid block, attention 0, transformer blocks"] == ["0", "1", "2"]
        assert sum(unit.residual for unit in found) == 2 * 2 + 2 * 3 + 3 + 3 * 3 + 3 * 2


def test_published_cuts_are_sets_of_units():
    config, family = tiny.SD["unet"], FAMILIES["sd1"]
    found = units.of(family, config)
    gone = {"down 0 and up 3, layers: 1+1", "down 1 and up 2, layers: 1+1", "down 2 and up 1, layers: 1+1"}
    for name, rest in (("sd_small", "down 3 and up 0, layers: 1+1"), ("sd_tiny", "down 3, mid block and up 0: all")):
        removed = [unit for unit in found if unit.name in gone | {rest}]
        assert units.row(removed, family, config).blocks == students.get(name).blocks
    left = count("unet", students.config(students.get("sd_tiny"), config))
    assert left == count("unet", config) - units.parameters(removed, config).sum()


def sizes(config: dict) -> int:
    """A stand-in for FLOPs that needs no tracing: a layer costs 1 and a transformer block 10, times its channels."""
    stages = students.pairs.stages(UNetConfig.from_dict(config)).values()
    return sum(stage.channels * (len(stage.depths) + 10 * sum(filter(None, stage.depths))) for stage in stages)


def test_flops_of_units_add_up(teacher, monkeypatch):
    family, config, found, rules = teacher
    monkeypatch.setattr(students, "cost", lambda config: (0, sizes(config)))
    flops, rng = units.flops(found, family, config), np.random.default_rng(0)
    assert (flops >= 0).all() and flops.any()
    for _ in range(200):
        removed = rng.random(len(found)) < 0.2
        if all(rule.holds(removed) for rule in rules):
            gone = [unit for unit, out in zip(found, removed, strict=True) if out]
            assert sizes(students.config(units.row(gone, family, config), config)) == sizes(config) - flops @ removed


def test_every_set_that_obeys_the_rules_is_a_student(teacher):
    family, config, found, rules = teacher
    rng, sizes, tried = np.random.default_rng(0), units.parameters(found, config), 0
    while tried < 60:
        removed = rng.random(len(found)) < rng.random() * 0.5
        if all(rule.holds(removed) for rule in rules):
            gone = [unit for unit, out in zip(found, removed, strict=True) if out]
            student = units.row(gone, family, config)
            cut = students.config(student, config)
            tried += 1
            if tried == 60:
                shapes = pretrained.shapes("unet", cut)
                students.view(student, pretrained.shapes("unet", config), shapes)
                assert count("unet", cut) == count("unet", config) - sizes @ removed


def test_the_depth_of_the_mid_block_follows_the_last_down_block():
    found = units.of(FAMILIES["sdxl"], XL)
    rules = list(solving.rules(found, XL))
    at = lambda *chosen: np.array([unit.name in chosen for unit in found])
    mid, down = "mid block, attention 0, transformer blocks: 1", "down 2, attention 0, transformer blocks: 2"
    obeys = lambda *chosen: all(rule.holds(at(*chosen)) for rule in rules)
    assert obeys(mid, down) and not obeys(mid) and not obeys(down)
    assert obeys(down, "mid block: all") and obeys(down, "mid block: all but resnet 0")
    assert not obeys(mid, down, "mid block: all")
    three = [f"down 2, attention 1, transformer blocks: {i}" for i in range(3)]
    assert obeys(*three[:2]) and not obeys(*three)
    assert obeys("down 2 and up 0, layers: 1+0") and not obeys("down 2 and up 0, layers: 1+0", three[0])


@pytest.mark.parametrize("seed", range(6))
def test_the_knapsack_is_solved_exactly(teacher, seed):
    """Against all sets of up to 14 units."""
    _, config, found, rules = teacher
    rng = np.random.default_rng(seed)
    some = np.sort(rng.choice(len(found), min(14, len(found)), replace=False))
    sets = np.array(list(itertools.product([False, True], repeat=len(some))))
    rules = [solving.Rule(rule.weights[some], rule.low, rule.high) for rule in rules]
    allowed = np.all([(rule.low <= sets @ rule.weights) & (sets @ rule.weights <= rule.high) for rule in rules], axis=0)
    sets = sets[allowed]
    errors, prices = 10 ** rng.uniform(-9, 0, len(some)), units.parameters(found, config)[some]
    worth = sets @ prices
    for share in (0.1, 0.5, 0.9, 1):
        least = np.ceil(share * worth.max())
        removed = solving.solve(errors, prices, least, rules)
        assert all(rule.holds(removed) for rule in rules) and prices @ removed >= least
        assert errors @ removed == pytest.approx((sets @ errors)[worth >= least].min(), rel=1e-9)
    with pytest.raises(ValueError, match=f"worth {worth.max():,.0f} at most"):
        solving.solve(errors, prices, worth.max() + 1, rules)


def test_prices_of_full_size_are_solved_exactly():
    """SDXL's: 10 and 60 transformer blocks of two prices, where the cheapest of each are the best of their number."""
    rng, inner, outer = np.random.default_rng(0), 34_755_840, 10_005_120
    prices, errors = np.array([outer] * 10 + [inner] * 60), 10 ** rng.uniform(-6, -2, 70)
    sums = [np.concatenate([[0], np.cumsum(np.sort(errors[prices == price]))]) for price in (outer, inner)]
    for least in (10_005_121, 700_000_000, 1_283_731_842):
        pairs = itertools.product(*map(enumerate, sums))
        best = min(a + b for (i, a), (j, b) in pairs if i * outer + j * inner >= least)
        assert errors @ solving.solve(errors, prices, least, []) == pytest.approx(best, rel=1e-9)


def test_a_share_of_the_parameters_is_trained(tiny_pipeline, tmp_path):
    """The student that was chosen before is taken again; another share is another run."""
    folder = Folder.open(tiny_pipeline)
    found = units.of(folder.family, folder.config("unet"))
    gone = [unit for unit in found if (unit.label == "1+1" and unit.place[5] in "012") or unit.place == found[-1].place]
    students.write(units.row(gone, folder.family, folder.config("unet")), tmp_path / students.CHOSEN[0])
    config = default.get_config()
    config.update(teacher=str(tiny_pipeline), student=None, keep=0.25)
    config.data.resolution = 32
    config = choosing.settled(config, tmp_path)
    assert config.student == str(tmp_path / "student.json")
    task = tasks.make(config, folder, np.float32)
    assert task.trained["unet"].keys().isdisjoint({"mid_block", "down_blocks.3"})
    with checkpoint.claimed(tmp_path, config.to_dict()):
        (tmp_path / metrics.FILE).write_text('{"step": 2, "loss": 1.0}\n')  # steps were taken
    with pytest.raises(ValueError, match=r"keep: 0\.25 there, 0\.3 here"):
        checkpoint.check_claim(tmp_path, config.to_dict() | {"keep": 0.3})


def test_the_teacher_chooses_once(monkeypatch, tiny_pipeline, tmp_path, capsys):
    config = keep.get_config()
    config.update_from_flattened_dict({"teacher": str(tiny_pipeline), "keep": 0.95})
    config, calls = choosing.settled(config, tmp_path), []
    row = units.row((), FAMILIES["sd1"], tiny.SD["unet"])

    def choose(config, *_):
        calls.append(config.keep)
        stand_in = types.SimpleNamespace(write=lambda path: students.write(row, path))
        return stand_in

    monkeypatch.setattr(choosing.keep, "choose", lambda config, folder, pictures, dtype, share: choose(config))
    for _ in range(2):
        choosing.ensure(config, None, None, jnp.float32)
    assert calls == [0.95] and students.get(config.student).blocks == row.blocks
    assert config.student == str(tmp_path / "student.json") and "wrote" in capsys.readouterr().out


@pytest.mark.slow
def test_a_block_of_zeros_is_a_block_removed(monkeypatch, home, tmp_path):
    """The teacher with zeros, which gives the error of the unit, is the student that is really cut: to 1e-5."""
    monkeypatch.setenv("FLAXKD_CACHE", str(home / "cache"))
    name = "up 0, attention 1, transformer blocks: 1"
    all_of = units.of
    monkeypatch.setattr(units, "of", lambda *of: [unit for unit in all_of(*of) if unit.name == name])
    one = sharding.make_mesh(1, 1, jax.devices()[:1])  # for one device, compiling takes half as long
    monkeypatch.setattr(sharding, "local_mesh", lambda: one)
    config = default.get_config()
    config.update_from_flattened_dict({"data.source": str(home / "pictures"), "data.resolution": 32})
    pictures = sources.open_source(config.data.source, "train", resolution=32)
    teacher = tiny.write(tmp_path / "teacher", tiny.XL | {"unet": tiny.XL["unet"] | tiny.INNERMOST})
    folder = Folder.open(teacher)
    with pytest.raises(ValueError, match=r"no student of .* keeps as few as 50\.0% of its parameters: units worth"):
        choosing.choose(config, folder, pictures, jnp.float32, 0.5)
    choice = choosing.choose(config, folder, pictures, jnp.float32, 0.99, examples=8)
    assert choice.measured == pytest.approx(choice.errors[0], rel=1e-5) and choice.measured > 1e-6
    cut = students.config(choice.student, folder.config("unet"))
    assert cut["reverse_transformer_layers_per_block"] == [[2, 1, 2], 1, 1]
    assert count("unet", cut) == round(choice.shares[0] * folder.count("unet"))
    choice.write(tmp_path / "row.json")
    assert students.get(tmp_path / "row.json").blocks == choice.student.blocks
    assert f"{name}" in (tmp_path / "row.txt").read_text() and (tmp_path / "row.png").stat().st_size > 10_000


def test_the_command_hands_everything_on(monkeypatch, home, tiny_pipeline, tmp_path, capsys):
    row, given = units.row((), FAMILIES["sd1"], tiny.SD["unet"]), []

    def choose(config, folder, pictures, dtype, share, **options):
        given.append((config.data.resolution, folder.path, len(pictures) > 9, share, options))
        return types.SimpleNamespace(student=row, write=lambda path: students.write(row, path))

    monkeypatch.setattr(choosing, "choose", choose)
    typed = ["--choose", "--keep=0.9", f"--teacher={tiny_pipeline}", f"--source={home / 'pictures'}", "--flops"]
    command.main([*typed, f"--out={tmp_path / 'row.json'}", "--examples=8", "--students=sd_tiny"])
    assert given == [(32, tiny_pipeline, True, 0.9, dict(of_flops=True, examples=8, beside=["sd_tiny"]))]
    assert f"--config.student={tmp_path / 'row.json'}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: --resolution = 30"):
        command.main([*typed, "--resolution=30"])


def test_keep_takes_a_published_student_of_that_size(tiny_pipeline, tmp_path):
    folder, config = Folder.open(tiny_pipeline), keep.get_config()
    config.teacher = str(tiny_pipeline)
    share = count("unet", students.config(students.get("sd_small"), folder.config("unet"))) / folder.count("unet")
    assert published(folder, share + 0.009) is students.get("sd_small") and published(folder, share + 0.011) is None
    for kept, name in ((share, "sd_small"), (share + 0.05, str(tmp_path / "student.json"))):
        config.keep = kept
        assert choosing.settled(config, tmp_path).student == name
    assert config.student is None and choosing.settled(default.get_config(), tmp_path).student == "sd_small"


def test_keep_and_a_student_are_one_too_many():
    config = keep.get_config()
    settings.check(config)
    config.student = "sd_small"
    with pytest.raises(ValueError, match=r"keep = 0\.5 and student = 'sd_small' are both given"):
        settings.check(config)
