"""LoRA files: every dialect and form is read as what it means, and what does not apply is told."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from flaxkd import students
from flaxkd.pretrained import Folder, families, lora_files, lora_names, lora_writing
from flaxkd.pretrained import keys as keys_of
from flaxkd.weights import lora
from tests import tiny

UNET = families.SD15 | tiny.UNET
LINEAR = ("mid_block", "attentions.0", "transformer_blocks.0", "attn1", "to_out.0")
CONV = ("mid_block", "resnets.0", "conv1")
TEXT = ("text_model", "encoder", "layers.0", "self_attn", "q_proj")
DOT = {path: ".".join(path) for path in (LINEAR, CONV, TEXT)}
LOW = {path: "_".join(path).replace(".", "_") for path in (LINEAR, CONV, TEXT)}


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


A, B, C = noise(3, 16), noise(16, 3), noise(3, 16, 3, 3)
UP = noise(16, 3)


@pytest.fixture(scope="module")
def model(tiny_pipeline) -> Folder:
    return Folder.open(tiny_pipeline)


def written(path, tensors: dict, **metadata: str):
    save_file({key: np.ascontiguousarray(x, np.float32) for key, x in tensors.items()}, path, metadata or None)
    return path


def deltas(file: lora_files.LoraFile) -> dict:
    """{(part, module): A @ B in PyTorch's layout}."""
    found = {}
    for part, adapter in file.parts.items():
        for module, (a, b) in lora.layers(adapter).items():
            delta = lora.delta(a, b)
            found[part, module] = torch_layout(delta)
    return found


def torch_layout(kernel: np.ndarray) -> np.ndarray:
    return keys_of.to_diffusers(("x", "kernel"), kernel)[1]


DIALECTS = {
    "PEFT": {
        f"unet.{DOT[LINEAR]}.lora_A.weight": A, f"unet.{DOT[LINEAR]}.lora_B.weight": B,
        f"text_encoder.{DOT[TEXT]}.lora_A.weight": A, f"text_encoder.{DOT[TEXT]}.lora_B.weight": B,
    },
    "PEFT without text_model": {
        f"unet.{DOT[LINEAR]}.lora_A.weight": A, f"unet.{DOT[LINEAR]}.lora_B.weight": B,
        f"text_encoder.{DOT[TEXT].removeprefix('text_model.')}.lora_A.weight": A,
        f"text_encoder.{DOT[TEXT].removeprefix('text_model.')}.lora_B.weight": B,
    },
    "diffusers": {
        f"unet.{DOT[LINEAR]}.lora.down.weight": A, f"unet.{DOT[LINEAR]}.lora.up.weight": B,
        f"text_encoder.{DOT[TEXT]}.lora_linear_layer.down.weight": A,
        f"text_encoder.{DOT[TEXT]}.lora_linear_layer.up.weight": B,
    },
    "old diffusers": {
        f"unet.{DOT[LINEAR].replace('to_out.0', 'processor.to_out_lora')}.down.weight": A,
        f"unet.{DOT[LINEAR].replace('to_out.0', 'processor.to_out_lora')}.up.weight": B,
        f"text_encoder.{DOT[TEXT].replace('q_proj', 'to_q_lora')}.down.weight": A,
        f"text_encoder.{DOT[TEXT].replace('q_proj', 'to_q_lora')}.up.weight": B,
    },
    "kohya": {
        f"lora_unet_{LOW[LINEAR]}.lora_down.weight": A, f"lora_unet_{LOW[LINEAR]}.lora_up.weight": B,
        f"lora_te_{LOW[TEXT]}.lora_down.weight": A, f"lora_te1_{LOW[TEXT]}.lora_up.weight": B,
        f"lora_unet_{LOW[LINEAR]}.alpha": np.float32(6), f"lora_te_{LOW[TEXT]}.alpha": np.float32(1.5),
    },
    "names of the original code": {
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_down.weight": A,
        "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_out_0.lora_up.weight": B,
    },
    "the script for LCM-LoRA": {
        f"unet.base_model.model.{DOT[LINEAR]}.lora_A.weight": A,
        f"unet.base_model.model.{DOT[LINEAR]}.lora_B.weight": B,
    },
}  # fmt: skip


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_the_same_product(tmp_path, dialect):
    file = lora_files.read(written(tmp_path / "x.safetensors", DIALECTS[dialect]))
    scales = {"unet": 2.0, "text_encoder": 0.5} if dialect == "kohya" else {"unet": 1.0, "text_encoder": 1.0}
    modules = {"unet": LINEAR, "text_encoder": TEXT}
    for part in file.parts:
        assert file.scales[part] == {modules[part]: scales[part]}
        np.testing.assert_allclose(deltas(file)[part, modules[part]], scales[part] * B @ A, rtol=1e-5, atol=1e-6)
    assert len(file.parts) == (1 if dialect[:3] in ("the", "nam") else 2) and not file.unknown
    assert f"scale {scales['unet']:g} on 1" in file.describe()


def kron(w1, w2):
    return np.einsum("ab,cd...->acbd...", w1, w2).reshape(len(w1) * len(w2), w1.shape[1] * w2.shape[1], *w2.shape[2:])


def flat(*shape: int) -> tuple:
    """Tensors of a LoHa of a convolution [16, 16, 3, 3], and what they mean."""
    x = {f"w{i}_a": noise(16, 2 + i)[:, :2] for i in (1, 2)} | {f"w{i}_b": noise(2, 144 + i)[:, :144] for i in (1, 2)}
    return x, ((x["w1_a"] @ x["w1_b"]) * (x["w2_a"] @ x["w2_b"])).reshape(16, 16, 3, 3)


def tucker() -> tuple:
    x = {f"w{i}_{ab}": noise(2, 16 + i)[:, :16] for i in (1, 2) for ab in "ab"}
    x |= {f"t{i}": noise(2, 2, 3, 3) * i for i in (1, 2)}
    whole = [np.einsum("ijkl,jr,ip->prkl", x[f"t{i}"], x[f"w{i}_b"], x[f"w{i}_a"]) for i in (1, 2)]
    return x, whole[0] * whole[1]


HADA, HADA_TUCKER = flat(), tucker()
W1, W2, W2_CONV = noise(4, 2), noise(4, 8), noise(4, 8, 3, 3)
FORMS = {
    "LoCon": (CONV, {"lora_down.weight": C, "lora_up.weight": UP[..., None, None], "alpha": np.float32(1.5)},
              0.5 * np.einsum("or,rihw->oihw", UP, C)),
    "LoCon, Tucker": (CONV, {"lora_down.weight": A[..., None, None], "lora_up.weight": UP[..., None, None],
                             "lora_mid.weight": noise(3, 3, 3, 3)},
                      np.einsum("op,pqhw,qi->oihw", UP, noise(3, 3, 3, 3), A)),
    "LoHa": (CONV, {f"hada_{name}": x for name, x in HADA[0].items()} | {"alpha": np.float32(1)}, 0.5 * HADA[1]),
    "LoHa, Tucker": (CONV, {f"hada_{name}": x for name, x in HADA_TUCKER[0].items()}, HADA_TUCKER[1]),
    "LoKr, both whole": (LINEAR, {"lokr_w1": W1, "lokr_w2": W2, "alpha": np.float32(9)}, kron(W1, W2)),
    "LoKr, w2 of two": (LINEAR, {"lokr_w1": W1, "lokr_w2_a": noise(4, 3), "lokr_w2_b": noise(3, 8),
                                 "alpha": np.float32(6)}, 2 * kron(W1, noise(4, 3) @ noise(3, 8))),
    "LoKr of a convolution": (CONV, {"lokr_w1": W1, "lokr_w2": W2_CONV}, kron(W1, W2_CONV)),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_is_two_matrices(tmp_path, model, form):
    module, tensors, expected = FORMS[form]
    keys = {f"lora_unet_{LOW[module]}.{end}": x for end, x in tensors.items()}
    file = lora_files.read(written(tmp_path / "x.safetensors", keys))
    fitted = lora_files.fit(file, model)["unet"]
    [(a, b)] = lora.layers(fitted).values()
    np.testing.assert_allclose(torch_layout(lora.delta(a, b)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spelling", ["kohya", "peft"])
@pytest.mark.parametrize("module", [LINEAR, CONV])
def test_dora_has_its_norms_for_each_output(tmp_path, model, module, spelling):
    kernel = model.stored("unet")
    for name in (*module, "kernel"):
        kernel = kernel[name]
    o, outputs = noise(16) ** 2 + 1, kernel.ndim - 1
    down, up = (A, B) if module is LINEAR else (C, UP[..., None, None])
    if spelling == "kohya":
        keys = {"lora_down.weight": down, "lora_up.weight": up, "dora_scale": o.reshape(-1, *(1,) * outputs)}
        keys = {f"lora_unet_{LOW[module]}.{end}": x for end, x in keys.items()}
    else:
        magnitude = o if module is LINEAR else o.reshape(1, -1, 1, 1)
        keys = {"lora_A.weight": down, "lora_B.weight": up, "lora_magnitude_vector": magnitude}
        keys = {f"unet.{DOT[module]}.{end}": x for end, x in keys.items()}
    path = written(tmp_path / "x.safetensors", keys)
    merged = lora_files.applied(model, [path]).params("unet")
    for name in (*module, "kernel"):
        merged = merged[name]
    norms = np.sqrt((merged**2).sum(tuple(range(outputs))))
    np.testing.assert_allclose(norms, o, rtol=1e-5)  # of m V / |V|
    keys = {key: x for key, x in keys.items() if "magnitude" not in key and "dora" not in key}
    plain = lora_files.applied(model, [written(tmp_path / "y.safetensors", keys)]).params("unet")
    for name in (*module, "kernel"):
        plain = plain[name]
    np.testing.assert_allclose(merged / norms, plain / np.sqrt((plain**2).sum(tuple(range(outputs)))), atol=1e-6)


def test_scales_come_from_the_header_of_diffusers_with_its_patterns(tmp_path):
    key = lambda name, x: f"unet.{DOT[LINEAR].replace('to_out.0', name)}.lora_{x}.weight"
    pairs = {key(name, x): y for name in ("to_q", "to_k", "to_out.0") for x, y in (("A", A), ("B", B))}
    config = {"unet.r": 3, "unet.lora_alpha": 1.5, "unet.alpha_pattern": {"to_k": 9, "mid_block.*to_out.0": 3}}
    path = written(tmp_path / "x.safetensors", pairs, lora_adapter_metadata=json.dumps(config))
    scales = {module[-1]: scale for module, scale in lora_files.read(path).scales["unet"].items()}
    assert scales == {"to_q": 0.5, "to_k": 3.0, "to_out.0": 1.0}


@pytest.mark.parametrize("dialect", ["peft", "kohya"])
def test_what_is_written_is_read_back_and_says_what_it_is_for(tmp_path, model, dialect):
    parts = {part: lora.init(model.shapes(part), "all", 2, seed=1) for part in ("unet", "text_encoder")}
    parts = {part: lora.tree({m: (a, b + noise(*b.shape)) for m, (a, b) in lora.layers(tree).items()})
             for part, tree in parts.items()}  # fmt: skip
    header = lora_writing.header(model, "toy", parts, trained={"steps": 7, "tag_frequency": {"toys": {"sks": 3}}})
    path = lora_writing.write(tmp_path / "toy.safetensors", parts, dialect, header)
    file = lora_files.read(path)
    fitted = lora_files.fit(file, model)
    for part, adapter in parts.items():
        for module, pair in lora.layers(adapter).items():
            for x, y in zip(pair, lora.layers(fitted[part])[module], strict=True):
                np.testing.assert_array_equal(x, y)
    found = file.metadata
    assert (found["ss_base_model_version"], found["ss_network_dim"], found["ss_network_alpha"]) == ("sd_v1", "2", "2")
    assert (found["ss_steps"], json.loads(found["ss_tag_frequency"])) == ("7", {"toys": {"sks": 3}})
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora" and len(found["sshs_model_hash"]) == 64
    alphas = [float(x) for key, x in load_file(path).items() if key.endswith("alpha")]
    assert alphas == ([2.0] * len(lora.layers(parts["unet"]) | lora.layers(parts["text_encoder"])) if dialect == "kohya"
                      else [])  # fmt: skip


def test_kohyas_names_of_two_encoders_and_of_the_original_code():
    assert lora_names.key("kohya", "text_encoder", TEXT, "A", two_encoders=True).startswith("lora_te1_text_model_")
    ours = {
        "input_blocks_4_1_proj_in": "down_blocks.1.attentions.0.proj_in",
        "output_blocks_5_1_transformer_blocks_1_attn2_to_k":
            "up_blocks.1.attentions.2.transformer_blocks.1.attn2.to_k",
        "output_blocks_2_2_conv": "up_blocks.0.upsamplers.0.conv",
        "input_blocks_4_0_skip_connection": "down_blocks.1.resnets.0.conv_shortcut",
        "middle_block_2_emb_layers_1": "mid_block.resnets.1.time_emb_proj",
    }  # fmt: skip
    for theirs, name in ours.items():
        assert ".".join(lora_names.parse(f"lora_unet_{theirs}.alpha").module) == name


def test_every_name_of_a_whole_unet_survives_underscores():
    modules = lora.modules(families.shapes("unet", UNET), "all")
    for module in (*modules, ("add_embedding", "linear_1"), (*CONV[:1], "attentions.0", "transformer_blocks.11", "ff")):
        for dialect in lora_names.WRITTEN:
            assert lora_names.parse(lora_names.key(dialect, "unet", module, "A"))[:3] == ("unet", module, "A")


# -- What does not apply -----------------------------------------------------------------------------------------------


def adapter(unet: dict, targets="feed_forward") -> dict:
    return {"unet": lora.init(families.shapes("unet", unet), targets, 2, seed=0)}


def test_a_teachers_file_on_a_student_is_told_with_the_remedy(tmp_path, model):
    config = students.config(students.get("sd_small"), UNET)
    student = model.replace({"unet": config}, {})
    path = lora_writing.write(tmp_path / "x.safetensors", adapter(UNET), "kohya", {})
    with pytest.raises(ValueError, match=r"whole UNet.*--to-student.*Misfits \(\d+\):\n  unet: down_blocks.\d.atten"):
        lora_files.fit(lora_files.read(path), student)
    lora_writing.write(path, adapter(UNET, "conv_in"), "kohya", lora_writing.header(model, "x", adapter(UNET)))
    with pytest.raises(ValueError, match=r"is for a whole UNet: .*--to-student"):  # which its names do not tell
        lora_files.fit(lora_files.read(path), student)
    header = lora_writing.header(student, "x", adapter(config), student="sd_small")
    lora_writing.write(path, adapter(config), "peft", header)
    with pytest.raises(ValueError, match="is for the student sd_small: --to-teacher"):
        lora_files.fit(lora_files.read(path), model)


def test_a_file_of_another_family_names_both(tmp_path, model):
    key = f"unet.{DOT[LINEAR].replace('attn1.to_out.0', 'attn2.to_k')}.lora_"
    path = written(tmp_path / "x.safetensors", {f"{key}A.weight": noise(3, 2048), f"{key}B.weight": B})
    with pytest.raises(ValueError, match=r"Stable Diffusion XL, and .* is Stable Diffusion 1.x"):
        lora_files.fit(lora_files.read(path), model)


def test_unknown_keys_are_listed_and_other_kinds_refused(tmp_path):
    with pytest.warns(UserWarning, match="1 tensors are of no LoRA and not applied: emb_params"):
        lora_files.read(written(tmp_path / "x.safetensors", DIALECTS["PEFT"] | {"emb_params": A}))
    others = {"diff": "whole differences", "oft_blocks": "OFT", "on_input": "IA3", "b1.weight": "GLoRA"}
    for end, kind in others.items():
        with pytest.raises(ValueError, match=rf"x.safetensors.* is of {kind}"):
            lora_files.read(written(tmp_path / "x.safetensors", {f"lora_unet_{LOW[LINEAR]}.{end}": A}))
    with pytest.raises(ValueError, match=r"x.safetensors cannot be read as a LoRA: it has no tensor of a LoRA"):
        lora_files.read(written(tmp_path / "x.safetensors", {"conv_in.weight": A}))
    with pytest.raises(ValueError, match=r"a module has A, and no B"):
        lora_files.read(written(tmp_path / "x.safetensors", {f"unet.{DOT[LINEAR]}.lora_A.weight": A}))
    with pytest.raises(ValueError, match=r"do not fit each other: A \[3, 16\], B \[16, 4\]"):
        keys = {f"unet.{DOT[LINEAR]}.lora_A.weight": A, f"unet.{DOT[LINEAR]}.lora_B.weight": noise(16, 4)}
        lora_files.read(written(tmp_path / "x.safetensors", keys))


def test_files_are_named_with_scales(tmp_path):
    path = written(tmp_path / "a:b.safetensors", DIALECTS["PEFT"])
    assert lora_files.split(f"{path}:0.8") == (path, 0.8) and lora_files.split(path) == (path, 1.0)
    assert lora_files.split(f"{tmp_path}:-1") == (path, -1.0)
    with pytest.raises(FileNotFoundError, match=r"no file .*c.safetensors:0.8x: --lora takes"):
        lora_files.split(tmp_path / "c.safetensors:0.8x")


def test_merging_adds_up_and_leaves_the_base_alone(tmp_path, model):
    parts = adapter(UNET, "attention")
    parts["unet"] = lora.tree({m: (a, b + 1) for m, (a, b) in lora.layers(parts["unet"]).items()})
    path = lora_writing.write(tmp_path / "x.safetensors", parts, "kohya", {})
    base, other = model.params("unet"), written(tmp_path / "y.safetensors", DIALECTS["PEFT"])
    merged = lora_files.applied(model, [f"{path}:0.7", f"{other}:0.3"]).params("unet")
    kernel = lambda tree: tree["mid_block"]["attentions.0"]["transformer_blocks.0"]["attn1"]["to_out.0"]["kernel"]
    a, b = lora.layers(parts["unet"])[LINEAR]
    np.testing.assert_allclose(kernel(merged) - kernel(base), 0.7 * a @ b + 0.3 * (B @ A).T, atol=1e-5)
    np.testing.assert_array_equal(kernel(lora_files.applied(model, []).params("unet")), kernel(base))
