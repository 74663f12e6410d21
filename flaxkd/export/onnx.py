"""A pipeline as ONNX files, one for each network, in the folders and under the names that diffusers and optimum read.

PyTorch's exporter writes them from a pipeline folder of diffusers: torch, diffusers and onnxscript must be there. The
batch is symbolic, the size of the pictures is not. Layout is PyTorch's, NCHW. Beside them lies the sampler as arrays,
sampler.npz: docs/export.md has the loop that follows them.

A quantized UNet holds qwix's integers and scales, each weight behind a DequantizeLinear. Activations are as they are.
"""

import contextlib
import importlib.util
import io
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flaxkd.diffusion import samplers
from flaxkd.export.integers import Weight, weights
from flaxkd.machine import files
from flaxkd.pretrained import Folder, families, save
from flaxkd.pretrained.folder import CONFIGS
from flaxkd.pretrained.writing import VERSION, write_padding_tokenizer, write_tokenizer

NEEDED = ("torch", "diffusers", "onnx", "onnxscript")
LARGEST = 3 * 2**29  # bytes of parameters; a file of protobuf ends at 2 GiB, and beyond this they lie beside it
OPSET = 21  # the first whose DequantizeLinear knows int4 and several scales in a row


class Network(NamedTuple):
    """A file: OUT/NAME/model.onnx of a part. Shapes are without the batch; None is an axis of 1 that is all it has."""

    part: str
    call: Callable[..., Any]  # (torch module, inputs) -> a tensor or a tuple of tensors
    inputs: Mapping[str, tuple[str, tuple[int, ...] | None]]  # {name: (dtype of torch, shape)}
    outputs: Sequence[str]


def networks(folder: Folder, height: int | None = None, width: int | None = None) -> dict[str, Network]:
    """{name of its folder: a network} of a pipeline. Raises ValueError for a size that its latents cannot have."""
    height, width = folder.picture_size(height, width)
    h, w, unet = height // folder.factor, width // folder.factor, folder.module("unet").config
    seen = {
        "sample": ("float32", (unet.in_channels, h, w)),
        "timestep": ("float32", None),  # one for all
        "encoder_hidden_states": ("float32", (folder.text_length, unet.cross_attention_dim)),
    }
    if unet.time_cond_proj_dim is not None:
        seen["timestep_cond"] = ("float32", (unet.time_cond_proj_dim,))
    if folder.family.sizes:
        pooled = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        seen |= {"text_embeds": ("float32", (pooled,)), "time_ids": ("float32", (6,))}
    picture = {"sample": ("float32", (3, height, width))}
    latents = {"latent_sample": ("float32", (folder.module("vae").config.latent_channels, h, w))}
    found = {
        "unet": Network("unet", _unet, seen, ["out_sample"]),
        "vae_encoder": Network(
            "vae", lambda vae, sample: vae.encode(sample).latent_dist.mode(), picture, ["latent_sample"]
        ),
        "vae_decoder": Network(
            "vae", lambda vae, latent_sample: vae.decode(latent_sample, return_dict=False)[0], latents, ["sample"]
        ),
    }
    for part in folder.family.encoders:
        projects = families.PARTS[part].class_name == "CLIPTextModelWithProjection"
        first = ["text_embeds", "last_hidden_state"] if projects else ["last_hidden_state", "pooler_output"]
        layers = folder.module(part).config.num_hidden_layers + 1 if folder.family.penultimate else 0
        names = [*first, *(f"hidden_states.{i}" for i in range(layers))]
        found[part] = Network(part, _encoder(first, layers), {"input_ids": ("int32", (folder.text_length,))}, names)
    return found


def _unet(unet, sample, timestep, encoder_hidden_states, **others):
    added = {name: others.pop(name) for name in ("text_embeds", "time_ids") if name in others}
    named = {"added_cond_kwargs": added} if added else {}
    return unet(sample, timestep, encoder_hidden_states, return_dict=False, **named, **others)[0]


def _encoder(first: Sequence[str], layers: int) -> Callable:
    def call(encoder, input_ids):
        made = encoder(input_ids, output_hidden_states=True)
        return (*(made[name] for name in first), *made.hidden_states[:layers])

    return call


