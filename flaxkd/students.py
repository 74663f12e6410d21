"""The students: which layers of its teacher each one keeps, and which features of the two are compared.

`TABLE` is all that is written down. What follows from it is derived: a student's `config.json`, weights,
feature pairs, size and cost. `python -m flaxkd.students` prints it for Stable Diffusion 1.5 and 2.1.
"""

import dataclasses
import difflib
import textwrap
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd.models.unet import UNet2DCondition, UNetConfig


class Published(NamedTuple):
    """A student as somebody published it."""

    name: str  # here
    title: str  # there
    source: str  # the weights on the hub
    inner: tuple[str, str] | None = None  # (student, teacher) modules compared beside the blocks shared


@dataclasses.dataclass(frozen=True, eq=False)
class Student:
    """A row of the table. Layer i of a block is its resnet i, with the attention i if there is one."""

    down: dict[int, tuple[int, ...]]  # down block of the teacher: the layers kept of it, in order
    mid: bool  # whether the mid block is kept; if so, whole
    up: dict[int, tuple[int, ...]]
    published: dict[str, Published]  # by pairing

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(published.name for published in self.published.values())


# Kim et al. 2023 (BK-SDM, arXiv:2305.15798) cut Stable Diffusion thus; Segmind's distill-sd does too.
# An up block keeps its layers 0 and 2: its last takes the skip from the stage outside, which has another
# width in blocks 1 and 2, so that no other layer fits there; layer 1 is the redundant one.
TABLE = (
    #       down block: layers kept                mid    up block: layers kept
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  True,  {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "segmind": Published("sd_small", "Segmind SD-Small", "segmind/small-sd"),
        "bksdm":   Published("bk_base",  "BK-SDM-Base",      "nota-ai/bk-sdm-base")}),
    Student({0: (0,), 1: (0,), 2: (0,), 3: (0,)},  False, {0: (0, 2), 1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        "bksdm":   Published("bk_small", "BK-SDM-Small",     "nota-ai/bk-sdm-small")}),
    Student({0: (0,), 1: (0,), 2: (0,)          }, False, {           1: (0, 2), 2: (0, 2), 3: (0, 2)}, {
        # distill_training.py: the student's innermost block learns all that the teacher's inner stage does.
        "segmind": Published("sd_tiny",  "Segmind SD-Tiny",  "segmind/tiny-sd",
                             ("down_blocks.2", "up_blocks.0")),
        # kd_train_text_to_image.py: before the downsampler, which the student lacks, and the last residual.
        "bksdm":   Published("bk_tiny",  "BK-SDM-Tiny",      "nota-ai/bk-sdm-tiny",
                             ("down_blocks.2.attentions.0.proj_out",
                              "down_blocks.2.attentions.1.proj_out"))}),
)  # fmt: skip

STUDENTS = {name: student for student in TABLE for name in student.names}

# The kinds of blocks that a publisher compares wherever teacher and student both have the block.
PAIRINGS = {"segmind": ("down_blocks", "mid_block", "up_blocks"), "bksdm": ("down_blocks", "up_blocks")}

CLASH = "mind that Segmind's SD-Small is sd_small = bk_base (with a mid block), and BK-SDM-Small is bk_small"

STAGES, LAYERS = 4, 2  # of a teacher; its up blocks have one layer more


def get(name: str) -> Student:
    """The student of that name, Segmind's or BK-SDM's. Raises ValueError with the names that come close."""
    if name not in STUDENTS:
        raise ValueError(_unknown("student", name, STUDENTS) + f"; {CLASH}")
    return STUDENTS[name]


def config(student: Student, teacher_config: dict) -> dict:
    """The student's `unet/config.json`: the teacher's, its fields cut to the blocks and layers that are kept.

    Raises ValueError for a teacher that is not a whole UNet of Stable Diffusion's four stages.
    """
    teacher = _check_teacher(teacher_config)
    down, up, channels = student.down, student.up, teacher.block_out_channels
    if channels[max(down)] != channels[-1]:  # what the outer up block takes came through the inner stage
        raise ValueError(
            f"{student.names[0]} lacks the inner stage, so the teacher's two inner stages must be equally wide, "
            f"as in Stable Diffusion, but block_out_channels = {list(channels)}: take a student that keeps all stages"
        )
    cut = {
        "block_out_channels": down,
        "down_block_types": down,
        "up_block_types": up,
        "attention_head_dim": down,
        "transformer_layers_per_block": down,
        "reverse_transformer_layers_per_block": up,
    }
    new = dict(teacher_config)
    for field, kept in cut.items():
        value = getattr(teacher, field)
        if isinstance(value, tuple):  # per block, and perhaps per layer within it
            new[field] = [
                [value[block][i] for i in layers] if isinstance(value[block], tuple) else value[block]
                for block, layers in kept.items()
            ]
    counts = [len(layers) for layers in down.values()]
    new["layers_per_block"] = counts if isinstance(teacher.layers_per_block, tuple) else counts[0]
    if not student.mid:
        new["mid_block_type"] = None
    return new


