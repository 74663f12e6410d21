"""The table, against published figures and configurations. Full-size models are but shapes (`eval_shape`)."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd import students
from flaxkd.models.layers import features
from flaxkd.models.unet import UNetConfig
from flaxkd.pretrained.families import FAMILIES, SD15, SD21, SDXL, count
from flaxkd.students import STUDENTS
from flaxkd.students.__main__ import main
from flaxkd.students.pairs import modules
from tests.running import ROOT

# The numbers of layers and transformer blocks of SDXL at small widths, so that the rows of the table apply.
TINY = SDXL | {"sample_size": 8, "block_out_channels": [8, 16, 32], "norm_num_groups": 8, "cross_attention_dim": 8,
               "attention_head_dim": [1, 2, 4], "addition_time_embed_dim": 8,
               "projection_class_embeddings_input_dim": 6 * 8 + 16}  # fmt: skip
TOY = {**SD15, "sample_size": 8, "block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4,
       "attention_head_dim": [1, 2, 2, 2], "cross_attention_dim": 8}  # fmt: skip
TEACHERS = {"sd15": SD15, "sd21": SD21, "sdxl": TINY}
FAMILY = {"sd15": "sd1", "sd21": "sd2", "sdxl": "sdxl"}

# Kim et al. 2023 and the safetensors headers of the published weights.
PARAMETERS = {
    "sd15": {None: 859_520_964, "bk_base": 579_384_964, "bk_small": 482_346_884, "bk_tiny": 323_384_964},
    "sd21": {None: 865_910_724, "bk_base": 583_480_964, "bk_small": 485_787_524, "bk_tiny": 326_825_604},
}


# Those of diffusers' UNet with the published numbers of layers and transformer blocks; and GFLOPs, as printed.
SDXL_SIZES = {
    "teacher": (2_567_463_684, 6771.2),
    "ssd_1b": (1_331_334_404, 4200.4),
    "vega": (745_225_604, 2802.8),
    "koala_1b": (1_161_184_324, 3428.4),
    "koala_700m": (782_822_724, 2698.5),
    "bk_sdxl_base": (1_717_277_764, 4507.9),
    "bk_sdxl_small": (1_304_160_324, 3710.6),
}


@functools.cache
def full_size(teacher: str, student: students.Student | None) -> dict:
    unet_config = TEACHERS[teacher]
    return students.shapes(students.config(student, unet_config) if student else unet_config)


every_cut = pytest.mark.parametrize(
    "teacher, student",
    [
        pytest.param(teacher, student, id=f"{teacher}-{'='.join(student.names)}")
        for teacher in TEACHERS
        for student in students.of(FAMILIES[FAMILY[teacher]])
    ],
)


def test_both_namings_name_the_same_networks():
    assert set(STUDENTS) == {"sd_small", "sd_tiny", "bk_base", "bk_small", "bk_tiny", *SDXL_SIZES} - {"teacher"}
    assert students.get("sd_small") is students.get("bk_base")
    assert students.get("sd_tiny") is students.get("bk_tiny")
    assert students.get("sd_small") is not students.get("bk_small")


@pytest.mark.parametrize("teacher", PARAMETERS)
def test_parameters_are_the_published_ones(teacher):
    for name, expected in PARAMETERS[teacher].items():
        params = full_size(teacher, students.get(name) if name else None)["params"]
        assert sum(x.size for x in jax.tree.leaves(params)) == expected, name


@pytest.mark.parametrize("name", SDXL_SIZES)
def test_parameters_of_sdxl_and_its_students(name):
    config = SDXL if name == "teacher" else students.config(students.get(name), SDXL)
    assert count("unet", config) == SDXL_SIZES[name][0]


@every_cut
def test_every_tensor_has_its_own_teacher_tensor_of_equal_shape(teacher, student):
    whole = flatten_dict(full_size(teacher, None)["params"])
    sources = []
    for path, tensor in flatten_dict(full_size(teacher, student)["params"]).items():
        sources.append(students.teacher_path(student, path))
        assert whole[sources[-1]].shape == tensor.shape, path
    assert len(set(sources)) == len(sources)


@every_cut
@pytest.mark.parametrize("pairing", students.PAIRINGS)
def test_feature_pairs_have_equal_shapes(teacher, student, pairing):
    there, here = features(full_size(teacher, None)), features(full_size(teacher, student))
    for mine, theirs in students.feature_pairs(student, pairing, TEACHERS[teacher]):
        assert here[mine].shape == there[theirs].shape, (mine, theirs)


@pytest.mark.parametrize("teacher, name", [("sd15", None), ("sdxl", None), ("sdxl", "ssd_1b"), ("sdxl", "koala_1b")])
def test_modules_are_those_that_are_captured(teacher, name):
    student, config = students.get(name) if name else None, TEACHERS[teacher]
    config = students.config(student, config) if student else config
    assert {*modules(UNetConfig.from_dict(config))} == features(full_size(teacher, student)).keys() - {""}


def test_feature_pairs_are_the_published_ones():
    blocks = [f"{path}_blocks.{i}" for path in ("down", "up") for i in range(4)]
    same = {(block, block) for block in blocks}
    outer = {("down_blocks.0", "down_blocks.0"), ("down_blocks.1", "down_blocks.1")}
    outer |= {(f"up_blocks.{i}", f"up_blocks.{i + 1}") for i in range(3)}
    inner = "down_blocks.2.attentions.{}.proj_out"
    expected = {
        ("sd_small", "segmind"): same | {("mid_block", "mid_block")},
        ("bk_base", "bksdm"): same,
        ("bk_small", "segmind"): same,
        ("bk_small", "bksdm"): same,
        ("sd_tiny", "segmind"): outer | {("down_blocks.2", "up_blocks.0")},
        ("bk_tiny", "bksdm"): outer | {(inner.format(0), inner.format(1))},
    }
    terms = [9, 8, 8, 8, 6, 6]
    for ((name, pairing), pairs), n in zip(expected.items(), terms, strict=True):
        found = students.feature_pairs(students.get(name), pairing)
        assert len(found) == n and set(found) == pairs, (name, pairing)


def test_feature_pairs_of_sdxl_are_the_published_ones():
    terms = {"segmind_sdxl": (26, 26, 16, 15, 16, 15), "koala": (34, 15, 30, 21, 46, 36), "segmind": (7, 7, 7, 6, 7, 6)}
    rows = students.of(FAMILIES["sdxl"])
    for pairing, expected in terms.items():
        assert tuple(len(students.feature_pairs(student, pairing)) for student in rows) == expected
    layers = [f"down_blocks.{i}.resnets.{j}" for i in range(3) for j in range(2)]
    layers += [f"down_blocks.{i}.attentions.{j}" for i in (1, 2) for j in range(2)] + ["mid_block"]
    layers += [f"up_blocks.{i}.resnets.{j}" for i in range(3) for j in range(3)]
    layers += [f"up_blocks.{i}.attentions.{j}" for i in range(2) for j in range(3)]
    for name in ("ssd_1b", "vega"):  # distill_sdxl.py, sub_block
        assert set(students.feature_pairs(students.get(name), "segmind_sdxl")) == {(each, each) for each in layers}
    block = "up_blocks.0.attentions.{}.transformer_blocks.{}.attn1".format
    ssd_1b, koala = (dict(students.feature_pairs(students.get(name), "koala")) for name in ("ssd_1b", "koala_1b"))
    assert ssd_1b[block(1, 3)] == block(1, 6) and ssd_1b[block(2, 9)] == block(2, 9)
    assert koala[block(1, 5)] == block(2, 5) and block(1, 6) not in koala
    small = students.feature_pairs(students.get("sd_small"), "koala")
    twin = "up_blocks.3.attentions.{}.transformer_blocks.0.attn1".format
    assert len(small) == 10 and small[-1] == (twin(1), twin(2))
    shallow = SDXL | {"transformer_layers_per_block": [1, 1, 2]}
    assert len(students.feature_pairs(students.get("bk_sdxl_base"), "koala", shallow)) == 1 + 2 + 2 + 4 + 2


@pytest.mark.parametrize("teacher", [SD15, SD21], ids=PARAMETERS)
def test_config_differs_from_the_teacher_as_the_published_ones_do(teacher):
    """The bk_base, bk_small and bk_tiny `config.json` of BK-SDM's unet_config and unet_config_v2 folders."""
    tiny = {
        "block_out_channels": [320, 640, 1280],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": [5, 10, 20] if teacher is SD21 else 8,
    }
    base = {**teacher, "layers_per_block": 1}
    expected = {
        "bk_base": base,
        "bk_small": {**base, "mid_block_type": None},
        "bk_tiny": {**base, "mid_block_type": None, **tiny},
    }
    before = repr(teacher)
    for name, config in expected.items():
        assert students.config(students.get(name), teacher) == config, name
    assert repr(teacher) == before


