"""Single-file checkpoints, as on civitai: a whole Stable Diffusion 1.x, 2.x or XL in one .safetensors, by LDM's names.

Such a file holds UNet, text encoders and mostly an autoencoder, and neither configurations nor a tokenizer. The
configurations are those of the published architectures, with blocks, layers and widths as the tensors have them; the
tokenizer is CLIP's. A file that flaxkd wrote (export/single_file.py) carries both in its header. ldm.py has the names.
"""

import functools
import json
import re
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from flaxkd.models.layers import one
from flaxkd.pretrained import clip_tokenizer, families, ldm, tensors
from flaxkd.pretrained.families import ARCHITECTURES, FAMILIES, TOKENIZERS, Family

# Entry of the file's header: JSON of {part: config.json, "scheduler": ..., "tokenizer" or "tokenizer_2": options}.
HEADER = "flaxkd"
MODELSPEC = "modelspec."  # begins the entries of Stability AI's ModelSpec, which others write too
PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
EPSILON_STEP = 875000  # global_step of stable-diffusion-2-base, by which diffusers knows that it predicts the noise

NEEDED = "flaxkd reads whole checkpoints of Stable Diffusion 1.x, 2.x and XL: UNet, text encoders, autoencoder"
RESAVE = """\
    # in an environment with torch, diffusers and transformers, and only if you trust where it comes from
    from diffusers import StableDiffusionPipeline  # of an SDXL: StableDiffusionXLPipeline, here and below
    pipeline = StableDiffusionPipeline.from_single_file("{file}", safety_checker=None)
    pipeline.save_pretrained("NEW_FOLDER", safe_serialization=True)
then pass NEW_FOLDER."""

# What else such files are: (a pattern that one of the names begins with, what the file is then).
UNET = r"(model\.diffusion_model\.)?"
OTHERS = (
    (r"lora_|.*\.(lora_(up|down|A|B)|hada_w\d_a|lokr_w\d)\b",
     "a LoRA, which changes a model and is none: give the model"),
    (r"control_model\.|(.*\.)?(input_hint_block|controlnet_cond_embedding)\.", "a ControlNet"),
    (r"(.*\.)?motion_modules\.", "a motion module of AnimateDiff"),
    (r"emb_params$|string_to_param", "a textual inversion: the words of a prompt, and no model"),
    (r"edm_(mean|vpred)", "a model such as Playground 2.5, whose noise follows EDM"),
    (rf"{UNET}(joint_blocks|double_blocks|double_layers|transformer_blocks|blocks\.0)\b",
     "a transformer such as SD3 or Flux: it has no UNet"),
)  # fmt: skip
# What one part alone looks like, in LDM's or diffusers' names.
ALONE = (
    (r"(first_stage_model\.|vae\.)?(de|en)coder\.(conv_in|mid|up|down)",
     "an autoencoder alone: give it as --vae or config.vae, beside a model"),
    (rf"{UNET}input_blocks\.|conv_in\.", "a UNet alone: give the whole model, for a pipeline its folder"),
    (r"(cond_stage_model|text_model|embeddings|transformer)\.", "a text encoder alone: give the whole model"),
)  # fmt: skip
CHANNELS = {5: "from a depth map", 7: "for upscaling", 8: "InstructPix2Pix"}


def read(path: Path, own_vae: bool = True) -> tuple[dict[str, dict], dict[str, Callable]]:
    """(configs, readers) of a single-file checkpoint, as `Folder` takes them. Only its header is read now.

    own_vae: whether its autoencoder is needed. Raises ValueError that says what the file is, and the remedy, if it is
    a pickle, cut off, another kind of model, or a part of one."""
    check_ending(path)
    found, header = tensors.header(path)
    _check_kind(path, found, own_vae)
    parts = {part: _part(part, found) for part in ldm.PREFIXES}
    named = {part: inside for part, (_, inside) in parts.items() if inside}
    family = _family(path, named)
    made = _written(path, header)
    readers = {part: lambda part=part: _read(path, part, parts[part][0]) for part in named}
    options = {name: made.pop(name) for name in TOKENIZERS.values() if name in made}
    configs = made or _configs(path, family, named, found, header)
    for part, field in family.captions.items():
        name = TOKENIZERS[field]
        if name in options or configs[part].get("vocab_size", clip_tokenizer.VOCAB_SIZE) == clip_tokenizer.VOCAB_SIZE:
            usual = clip_tokenizer.options(ldm.is_open_clip(family.single_file[part]))
            readers[name] = functools.partial(clip_tokenizer.make, **options.get(name, usual))
    index = {  # a tokenizer without a reader must lie beside the file
        "_class_name": family.pipeline_of(configs["unet"], configs.get("vae", {})),
        "scheduler": ["diffusers", configs["scheduler"].get("_class_name", "PNDMScheduler")],
    }
    return configs | {"model_index": index}, readers


