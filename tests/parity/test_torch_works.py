"""The other side of the benchmark does the same work."""

import json

import jax
import numpy as np
import pytest

from flaxkd.bench import benchmark, torch_works, works
from flaxkd.bench.works import Prepared
from flaxkd.pretrained import Folder
from tests.bench.test_benchmark import refused, small

pytest.importorskip("torch")


@pytest.mark.parametrize(
    ("teacher", "student", "pairing"),
    [
        ("tiny_pipeline", "sd_tiny", "segmind"),  # a pair of blocks with unequal names, and no mid block
        pytest.param("tiny_xl", "bk_sdxl_small", "koala", marks=pytest.mark.slow),  # two text encoders, and sizes
    ],
)
def test_both_sides_compute_the_same_loss(request, teacher, student, pairing):
    teacher = request.getfixturevalue(teacher)
    subject = works.subject(student, small(teacher, pairing=pairing), Folder.open(teacher), steps=2)
    inputs = subject.task.prepare(jax.random.key(1), subject.batch)
    _, ours = jax.jit(subject.task.loss)(subject.task.trained, subject.task.frozen, {}, inputs)
    networks = torch_works._networks(subject)
    tensors = lambda *arrays: torch_works._tensors(subject, *map(np.asarray, arrays))
    conditions = dict(zip(inputs.conditions, tensors(*inputs.conditions.values()), strict=True))
    seen = tensors(inputs.noisy_latents, inputs.timesteps, inputs.target)
    theirs = torch_works.loss(subject, networks)(*seen, conditions)
    assert theirs.keys() == {"loss", "loss_noise", "loss_output", "loss_feature"}
    for name, value in theirs.items():
        np.testing.assert_allclose(float(value.detach()), ours[name], rtol=2e-5, err_msg=name)


def test_a_denoising_step_of_sdxl_has_all_that_conditions_its_unet(tiny_xl):
    subject = works.subject("teacher", small(tiny_xl), Folder.open(tiny_xl), steps=2)
    shapes = [(8, 8, 8, 4), (8,), (8, 16, 32), (8, 12), (8, 6)]  # twice the batch
    assert [x.shape for x in subject.inputs] == shapes
    unet = subject.folder.module("unet")
    ours = jax.eval_shape(
        lambda params, *inputs: unet.apply({"params": params}, *inputs), subject.unet, *subject.inputs
    )
    theirs = torch_works._denoise(subject, torch_works._networks(subject), compiled=False)()
    assert ours.shape == (8, 8, 8, 4) and theirs.shape == (8, 4, 8, 8) and bool(theirs.isfinite().all())


def test_a_step_in_torch_moves_the_student_alone(tiny_pipeline):
    subject = works.subject("sd_tiny", small(tiny_pipeline), Folder.open(tiny_pipeline), steps=2)
    networks = torch_works._networks(subject)
    before = [p.detach().clone() for p in (*networks.unet.parameters(), *networks.teacher.parameters())]
    losses = [torch_works._train(subject, networks, compiled=False)() for _ in range(2)]
    after = [*networks.unet.parameters(), *networks.teacher.parameters()]
    moved = [not bool((a == b).all()) for a, b in zip(before, after, strict=True)]
    n = len(list(networks.unet.parameters()))
    assert np.isfinite(losses).all() and np.mean(moved[:n]) > 0.9 and not any(moved[n:])


def test_a_benchmark_times_every_work_of_everybody(tiny_pipeline, tmp_path, monkeypatch):
    """All but the work itself, which compiles for minutes: the other tests look at that."""
    done = []

    def prepared(subject, work, by=benchmark.OURS):
        ours = by == benchmark.OURS
        flops = {"denoise": 2e9, "train": 4e9}.get(work) if ours else None
        return Prepared(lambda: done.append((subject.name, work, by)), 1.0, flops, flops and 2**20)

    monkeypatch.setattr(works, "prepare", prepared)
    monkeypatch.setattr(torch_works, "prepare", prepared)
    result = benchmark.run(
        small(tiny_pipeline),
        names=["sd_tiny"],
        against=[torch_works.EAGER],
        unet={"norm_num_groups": 8},
        rounds=5,
        steps=2,
        out=tmp_path,
    )
    models = [(row["model"], row["by"]) for row in result["rows"]]
    assert models == [(m, by) for m in ("teacher", "sd_tiny") for by in ("flaxkd", "torch eager")]
    assert len(done) == 5 * len(models) * len(works.WORKS)
    for work in works.WORKS:
        for row in result["rows"]:
            assert len(row[work]["all_seconds"]) == 5
            assert row[work]["seconds"] == np.median(row[work]["all_seconds"])
    assert json.loads((tmp_path / "bench.json").read_text()) == result
    text = (tmp_path / "bench.md").read_text()
    assert "| teacher | torch eager |" in text and "norm_num_groups 8" in text
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_what_the_other_side_has_not_is_refused_before_any_compute(tiny_pipeline):
    refused(tiny_pipeline, "of ema_decay", {"ema_decay": 0.9}, against=[torch_works.EAGER])


def test_on_a_gpu_torch_is_at_its_best():
    import torch

    settings = [(torch.backends.cudnn, "benchmark"), (torch.backends.cudnn, "allow_tf32")]
    settings += [(torch.backends.cuda.matmul, "allow_tf32")]
    before = [getattr(of, name) for of, name in settings]
    conv = torch.nn.Conv2d(4, 8, 3)
    try:
        torch_works._at_its_best(conv)
        assert all(getattr(of, name) for of, name in settings)
    finally:
        for (of, name), value in zip(settings, before, strict=True):
            setattr(of, name, value)
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
