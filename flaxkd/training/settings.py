"""THE TABLE of settings: what every key of a configuration may be. It is checked before anything else is done.

What only the devices, the teacher's folder or the data can tell is checked where they are opened: whether a batch can
be split, a resolution, the blocks that a student keeps.
"""

import difflib
import functools
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from flaxkd import students
from flaxkd.data import buckets, pictures
from flaxkd.diffusion import samplers
from flaxkd.machine import configuration, diffusers_flags, dtypes
from flaxkd.models.attention import FORMS
from flaxkd.pretrained import families, fresh
from flaxkd.training import step
from flaxkd.weights import lora, quantize


class Rule(NamedTuple):
    """What a value may be. words: complete "batch_size = 0 ..." if it may not. known: names, as suggestions."""

    holds: Callable[[Any], bool]
    words: str
    known: tuple[str, ...] = ()

    def fault(self, key: str, value: Any) -> str:
        shown = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
        shown = shown if len(shown) < 100 else f"{shown[:100]}..."
        return f"{key} = {shown} {self.words}{_meant(value, self.known)}"


def _meant(value: Any, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(value), known, cutoff=0.5)
    return f", did you mean {' or '.join(map(repr, close))}?" if close else ""


def whole(low: int, high: int | None = None) -> Rule:
    """Whole numbers from `low` to `high`."""
    of_kind = lambda x: isinstance(x, int | np.integer) and not isinstance(x, bool)
    words = f"must be a whole number of at least {low}" if high is None else f"must be a whole number, {low} to {high}"
    return Rule(lambda x: of_kind(x) and low <= x <= (math.inf if high is None else high), words)


def number(low: float = -math.inf, high: float = math.inf, *, above: bool = False, below: bool = False) -> Rule:
    """Finite numbers from `low` to `high`. above, below: without the bounds themselves."""
    of_kind = lambda x: isinstance(x, int | float | np.number) and not isinstance(x, bool) and math.isfinite(x)
    holds = lambda x: of_kind(x) and low <= x <= high and not (above and x == low) and not (below and x == high)
    bounds = [f"{'above' if above else 'of at least'} {low:g}"] * math.isfinite(low)
    bounds += [f"{'below' if below else 'of at most'} {high:g}"] * math.isfinite(high)
    return Rule(holds, f"must be a number {' and '.join(bounds)}".rstrip())


def word(*known: str) -> Rule:
    few = "is neither {!r} nor {!r}".format(*known) if len(known) == 2 else f"is unknown (known: {', '.join(known)})"
    return Rule(lambda x: isinstance(x, str) and x in known, few, known)


def flag_or(*known: str) -> Rule:
    """A switch that may also be one of these words."""
    words = f"must be {', '.join(map(repr, (True, False, *known[:-1])))} or {known[-1]!r}"
    return Rule(lambda x: FLAG.holds(x) or (isinstance(x, str) and x in known), words, known)


def texts(of: Rule, what: str, least: int = 0) -> Rule:
    """Several texts, each as `of` says; one may stand alone."""
    of_kind = lambda x: isinstance(x, tuple | list | str) and all(of.holds(text) for text in listed(x))
    return Rule(lambda x: of_kind(x) and len(listed(x)) >= least, f"must be a tuple of {what}")


def listed(setting: str | tuple | list) -> list[str]:
    """The texts of a setting: one may stand alone."""
    return [setting] if isinstance(setting, str) else list(setting)


def or_none(rule: Rule, meaning: str, *others: Any) -> Rule:
    """The values of a rule, None with this meaning, and `others`."""
    allowed = lambda x: x is None or any(type(x) is type(other) and x == other for other in others)
    return Rule(lambda x: allowed(x) or rule.holds(x), f"{rule.words}; None is {meaning}", rule.known)


def _read_by(function: Callable, wrong: type[Exception], kind=str) -> Callable[[Any], bool]:
    """Whether a value is a text, or of another `kind`, that `function` reads without the error `wrong`."""

    def holds(x: Any) -> bool:
        try:
            return isinstance(x, kind) and (function(x), True)[1]
        except wrong:
            return False

    return holds