def read_vae(path: Path, scaling: dict) -> tuple[dict, Callable]:
    """(config.json, () -> tensors by diffusers' keys) of the autoencoder in a file: alone, or of a whole checkpoint.

    scaling: what its tensors do not tell, in its config.json; that of SD 1.x otherwise."""
    check_ending(path)
    found, header = tensors.header(path)
    prefix, named = _part("vae", found)
    if not named:
        prefix, named = "", ldm.to_diffusers("vae", found)
    if "decoder.conv_in.weight" not in named:
        raise ValueError(f"{path} holds no autoencoder of Stable Diffusion")
    config = _written(path, header).get("vae") or _derived(path, lambda: _vae(named, families.VAE | scaling))
    return config, lambda: _read(path, "vae", prefix)


def _written(path: Path, header: dict[str, str]) -> dict:
    """What flaxkd wrote into the header of a file; {} for others' files. Raises ValueError if it is damaged."""
    try:
        content = json.loads(header.get(HEADER, "{}"))
        whole = not content or all(isinstance(content[part], dict) for part in ("unet", "text_encoder", "scheduler"))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise ValueError(f"{path} has damaged configurations in its header (the entry {HEADER}): write it again")
    return content


def check_ending(path: Path) -> None:
    """Raises ValueError with the remedy unless a file's name ends as that of safetensors."""
    if path.suffix.lower() in tensors.PICKLES:
        resave = RESAVE.format(file=path)
        raise ValueError(f"{path} is a pickle, not opened as it can run code. Save it as safetensors:\n{resave}")
    if path.suffix.lower() != ".safetensors":
        raise ValueError(f"{path} is no model: give a pipeline folder of diffusers, or a file *.safetensors. {NEEDED}")


def _check_kind(path: Path, found: dict[str, np.ndarray], own_vae: bool) -> None:
    first = lambda table: next((what for pattern, what in table if any(re.match(pattern, key) for key in found)), None)
    present = {part: any(key.startswith(prefixes) for key in found) for part, prefixes in ldm.PREFIXES.items()}
    what = first(OTHERS)
    if what is None and sum(present.values()) < 2:
        names = ", ".join(sorted(found)[:3]) or "none"
        what = first(ALONE) or f"no checkpoint by LDM's names (its first tensors: {names})"
    if what is None and not (present["unet"] and present["text_encoder"]):
        what = f"without a {'text encoder' if present['unet'] else 'UNet'}"
    shape = found.get("model.diffusion_model.input_blocks.0.0.weight", np.empty(0)).shape
    if what is None and len(shape) == 4 and (channels := shape[1]) - 4 not in families.BESIDE:
        kind = f" ({CHANNELS[channels]})" if channels in CHANNELS else ""
        what = f"a model whose UNet takes {channels} channels{kind}, not the 4 of text to image or the 9 of inpainting"
    if what:
        raise ValueError(f"{path} is {what}. {NEEDED}")
    if own_vae and not present["vae"]:
        raise ValueError(f"{path} holds no autoencoder: give one with --vae or --config.vae, such as "
                         "stabilityai/sd-vae-ft-mse")  # fmt: skip


def _part(part: str, found: dict[str, np.ndarray]) -> tuple[str, dict[str, np.ndarray]]:
    """(the prefix of a part in the file, its tensors by diffusers' names); ("", {}) if there is none."""
    for prefix in ldm.PREFIXES[part]:
        if inside := {key.removeprefix(prefix): x for key, x in found.items() if key.startswith(prefix)}:
            return prefix, ldm.to_diffusers(part, inside)
    return "", {}


