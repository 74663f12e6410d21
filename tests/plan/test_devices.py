"""Machines by their names, and what their makers say of them."""

import pytest

from flaxkd.plan import devices


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


def test_the_device_of_a_published_peak():
    class Fake:
        def __init__(self, kind):
            self.device_kind = kind

    assert devices.peak(Fake("NVIDIA A100-SXM4-80GB")).memory == 80 * 2**30
    assert devices.peak(Fake("NVIDIA A100-SXM4-40GB")).memory == 40 * 2**30
    assert devices.peak(Fake("TPU v5 lite")).flops_per_second == 197e12
    assert devices.peak(Fake("TPU v5")).flops_per_second == 459e12
    assert devices.peak(Fake("cpu")) is None
