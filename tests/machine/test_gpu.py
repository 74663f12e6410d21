"""The memory that a process asks of a GPU, as JAX reads it."""

import os

import pytest
from jaxlib import xla_client

from flaxkd.machine import gpu


@pytest.mark.parametrize(
    ("given", "asked"), [({}, gpu.MEMORY), ({gpu.NAMES[0]: ".5"}, 0.5), ({gpu.NAMES[1]: ".4"}, 0.4)]
)
def test_xla_gets_nearly_all_memory_unless_the_user_says_otherwise(given, asked, monkeypatch):
    for name in gpu.NAMES:
        monkeypatch.setenv(name, given.get(name, ""))
    gpu.take_memory()
    assert xla_client.generate_pjrt_gpu_plugin_options()["memory_fraction"] == asked
    assert {name: os.environ[name] for name in given} == given
