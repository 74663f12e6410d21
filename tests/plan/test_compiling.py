"""A plan: the step is traced without weights, and what compilers say of a program is read rightly."""

import pickle
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import small
from flaxkd import pretrained, students
from flaxkd.machine import sharding
from flaxkd.plan import compiling, devices, table
from flaxkd.pretrained import Folder, families
from flaxkd.tasks import distill
from tests import tiny


def config_of(**changes):
    config = small.get_config("")
    config.batch_size = 8
    with config.ignore_type():
        config.update(changes)
    return config


@pytest.fixture
def here(monkeypatch):
    """The devices of every machine are the first four of this one."""
    monkeypatch.setattr(compiling, "topology", lambda target: jax.devices()[:4])
    return devices.target("v5e:2x2")


@pytest.mark.slow
def test_the_step_is_traced_without_weights_and_its_bytes_are_those_of_the_shapes(here, monkeypatch, tiny_pipeline):
    fsdp, folder = 4, Folder.open(tiny_pipeline)
    monkeypatch.setattr(sharding, "FSDP_MIN_SIZE", 1)
    config = config_of(teacher=str(tiny_pipeline), mesh={"data": -1, "fsdp": fsdp})
    config.data.resolution = folder.resolution
    lowered = compiling.lower(config, here)
    unet = folder.config("unet")
    student = students.config(students.get("sd_small"), unet)
    assert lowered.held["parameters"] == pytest.approx(4 * pretrained.count("unet", student) / fsdp, rel=0.01)
    assert lowered.held["optimizer"] == pytest.approx(2 * lowered.held["parameters"], rel=1e-3)
    teacher = folder.count("unet") + folder.count("text_encoder")
    assert lowered.held["teacher"] == pytest.approx(2 * teacher / fsdp, rel=0.01)
    assert lowered.held["average"] == 0 and lowered.attention == "plain"  # 64 tokens
    assert lowered.passes == ((unet, 1), (student, 3))
    forward = {name: students.cost(c)[1] for name, c in (("t", unet), ("s", student))}
    assert table.image_flops(lowered) == forward["t"] + 3 * forward["s"]
    config.remat = True
    again = distill.task(config, folder, jnp.float32)
    assert again.passes == ((unet, 1), (student, 4))


@pytest.mark.slow
def test_a_step_of_sdxl_is_planned_from_its_configurations_alone(here, monkeypatch):
    """Of a published SDXL that is tiny: its two text encoders, its sizes, and what conditions its UNet."""
    row = families.Architecture("tiny", "sdxl", {name: x for name, x in tiny.XL.items() if name != "vocab_size"}, ())
    monkeypatch.setattr(compiling, "published", lambda teacher: row)
    config = config_of(teacher="OWNER/NAME", student="bk_sdxl_small", pairing="segmind_sdxl", remat=True)
    config.data.resolution = 32
    lowered = compiling.lower(config, here)
    frozen = sum(pretrained.count(part, row.configs[part]) for part in ("unet", "text_encoder", "text_encoder_2"))
    assert lowered.held["teacher"] == 2 * frozen
    student = students.config(students.get("bk_sdxl_small"), row.unet)
    assert lowered.held["parameters"] == 4 * pretrained.count("unet", student)
    assert lowered.held["batch"] == 2 * 4 * (8 * 8 * 8 + 16 + 16 + 6)  # moments, both rows of ids, sizes
    assert [times for _, times in lowered.passes] == [1, 4] and lowered.attention == "plain"


def test_the_attention_of_a_program_is_the_one_that_pays_there(monkeypatch):
    class Mesh:
        devices = np.array([type("Device", (), {"platform": "tpu"})])

    name = lambda config, unet, size: compiling.longest_attention(config, Mesh(), unet, size, jnp.bfloat16)
    assert name(config_of(), families.SD15, 64) == "splash" and name(config_of(), families.SD15, 16) == "plain"
    assert name(config_of(attention="blocked"), families.SD15, 64) == "blocked"
    # SDXL has none at its outermost level: at 1024 pixels it begins with 4,096 tokens, at 256 pixels with 256.
    assert name(config_of(), families.SDXL, 128) == "splash" and name(config_of(), families.SDXL, 32) == "plain"


def test_a_batch_that_cannot_be_split_is_refused_before_anything_is_traced(here):
    with pytest.raises(ValueError, match="multiple of 4"):
        compiling.lower(config_of(batch_size=6), here)


def test_collectives_are_read_from_a_compiled_program():
    mesh = sharding.make_mesh(2, 2, jax.devices()[:4])
    whole, rows = sharding.replicated(mesh), sharding.batch(mesh)
    of = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    gradient = jax.jit(jax.grad(lambda w, x: jnp.sum((x @ w) ** 2)), in_shardings=(whole, rows), out_shardings=whole)
    text = gradient.lower(of(16, 8), of(4, 16)).compile().as_text()
    assert compiling.collectives(text) == {"all-reduce": (1, 16 * 8 * 4)}
    gather = jax.jit(lambda x: x, in_shardings=rows, out_shardings=whole)
    assert compiling.collectives(gather.lower(of(4, 16)).compile().as_text()) == {"all-gather": (1, 4 * 16 * 4)}
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
    first, again = (compiling.kept(compiling.whole, None, lowered, devices.target("v5e:2x2")) for _ in range(2))
    assert first == again and first.fits and first.collectives is None
    assert table.sent(None) == "not told"