def test_config_cuts_every_list_and_keeps_what_it_does_not_know():
    teacher = {
        **SD15,
        "_name_or_path": "someone/their-teacher",
        "sample_size": 16,
        "block_out_channels": (32, 64, 128, 128),
        "attention_head_dim": [2, 4, 4, 8],
        "layers_per_block": [2, 2, 2, 2],
        "transformer_layers_per_block": [[1, 2], [3, 4], [5, 6], 7],
        "reverse_transformer_layers_per_block": [7, [6, 9, 5], [4, 9, 3], [2, 9, 1]],
    }
    config = students.config(students.get("bk_tiny"), teacher)
    cut = {
        "block_out_channels": [32, 64, 128],
        "attention_head_dim": [2, 4, 4],
        "layers_per_block": [1, 1, 1],
        "transformer_layers_per_block": [1, 3, 5],
        "reverse_transformer_layers_per_block": [[6, 5], [4, 3], [2, 1]],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "mid_block_type": None,
    }
    assert config == {**teacher, **cut}


def test_config_of_sdxl_has_numbers_where_layers_are_alike():
    none, resnet, one_layer = {"mid_block_type": None}, {"mid_block_type": "UNetMidBlock2D"}, {"layers_per_block": 1}
    down, up = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    expected = {
        "ssd_1b": resnet | {down: [1, 2, 4], up: [[4, 4, 10], [2, 1, 1], 1]},
        "vega": resnet | {down: [1, 1, 2]},
        "koala_1b": one_layer | {down: [0, 2, 6]},
        "koala_700m": one_layer | none | {down: [0, 2, 5]},
        "bk_sdxl_base": one_layer,
        "bk_sdxl_small": one_layer | none,
    }
    for name, cut in expected.items():
        assert students.config(students.get(name), SDXL) == SDXL | cut, name


