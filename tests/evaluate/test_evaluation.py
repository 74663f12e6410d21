"""The program as a person runs it, on a tiny pipeline: the teacher against itself, and a student cut from it."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from PIL import Image

from flaxkd import export, pretrained, students
from flaxkd.data import sources
from flaxkd.diffusion import consistency
from flaxkd.evaluate import candidates, evaluation, fidelity, table
from flaxkd.evaluate.__main__ import main
from flaxkd.pretrained import Folder
from tests.tiny import CAPTIONS

FEW = ["--sampler=ddim", "--steps=2", "--batch-size=4"]


def furnish(home, pipeline):
    """Puts a folder of pictures with captions and a student as cut into a folder."""
    (home / "pictures").mkdir()
    rng = np.random.default_rng(0)
    with (home / "pictures" / "metadata.jsonl").open("w") as file:
        for i in range(60):
            image = Image.fromarray(rng.integers(256, size=(4, 4, 3), dtype=np.uint8))
            image.resize((32, 32)).save(home / "pictures" / f"{i}.png")
            file.write(json.dumps({"file_name": f"{i}.png", "text": f"{CAPTIONS[i % 5]} {i}"}) + "\n")
    student = students.get("bk_tiny")
    config, (_, teacher) = (
        Folder.open(pipeline).config("unet"),
        Folder.open(pipeline).load("unet"),
    )
    config = students.config(student, config)
    params = students.take(student, teacher, pretrained.shapes("unet", config))
    pretrained.save(home / "student", source=Folder.open(pipeline), parts={"unet": (config, params)})
    return home


@pytest.fixture(scope="module")
def home(tiny_pipeline, tmp_path_factory):
    return furnish(tmp_path_factory.mktemp("home"), tiny_pipeline)


@pytest.fixture(scope="module")
def evaluated(home, tiny_pipeline):
    out = home / "out"
    models = [str(tiny_pipeline), str(home / "student")]
    data = ["--reference", str(tiny_pipeline), "--data", str(home / "pictures"), "--out", str(out)]
    main(["--model", *models, *data, "--bins=2", "--examples=3", *FEW])
    return out, json.loads((out / "evaluation.json").read_text())


def test_the_teacher_against_itself_is_perfect(evaluated):
    _, result = evaluated
    teacher, itself, _ = result["rows"]
    assert teacher["model"] == "teacher (pipeline)" and itself["model"] == "pipeline"
    assert itself["loss_output"] == itself["feature"] == 0
    assert itself["psnr"] == fidelity.PSNR_LIMIT and itself["ssim"] == pytest.approx(1)
    assert itself["frechet_latent"] == pytest.approx(0, abs=1e-6)
    same = ("parameters", "loss_noise", "frechet_latent_data")
    assert {name: itself[name] for name in same} == {name: pytest.approx(teacher[name]) for name in same}
    assert result["settings"]["pipeline is"] == "same network"


def test_a_student_as_cut_is_not(evaluated, home):
    _, result = evaluated
    teacher, _, student = result["rows"]
    assert student["parameters"] < teacher["parameters"] and result["settings"]["student is"].endswith("bk_tiny")
    assert student["loss_output"] > 0 and student["frechet_latent"] > 0
    assert student["psnr"] < 60 and student["ssim"] < 0.99
    pairs = students.feature_pairs(students.get("sd_tiny"), "segmind")
    assert list(student["features"]) == [own for own, _ in pairs]
    assert min(student["features"].values()) > 0
    for name in ("loss_noise", "loss_output", "feature"):
        assert np.mean(student["by_timestep"][name]) == pytest.approx(
            student[name], rel=0.5 if name == "feature" else 1e-6
        )


def test_the_result_is_a_table_and_pictures(evaluated):
    out, result = evaluated
    text = (out / "evaluation.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert "Fréchet (latent)" in lines[0] and "FID" not in lines[0]
    assert [line.split(" | ")[0][2:] for line in lines[1:4]] == ["teacher (pipeline)", "pipeline", "student"]
    assert f"{result['rows'][2]['loss_output']:.4f}" in lines[3]
    assert "Fréchet distance in the VAE's latent space" in text and "0–499 | 500–999" in text
    for name in ("evaluation.png", "samples.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 100
    captions = [x["caption"] for x in sources.open_source(str(out.parent / "pictures"), "validation", resolution=32)]
    settings = json.loads((out / "pictures" / "fidelity" / "student" / "settings.json").read_text())
    assert settings["prompts"] == min(3, len(captions)) and settings["sampler"] == "ddim"


def test_a_workdir_is_a_model(home, tiny_pipeline, monkeypatch):
    """Its newest checkpoint replaces what it trained."""
    workdir = home / "workdir"
    workdir.mkdir()
    config = Folder.open(home / "student").config("unet")
    plan = {"source": str(tiny_pipeline), "parts": {"unet": config}}
    (workdir / "export.json").write_text(json.dumps(plan))
    _, params = Folder.open(home / "student").load("unet")
    monkeypatch.setattr(export.workdir, "restore", lambda folder, ema: (7, {"unet": params}, False))
    mesh = evaluation.sharding.local_mesh()
    loaded = candidates.load(candidates.find(str(workdir)), np.float32, mesh)
    folder = candidates.load(candidates.find(str(home / "student")), np.float32, mesh)
    assert loaded.name == "workdir" and loaded.fingerprint == folder.fingerprint
    assert loaded.folder.count("unet") == sum(x.size for x in jax.tree.leaves(params))


def test_a_trained_student_stands_beside_itself_as_cut(home, tiny_pipeline):
    """Once for each kind of student, before the first of them; not for the teacher's own network."""
    teacher = candidates.find(str(tiny_pipeline))
    cut = candidates.find(str(home / "student"))
    params = jax.tree.map(lambda x: x + np.float32(0.01), cut.folder.params("unet"))
    trained = candidates.Candidate("trained", cut.folder.replace({}, {"unet": lambda: params}))
    again = trained._replace(name="again")
    names = lambda *models: [model.name for model in candidates.anchored([teacher, *models])]
    assert names(trained, again) == ["pipeline", "sd_tiny as cut", "trained", "again"]
    assert names(teacher._replace(name="itself"), trained) == ["pipeline", "itself", "sd_tiny as cut", "trained"]
    assert names(cut, trained) == ["pipeline", "student", "trained"]  # it is there already
    added = candidates.anchored([teacher, trained])[1]
    assert added.as_cut and added.folder.config("unet") == cut.folder.config("unet")
    jax.tree.map(np.testing.assert_array_equal, added.folder.params("unet"), cut.folder.params("unet"))