def _check_teacher(teacher_config: dict) -> UNetConfig:
    teacher = UNetConfig.from_dict(teacher_config)
    channels, layers = teacher.block_out_channels, teacher.layers_per_block
    wrong = []
    if len(channels) != STAGES:
        wrong.append(f"the stages are {len(channels)} (block_out_channels = {list(channels)}), not {STAGES}")
    if layers not in (LAYERS, (LAYERS,) * len(channels)):
        wrong.append(f"the layers_per_block are {layers}, not {LAYERS}")
    if teacher.mid_block_type is None:
        wrong.append("the mid block is missing")
    if wrong:
        raise ValueError(
            "a student can only be cut from a whole UNet like that of Stable Diffusion 1.x and 2.x, but of "
            f"this teacher {'; '.join(wrong)}. If it is a student itself, give the model that it was cut from"
        )
    return teacher


def teacher_path(student: Student, path: tuple[str, ...]) -> tuple[str, ...]:
    """Where in the teacher the student's parameter at `path` comes from.

    sd_small's ("up_blocks.1", "resnets.1", "conv1", "bias") is ("up_blocks.1", "resnets.2", "conv1", "bias").
    """
    kind, _, i = path[0].partition(".")
    kept = {"down_blocks": student.down, "up_blocks": student.up}.get(kind)
    if kept is None:
        return path
    block, layers = list(kept.items())[int(i)]
    part, _, j = path[1].partition(".")
    name = f"{part}.{layers[int(j)]}" if part in ("resnets", "attentions") else path[1]
    return (f"{kind}.{block}", name, *path[2:])


def take(student: Student, teacher_params: dict, student_shapes: dict) -> dict:
    """The student's parameters as cut: every one a copy of one of the teacher's, in the teacher's dtype.

    teacher_params: nested dict of numpy or jax arrays; student_shapes: the student's parameters as shapes.
    They share no memory: the train step donates the student's, and the teacher has to outlive that.
    Raises ValueError listing every parameter that the teacher has not, or has in another shape.
    """
    teacher, new, wrong = flatten_dict(teacher_params), {}, []
    for path, like in flatten_dict(student_shapes).items():
        source = teacher_path(student, path)
        if source not in teacher:
            wrong.append(f"{'.'.join(path)}: the teacher has no {'.'.join(source)}")
        elif teacher[source].shape != like.shape:
            wrong.append(f"{'.'.join(path)}: {like.shape}, but {teacher[source].shape} in the teacher")
        else:
            new[path] = teacher[source].copy()
    if wrong:
        found = "\n  ".join(wrong)
        raise ValueError(f"this teacher lacks {len(wrong)} of the student's parameters:\n  {found}")
    return unflatten_dict(new)


def feature_pairs(student: Student, pairing: str) -> tuple[tuple[str, str], ...]:
    """The (student module, teacher module) pairs of which the outputs are compared, from the first that runs.

    pairing: "segmind" (9 terms for sd_small, 6 for sd_tiny) or "bksdm" (8 for bk_base and bk_small, 6 for
    bk_tiny), whichever the student's name: the blocks that both sides have, and the table's `inner` pair.
    Raises ValueError for another pairing.
    """
    if pairing not in PAIRINGS:
        raise ValueError(_unknown("feature pairing", pairing, PAIRINGS))

    def shared(kind, kept):
        # The last block of a path does not resample: a block is shared if last in both, or in neither.
        both = [(i, j) for i, j in enumerate(kept) if (i == len(kept) - 1) == (j == STAGES - 1)]
        return [(f"{kind}.{i}", f"{kind}.{j}") for i, j in both if kind in PAIRINGS[pairing]]

    mid = [("mid_block", "mid_block")] if student.mid and "mid_block" in PAIRINGS[pairing] else []
    inner = [p.inner for key, p in student.published.items() if key == pairing and p.inner]
    return (*shared("down_blocks", student.down), *inner, *mid, *shared("up_blocks", student.up))


