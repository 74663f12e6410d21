"""A student as cut from its teacher: its `unet/config.json`, its weights, its size and cost."""

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd.models.unet import UNet2DCondition, UNetConfig
from flaxkd.students.table import Student


def config(student: Student, teacher_config: dict) -> dict:
    """The student's `unet/config.json`: the teacher's, with its fields cut to the kept blocks and layers.

    Raises ValueError if the teacher is not a whole UNet of the student's families.
    """
    teacher = _check_teacher(student, teacher_config)
    down, up, channels = student.down, student.up, teacher.block_out_channels
    if channels[max(down)] != channels[-1]:  # the outer up block takes what came through the inner stage
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


def _check_teacher(student: Student, teacher_config: dict) -> UNetConfig:
    teacher, family = UNetConfig.from_dict(teacher_config), student.family
    channels, layers = teacher.block_out_channels, teacher.layers_per_block
    wrong = []
    if len(channels) != family.stages:
        wrong.append(f"the stages are {len(channels)} (block_out_channels = {list(channels)}), not {family.stages}")
    if layers not in (family.layers, (family.layers,) * len(channels)):
        wrong.append(f"the layers_per_block are {layers}, not {family.layers}")
    if teacher.mid_block_type is None:
        wrong.append("the mid block is missing")
    if wrong:
        raise ValueError(
            "a student can only be cut from a whole UNet like that of Stable Diffusion 1.x and 2.x, but in "
            f"this teacher {'; '.join(wrong)}. If it is itself a student, give the model it was cut from"
        )
    return teacher


def teacher_path(student: Student, path: tuple[str, ...]) -> tuple[str, ...]:
    """The path in the teacher of the student's parameter at `path`.

    sd_small's ("up_blocks.1", "resnets.1", "conv1", "bias") comes from ("up_blocks.1", "resnets.2", "conv1", "bias").
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
    """The student's parameters as cut: each is a copy of one of the teacher's, in the teacher's dtype.

    teacher_params: nested dict of numpy or jax arrays; student_shapes: the student's parameters as shapes.
    The copies share no memory with the teacher's: the train step donates them, and the teacher must outlive that.
    Raises ValueError that lists every parameter the teacher lacks or has in another shape.
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


def shapes(unet_config: dict) -> dict:
    """{"params": tree, "features": tree} of a UNet as shapes, at its sample_size and batch 1. Takes 1 s."""
    model, inputs = _program(unet_config)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def cost(unet_config: dict) -> tuple[int, float]:
    """(parameters, FLOPs of a forward pass at its sample_size, batch 1, 77 text tokens) of a UNet. Takes 2 s.

    XLA counts the program before compilation. A multiply-add is two FLOPs. Attention and elementwise operations
    count; products with padding zeros do not.
    """
    model, inputs = _program(unet_config)
    params = shapes(unet_config)["params"]
    traced = jax.jit(model.apply).trace({"params": params}, *inputs)
    program = traced.lower(lowering_platforms=("tpu",))  # on a CPU some layers take other forms, with loops
    return sum(x.size for x in jax.tree.leaves(params)), program.cost_analysis()["flops"]


def _program(unet_config: dict):
    c = UNetConfig.from_dict(unet_config)
    inputs = (1, c.sample_size, c.sample_size, c.in_channels), (1,), (1, 77, c.cross_attention_dim)
    return UNet2DCondition(c), [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
