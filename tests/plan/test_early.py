"""What a TPU program needs, read from the dumps of a compiler that is still at work: a shell script in its place."""

import pickle
import time

import pytest

from configs import small
from flaxkd.plan import compiling, devices

HERE = devices.target("v5e:2x2")
# As libtpu 0.0.42 wrote them, with fewer buffers.
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
    return compiling.assigned(small.get_config(""), None, HERE)


def test_it_ends_the_compiler_as_soon_as_the_buffers_are_known(compiler, tmp_path):
    for name, text in DUMPS.items():
        (tmp_path / f"module_0003.jit_train_step.cl_1.{name}.txt").write_text(text)
    compiler(f'echo "$XLA_FLAGS" > {tmp_path}/flags', f'cp {tmp_path}/module_* "$3"', "exec sleep 60")
    begin = time.monotonic()
    found = assigned()
    assert time.monotonic() - begin < 30
    assert found[:4] == (8119808000, 2243363328, None, {"all-reduce": (1, 8 * 128 * 4 + 8)}) and found.fits
    assert "--xla_dump_to=" in (tmp_path / "flags").read_text()


def test_a_compiler_that_ends_by_itself_has_told_all(compiler, tmp_path):
    too_large = compiling.Compiled(2**40, None, None, {}, 1.0)
    (tmp_path / "result").write_bytes(pickle.dumps(too_large))
    compiler(f'cp {tmp_path}/result "$3"')
    assert assigned() == too_large and not too_large.fits


def test_what_the_compiler_said_when_it_failed_is_told(compiler):
    compiler("echo first; echo INTERNAL: something >&2; exit 3")
    with pytest.raises(RuntimeError, match=r"v5e:2x2 ended with status 3:\nfirst\nINTERNAL: something"):
        assigned()