FLAG = Rule(lambda x: isinstance(x, bool | np.bool_), "must be True or False")
TEXT = Rule(lambda x: isinstance(x, str) and bool(x.strip()), "must be a text that is not empty")
PATTERN = Rule(_read_by(re.compile, re.error), "is no regular expression")
COLOR = Rule(_read_by(pictures.color, ValueError), 'must be a color such as "white" or "#ffcc00"')
BUCKETS = Rule(
    _read_by(functools.partial(buckets.sizes, resolution=64), ValueError, str | tuple | list),
    f"must be (height, width) pairs in pixels, or of {', '.join(buckets.PRESETS)}",
    tuple(buckets.PRESETS),
)
DICT = Rule(lambda x: isinstance(x, dict | ConfigDict) and bool(x), "must be a dict")
TARGETS = texts(PATTERN, f"{', '.join(lora.TARGETS)}, or ends of module names", least=1)
EVERY = or_none(whole(0), "never, as is 0")
AXIS = Rule(
    lambda x: type(x) is int and (x == -1 or x >= 1), "must be a whole number of at least 1, or -1 for the rest"
)
SAMPLER = Rule(
    _read_by(samplers.name_of, ValueError), f"is unknown (known: {', '.join(samplers.KINDS)})", samplers.KINDS
)
INIT = Rule(
    lambda x: isinstance(x, str) and (x in ("teacher", "random") or "/" in x or os.path.exists(x)),
    "is neither 'teacher', 'random' nor a folder or hub id with a UNet",
    ("teacher", "random"),
)
STUDENT = Rule(
    lambda x: isinstance(x, str) and (x in students.STUDENTS or x.endswith(".json")),
    f"is unknown (known: {', '.join(students.STUDENTS)}, and a student's file, FILE.json)",
    tuple(students.STUDENTS),
)

RULES = {
    "teacher": or_none(TEXT, "the embedded miniature", ""),
    "vae": or_none(TEXT, "the teacher's own", ""),
    "clip_skip": whole(0),
    "student": or_none(STUDENT, "the teacher itself", ""),
    "keep": or_none(number(0, 1, above=True, below=True), "the student by its name"),
    "task": or_none(TEXT, "the task that trains these parts", ""),
    "train": texts(word(*families.PARTS), f"parts: {', '.join(families.PARTS)}", least=1),
    "init": INIT,
    "blank": or_none(DICT, "no new pipeline"),
    "seed": whole(0, 2**32 - 1),
    "weight.noise": number(0),
    "weight.output": number(0),
    "weight.feature": number(0),
    "pairing": word(*students.PAIRINGS),
    "normalize_features": flag_or(*configuration.WORDS["normalize_features"]),
    "prediction_type": or_none(word("epsilon", "v_prediction"), "that of the teacher's scheduler", ""),
    "snr_gamma": or_none(number(0, above=True), "off"),
    "timestep_sampling": word("uniform", "min_snr"),
    "noise_offset": number(0),
    "input_perturbation": number(0),
    "caption_dropout": number(0, 1),
    "kl_weight": number(0),
    "quantize": or_none(word(*quantize.SCHEMES), "full precision", ""),
    "full_precision": texts(PATTERN, "ends of names of layers, as regular expressions"),
    "few_step.target": word("online", "average"),
    "few_step.phases": whole(1),
    "few_step.ways": whole(1),
    "few_step.ode_steps": whole(1),
    "few_step.guidance": Rule(
        lambda x: isinstance(x, tuple | list) and 1 <= len(x) <= 2 and all(number(1).holds(each) for each in x),
        "must be one or two numbers of at least 1, which is no guidance",
    ),
    "few_step.embedded": FLAG,
    "few_step.huber": or_none(number(0, above=True), "squares alone"),
    "lora.rank": or_none(whole(1), "whole parts"),
    "lora.alpha": or_none(number(0, above=True), "the rank"),
    "lora.targets": TARGETS,
    "lora.init": or_none(TEXT, "new adapters", ""),
    "lora.text_encoder.rank": or_none(whole(1), "that of the UNet"),
    "lora.text_encoder.alpha": or_none(number(0, above=True), "that of the UNet"),
    "lora.text_encoder.targets": or_none(TARGETS, "those of the UNet"),
    "prior.prompt": or_none(TEXT, "no prior preservation", ""),
    "prior.weight": number(0),
    "prior.pictures": whole(0),
    "prior.folder": or_none(TEXT, "`class` in the workdir", ""),
    "steps": whole(1, 2**31 - 1),
    "batch_size": whole(1),
    "accumulate": whole(1),
    "optimizer": DICT,
    "learning_rate": DICT,
    "text_encoder_rate": number(0),
    "max_grad_norm": or_none(number(0, above=True), "no clipping"),
    "bad_steps.spike": or_none(number(1, above=True), "no limit"),
    "bad_steps.in_a_row": whole(1),
    "ema_decay": or_none(number(0, 1, below=True), "no average"),
    "dtype": or_none(word(*dtypes.NAMES, *dtypes.SPELLINGS), "bfloat16, or float32 on a CPU", ""),
    "remat": flag_or(*configuration.WORDS["remat"]),
    "attention": or_none(word(*FORMS), "the one that pays on the device", ""),
    "mesh.data": AXIS,
    "mesh.fsdp": AXIS,
    "cpu_devices": whole(1, 1024),
    "compilation_cache": or_none(TEXT, "that of the environment", ""),
    "data.source": TEXT,
    "data.caption_column": or_none(TEXT, "text, caption or prompt", ""),
    "data.caption": or_none(TEXT, "each picture's own", ""),
    "data.image_column": or_none(TEXT, "file_name, file or path", ""),
    "data.background": COLOR,
    "data.resolution": whole(1),
    "data.buckets": or_none(BUCKETS, "squares", ""),
    "data.variants": or_none(PATTERN, "none", ""),
    "data.random_flip": FLAG,
    "data.collages": number(0),
    "data.collage_captions": or_none(PATTERN, "all", ""),
    "log_every": EVERY,
    "validation.every": EVERY,
    "validation.examples": whole(0),
    "sample.every": EVERY,
    "sample.prompts": or_none(texts(TEXT, "prompts, none of them empty"), "no pictures"),
    "sample.sampler": or_none(SAMPLER, "the model's own"),
    "sample.steps": or_none(whole(1, 1000), "those usual for the sampler"),
    "sample.guidance": or_none(number(0), "the model's own"),
    "checkpoint.every": EVERY,
    "checkpoint.keep": or_none(whole(1), "all"),
    "checkpoint.keep_every": EVERY,
}