def test_a_model_of_few_steps_is_drawn_as_it_was_made(tiny_pipeline):
    teacher = candidates.find(str(tiny_pipeline))
    scheduler = consistency.scheduler_config(teacher.folder.config("scheduler"), "epsilon", 50)
    few = dataclasses.replace(teacher.folder.replace({"scheduler": scheduler}, {}), drawn_with=1.0)
    models = [teacher._replace(name="teacher"), teacher._replace(name="fast", folder=few)]
    asked = lambda *flags: evaluation.parse(["--model", "fast", "--batch-size=4", *flags])
    drawn = lambda args: [evaluation.how(args, model, ("dpmsolver++", 7.5)) for model in models]
    assert drawn(asked()) == [("dpmsolver++", 25, 7.5), ("lcm", 4, 1.0)]
    assert drawn(asked("--steps=8"))[1] == ("lcm", 8, 1.0)
    assert drawn(asked("--sampler=ddim", "--guidance=3"))[1] == ("ddim", 4, 3.0)
    _, settings = evaluation.prepare(asked(), models)
    assert settings["steps"] == 25 and settings["drawn in few steps (fast)"] == "4 of lcm, guidance 1"
    assert "drawn in few steps (teacher)" not in settings


def test_a_picture_of_any_result_can_be_read(tmp_path, monkeypatch):
    """One bin, a figure that is not finite, zeros: no empty scale, and numbers without exponents."""
    kept = []
    monkeypatch.setattr(table.figures, "save", lambda figure, path: kept.append(figure))
    student = {"model": "a/very/long/name/of/a/student/in/some/folder", "psnr": float("nan"), "frechet_latent": 0.0}
    student |= {"by_timestep": {"loss_output": [6.0], "loss_noise": [0.0]}, "fid": 17.05}
    student |= {"features": {"mid_block": 0.02, "up_blocks.0": 7.0}}
    rows = [{"model": "teacher", "by_timestep": {"loss_noise": [0.2]}, "fid": 13.05, "psnr": None}, student]
    table.picture({"rows": rows, "settings": {"timesteps": [0, 1000]}}, tmp_path / "picture.png")
    figure = kept[0]
    figure.canvas.draw()
    axes = {axis.get_title(): axis for axis in figure.axes}
    assert axes.keys() == {"loss_output by timestep", "loss_noise by timestep", "features, relative error", "PSNR",
                           "Fréchet (latent)", "FID"}  # fmt: skip
    for axis in figure.axes:
        labels = [text.get_text() for of in (axis.xaxis, axis.yaxis) for text in of.get_ticklabels(which="both")]
        assert len(labels) < 25 and not any("$" in label for label in labels), labels
        assert all(len(label) <= 28 for label in labels)
    assert axes["FID"].get_xlim()[0] == 0 and [text.get_text() for text in axes["PSNR"].texts] == ["nan"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model", "nowhere"], "there is no folder .*nowhere"),
        (["--model", "{student}", "--no-fidelity"], "needs --prompts FILE"),
        (["--model", "{student}", "--batch-size=3"], "batch_size = 3 images cannot be split over 4 devices"),
        (["--model", "{student}", "--sampler=dpm3"], "sampler 'dpm3' is unknown"),
        (["--model", "{student}", "--resolution=40"], "resolution 40 is no multiple of 32 pixels"),
        (["--model", "{student}", "--bins=0"], "bins = 0"),
        (["--model", "{student}", "--data=nowhere"], "no data set 'nowhere'"),
        (
            ["--model", "{student}", "--prompts=nowhere.txt", "--sampler=ddim"],
            "there is no file .*nowhere.txt",
        ),
        (["--model", "{other}"], r"other cannot be compared with teacher \(pipeline\): prediction_type is"),
    ],
)
def test_mistakes_are_found_before_any_compute(home, tiny_pipeline, arguments, message, monkeypatch, tmp_path):
    other = home / "other"
    if not other.exists():
        pretrained.save(other, source=Folder.open(tiny_pipeline), parts={})
        scheduler = Folder.open(other).config("scheduler") | {"prediction_type": "v_prediction"}
        (other / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    monkeypatch.setattr(candidates, "load", None)
    arguments = [text.format(student=home / "student", other=other) for text in arguments]
    data = [
        "--data",
        str(home / "pictures"),
        "--out",
        str(tmp_path / "out"),
        "--reference",
        str(tiny_pipeline),
    ]
    with pytest.raises(SystemExit, match=f"^error: (?s:.*){message}"):
        main([*data, *arguments])
    assert not (tmp_path / "out").exists()


def test_options_of_the_protocol_need_its_prompts(capsys):
    with pytest.raises(SystemExit):
        main(["--model", "x", "--real", "nowhere", "--clip", "other"])
    assert "error: --real, --clip: of the published protocol, which needs --prompts FILE" in capsys.readouterr().err