def _read(path: Path, part: str, prefix: str) -> dict[str, np.ndarray]:
    return ldm.to_diffusers(part, tensors.read([path], prefix))


def _family(path: Path, named: dict[str, dict]) -> Family:
    """The row of a file with these parts. Raises ValueError for a UNet with other text encoders."""
    unet = named["unet"]
    found = {
        "use_linear_projection": any(x.ndim == 2 for key, x in unet.items() if key.endswith("proj_in.weight")),
        "addition_embed_type": "add_embedding.linear_1.weight" in unet,
    }
    for family in FAMILIES.values():
        if family.unet == found and {*family.encoders} == {*named} - {"unet", "vae"}:
            return family
    raise ValueError(f"{path} is SDXL's refiner, or another model that takes more than a caption. {NEEDED}")


# -- Configurations, from the shapes of the tensors --------------------------------------------------------------------


def _configs(path: Path, family: Family, named: dict, found: dict, header: dict[str, str]) -> dict[str, dict]:
    rows = {x.configs["scheduler"]["prediction_type"]: x for x in ARCHITECTURES.values()
            if FAMILIES[x.family] is family}  # fmt: skip
    prediction = _prediction(path, found, header, several=len(rows) > 1)
    row = rows.get(prediction, ARCHITECTURES[family.shown])
    scheduler = row.configs["scheduler"] | {"prediction_type": prediction}
    scheduler |= {"rescale_betas_zero_snr": True} if "ztsnr" in found else {}
    makers = {"unet": _unet, "vae": _vae, "text_encoder": _text_encoder, "text_encoder_2": _text_encoder}
    make = lambda part: makers[part](named[part], row.configs[part])
    made = {part: _derived(path, functools.partial(make, part)) for part in named}
    return {"vae": row.configs["vae"], **made, "scheduler": scheduler}  # of a file without one, for another's scaling


def _derived(path: Path, make: Callable[[], dict]) -> dict:
    """Raises ValueError if tensors are missing that tell the configuration, or their sizes are unusual."""
    try:
        return make()
    except KeyError as error:
        reason = f"the tensor {error} is missing"
    except (IndexError, TypeError, ValueError) as error:  # of tensors with other axes
        reason = str(error)
    raise ValueError(
        f"the configuration of {path} does not follow from its tensors: {reason}. {NEEDED}. diffusers may know "
        f"more of them:\n{RESAVE.format(file=path)}"
    )


def _prediction(path: Path, found: dict[str, np.ndarray], header: dict[str, str], several: bool) -> str:
    """What the UNet predicts. Its tensors do not tell: the header, a YAML beside the file, else as diffusers does.

    several: whether the published models of its family differ in it."""
    if (said := header.get(f"{MODELSPEC}prediction_type")) in PREDICTIONS:
        return PREDICTIONS[said]
    if (settings := path.with_suffix(".yaml")).is_file():  # LDM's own configuration beside the file, as for A1111
        says_v = re.search(r"parameterization:\s*[\"']?v", settings.read_text(encoding="utf-8", errors="replace"))
        return "v_prediction" if says_v else "epsilon"
    if not several:
        return "v_prediction" if "v_pred" in found else "epsilon"  # a mark of SDXL's, which ComfyUI reads too
    if "global_step" in found and np.all(tensors.read([path], "global_step")[""] == EPSILON_STEP):
        return "epsilon"
    warnings.warn(
        f"{path} does not say what its UNet predicts: v_prediction at 768 pixels is assumed, as diffusers does. For a "
        f"model made from SD 2.x base put {settings.name} beside it (an empty file is enough), or train with "
        "--config.prediction_type=epsilon",
        stacklevel=2,
    )
    return "v_prediction"