def test_a_teacher_with_too_few_transformer_blocks_is_refused():
    shallow = SDXL | {"transformer_layers_per_block": [1, 2, 4]}
    message = r"down_blocks.2.attentions.0 has 4 transformer blocks, and 0, 1, 2, 6 are kept; .*up_blocks.0"
    with pytest.raises(ValueError, match=message):
        students.config(students.get("ssd_1b"), shallow)
    assert students.config(students.get("vega"), shallow)["transformer_layers_per_block"] == [1, 1, 2]


CHOSEN = students.Student(
    {0: (0, 1), 1: {0: (1,), 1: (0, 1)}, 2: {0: (2, 5, 9)}},
    (0, 3, 9),
    {0: {0: students.row.ALL, 2: (4,)}, 1: (0, 1, 2), 2: (0, 1, 2)},
    {"koala": students.Published("chosen", "chosen by the teacher")},
    ("sdxl",),
    "chosen",
)


CHOSEN_SD = students.Student(
    {0: (1,), 1: (0, 1), 2: (0,), 3: (0, 1)},
    True,
    {0: (0, 1, 2), 1: (0, 2), 2: (0, 1, 2), 3: (0, 2)},
    {"bksdm": students.Published("chosen_sd", "chosen by the teacher")},
)
UNEVEN = {
    "sd": (CHOSEN_SD, TOY, {"layers_per_block": [1, 2, 1, 2]}),
    "sdxl": (CHOSEN, TINY, {
        "layers_per_block": [2, 2, 1],
        "transformer_layers_per_block": [1, [1, 2], 3],
        "reverse_transformer_layers_per_block": [[10, 1], 2, 1]}),
}  # fmt: skip


@pytest.mark.parametrize("student, teacher, cut", UNEVEN.values(), ids=UNEVEN)
def test_a_student_may_keep_as_many_layers_of_each_block_as_it_likes(student, teacher, cut):
    assert students.config(student, teacher) == teacher | cut
    whole, sources = flatten_dict(toy_teacher(sdxl=teacher is TINY)), []
    for path, tensor in flatten_dict(students.shapes(teacher | cut)["params"]).items():
        sources.append(students.teacher_path(student, path))
        assert whole[sources[-1]].shape == tensor.shape, path
    assert len(set(sources)) == len(sources)


