"""A plan: the step is traced without weights, its text is read rightly, and the search finds where the memory ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import small
from flaxkd import pretrained, students
from flaxkd.machine import sharding
from flaxkd.plan import compiling, devices, table
from flaxkd.pretrained import Folder, families, hub
from flaxkd.tasks import distill


@pytest.mark.parametrize(
    ("name", "count", "gib", "topology"),
    [("v5e:4x8", 32, 16, "v5e:4x8"), ("v5p:2x2x1", 4, 95, "v5p:2x2x1"), ("a100-80x8", 8, 80, "1x1x8"),
     ("a100-40", 1, 40, "1x1x1"), ("a100x2", 2, 80, "1x1x2"), ("h100x8", 8, 80, "1x1x8")],
)  # fmt: skip
def test_a_machine_is_told_by_its_name(name, count, gib, topology):
    target = devices.target(name)
    assert (target.count, target.peak.memory, target.topology) == (count, gib * 2**30, topology)


@pytest.mark.parametrize("name", ["v5e", "v9e:2x2", "a100:2x2", "v5ex4", "rtx4090", "v5e:2"])
def test_an_unknown_machine_is_answered_with_examples(name):
    with pytest.raises(ValueError, match=r"v5e:4x8.*a100-80x8"):
        devices.target(name)


def count(part: str, config: dict) -> int:
    return pretrained.count(part, config)


def test_the_published_architectures_have_their_published_sizes():
    parts = ("unet", "text_encoder", "vae")
    sizes = {
        name: tuple(count(part, getattr(row, part)) for part in parts)
        for name, row in pretrained.ARCHITECTURES.items()
    }
    assert sizes == {
        "sd15": (859_520_964, 123_060_480, 83_653_863),
        "sd21_base": (865_910_724, 340_387_840, 83_653_863),
        "sd21": (865_910_724, 340_387_840, 83_653_863),
    }
    assert pretrained.published("CompVis/stable-diffusion-v1-4") is pretrained.ARCHITECTURES["sd15"]
    assert pretrained.published(None) is pretrained.published("somebody/else") is None


@pytest.fixture
def here(monkeypatch):
    """The devices of every machine are the first four of this one."""
    monkeypatch.setattr(compiling, "topology", lambda target: jax.devices()[:4])
    return devices.target("v5e:2x2")


def config_of(**changes):
    config = small.get_config("")
    config.batch_size = 8
    config.update(changes)
    return config


@pytest.mark.parametrize("fsdp", [1, 4])
def test_the_step_is_traced_without_weights_and_its_bytes_are_those_of_the_shapes(here, fsdp, monkeypatch):
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    lowered = compiling.lower(config_of(mesh={"data": -1, "fsdp": fsdp}), here)
    teacher = 2 * sum(
        count(part, Folder.open(hub.EMBEDDED).config(part)) for part in ("unet", "text_encoder")
    )
    assert lowered.held["parameters"] == pytest.approx(4 * 5_903_940 / fsdp, rel=0.01)
    assert lowered.held["optimizer"] == pytest.approx(2 * lowered.held["parameters"], rel=1e-3)
    assert lowered.held["teacher"] == pytest.approx(teacher / fsdp, rel=0.01)
    assert lowered.held["average"] == 0 and lowered.attention == "once"  # 256 tokens, on a CPU
    unet = Folder.open(hub.EMBEDDED).config("unet")
    student = students.config(students.get("sd_small"), unet)
    assert lowered.passes == ((unet, 1), (student, 3))
    forward = {name: students.cost(c)[1] for name, c in (("t", unet), ("s", student))}
    assert table.image_flops(lowered) == forward["t"] + 3 * forward["s"]
    again = distill.task(config_of(remat=True), Folder.open(), jnp.float32)
    assert again.passes == ((unet, 1), (student, 4))


def test_the_attention_of_a_program_is_the_one_that_pays_there(monkeypatch):
    class Mesh:
        devices = np.array([type("Device", (), {"platform": "tpu"})])

    name = lambda config, unet, size: compiling.longest_attention(config, Mesh(), unet, size, jnp.bfloat16)
    assert (
        name(config_of(), families.SD15, 64) == "splash" and name(config_of(), families.SD15, 16) == "plain"
    )
    assert name(config_of(attention="blocked"), families.SD15, 64) == "blocked"


def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_traced(here):
    with pytest.raises(ValueError, match="multiple of 4"):
        compiling.lower(config_of(batch_size=6), here)


def test_collectives_are_read_from_a_compiled_program():
    mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
    whole, rows = sharding.replicated(mesh), sharding.batch(mesh)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    gradient = jax.jit(
        jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), in_shardings=(whole, rows), out_shardings=whole
    )
    text = gradient.lower(of(16, 8), of(4, 16)).compile().as_text()
    assert compiling.collectives(text) == {"all-reduce": (1, 16 * 8 * 4)}
    gather = jax.jit(lambda x: x, in_shardings=rows, out_shardings=whole)
    assert compiling.collectives(gather.lower(of(4, 16)).compile().as_text()) == {
        "all-gather": (1, 4 * 16 * 4)
    }
    tpu = """
  %ar = (f32[8,128]{1,0:T(8,128)}, bf16[4]{0:T(128)(2,1)}) all-reduce(f32[8,128] %a, bf16[4] %b), replica_groups={}
  %ags = (f32[2]{0}, f32[8]{0}) all-gather-start(f32[2]{0} %p), dimensions={0}
  %agd = f32[8]{0} all-gather-done((f32[2]{0}, f32[8]{0}) %ags)
    """
    assert compiling.collectives(tpu) == {"all-reduce": (1, 8 * 128 * 4 + 8), "all-gather": (1, 32)}


def test_a_program_that_does_not_fit_says_what_it_asked_for():
    old = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded hbm"
    now = (  # libtpu 0.0.42, and 0.0.52 with "E1000: CompileTimeHbmOom: " before it
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (29.45G) exceeds "
        "available HBM (15.75G)."
    )
    assert compiling.asked(old) == int(20.5 * 2**30) and compiling.asked(now) == int(29.45 * 2**30)
    assert compiling.asked("INTERNAL: something else") is None


def test_what_this_jaxlib_cannot_read_of_a_program_is_left_out(monkeypatch, tmp_path):
    """As it was of a step for v5p, after 14 minutes of compiling: the rest is told, and kept."""
    monkeypatch.setenv("FLAXKD_CACHE", str(tmp_path))
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()

    def refused(self):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure")

    monkeypatch.setattr(jax.stages.Compiled, "as_text", refused)

    class Program:
        as_text = staticmethod(lambda: "the program")
        compile = staticmethod(lambda options: compiled)

    lowered = compiling.Lowered(Program, {}, (), 8, "plain", "libtpu")
    first, again = (
        compiling.kept(compiling.whole, None, lowered, devices.target("v5e:2x2")) for _ in range(2)
    )
    assert first == again and first.fits and first.collectives is None
    assert table.sent(None) == "not told"


def needs(fixed: float, each: float):
    """A stand-in for a compiler: of n images on a device it says fixed + n * each GiB."""

    def row(config, target):
        images = config.batch_size // target.count
        saved = 0.5 if config.remat else 1.0
        held = {"parameters": fixed * table.GIB / 4, "optimizer": fixed * table.GIB / 2}
        needed = (fixed + images * each * saved) * table.GIB
        return {"per_device": images, "needed": needed, "fits": needed <= table.room(target), "held": held,
                "remat": config.remat, "mesh": table.shape_of(config.mesh, target)}  # fmt: skip

    return row


@pytest.mark.parametrize(
    ("fixed", "each", "found"), [(8.0, 0.8, 8), (8.0, 0.1, 67), (2.0, 12.0, 1), (2.0, 13.0, 0)]
)
@pytest.mark.parametrize("start", [4, 64, 512])
def test_the_search_ends_at_the_last_batch_that_fits(monkeypatch, fixed, each, found, start):
    monkeypatch.setattr(table, "row", needs(fixed, each))
    rows = table.largest(config_of(batch_size=start), devices.target("v5e:2x2"))
    assert (rows[-1]["per_device"] if rows else 0) == found


def test_what_would_make_twice_as_many_fit(monkeypatch):
    monkeypatch.setattr(table, "row", needs(8.0, 0.8))
    rows = table.next_size(config_of(), devices.target("v5e:2x2"), 8)
    assert [(r["remat"], r["mesh"], r["per_device"], r["fits"]) for r in rows] == [
        (True, "4 x 1", 16, True),
        (False, "1 x 4", 16, False),
        (True, "1 x 4", 16, True),
    ]
    assert len(table.next_size(config_of(remat=True), devices.target("v5e:2x2"), 8)) == 1
    seen = []
    monkeypatch.setattr(table, "row", lambda config, target: seen.append((config.attention, config.remat)))
    table.next_size(config_of(attention="plain"), devices.target("v5e:2x2"), 8)
    assert seen == [(None, False), ("plain", True), ("plain", False), ("plain", True)]


def test_a_plan_as_a_table(monkeypatch):
    here = devices.target("v5e:2x2")
    result = compiling.Compiled(3 * 2**30, 2**30, 1e12, {"all-reduce": (2, 2**29)}, 1.0)
    unet = families.SD15 | {"sample_size": 8}
    lowered = compiling.Lowered(
        None,
        {"parameters": 1, "optimizer": 2, "average": 0, "teacher": 3, "batch": 4},
        ((unet, 1), (unet, 3)),
        8,
        "plain",
        "libtpu",
    )
    monkeypatch.setattr(compiling, "lower", lambda config, target: lowered)
    monkeypatch.setattr(compiling, "assigned", lambda config, lowered, target: result)
    monkeypatch.setattr(compiling, "kept", lambda make, *of: make(*of))
    row = table.row(config_of(), here)
    rate = 4 * 197e12 * 0.40 / row["image_flops"]
    assert row["images_per_second"] == pytest.approx(rate)
    assert row["device_hours"] == pytest.approx(4 * 300 * 8 / rate / 3600)
    text = table.markdown([row, row | {"fits": False, "temporary": None}])
    assert "| v5e:2x2 | sd_small | 64 | 2 | plain | no | 4 x 1 |" in text and "2 all-reduce 0.50" in text
    assert "estimates" in text and "40% (no figure is published" in text
    assert np.all([line.count("|") == text.splitlines()[0].count("|") for line in text.splitlines()[:4]])
