"""The converters: round trips are exact, and the workdir of a training becomes a folder for diffusers."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from convert import from_diffusers, to_diffusers
from flaxkd import export, pretrained
from flaxkd.pretrained import Folder, hub

pytest.importorskip("torch")


def tensors(folder: Path) -> dict:
    return {part: Folder.open(folder).tensors(part) for part in pretrained.PARTS}


def same(a: dict, b: dict) -> bool:
    """Equal names, dtypes and bits; with or without the prefix that transformers 5 leaves out."""
    a, b = (
        {(p, k.removeprefix("text_model.")): x for p, t in c.items() for k, x in t.items()} for c in (a, b)
    )
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and np.array_equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def converted(tiny_pipeline, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "orbax"
    from_diffusers.convert(str(tiny_pipeline), out)
    return out


@pytest.fixture(scope="module")
def student(tiny_pipeline) -> tuple[dict, dict]:
    """(config, params) of a UNet that has no mid block and one layer per block, with random weights."""
    config = Folder.open(tiny_pipeline).config("unet") | {"layers_per_block": 1, "mid_block_type": None}
    shapes = pretrained.shapes("unet", config)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), shapes)


def shift(params: dict, by: float) -> dict:
    return jax.tree.map(lambda x: x + np.float32(by), params)


@pytest.fixture(scope="module")
def trained(tiny_pipeline, student, tmp_path_factory) -> Path:
    """What a training leaves: two checkpoints with optimizer and average, its config, figures and samples."""
    config, params = student
    workdir = tmp_path_factory.mktemp("trained") / "run"
    workdir.mkdir()
    with ocp.CheckpointManager(workdir / "checkpoints") as manager:
        for step in (10, 20):
            now = {"unet": jax.tree.map(jnp.asarray, shift(params, step))}
            state = {"params": now, "ema": {"unet": shift(params, -step)}, "step": jnp.int32(step)}
            state["opt_state"] = optax.sgd(1e-3, momentum=0.9).init(now)
            args = ocp.args.Composite(
                state=ocp.args.StandardSave(state), data=ocp.args.JsonSave({"at": step})
            )
            manager.save(step, args=args)
    export.write_record(workdir, Folder.open(tiny_pipeline), {"unet": config})
    run = {"teacher": "owner/teacher", "student": "bk_tiny", "blank": None, "data": {"source": "openmoji"}}
    run["sample"] = {"prompts": ["red apple"]}
    (workdir / "config.json").write_text(json.dumps(run))
    (workdir / "samples.png").write_bytes(b"picture")
    records = [{"step": 0, "validation/loss": 2.0}, {"step": 10, "loss": 1.5, "feature/mid_block": 3.0}]
    records.append({"step": 20, "validation/loss": 0.25})
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return workdir


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")


def test_round_trip_is_exact(tiny_pipeline, converted, tmp_path):
    to_diffusers.main(["--workdir", str(converted), "--out", str(tmp_path / "back")])
    assert same(tensors(tmp_path / "back"), tensors(tiny_pipeline))
    for part in ("unet", "vae", "scheduler"):
        before, after = (
            Folder.open(folder).config(part) for folder in (tiny_pipeline, tmp_path / "back")
        )
        assert {k: v for k, v in after.items() if k[0] != "_"} == {
            k: v for k, v in before.items() if k[0] != "_"
        }


def test_a_converted_folder_can_be_moved(tiny_pipeline, converted, tmp_path):
    moved = shutil.copytree(converted, tmp_path / "moved")
    export.export(moved, tmp_path / "back", np.float16)
    half = {p: {k: x.astype(np.float16) for k, x in t.items()} for p, t in tensors(tiny_pipeline).items()}
    assert same(tensors(tmp_path / "back"), half)


def test_from_diffusers_says_what_it_wrote(tiny_pipeline, tmp_path, capsys):
    from_diffusers.main(["--model", str(tiny_pipeline), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for part, stored in tensors(tiny_pipeline).items():
        assert (
            f"{len(stored)} tensors" in said
            and f"{sum(x.size for x in stored.values()):,} parameters" in said
        ), part


def test_from_diffusers_keeps_what_is_there(tiny_pipeline, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match=r"^error: .* not empty"):
        from_diffusers.main(["--model", str(tiny_pipeline), "--out", str(tmp_path)])
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_from_diffusers_refuses_a_pickle_without_a_trace(tiny_pipeline, tmp_path):
    model = shutil.copytree(tiny_pipeline, tmp_path / "model")
    path = model / "vae" / "diffusion_pytorch_model.safetensors"
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(SystemExit, match=r"^error: .*pickle"):
        from_diffusers.main(["--model", str(model), "--out", str(tmp_path / "out")])
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("flags, shifted", [([], -20), (["--ema"], -20), (["--no-ema"], 20)])
def test_a_training_is_exported_with_what_was_trained(workdir, student, tiny_pipeline, flags, shifted):
    out = workdir / "diffusers"
    to_diffusers.main(["--workdir", str(workdir), "--out", str(out), "--dtype", "float32", *flags])
    _, params = Folder.open(out).load("unet")
    assert jax.tree.all(jax.tree.map(np.array_equal, params, shift(student[1], shifted)))
    for part in ("vae", "text_encoder"):
        assert same(
            {part: Folder.open(out).tensors(part)}, {part: Folder.open(tiny_pipeline).tensors(part)}
        )


def test_an_exported_student_loads_in_diffusers_and_draws(workdir, student, tmp_path):
    from diffusers import StableDiffusionPipeline

    out = export.export(workdir, tmp_path / "out", np.float16)
    pipeline = StableDiffusionPipeline.from_pretrained(out)
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.unet.num_parameters() == sum(x.size for x in jax.tree.leaves(student[1]))
    assert pipeline.unet.mid_block is None and len(pipeline.unet.down_blocks[0].resnets) == 1
    assert pipeline("red apple", num_inference_steps=1, output_type="np").images.shape == (1, 32, 32, 3)


def test_the_card_tells_what_it_is(workdir, tmp_path):
    out = export.export(workdir, tmp_path / "out")
    card = (out / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    for line in (
        "license: other",
        "library_name: diffusers",
        "base_model: owner/teacher",
        "- knowledge-distillation",
    ):
        assert line in front.splitlines()
    assert "`bk_tiny`" in body and "![samples](samples.png)" in body and "20 optimizer steps" in body
    assert "| validation/loss | 2 | 0.25 | 20 |" in body and "mid_block |" not in body
    assert "CC BY-SA 4.0" in body and "moving average" in body and "32 x 32 pixels" in body
    assert (out / "samples.png").read_bytes() == b"picture"


def test_the_card_of_a_student_of_the_embedded_teacher(workdir, tiny_pipeline, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "EMBEDDED", tiny_pipeline)
    run = json.loads((workdir / "config.json").read_text()) | {"teacher": None}
    (workdir / "config.json").write_text(json.dumps(run))
    export.write_record(workdir, Folder.open(tiny_pipeline), json.loads((workdir / "export.json").read_text())["parts"])
    assert json.loads((workdir / "export.json").read_text())["source"] is None
    front = (export.export(workdir, tmp_path / "out") / "README.md").read_text().split("---\n")[1]
    assert "license: cc-by-sa-4.0" in front and "base_model" not in front


@pytest.mark.parametrize(
    "theirs, data, ours",
    [("mit", "pictures", "mit"), ("mit", "openmoji", "other"), ("cc-by-sa-4.0", "openmoji", "cc-by-sa-4.0")],
)
def test_the_licence_of_the_source_goes_on(workdir, tiny_pipeline, tmp_path, theirs, data, ours):
    source = shutil.copytree(tiny_pipeline, tmp_path / "mine" / "diffusers")
    (source / "README.md").write_text(f"---\nlicense: {theirs}\n---\nlicense: none of these\n")
    run = json.loads((workdir / "config.json").read_text()) | {
        "teacher": str(source),
        "data": {"source": data},
    }
    (workdir / "config.json").write_text(json.dumps(run))
    card = export.export(workdir, tmp_path / "out", source=source) / "README.md"
    _, front, body = card.read_text().split("---\n", 2)
    assert f"license: {ours}" in front.splitlines()
    assert f"derive from those of mine, whose licence ({theirs})" in body


def test_a_broken_checkpoint_gives_way_to_the_one_before(workdir):
    for path in (workdir / "checkpoints" / "20").rglob("*"):
        if path.is_file() and path.parent.name == "d":
            path.write_bytes(path.read_bytes()[:10])
    step, params, averaged = export.restore(workdir / "checkpoints")
    assert (step, list(params), averaged) == (10, ["unet"], True)
    shutil.rmtree(workdir / "checkpoints" / "10")
    with pytest.raises(ValueError, match=r"no checkpoint in .* can be read"):
        export.restore(workdir / "checkpoints")


def test_errors_of_export_say_what_to_do(workdir, converted, tiny_pipeline, tmp_path):
    with pytest.raises(FileNotFoundError, match="give a workdir"):
        export.export(tmp_path, tmp_path / "out")
    with pytest.raises(ValueError, match="no moving average"):
        export.export(converted, tmp_path / "out", ema=True)
    plan = json.loads((workdir / "export.json").read_text())
    (workdir / "export.json").write_text(json.dumps(plan | {"source": "/gone"}))
    with pytest.raises(FileNotFoundError, match="--source DIR"):
        export.export(workdir, tmp_path / "out")
    assert export.export(workdir, tmp_path / "out", source=tiny_pipeline).is_dir()
    shutil.rmtree(workdir / "checkpoints")
    with pytest.raises(FileNotFoundError, match="has no checkpoint"):
        export.export(workdir, tmp_path / "out", source=tiny_pipeline)