CANNOT = {
    "a layer too few": (dict(up={0: (0, 2), 1: (0, 2), 2: (0, 1, 2)}),
                        r"down block 1 keeps 2 layers and up block 1 keeps 2: diffusers has exactly one more"),
    "order": (dict(down={0: (1, 0), 1: (0, 1), 2: {0: (5, 2)}}),
              r"down block 0 keeps the layers \[1, 0\], not some of 0 to 1 in order\n.*2.attentions.0 .*\[5, 2\]"),
    "an inner block": (dict(down={0: (0, 1), 2: (0,)}), r"down blocks \[0, 2\] and up blocks \[0, 1, 2\] are not"),
    "mid": (dict(mid="attention"), r"mid = 'attention' is none of True, False, 'resnet' and"),
    "mid depth": (dict(mid=(0, 1)), r"mid block of chosen has 2 transformer blocks, and the first one in its last down "
                                    r"block 3: diffusers has one number"),
    "mid whole": (dict(mid=True), r"mid block of chosen has 10 transformer blocks"),
}  # fmt: skip


@pytest.mark.parametrize("change, message", CANNOT.values(), ids=CANNOT)
def test_what_diffusers_cannot_express_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        students.config(dataclasses.replace(CHOSEN, **change), SDXL)


def test_a_student_may_come_from_a_file(tmp_path):
    file = tmp_path / "chosen.json"
    for student in (CHOSEN, students.get("ssd_1b"), students.get("bk_small")):
        students.write(student, file)
        facts = lambda s: (s.blocks, s.names, s.families, s.basis, *s.published)
        assert facts(students.get(str(file))) == facts(student)
    text = (ROOT / "docs" / "using.md").read_text().partition("```json\n")[2].partition("```")[0]
    file.write_text(text)
    koala = students.config(students.get("koala_700m"), SDXL)
    assert students.config(students.get(str(file)), SDXL) == koala | {"transformer_layers_per_block": [1, 2, 5]}
    with pytest.raises(ValueError, match="sd_tiny = bk_tiny is in the table"):
        students.write(students.get("sd_tiny"), file)


BROKEN = {
    "a list": ([], "it needs the keys name, title, pairing"),
    "a key too few": ({"up": None}, "it needs the keys .*basis, and has name, .*mid, basis"),
    "a kind": ({"down": [1]}, r"down = \[1\] is of another type"),
    "a family": ({"families": ["sd9"]}, r"families = \['sd9'\] \(known: sd1, sd2, sdxl\)"),
    "a number": ({"down": {"zero": [0]}}, "invalid literal .*'zero'"),
    "layers": ({"down": {"0": 3}}, "'int' object is not iterable"),
    "a row": ({"mid": "all"}, "chosen can be cut from no UNet:\n  mid = 'all'"),
}


@pytest.mark.parametrize("change, message", BROKEN.values(), ids=BROKEN)
def test_a_broken_file_is_refused(change, message, tmp_path):
    students.write(CHOSEN, tmp_path / "chosen.json")
    row = json.loads((tmp_path / "chosen.json").read_text())
    row = {key: value for key, value in (row | change).items() if value is not None} if change else change
    (tmp_path / "chosen.json").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=rf"chosen.json is no file of a student: {message}"):
        students.get(str(tmp_path / "chosen.json"))


@functools.cache
def toy_teacher(sdxl: bool = False) -> dict:
    """Parameters of which every tensor has another value, so that a copy tells where it came from."""
    flat = flatten_dict((full_size("sdxl", None) if sdxl else students.shapes(TOY))["params"])
    return unflatten_dict({p: np.full(x.shape, i, x.dtype) for i, (p, x) in enumerate(flat.items())})


