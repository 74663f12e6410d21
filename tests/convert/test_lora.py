"""convert.lora: dialects, teacher to student and back, merging, extracting."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from convert import lora as convert
from flaxkd import export, students
from flaxkd.pretrained import Folder, families, lora_files, lora_writing, save
from flaxkd.weights import lora
from tests import tiny


def adapter(shapes: dict, targets: str, rank: int = 2, seed: int = 0) -> dict:
    rng, new = np.random.default_rng(seed), lora.init(shapes, targets, rank, seed)
    return jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32), new)


def equal(one: dict, two: dict) -> None:
    one, two = flatten_dict(one), flatten_dict(two)
    assert one.keys() == two.keys()
    for path, x in one.items():
        np.testing.assert_array_equal(x, two[path], err_msg=".".join(path))


XL = tiny.XL["unet"]
SD = tiny.SD["unet"]


@pytest.mark.parametrize(
    ("name", "teacher"),
    [("sd_small", SD), ("bk_small", SD), ("bk_tiny", SD), ("bk_sdxl_small", XL), ("bk_sdxl_base", XL)],
)
def test_cutting_the_merged_teacher_is_merging_into_the_cut_one(name, teacher):
    student, whole = students.get(name), families.shapes("unet", teacher)
    shapes = families.shapes("unet", students.config(student, teacher))
    params, given = tiny.weights(whole, 1), adapter(whole, "all")
    taken, left_out = students.take_adapter(student, given, shapes)
    merged = students.take(student, lora.merge(params, given), shapes)
    equal(merged, lora.merge(students.take(student, params, shapes), taken))
    assert lora.layers(taken).keys() == {*lora.modules(shapes, "all")}
    assert len(lora.layers(taken)) + len(left_out) == len(lora.layers(given))
    back = students.give_adapter(student, taken)
    assert not {*left_out} & {*lora.layers(back)}
    equal(students.take_adapter(student, back, shapes)[0], taken)


@pytest.mark.parametrize(("name", "kept"), [("sd_small", 120), ("bk_small", 108), ("sd_tiny", 108)])
def test_as_many_modules_are_kept_as_the_table_of_students_says(name, kept):
    whole = families.shapes("unet", families.SD15)
    given = lora.tree({module: (0, 0) for module in lora.modules(whole, "feed_forward")})
    config = students.config(students.get(name), families.SD15)
    taken, left_out = students.take_adapter(students.get(name), given, families.shapes("unet", config))
    assert (len(lora.layers(taken)), len(left_out)) == (kept, 192 - kept)


def test_files_go_to_a_student_and_back_and_tell_whose_they_are(tiny_pipeline, tmp_path, capsys):
    teacher = Folder.open(tiny_pipeline)
    parts = {part: adapter(teacher.shapes(part), "feed_forward") for part in ("unet", "text_encoder")}
    path = lora_writing.write(tmp_path / "a.safetensors", parts, "peft", lora_writing.header(teacher, "a", parts))
    made = tmp_path / "small.safetensors"
    model = ["--model", str(tiny_pipeline)]
    convert.main(["--lora", f"{path}:0.5", "--to-student", "sd_small", *model, "--out", str(made)])
    said = capsys.readouterr().out
    assert "48 of 72 modules of the UNet; sd_small lacks" in said
    assert "left out: up_blocks.1.attentions.1.proj_in" in said
    file = lora_files.read(made)
    assert file.dialects == ("kohya",) and file.metadata["flaxkd.student"] == "sd_small"
    student = students.get("sd_small")
    config = students.config(student, teacher.config("unet"))
    cut = teacher.replace({"unet": config}, {"unet": lambda: students.view(student, teacher.params("unet"), shapes)})
    shapes = families.shapes("unet", config)
    merged = lora_files.applied(cut, [made]).params("unet")
    expected = lora_files.applied(teacher, [f"{path}:0.5"]).params("unet")
    equal(merged, students.view(student, expected, shapes))
    back = tmp_path / "back.safetensors"
    convert.main(["--lora", str(made), "--to-teacher", "sd_small", *model, "--to", "peft", "--out", str(back)])
    fitted = lora_files.fit(lora_files.read(back), teacher)
    equal(students.take_adapter(student, fitted["unet"], shapes)[0], lora_files.fit(file, cut)["unet"])
    with pytest.raises(SystemExit, match="is for the student sd_small: --to-teacher"):
        convert.main(["--lora", str(made), "--to-student", "bk_small", *model, "--out", str(back)])
    with pytest.raises(SystemExit, match="does not tell the model it is for: give --model"):
        convert.main(["--lora", str(path), "--to-student", "sd_small", "--out", str(back)])


@pytest.mark.parametrize(("model", "name"), [(None, "sd_small"), ("miniature_xl", "bk_sdxl_small")])
def test_a_file_of_a_miniature_needs_no_model(model, name, tmp_path):
    teacher, student = export.open_model(model), students.get(name)
    parts = {"unet": adapter(teacher.shapes("unet"), "attention")}
    path = lora_writing.write(tmp_path / "a.safetensors", parts, "peft", lora_writing.header(teacher, "a", parts))
    small, back = tmp_path / "small.safetensors", tmp_path / "back.safetensors"
    convert.main(["--lora", str(path), "--to-student", name, "--out", str(small)])
    cut = teacher.replace({"unet": students.config(student, teacher.config("unet"))}, {})
    fitted = lora_files.fit(lora_files.read(small), cut)["unet"]
    equal(students.take_adapter(student, parts["unet"], cut.shapes("unet"))[0], fitted)
    convert.main(["--lora", str(small), "--to-teacher", name, "--out", str(back)])
    equal(students.give_adapter(student, fitted), lora_files.fit(lora_files.read(back), teacher)["unet"])


def test_a_merged_folder_and_what_is_extracted_from_it(tiny_pipeline, tmp_path, capsys):
    base = Folder.open(tiny_pipeline)
    parts = {part: adapter(base.shapes(part), "attention") for part in ("unet", "text_encoder")}
    path = lora_writing.write(tmp_path / "a.safetensors", parts, "kohya", {})
    fused = tmp_path / "fused"
    convert.main(["--lora", f"{path}:0.7", "--fuse", "--model", str(tiny_pipeline), "--out", str(fused)])
    expected = lora_files.applied(base, [f"{path}:0.7"])
    for part in ("unet", "text_encoder"):
        equal(Folder.open(fused).stored(part), expected.params(part))
    capsys.readouterr()
    found = tmp_path / "found.safetensors"
    convert.main(["--extract", str(tiny_pipeline), str(fused), "--rank", "2", "--out", str(found)])
    assert "kept of |D|^2 in all: 100.00% at rank 2; 0.00% are" in capsys.readouterr().out
    for one, two in zip(*(lora_files.fit(lora_files.read(x), base).items() for x in (path, found)), strict=True):
        for module, pair in lora.layers(one[1]).items():
            np.testing.assert_allclose(lora.delta(*lora.layers(two[1])[module]), 0.7 * lora.delta(*pair), atol=1e-5)
    unet = Folder.open(fused).stored("unet")
    unet["conv_norm_out"]["scale"] = unet["conv_norm_out"]["scale"] + 1
    changed = save(tmp_path / "changed", source=Folder.open(fused), parts={"unet": (base.config("unet"), unet)})
    convert.main(["--extract", str(tiny_pipeline), str(changed), "--rank", "1", "--out", str(found)])
    said = capsys.readouterr().out
    leaves = lambda folder: jax.tree.leaves([folder.params(part) for part in parts])
    pairs = zip(leaves(Folder.open(changed)), leaves(base), strict=True)
    total = sum(np.square(x - y, dtype=np.float64).sum() for x, y in pairs)
    lost = base.config("unet")["block_out_channels"][0] / total
    assert f"{lost:.2%} are of what a LoRA has not" in said and "most of it in conv_norm_out.scale" in said


def test_the_nearest_product_is_that_of_singular_values():
    x = np.random.default_rng(0).standard_normal((3, 3, 4, 7)).astype(np.float32)
    for matrix in (x, x[0, 0], x[0, 0].T):
        flat = matrix.reshape(-1, matrix.shape[-1])
        s = np.linalg.svd(flat, compute_uv=False) ** 2
        a, b, kept = lora.nearest(matrix, 2)
        assert kept == pytest.approx(s[:2].sum() / s.sum(), rel=1e-5)
        assert np.square(matrix - lora.delta(a, b)).sum() == pytest.approx(s[2:].sum(), rel=1e-4)


def test_without_a_file_there_is_nothing_to_write(tiny_pipeline, tmp_path):
    for flags in ([], ["--fuse", "--model", str(tiny_pipeline)]):
        with pytest.raises(SystemExit, match="there is nothing to read: give --lora FILE"):
            convert.main([*flags, "--out", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extract", "A", "B", "--out", "ink.pt"], "--out ink.pt must end in .safetensors"),
        (["--extract", "A", "B", "--rank", "0"], "--rank 0 must be at least 1"),
        (["--extract", "A", "B", "--lora", "x", "--model", "y"], "--lora, --model: not of --extract"),
        (["--lora", "x", "--rank", "4", "--targets", "attention"], "--rank, --targets: of --extract"),
        (["--lora", "x", "--fuse", "--to", "peft"], "--to: not of --fuse"),
    ],
)
def test_options_are_checked_before_anything_is_read(arguments, message, capsys):
    with pytest.raises(SystemExit):
        convert.main(["--out", "ink.safetensors", *arguments] if "--out" not in arguments else arguments)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")