def write(
    out: Path,
    folder: Folder,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sampler: str | None = None,
    scheme: str | None = None,
) -> dict[str, int]:
    """Writes a pipeline in float32 to a new folder `out`; returns {file: bytes}. None: as `flaxkd.Pipeline` has it.

    scheme: a row of quantize.SCHEMES for the weights of the UNet. Raises ValueError as `networks`, `weights` and
    `samplers.schedule` do and if `out` is in use, ImportError without a package of NEEDED."""
    out, found, arrays = Path(out).absolute(), networks(folder, height, width), _sampler(folder, sampler, steps)
    files.check_replaceable(out, (out / "unet" / "model.onnx").is_file(), "to ONNX")
    _check_packages()
    rounded = {"unet": weights(folder, scheme)}
    with files.whole_folder(out) as new, tempfile.TemporaryDirectory() as scratch:
        source = save(Path(scratch) / "pipeline", source=folder, parts={}, dtype="float32")
        for name, network in found.items():
            (new / name).mkdir()
            config = files.read_json(source / network.part / CONFIGS[network.part])
            files.write_json(new / name / "config.json", config)
            _write(new / name / "model.onnx", source / network.part, network, rounded.get(name, {}))
        files.write_json(new / "scheduler" / CONFIGS["scheduler"], folder.config("scheduler"))
        np.savez(new / "sampler.npz", **arrays)
        write_tokenizer(folder, new)
        for field in folder.tokenizers:
            write_padding_tokenizer(folder, field, new)
        files.write_json(new / "model_index.json", _index(folder, [*found]))
    return {str(path.relative_to(out)): path.stat().st_size for path in sorted(out.glob("*/model.onnx*"))}


def _sampler(folder: Folder, kind: str | None, steps: int | None) -> dict[str, np.ndarray]:
    """The fields of a Schedule but those for pictures to start from, and two numbers that a loop needs."""
    config = folder.config("scheduler")
    steps = samplers.usual_steps(kind, config) if steps is None else steps
    schedule = samplers.schedule(kind, config, steps)._asdict()
    kept = {name: x for name, x in schedule.items() if x is not None and name != "kept"}
    return kept | {"guidance": np.float32(folder.guidance), "scaling_factor": np.float32(folder.scaling_factor)}


def _check_packages() -> None:
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f'the export to ONNX needs {", ".join(missing)}: pip install "flaxkd[onnx]"')


def _write(file: Path, source: Path, network: Network, rounded: Mapping[str, Weight]) -> None:
    """Writes a network whose config.json and weights are in `source`, as diffusers writes them.

    rounded: weights in place of those."""
    import diffusers
    import torch
    import transformers

    row = families.PARTS[network.part]
    library = {"diffusers": diffusers, "transformers": transformers}[row.library]
    transformers.utils.logging.disable_progress_bar()
    module = getattr(library, row.class_name).from_pretrained(source).eval().requires_grad_(False)

    class Called(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.module = module

        def forward(self, *values):
            return network.call(self.module, **dict(zip(network.inputs, values, strict=True)))

    b = torch.export.Dim("b")
    examples = [torch.ones((1,) if shape is None else (2, *shape), dtype=getattr(torch, dtype))
                for dtype, shape in network.inputs.values()]  # fmt: skip
    dynamic = tuple(None if shape is None else {0: b} for _, shape in network.inputs.values())
    with _quiet(), torch.no_grad():
        # Without `optimize`: it takes minutes, and a runtime optimizes what it loads itself.
        made = torch.onnx.export(
            Called(), tuple(examples), dynamo=True, optimize=False, dynamic_shapes={"values": dynamic},
            input_names=[*network.inputs], output_names=[*network.outputs], verbose=False, opset_version=OPSET,
        )  # fmt: skip
    for node in made.model.graph:  # lines of PyTorch's source, a quarter of a small file
        node.metadata_props.clear()
    for name, weight in rounded.items():
        _dequantize(made.model.graph, f"module.{name}", weight)
    size = sum(value.const_value.nbytes for value in made.model.graph.initializers.values())
    made.save(str(file), external_data=size > LARGEST)


def _dequantize(graph, name: str, weight: Weight) -> None:
    """Makes a weight of a graph, an initializer, the result of a DequantizeLinear."""
    import onnx_ir

    value, inputs = graph.initializers.pop(name), []
    for end, array in ("_quantized", weight.values), ("_scale", weight.scales):
        tensor = onnx_ir.tensor(np.ascontiguousarray(array), name=name + end)
        inputs.append(onnx_ir.Value(name=tensor.name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype),
                                    const_value=tensor))  # fmt: skip
        graph.register_initializer(inputs[-1])
    blocks = {"axis": 1, "block_size": weight.block} if weight.block else {"axis": 0}
    value.const_value = None
    graph.insert_before(graph[0], onnx_ir.node("DequantizeLinear", inputs, blocks, outputs=[value]))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter reports packages that are not needed, on all channels."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _index(folder: Folder, names: Sequence[str]) -> dict:
    """Its model_index.json: diffusers' class for ONNX, or where it has none that of optimum."""
    named = {"StableDiffusionPipeline": "OnnxStableDiffusionPipeline"}
    index = {"_class_name": named.get(folder.pipeline, f"ORT{folder.pipeline}"), "_diffusers_version": VERSION}
    index |= folder.family.index | {name: ["diffusers", "OnnxRuntimeModel"] for name in names}
    tokenizers = (families.TOKENIZERS[field] for field in folder.family.captions.values())
    index |= {name: ["transformers", "CLIPTokenizer"] for name in tokenizers}
    return index | {"scheduler": ["diffusers", folder.config("scheduler")["_class_name"]]}
