"""A pipeline becomes a workdir, whose export is that pipeline."""

import shutil

import numpy as np
import pytest

from convert import from_diffusers, to_diffusers
from flaxkd import export
from flaxkd.pretrained import Folder
from tests.export.trainings import same, tensors


def test_a_converted_folder_can_be_moved(tiny_pipeline, tmp_path):
    from_diffusers.convert(str(tiny_pipeline), tmp_path / "converted")
    moved = shutil.move(tmp_path / "converted", tmp_path / "moved")
    export.export(moved, tmp_path / "back", np.float16)
    half = {p: {k: x.astype(np.float16) for k, x in t.items()} for p, t in tensors(tiny_pipeline).items()}
    assert same(tensors(tmp_path / "back"), half)


def test_sdxl_goes_there_and_back(tiny_xl, tmp_path, capsys):
    from_diffusers.convert(str(tiny_xl), tmp_path / "converted")
    to_diffusers.main(["--workdir", str(tmp_path / "converted"), "--out", str(tmp_path / "back")])
    assert "try: StableDiffusionXLPipeline.from_pretrained(" in capsys.readouterr().out
    before, after = tensors(tiny_xl), tensors(tmp_path / "back")
    assert [*after] == ["unet", "vae", "text_encoder", "text_encoder_2"] and same(before, after)
    folders = Folder.open(tiny_xl), Folder.open(tmp_path / "back")
    assert all(folders[0].config(part) == folders[1].config(part) for part in after)
    first, second = (folder.tokenize(["red apple", None]) for folder in folders)
    assert first.keys() == {"input_ids", "input_ids_2"} and all(np.array_equal(first[x], second[x]) for x in first)


def test_from_diffusers_says_what_it_wrote(tiny_pipeline, tmp_path, capsys):
    from_diffusers.main(["--model", str(tiny_pipeline), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    for part, stored in tensors(tiny_pipeline).items():
        assert f"{len(stored)} tensors" in said and f"{sum(x.size for x in stored.values()):,} parameters" in said, part


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


def test_a_single_file_of_a_workdir_goes_back_to_the_same_folder(tiny_pipeline, tmp_path, capsys):
    workdir, file = tmp_path / "converted", tmp_path / "model.safetensors"
    from_diffusers.convert(str(tiny_pipeline), workdir)
    to_diffusers.main(["--workdir", str(workdir), "--single-file", str(file)])
    assert f"wrote {file}, 1." in capsys.readouterr().out
    to_diffusers.main(["--model", str(file), "--out", str(tmp_path / "back")])
    assert same(tensors(tmp_path / "back"), tensors(tiny_pipeline))
    to_diffusers.main(["--model", str(tiny_pipeline), "--single-file", str(file), "--dtype", "float16"])
    assert {x.dtype for x in Folder.open(file).tensors("vae").values()} == {np.dtype("float16")}
    for arguments, said in (
        (["--model", str(file)], "give --out DIR or --single-file FILE"),
        (["--single-file", str(file)], "--workdir --model is required"),
        (["--model", str(tiny_pipeline), "--single-file", str(file), "--for", "sd.cpp"], "has no UNet like this one"),
        (["--model", str(file), "--single-file", str(file)], "would replace its source"),
    ):
        with pytest.raises(SystemExit) as ended:
            to_diffusers.main(arguments)
        assert said in f"{ended.value}{capsys.readouterr().err}"
