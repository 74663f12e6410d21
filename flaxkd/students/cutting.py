"""A student as cut from its teacher: its `unet/config.json`, its weights, its size and cost."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from flaxkd.models.layers import frozen, one
from flaxkd.models.unet import UNet2DCondition, UNetConfig, each
from flaxkd.pretrained.families import FAMILIES, PARTS
from flaxkd.students.row import ALL, RESNET, Student
from flaxkd.weights import lora


def config(student: Student, teacher_config: dict) -> dict:
    """The student's `unet/config.json`: the teacher's, with its fields cut to the kept blocks and layers.

    Raises ValueError if the teacher is not a whole UNet of the student's families, has fewer transformer blocks than
    the student keeps, or if no configuration of diffusers can express the student.
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
    }
    new = dict(teacher_config)
    for field, kept in cut.items():
        value = getattr(teacher, field)
        if isinstance(value, tuple):  # per block
            new[field] = [value[block] for block in kept]
    counts = [len(layers) for layers in down.values()]
    new["layers_per_block"] = counts if isinstance(teacher.layers_per_block, tuple) else one(counts)
    for field, depths in _depths(student, teacher).items():
        value = getattr(teacher, field)
        if value not in (frozen(depths), one(depths)):  # else as the teacher spells it
            new[field] = depths
    new |= {False: {"mid_block_type": None}, RESNET: {"mid_block_type": "UNetMidBlock2D"}}.get(student.mid, {})
    _check_mid(student, teacher, UNetConfig.from_dict(new))
    return new


def _depths(student: Student, teacher: UNetConfig) -> dict[str, list | None]:
    """{field of config.json: the transformer blocks of each layer}, one number for a block of equal layers."""
    names = "transformer_layers_per_block", "reverse_transformer_layers_per_block"
    down = each(getattr(teacher, names[0]), len(teacher.block_out_channels))
    whole = {"down_blocks": down, "up_blocks": getattr(teacher, names[1]) or down[::-1]}
    found: dict[str, list] = {path: [] for path in whole}
    for source, layers in student.blocks.values():
        path, _, i = source.partition(".")
        if path in whole:
            depths = each(whole[path][int(i)], 1 + max(layers))
            found[path].append(one([depths[j] if kept is ALL else len(kept) for j, kept in layers.items()]))
    down, up = found.values()
    return {names[0]: down, names[1]: None if up == down[::-1] else up}


def _check_mid(student: Student, teacher: UNetConfig, cut: UNetConfig) -> None:
    """Raises ValueError if the mid block of the configuration is not as deep as the student's."""
    if cut.mid and cut.mid.depths:
        kept = student.blocks["mid_block"][1][0]
        depths = teacher.mid.depths if kept is ALL else (len(kept),)
        if cut.mid.depths != depths:
            raise ValueError(
                f"the attention in the mid block of {student.names[0]} has {depths[0]} transformer blocks, and the "
                f"first one in its last down block {cut.mid.depths[0]}: diffusers has one number for both. Keep as "
                f"many of each, or of the mid block its first resnet alone ({RESNET!r})"
            )


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
    wrong = wrong or _too_shallow(student, teacher)
    if wrong:
        like = " and ".join(FAMILIES[name].title for name in student.families)
        raise ValueError(
            f"{student.names[0]} can only be cut from a whole UNet like that of {like}, but in "
            f"this teacher {'; '.join(wrong)}. If it is itself a student, give the model it was cut from; if it is of "
            "another family, take one of its own students (python -m flaxkd.students)"
        )
    return teacher


def _too_shallow(student: Student, teacher: UNetConfig) -> list[str]:
    """Every attention of the teacher with fewer transformer blocks than the student keeps, in words."""
    paths = {"down_blocks": teacher.down, "mid_block": [teacher.mid], "up_blocks": teacher.up}
    wrong = []
    for source, layers in student.blocks.values():
        path, _, i = source.partition(".")
        depths = paths[path][int(i or 0)].depths
        for layer, kept in layers.items():
            depth = (depths[layer] if layer < len(depths) else None) or 0
            if kept and kept[-1] >= depth:
                kept = ", ".join(map(str, kept))
                wrong.append(f"{source}.attentions.{layer} has {depth} transformer blocks, and {kept} are kept")
    return wrong