# -- A compiler that is still at work: a shell script in its place ----------------------------------------------------

# As libtpu 0.0.42 writes them, with fewer buffers.
DUMPS = {
    "after_optimizations": """HloModule jit_train_step, is_scheduled=true
  %ar = (f32[8,128]{1,0:T(8,128)}, bf16[4]{0:T(128)(2,1)}) all-reduce(f32[8,128] %a, bf16[4] %b), replica_groups={}
""",
    "after_optimizations-buffer-assignment": """BufferAssignment:
allocation 6932: size 4096, parameter 9, shape |f32[1024]| at ShapeIndex {}, maybe-live-out:
 value: <90343 copy-start.1120{0} @1> (size=16384,offset=70868992): f32[128,32]{0,1:T(8,128)S(1)}
allocation 6967: size 2243363328, preallocated-temp:
allocation 6968: size 188, color 2, preallocated-temp:
allocation 6970: size 117440512, color 1, preallocated-temp:
""",
    "after_optimizations-memory-usage-report": """Memory Space: default (color=0)
Total bytes: 8119808000 (7.56GiB)
  160.00MiB(  2%);  160.00MiB;   1508229120;                1; bf16[8,4096,2560]
Memory Space: vmem (color=1)
Total bytes: 117440512 (112.00MiB)
""",
    "after_optimizations_after_buffer_assignment": "HloModule",
}


@pytest.fixture
def compiler(tmp_path, monkeypatch):
    """(lines of shell) -> they run in place of the process that compiles; its folder is $3."""

    def stand_in(*lines):
        script = tmp_path / "compiler"
        script.write_text("\n".join(["#!/bin/sh", *lines]))
        script.chmod(0o755)
        monkeypatch.setattr("sys.executable", str(script))

    return stand_in


def assigned():
    return compiling.assigned(small.get_config(""), None, devices.target("v5e:2x2"))


def test_it_ends_the_compiler_as_soon_as_the_buffers_are_known(compiler, tmp_path):
    for name, text in DUMPS.items():
        (tmp_path / f"module_0003.jit_train_step.cl_1.{name}.txt").write_text(text)
    compiler(f'echo "$XLA_FLAGS" > {tmp_path}/flags', f'cp {tmp_path}/module_* "$3"', "exec sleep 60")
    begin = time.monotonic()
    found = assigned()
    assert time.monotonic() - begin < 30
    assert found[:4] == (8119808000, 2243363328, None, {"all-reduce": (1, 8 * 128 * 4 + 8)}) and found.fits
    assert "--xla_dump_to=" in (tmp_path / "flags").read_text()


# The same buffers, and the real ones of the miniature's step, as libtpu 0.0.52 writes them.
PAGES = """allocation 0: size 512, page 0, thread-local:
allocation 1: size 1179648, page 0, parameter 0, shape |f32[3,3,256,128]| at ShapeIndex {186}, maybe-live-out:
allocation 7287: size 7168, color 6, page 0, preallocated-temp:
allocation 7288: size 232, color 2, page 0, preallocated-temp:
allocation 7289: size 63259136, page 0, preallocated-temp:
allocation 7290: size 71516672, color 1, page 0, preallocated-temp:
"""


def dumped(folder, **changes):
    """Dumps in a folder. changes: {end of the name with underscores: its text}; None for no such dump."""
    for name, text in DUMPS.items():
        text = changes.get(name.replace("-", "_"), text)
        if text is not None:
            (folder / f"module_0003.jit_train_step.cl_1.{name}.txt").write_text(text)
    return compiling.read(folder, devices.target("v5e:2x2"), 1.0)


@pytest.mark.parametrize(
    ("buffers", "temporary"),
    [
        (PAGES, 63259136),
        (PAGES.replace(", page 0", ""), 63259136),
        (PAGES.replace("7289: size 63259136,", "7289: size 63259136, color 0,"), 63259136),
        (PAGES + "allocation 7291: size 1000, page 1, preallocated-temp:\n", 63260136),
    ],
)
def test_temporaries_are_those_in_the_memory_of_the_device(tmp_path, buffers, temporary):
    assert dumped(tmp_path, after_optimizations_buffer_assignment=buffers).temporary == temporary


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("after_optimizations_buffer_assignment", PAGES.replace("preallocated-temp", "temporary"), "the temporaries"),
        ("after_optimizations_buffer_assignment", None, "the temporaries"),
        ("after_optimizations_memory_usage_report", "Memory Space: hbm\nTotal: 7 GiB\n", "the memory"),
        ("after_optimizations", "HloModule jit_train_step\n", "the collectives"),
    ],
)
def test_what_is_not_found_in_a_dump_is_an_error_and_no_zero(tmp_path, name, text, what):
    with pytest.raises(ValueError, match=f"writes {what} of a program for v5e:2x2 .*--whole"):
        dumped(tmp_path, **{name: text})


def test_a_compiler_that_ends_by_itself_has_told_all(compiler, tmp_path):
    too_large = compiling.Compiled(2**40, None, None, {}, 1.0)
    (tmp_path / "result").write_bytes(pickle.dumps(too_large))
    compiler(f'cp {tmp_path}/result "$3"')
    assert assigned() == too_large and not too_large.fits


def test_what_the_compiler_said_when_it_failed_is_told(compiler):
    compiler("echo first; echo INTERNAL: something >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"v5e:2x2 ended with status 3:\nfirst\nINTERNAL: something"):
        assigned()