def shapes(unet_config: dict) -> dict:
    """{"params": tree, "features": tree} of a UNet, as shapes at its sample_size and batch 1, in 1 s."""
    model, inputs = _program(unet_config)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def cost(unet_config: dict) -> tuple[int, float]:
    """(parameters, FLOPs of a forward pass at its sample_size, batch 1, 77 text tokens) of a UNet, in 2 s.

    The count is XLA's, of the program before compilation: a multiply-add is two, attention and elementwise
    operations are included, products with the zeros of a padding are not.
    """
    model, inputs = _program(unet_config)
    params = shapes(unet_config)["params"]
    traced = jax.jit(model.apply).trace({"params": params}, *inputs)
    program = traced.lower(lowering_platforms=("tpu",))  # a CPU has other forms of some layers, with loops
    return sum(x.size for x in jax.tree.leaves(params)), program.cost_analysis()["flops"]


def _program(unet_config: dict):
    c = UNetConfig.from_dict(unet_config)
    inputs = (1, c.sample_size, c.sample_size, c.in_channels), (1,), (1, 77, c.cross_attention_dim)
    return UNet2DCondition(c), [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]


def _unknown(what: str, name: str, known) -> str:
    close = difflib.get_close_matches(str(name), known, cutoff=0.5)
    hint = f", did you mean {' or '.join(map(repr, close))}?" if close else ""
    return f"unknown {what} {name!r}{hint} (known: {', '.join(known)})"


# unet/config.json of stable-diffusion-v1-5 and stable-diffusion-2-1 on the hub.
SD15 = {
    "_class_name": "UNet2DConditionModel",
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "cross_attention_dim": 768,
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
SD21 = {
    **SD15,
    "attention_head_dim": [5, 10, 20, 20],
    "cross_attention_dim": 1024,
    "only_cross_attention": False,
    "sample_size": 96,
    "upcast_attention": True,
    "use_linear_projection": True,
}


def diagram(student: Student | None) -> str:
    """The teacher's blocks in a line, a digit for a layer kept, a dot for one removed (None: all kept)."""

    def path(kept, layers):
        keeps = lambda block, i: kept is None or i in kept.get(block, ())
        return " ".join("".join(str(i) if keeps(b, i) else "." for i in range(layers)) for b in range(STAGES))

    down, mid, up = (student.down, student.mid, student.up) if student else (None, True, None)
    return f"{path(down, LAYERS)} | {'mid' if mid else '...'} | {path(up, LAYERS + 1)}"


def size_table(title: str, teacher_config: dict) -> str:
    """The students of one teacher as text: names, what is kept, parameters and FLOPs with their shares."""
    size, channels = teacher_config["sample_size"], teacher_config["in_channels"]
    head = f"{'down blocks | mid | up blocks':33}{'parameters':>14}{'share':>8}{'GFLOPs':>10}{'share':>8}"
    lines = [f"{title}, latents {size}x{size}x{channels}", f"  {'':20}{head}"]
    whole = cost(teacher_config)
    for student in (None, *TABLE):
        name = " = ".join(student.names) if student else "teacher"
        parameters, flops = cost(config(student, teacher_config)) if student else whole
        shares = parameters / whole[0], flops / whole[1]
        numbers = f"{parameters:14,}{shares[0]:8.1%}{flops / 1e9:10,.1f}{shares[1]:8.1%}"
        lines.append(f"  {name:20}{diagram(student):33}{numbers}")
    return "\n".join(lines)


def pair_table() -> str:
    """The feature pairs of every published student as text; they are the same for every teacher."""
    lines = ["Feature pairs; a block is named once where student and teacher agree, else student<-teacher"]
    for student in TABLE:
        for pairing, published in student.published.items():
            pairs = feature_pairs(student, pairing)
            words = " ".join(s if s == t else f"{s}<-{t}" for s, t in pairs)
            head = f"  {published.name:10}{published.title:18}{pairing:9}{len(pairs)}  "
            wrap = {"width": 110, "initial_indent": head, "subsequent_indent": " " * len(head)}
            lines += textwrap.wrap(words, break_on_hyphens=False, break_long_words=False, **wrap)
    return "\n".join(lines)


def main() -> None:
    jax.config.update("jax_platforms", "cpu")  # counting needs no accelerator, and a training may hold it
    for title, teacher_config in {"Stable Diffusion 1.5": SD15, "Stable Diffusion 2.1": SD21}.items():
        print(size_table(title, teacher_config) + "\n", flush=True)
    print("Digits are layers kept, dots layers removed. GFLOPs: one forward pass, batch 1, 77 text tokens.")
    print(f"Names: {CLASH}.\nNames joined by = are one network, with other features compared.\n")
    print(pair_table())


if __name__ == "__main__":
    main()