def teacher_path(student: Student, path: tuple[str, ...]) -> tuple[str, ...]:
    """The path in the teacher of the student's parameter at `path`.

    sd_small's ("up_blocks.1", "resnets.1", "conv1", "bias") comes from ("up_blocks.1", "resnets.2", "conv1", "bias").
    """
    if path[0] not in student.blocks:
        return path
    block, layers = student.blocks[path[0]]
    source, kept = [block], ALL
    for word in path[1:]:
        kind, _, i = word.partition(".")
        if kind in ("resnets", "attentions"):
            layer = list(layers)[int(i)]
            word, kept = f"{kind}.{layer}", layers[layer]
        elif kind == "transformer_blocks" and kept is not ALL:
            word = f"{kind}.{kept[int(i)]}"
        source.append(word)
    return tuple(source)


def take(student: Student, teacher_params: dict, student_shapes: dict) -> dict:
    """The student's parameters as cut: each is a copy of one of the teacher's, in the teacher's dtype.

    The copies share no memory with the teacher's: the train step donates them, and the teacher must outlive that.
    Arguments and errors are those of `view`.
    """
    return jax.tree.map(lambda x: x.copy(), view(student, teacher_params, student_shapes))


def view(student: Student, teacher_params: dict, student_shapes: dict) -> dict:
    """The student's parameters as cut: each is one of the teacher's itself.

    teacher_params: nested dict of arrays or shapes; student_shapes: the student's parameters as shapes.
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
            new[path] = teacher[source]
    if wrong:
        found = "\n  ".join(wrong)
        raise ValueError(f"this teacher lacks {len(wrong)} of the student's parameters:\n  {found}")
    return unflatten_dict(new)


def take_adapter(student: Student, adapter: dict, student_shapes: dict) -> tuple[dict, list[tuple[str, ...]]]:
    """(a LoRA of the teacher's UNet as one of the student's, the modules left out since the student has none).

    Exact: cutting the teacher with its adapter merged is merging the student's into the cut teacher, bit for bit.
    student_shapes: the student's parameters as shapes."""
    pairs, new = lora.layers(adapter), {}
    for path in flatten_dict(student_shapes):
        source = teacher_path(student, path[:-1])
        if path[-1] == "kernel" and source in pairs:
            new[path[:-1]] = source
    left_out = sorted(pairs.keys() - {*new.values()})
    return lora.tree({module: pairs[source] for module, source in new.items()}), left_out


def give_adapter(student: Student, adapter: dict) -> dict:
    """The inverse: a LoRA of the student's UNet under the teacher's names. The teacher's other layers stay as they are.

    It is not the same function on the teacher: it serves programs that know the whole layout alone."""
    return lora.tree({teacher_path(student, module): pair for module, pair in lora.layers(adapter).items()})


def shapes(unet_config: dict) -> dict:
    """{"params": tree, "features": tree} of a UNet as shapes, at its sample_size and batch 1. Takes 1 s."""
    model, inputs = _program(unet_config)
    return jax.eval_shape(model.init, jax.random.key(0), *inputs)


def cost(unet_config: dict) -> tuple[int, float]:
    """(parameters, FLOPs of a forward pass at its sample_size, batch 1, 77 text tokens) of a UNet. Takes 2 s.

    XLA counts the program before compilation. A multiply-add is two FLOPs. Attention and elementwise operations
    count; products with padding zeros do not. Raises ValueError where JAX has no CPU.
    """
    model, inputs = _program(unet_config)
    params = shapes(unet_config)["params"]
    with jax.default_device(_cpu()):  # JAX counts for no other device before compilation
        traced = jax.jit(model.apply).trace({"params": params}, *inputs)
        program = traced.lower(lowering_platforms=("tpu",))  # on a CPU some layers take other forms, with loops
    return sum(x.size for x in jax.tree.leaves(params)), program.cost_analysis()["flops"]


def image_flops(passes: Sequence[tuple[dict, int]]) -> float:
    """The least FLOPs of training on one image, by `Task.passes`. Raises ValueError, as `cost` does."""
    return sum(times * cost(unet_config)[1] for unet_config, times in passes)


def _cpu() -> jax.Device:
    try:
        return jax.local_devices(backend="cpu")[0]
    except RuntimeError:
        platforms = jax.config.jax_platforms
        raise ValueError(
            f"JAX_PLATFORMS is {platforms}, and counting FLOPs needs the CPU too: set it to {platforms},cpu or unset it"
        ) from None


def _program(unet_config: dict):
    c = UNetConfig.from_dict(unet_config)
    _, timesteps, _, *added = PARTS["unet"].inputs(c)
    sample, text = (1, c.sample_size, c.sample_size, c.in_channels), (1, 77, c.cross_attention_dim)
    sample, text = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (sample, text))
    return UNet2DCondition(c), [sample, timesteps, text, *added]