# Keys whose groups are the arguments of functions of optax, as far as their names say what they may be.
ARGUMENTS = {
    "optimizer": {
        "b1": number(0, 1, below=True),
        "b2": number(0, 1, below=True),
        "eps": number(0),
        "weight_decay": number(0),
        "momentum": or_none(number(0, 1, below=True), "none"),
    },
    "learning_rate": {
        "init_value": number(0),
        "peak_value": number(0),
        "end_value": number(0),
        "value": number(0),
        "warmup_steps": whole(0),
        "decay_steps": whole(1),
        "transition_steps": whole(1),
    },
}


def check(config: ConfigDict) -> None:
    """Raises ValueError that lists all settings of a configuration that cannot work, each with its remedy.

    A key that flaxkd does not know is one, too, unless the task is not of this package."""
    values = leaves(config)
    faults = [f"{key} is missing: begin with configs/default.py" for key in RULES if key not in values]
    if ":" not in str(values.get("task")):
        faults += [_unknown(key) for key in values if key not in RULES]
    faults += [rule.fault(key, value) for key, value, rule in _ruled(config) if not rule.holds(value)]
    if faults := faults or list(_together(config)):
        raise ValueError(faults[0] if len(faults) == 1 else "\n  ".join([f"{len(faults)} settings:", *faults]))