def test_take_copies_the_layers_that_are_kept():
    sources = {
        "sd_small": {
            "down_blocks.3/resnets.0/conv1": "down_blocks.3/resnets.0/conv1",
            "mid_block/resnets.1/conv1": "mid_block/resnets.1/conv1",
            "up_blocks.1/resnets.1/conv1": "up_blocks.1/resnets.2/conv1",
            "up_blocks.1/attentions.1/proj_in": "up_blocks.1/attentions.2/proj_in",
            "up_blocks.0/upsamplers.0/conv": "up_blocks.0/upsamplers.0/conv",
            "time_embedding/linear_1": "time_embedding/linear_1",
        },
        "sd_tiny": {
            "down_blocks.1/downsamplers.0/conv": "down_blocks.1/downsamplers.0/conv",
            "up_blocks.0/resnets.0/conv1": "up_blocks.1/resnets.0/conv1",
            "up_blocks.2/resnets.1/conv2": "up_blocks.3/resnets.2/conv2",
            "up_blocks.2/attentions.1/proj_out": "up_blocks.3/attentions.2/proj_out",
            "up_blocks.1/upsamplers.0/conv": "up_blocks.2/upsamplers.0/conv",
            "conv_out": "conv_out",
        },
    }
    whole = flatten_dict(toy_teacher(), sep="/")
    for name, expected in sources.items():
        student = students.get(name)
        like = students.shapes(students.config(student, TOY))["params"]
        taken = flatten_dict(students.take(student, toy_teacher(), like), sep="/")
        assert set(taken) == set(flatten_dict(like, sep="/"))
        for here, there in expected.items():
            np.testing.assert_array_equal(taken[f"{here}/kernel"], whole[f"{there}/kernel"], err_msg=here)


def test_take_copies_the_transformer_blocks_that_are_kept():
    sources = {
        "down_blocks.2/attentions.1/transformer_blocks.3": "down_blocks.2/attentions.1/transformer_blocks.6",
        "up_blocks.0/attentions.2/transformer_blocks.9": "up_blocks.0/attentions.2/transformer_blocks.9",
        "up_blocks.1/attentions.2/transformer_blocks.0": "up_blocks.1/attentions.2/transformer_blocks.0",
    }
    student, whole = students.get("ssd_1b"), flatten_dict(toy_teacher(sdxl=True), sep="/")
    like = full_size("sdxl", student)["params"]
    taken = flatten_dict(students.take(student, toy_teacher(sdxl=True), like), sep="/")
    assert set(taken) == set(flatten_dict(like, sep="/"))
    same = ("mid_block/resnets.0/conv1/kernel", "add_embedding/linear_1/kernel")
    sources = {f"{here}/attn2/to_k/kernel": f"{there}/attn2/to_k/kernel" for here, there in sources.items()}
    for here, there in (sources | dict(zip(same, same, strict=True))).items():
        np.testing.assert_array_equal(taken[here], whole[there], err_msg=here)


@pytest.mark.parametrize("on_device", [False, True], ids=["numpy", "jax"])
def test_take_shares_no_memory_with_the_teacher(on_device):
    student = students.get("sd_small")
    like = {"conv_in": {"bias": jax.ShapeDtypeStruct((8,), np.float32)}}
    teacher = {"conv_in": {"bias": toy_teacher()["conv_in"]["bias"]}}
    teacher = jax.device_put(teacher) if on_device else teacher
    there, here = teacher["conv_in"]["bias"], students.take(student, teacher, like)["conv_in"]["bias"]
    np.testing.assert_array_equal(here, there)
    if on_device:
        assert here.unsafe_buffer_pointer() != there.unsafe_buffer_pointer()
        here.delete()  # as donation does
        assert not there.is_deleted()
    else:
        assert not np.shares_memory(here, there)


def test_take_lists_what_the_teacher_lacks():
    like = {"conv_in": {"bias": np.zeros(3)}, "up_blocks.0": {"resnets.1": {"norm1": {"scale": np.zeros(3)}}}}
    with pytest.raises(ValueError, match=r"lacks 2 of") as error:
        students.take(students.get("sd_small"), {"conv_in": {"bias": np.zeros(4)}}, like)
    assert "conv_in.bias: (3,), but (4,) in the teacher" in str(error.value)
    assert "the teacher has no up_blocks.0.resnets.2.norm1.scale" in str(error.value)


