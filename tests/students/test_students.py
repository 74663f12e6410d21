"""The table, against published figures and configurations. Full-size models are but shapes (`eval_shape`)."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd import students
from flaxkd.models.layers import features
from flaxkd.pretrained.families import SD15, SD21
from flaxkd.students import STUDENTS, TABLE
from flaxkd.students.__main__ import main
from tests.running import ROOT

TEACHERS = {"sd15": SD15, "sd21": SD21}

# Kim et al. 2023 and the safetensors headers of the published weights.
PARAMETERS = {
    "sd15": {None: 859_520_964, "bk_base": 579_384_964, "bk_small": 482_346_884, "bk_tiny": 323_384_964},
    "sd21": {None: 865_910_724, "bk_base": 583_480_964, "bk_small": 485_787_524, "bk_tiny": 326_825_604},
}


@functools.cache
def full_size(teacher: str, student: students.Student | None) -> dict:
    unet_config = TEACHERS[teacher]
    return students.shapes(students.config(student, unet_config) if student else unet_config)


both_teachers = pytest.mark.parametrize("teacher", TEACHERS)
every_student = pytest.mark.parametrize("student", TABLE, ids=lambda student: "=".join(student.names))


def test_both_namings_name_the_same_networks():
    assert set(STUDENTS) == {"sd_small", "sd_tiny", "bk_base", "bk_small", "bk_tiny"}
    assert students.get("sd_small") is students.get("bk_base")
    assert students.get("sd_tiny") is students.get("bk_tiny")
    assert students.get("sd_small") is not students.get("bk_small")


@both_teachers
def test_parameters_are_the_published_ones(teacher):
    for name, expected in PARAMETERS[teacher].items():
        params = full_size(teacher, students.get(name) if name else None)["params"]
        assert sum(x.size for x in jax.tree.leaves(params)) == expected, name


@both_teachers
@every_student
def test_every_tensor_has_its_own_teacher_tensor_of_equal_shape(teacher, student):
    whole = flatten_dict(full_size(teacher, None)["params"])
    sources = []
    for path, tensor in flatten_dict(full_size(teacher, student)["params"]).items():
        sources.append(students.teacher_path(student, path))
        assert whole[sources[-1]].shape == tensor.shape, path
    assert len(set(sources)) == len(sources)


@both_teachers
@every_student
@pytest.mark.parametrize("pairing", students.PAIRINGS)
def test_feature_pairs_have_equal_shapes(teacher, student, pairing):
    there, here = features(full_size(teacher, None)), features(full_size(teacher, student))
    for mine, theirs in students.feature_pairs(student, pairing):
        assert here[mine].shape == there[theirs].shape, (mine, theirs)


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


@pytest.mark.parametrize("teacher", TEACHERS.values(), ids=TEACHERS)
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
        "transformer_layers_per_block": [[1], [3], [5]],
        "reverse_transformer_layers_per_block": [[6, 5], [4, 3], [2, 1]],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3,
        "up_block_types": ["CrossAttnUpBlock2D"] * 3,
        "mid_block_type": None,
    }
    assert config == {**teacher, **cut}


TOY = {**SD15, "sample_size": 8, "block_out_channels": [8, 16, 24, 24], "norm_num_groups": 4,
       "attention_head_dim": [1, 2, 2, 2], "cross_attention_dim": 8}  # fmt: skip


@functools.cache
def toy_teacher() -> dict:
    """Parameters of which every tensor has another value, so that a copy tells where it came from."""
    flat = flatten_dict(students.shapes(TOY)["params"])
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
    with pytest.raises(ValueError, match=r"did you mean 'bksdm'\?.*known: segmind, bksdm"):
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


def test_flops_agree_with_an_independent_count():
    """Multiply-adds of convolutions and linear layers by thop (223.7 G), and of attention's matmuls (37.8 G).

    Ours leave out the products with padding, and add the elementwise operations.
    """
    parameters, flops = students.cost(students.config(students.get("bk_base"), SD15))
    assert parameters == PARAMETERS["sd15"]["bk_base"]
    assert flops == pytest.approx(2 * (223.7e9 + 37.8e9), rel=0.025)


def test_printout_names_every_student_and_the_clash(monkeypatch, capsys):
    monkeypatch.setattr(students.cutting, "cost", lambda config: (1_000 * config["layers_per_block"], 2e9))
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    main()
    printed = capsys.readouterr().out
    for name in STUDENTS:
        assert name in printed
    assert "sd_small = bk_base" in printed and students.CLASH in printed
    assert "1,000   50.0%" in printed
    assert max(map(len, printed.splitlines())) <= 120


def test_the_readme_has_the_compute_of_today():
    readme = (ROOT / "README.md").read_text()
    whole = students.cost(SD15)[1]
    for student in TABLE:
        share = students.cost(students.config(student, SD15))[1] / whole
        for name in student.names:
            (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
            assert f"| {share:.1%} |".replace("%", " %") in row, name