def _unet(x: dict[str, np.ndarray], published: dict) -> dict:
    down, up, _ = ldm.blocks(x)
    channels = [len(x[f"down_blocks.{i}.resnets.0.conv1.weight"]) for i in range(len(down))]
    kinds = {
        "down": ["CrossAttnDownBlock2D" if f"down_blocks.{i}.attentions.0.norm.weight" in x else "DownBlock2D"
                 for i in range(len(down))],
        "up": ["CrossAttnUpBlock2D" if f"up_blocks.{i}.attentions.0.norm.weight" in x else "UpBlock2D"
               for i in range(len(up))],
    }  # fmt: skip
    config = published | {
        "block_out_channels": channels,
        "cross_attention_dim": x[f"{_first_attention(x)}.transformer_blocks.0.attn2.to_k.weight"].shape[1],
        "down_block_types": kinds["down"],
        "in_channels": x["conv_in.weight"].shape[1],
        "layers_per_block": down[0] if len({*down}) == 1 else list(down),
        "out_channels": len(x["conv_out.weight"]),
        "up_block_types": kinds["up"],
    }
    if isinstance(published["attention_head_dim"], list):  # heads of 64 channels; SD 1.x has 8 heads in all blocks
        config["attention_head_dim"] = [width // 64 for width in channels]
    if "add_embedding.linear_1.weight" in x:
        config["projection_class_embeddings_input_dim"] = x["add_embedding.linear_1.weight"].shape[1]
    depths = {path: [_depths(x, f"{path}.{i}") for i in range(len(down))] for path in ("down_blocks", "up_blocks")}
    whole, reverse = depths["down_blocks"], depths["up_blocks"]
    if any(depth != 1 for depth in [*whole, *reverse]):
        config["transformer_layers_per_block"] = whole
        config |= {} if reverse == whole[::-1] else {"reverse_transformer_layers_per_block": reverse}
    if "mid_block.attentions.0.norm.weight" not in x:
        config["mid_block_type"] = "UNetMidBlock2D" if "mid_block.resnets.0.conv1.weight" in x else None
    return _in_groups(config)


def _depths(x: dict[str, np.ndarray], block: str) -> int | list[int]:
    """The transformer blocks of each attention of a block, as one number if they agree; 1 for a block without any."""
    attentions = ldm.numbers(x, f"{block}.attentions.")
    return one([len(ldm.numbers(x, f"{block}.attentions.{i}.transformer_blocks.")) for i in attentions] or [1])


def _first_attention(x: dict[str, np.ndarray]) -> str:
    return next((key.removesuffix(".proj_in.weight") for key in x if key.endswith(".proj_in.weight")), "attentions.0")


def _vae(x: dict[str, np.ndarray], published: dict) -> dict:
    levels = ldm.numbers(x, "encoder.down_blocks.")
    return _in_groups(published | {
        "block_out_channels": [len(x[f"encoder.down_blocks.{i}.resnets.0.conv1.weight"]) for i in levels],
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "in_channels": x["encoder.conv_in.weight"].shape[1],
        "latent_channels": x["decoder.conv_in.weight"].shape[1],
        "layers_per_block": len(ldm.numbers(x, "encoder.down_blocks.0.resnets.")),
        "out_channels": len(x["decoder.conv_out.weight"]),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
    })  # fmt: skip


def _in_groups(config: dict) -> dict:
    if odd := [width for width in config["block_out_channels"] if width % 32]:
        raise ValueError(f"a width of {odd[0]} channels is no multiple of the 32 groups of its norms")
    return config


def _text_encoder(x: dict[str, np.ndarray], published: dict) -> dict:
    x = {key if key.startswith("text_") else f"text_model.{key}": w for key, w in x.items()}
    vocab_size, width = x["text_model.embeddings.token_embedding.weight"].shape
    layers = len(ldm.numbers(x, "text_model.encoder.layers."))
    projection = {"projection_dim": len(x["text_projection.weight"])} if "projection_dim" in published else {}
    return (
        published
        | projection
        | {
            "hidden_size": width,
            "intermediate_size": len(x["text_model.encoder.layers.0.mlp.fc1.weight"]),
            "max_position_embeddings": len(x["text_model.embeddings.position_embedding.weight"]),
            "num_attention_heads": width // 64,
            # SD 2.x takes the states before the last layer, which some files hold all the same.
            "num_hidden_layers": min(layers, published["num_hidden_layers"]),
            "vocab_size": vocab_size,
        }
    )