def test_unknown_names_are_met_with_the_close_ones():
    with pytest.raises(ValueError, match=r"did you mean 'sd_tiny'.*sd_small = bk_base"):
        students.get("sd-tiny")
    with pytest.raises(ValueError, match=r"did you mean .*'(sd|bk)_small'.*sd_small = bk_base"):
        students.get("small")
    with pytest.raises(ValueError, match=r"did you mean 'bksdm'\?.*known: segmind, bksdm, segmind_sdxl, koala"):
        students.feature_pairs(students.get("sd_tiny"), "bk-sdm")


UNSUITED = {
    "SDXL": ({**SD15, "block_out_channels": [320, 640, 1280],
              "down_block_types": SD15["down_block_types"][1:],
              "up_block_types": SD15["up_block_types"][:3]}, r"stages are 3 .*320, 640, 1280.*not 4"),
    "a student": (students.config(students.get("bk_base"), SD15), r"layers_per_block are 1, not 2"),
    "uneven": ({**SD15, "layers_per_block": [2, 2, 3, 2]}, r"layers_per_block are \(2, 2, 3, 2\), not 2"),
    "midless": ({**SD15, "mid_block_type": None}, r"mid block is missing"),
    "tiny": (students.config(students.get("bk_tiny"), SD15), r"stages are 3.*layers_per_block.*mid block"),
}  # fmt: skip


@pytest.mark.parametrize("teacher, message", UNSUITED.values(), ids=UNSUITED)
def test_an_unsuited_teacher_is_refused(teacher, message):
    with pytest.raises(ValueError, match=message):
        students.config(students.get("sd_small"), teacher)


def test_the_diagram_shows_what_is_kept():
    assert students.diagram(None) == "01 01 01 01 | mid | 012 012 012 012"
    assert students.diagram(students.get("sd_tiny")) == "0. 0. 0. .. | ... | ... 0.2 0.2 0.2"
    assert students.diagram(students.get("vega")) == "01 01 01 | res | 012 012 012"
    assert students.diagram(students.get("koala_1b")) == "0. 0. 0. | mid | 0.2 0.2 0.2"


def test_flops_agree_with_an_independent_count():
    """Multiply-adds of convolutions and linear layers by thop (223.7 G), and of attention's matmuls (37.8 G).

    Ours leave out the products with padding, and add the elementwise operations.
    """
    parameters, flops = students.cost(students.config(students.get("bk_base"), SD15))
    assert parameters == PARAMETERS["sd15"]["bk_base"]
    assert flops == pytest.approx(2 * (223.7e9 + 37.8e9), rel=0.025)


def test_flops_of_a_student_of_sdxl():
    parameters, flops = students.cost(students.config(students.get("koala_700m"), SDXL))
    assert (parameters, round(flops / 1e9, 1)) == SDXL_SIZES["koala_700m"]


def test_printout_names_every_student_and_the_clash(monkeypatch, capsys):
    cost = lambda config: (1_000 * config["layers_per_block"], config["sample_size"] * 1e9)
    monkeypatch.setattr(students.cutting, "cost", cost)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    main()
    printed = capsys.readouterr().out
    for name in STUDENTS:
        assert name in printed
    assert "sd_small = bk_base" in printed and students.CLASH in printed
    assert "1,000   50.0%" in printed
    sections = printed.split("\n\n")
    assert "sd_tiny" in sections[0] and "vega" not in sections[0]
    assert "sd_tiny" not in sections[2] and "vega" in sections[2] and "128x128x4" in sections[2]
    assert "which transformer blocks, estimated from its weights" in printed
    assert "0 1 2 6 in" in printed and "transformer_blocks.0,1,2,3,4,5.attn1" in printed
    assert max(map(len, printed.splitlines())) <= 120


@pytest.mark.slow
def test_the_readme_has_the_compute_of_today():
    readme = (ROOT / "README.md").read_text()
    whole = students.cost(SD15)[1]
    shares = {
        name: students.cost(students.config(student, SD15))[1] / whole
        for student in students.of(FAMILIES["sd1"])
        for name in student.names
    }
    shares |= {name: flops / SDXL_SIZES["teacher"][1] for name, (_, flops) in SDXL_SIZES.items() if name in STUDENTS}
    assert shares.keys() == STUDENTS.keys()
    for name, share in shares.items():
        (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
        assert f"| {share:.1%} |".replace("%", " %") in row, name
        assert name not in SDXL_SIZES or f"| {SDXL_SIZES[name][0]:,} |" in row
