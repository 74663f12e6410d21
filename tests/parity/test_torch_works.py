"""The other side of the benchmark does the same work."""

import jax
import numpy as np
import pytest

from flaxkd.bench import torch_works, works
from flaxkd.pretrained import Folder
from tests.bench.test_benchmark import small

pytest.importorskip("torch")


def test_both_sides_compute_the_same_loss(tiny_pipeline):
    """sd_tiny has a pair of blocks with unequal names, and no mid block."""
    subject = works.subject("sd_tiny", small(tiny_pipeline), Folder.open(tiny_pipeline), steps=2)
    inputs = subject.task.prepare(jax.random.key(1), subject.batch)
    _, ours = jax.jit(subject.task.loss)(subject.task.trained, subject.task.frozen, {}, inputs)
    networks = torch_works._networks(subject)
    arrays = (inputs.noisy_latents, inputs.timesteps, inputs.input_ids, inputs.target)
    tensors = torch_works._tensors(subject, *(np.asarray(x) for x in arrays))
    theirs = torch_works.loss(subject, networks)(*tensors)
    assert theirs.keys() == {"loss", "loss_noise", "loss_output", "loss_feature"}
    for name, value in theirs.items():
        np.testing.assert_allclose(float(value.detach()), ours[name], rtol=2e-5, err_msg=name)


def test_a_step_in_torch_moves_the_student_alone(tiny_pipeline):
    subject = works.subject("sd_tiny", small(tiny_pipeline), Folder.open(tiny_pipeline), steps=2)
    networks = torch_works._networks(subject)
    before = [p.detach().clone() for p in (*networks.unet.parameters(), *networks.teacher.parameters())]
    losses = [torch_works._train(subject, networks, compiled=False)() for _ in range(2)]
    after = [*networks.unet.parameters(), *networks.teacher.parameters()]
    moved = [not bool((a == b).all()) for a, b in zip(before, after, strict=True)]
    n = len(list(networks.unet.parameters()))
    assert np.isfinite(losses).all() and np.mean(moved[:n]) > 0.9 and not any(moved[n:])