def leaves(group: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """{"data.source": value, ...}; a group that has a rule of its own is a leaf."""
    found = {}
    for key, value in group.items():
        inner = isinstance(value, ConfigDict) and prefix + key not in RULES
        found |= leaves(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return found


def _ruled(config: ConfigDict) -> Iterator[tuple[str, Any, Rule]]:
    for key, value in leaves(config).items():
        if key in RULES:
            yield key, value, RULES[key]
            for name, rule in ARGUMENTS.get(key, {}).items() if DICT.holds(value) else ():
                if name in value and not (name == "decay_steps" and value[name] == config.steps):  # it follows steps
                    yield f"{key}.{name}", value[name], rule


def _unknown(key: str) -> str:
    here = diffusers_flags.HERE.get(key)
    return f"there is no key {key}" + (f"; here it is: {here}" if here else _meant(key, RULES))


def _together(config: ConfigDict) -> Iterator[str]:
    """What is wrong with settings that are each in their range."""
    if config.student and not any((config.weight.noise, config.weight.output, config.weight.feature)):
        yield "weight.noise, weight.output and weight.feature are all 0: there is nothing to learn from"
    if config.keep and config.student:
        yield (
            f"keep = {config.keep} and student = {config.student!r} are both given: --config.student=None lets keep "
            "choose, as configs/keep.py does"
        )
    if config.keep and config.blank:
        yield f"keep = {config.keep} and blank are both given: only a trained teacher can choose what to keep"
    if config.prior.prompt and (config.student or config.task not in (None, "", "finetune") or "vae" in config.train):
        yield (
            f"prior.prompt = {config.prior.prompt!r} is for fine-tuning alone, as configs/dreambooth.py does it: not "
            f"for student = {config.student!r}, task = {config.task!r}, train = {tuple(listed(config.train))}"
        )
    if config.prior.prompt and (config.batch_size % 2 or config.validation.examples % 2):
        yield (
            f"batch_size = {config.batch_size}, validation.examples = {config.validation.examples}: with prior.prompt "
            "half of them are pictures of the class, so both must be even"
        )
    if config.prior.prompt and not config.prior.pictures and not config.prior.folder:
        yield "prior.pictures = 0: then prior.folder must name your own pictures of the class"
    if config.data.collages and config.data.caption:
        yield (
            f"data.collages = {config.data.collages} and data.caption are both given: a collage needs two pictures "
            "with captions of their own"
        )
    if (config.lora.rank or config.lora.init) and "vae" in config.train:
        yield "lora is for UNets and text encoders: with train = ('vae',), give --config.lora.rank=None"
    if config.quantize and "vae" in config.train:
        yield f"quantize = {config.quantize!r} is for UNets: not for train = {tuple(listed(config.train))}"
    if config.quantize and (config.lora.rank or config.lora.init):
        yield (
            f"quantize = {config.quantize!r} and lora are both given: a LoRA file cannot say how its model is rounded. "
            f"Round it first, convert.to_diffusers --quantize {config.quantize}, and adapt that"
        )
    if config.timestep_sampling == "min_snr" and config.snr_gamma is None:
        yield "timestep_sampling = 'min_snr' samples by the weights of snr_gamma: give it, 5.0 is usual"
    if config.dtype and dtypes.spelt(config.dtype) == "float16":
        yield (
            f"dtype = {config.dtype!r}: small gradients are zero in float16 unless the loss is scaled, which flaxkd "
            "does not do. bfloat16 takes the same memory and needs no scaling; float32 is exact"
        )
    if config.teacher and config.blank and fresh.TEACHER not in config.blank.values():
        yield f"teacher = {config.teacher!r} and blank are both given: --config.blank=None trains the teacher"
    if config.blank:
        needed = {*families.FAMILIES["sd1"].parts, "scheduler", "vocab_size"}
        if missing := sorted(needed - {*config.blank}):
            yield f"blank lacks {', '.join(missing)}: configs/vae.py has an example"
    yield from _of_optax(config)


def _of_optax(config: ConfigDict) -> Iterator[str]:
    """What is wrong with the schedule and the optimizer: both are tried on a single weight."""
    try:
        if wrong := [rate for rate in _rates(config) if not (math.isfinite(rate) and rate >= 0)]:
            yield f"learning_rate: it would be {wrong[0]:g} at some step, and must be a number of at least 0"
            return
        tx, weight = step.optimizer(config), {"weight": np.zeros((2, 2), np.float32)}
        jax.eval_shape(lambda x: tx.update(x, tx.init(x), x), weight)
    except Exception as error:  # of any function of optax, for arguments that are not its
        said = isinstance(error, ValueError) and str(error).startswith(("learning_rate", "optimizer"))
        yield str(error) if said else f"optimizer.name = {config.optimizer['name']!r} cannot train: {error}"


def draws(config: ConfigDict) -> bool:
    """Whether a run shows samples."""
    return bool(config.sample.every and config.sample.prompts)


def validates(config: ConfigDict) -> bool:
    """Whether a run measures its loss on held-out examples."""
    return bool(config.validation.every and config.validation.examples)


def rates(config: ConfigDict) -> str:
    """The learning rate over a run, in words. They say so if its schedule ends elsewhere than the run."""
    first, *_, last = seen = _rates(config)
    said = f"{first:.3g} at first, {max(seen):.3g} at most, {last:.3g} at last" if len({*seen}) > 1 else f"{first:.3g}"
    horizon, steps = dict(config.learning_rate).get("decay_steps", config.steps), config.steps
    return said + f" (learning_rate.decay_steps is {horizon:,}, steps is {steps:,})" * (horizon != steps)


def _rates(config: ConfigDict) -> list[float]:
    """The learning rate at the first step, at the end of the warm-up, here and there, and at the last step."""
    schedule, last = step.learning_rate(config), config.steps - 1
    peak = min(dict(config.learning_rate).get("warmup_steps", 0), last)
    return [float(schedule(at)) for at in (0, peak, *np.linspace(0, last, 33).astype(int).tolist())]
