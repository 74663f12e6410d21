"""Machines by their names, and what their makers say of them."""

import pytest

from flaxkd.plan import devices


@pytest.mark.parametrize(
    ("name", "count", "gib", "topology"),
    [("v5e:4x8", 32, 16, "v5e:4x8"), ("v5p:2x2x1", 4, 95, "v5p:2x2x1"), ("a100-80x8", 8, 80, "1x1x8"),
     ("a100-40", 1, 40, "1x1x1"), ("a100x2", 2, 80, "1x1x2"), ("h100x8", 8, 80, "1x1x8"),
     ("h200", 1, 141, "1x1x1")],
)  # fmt: skip
def test_a_machine_is_told_by_its_name(name, count, gib, topology):
    target = devices.target(name)
    assert (target.count, target.peak.memory, target.topology) == (count, gib * 2**30, topology)


@pytest.mark.parametrize("name", ["v4:2x2x4", "v4:16x16x16", "v5p:4x4x4", "v5p:16x16x24", "v6e:16x16", "v5e:1x1"])
def test_a_slice_that_can_be_rented_is_known(name):
    assert devices.target(name).topology == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("v5e:3x5", "there is no v5e:3x5: v5e has 1x1, 2x2, 2x4, .* 16x16$"),
        ("v5e:4x2", "v5e has 1x1"),
        ("v6e:2x2x2", "v6e has 1x1"),
        ("v5e:32x32", "v5e has 1x1"),
        ("v4:2x2", "v4 has 2x2x1, .*multiples of 4, up to 4,096 chips"),
        ("v4:16x16x24", "v4 has 2x2x1"),
        ("v5p:4x8x6", "v5p has 2x2x1, .*up to 6,144 chips"),
        ("v5p:8x4x4", "v5p has 2x2x1"),
        ("v5p:0x4x4", "v5p has 2x2x1"),
    ],
)
def test_a_slice_that_nobody_has_is_answered_with_those_there_are(name, message):
    with pytest.raises(ValueError, match=message):
        devices.target(name)


@pytest.mark.parametrize("name", ["v5e", "v9e:2x2", "a100:2x2", "v5ex4", "rtx4090", "v5e:2", "h100x0"])
def test_an_unknown_machine_is_answered_with_examples(name):
    with pytest.raises(ValueError, match=r"v5e:4x8.*a100-80x8"):
        devices.target(name)


def test_the_device_of_a_published_peak():
    class Fake:
        def __init__(self, kind):
            self.device_kind = kind

    assert devices.peak(Fake("NVIDIA A100-SXM4-80GB")).memory == 80 * 2**30
    assert devices.peak(Fake("NVIDIA A100-SXM4-40GB")).memory == 40 * 2**30
    assert devices.peak(Fake("TPU v5 lite")).flops_per_second == 197e12
    assert devices.peak(Fake("TPU v5")).flops_per_second == 459e12
    assert devices.peak(Fake("cpu")) is None
