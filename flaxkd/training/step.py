"""The train step that every task shares: gradients, accumulation, optimizer, EMA, in one sharded `jax.jit`.

What is trained is a `Task` (task.py). The step knows neither UNet nor loss.
"""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from flaxkd.machine import sharding
from flaxkd.training.task import Task


class Health(NamedTuple):
    """The steps so far. usual: float32[], their mean loss; the others int32[], numbers of steps."""

    usual: jax.Array  # over about the last MEMORY good steps
    good: jax.Array
    skipped: jax.Array
    in_a_row: jax.Array  # skipped without a break, up to the last step


MEMORY = 100  # steps


class State(NamedTuple):
    """What a checkpoint holds. step: int32[], steps done. ema: like params, or empty if there is no average."""

    step: jax.Array
    params: dict
    opt_state: Any
    ema: dict
    health: Health


def learning_rate(config) -> Callable:
    """Any optax schedule by its name: `config.learning_rate` is {"schedule": name, **arguments}.

    As in diffusers, a run shorter than its warm-up only warms up. Raises ValueError for a name or arguments that optax
    does not have."""
    arguments = dict(config.learning_rate)
    name = arguments.pop("schedule", None)
    schedule = getattr(optax.schedules, str(name), None)
    if not callable(schedule):
        raise ValueError(f"learning_rate.schedule = {name!r} is not in optax.schedules ({', '.join(_schedules())})")
    if {"decay_steps", "warmup_steps"} <= {*arguments}:
        arguments["decay_steps"] = max(arguments["decay_steps"], arguments["warmup_steps"] + 1)
    return _made(schedule, "learning_rate", name, **arguments)


def _schedules() -> list[str]:
    return [name for name in dir(optax.schedules) if name.endswith("schedule") and "inject" not in name]


def _optimizers() -> list[str]:
    functions = {name: value for name, value in vars(optax).items() if inspect.isfunction(value)}
    takes = lambda name: "learning_rate" in inspect.signature(functions[name]).parameters
    return [name for name in functions if takes(name) and not name.startswith(("_", "scale_by"))]


def _made(function: Callable, group: str, name: str, *first, **arguments):
    """function(*first, **arguments), of optax. Raises ValueError with the arguments it takes."""
    try:
        return function(*first, **arguments)
    except (TypeError, ValueError, AttributeError) as error:
        takes = [*inspect.signature(function).parameters][len(first) :]
        raise ValueError(
            f"{group}: optax.{name} takes {', '.join(takes)}, and cannot be made with {arguments}: {error}"
        ) from error


def optimizer(config) -> optax.GradientTransformation:
    """Clipping by the global norm (None: none), then AdamW or another optimizer of optax by name.

    Raises ValueError, as `learning_rate` does."""
    arguments = dict(config.optimizer)
    name = arguments.pop("name", None)
    if name not in (known := _optimizers()):
        raise ValueError(f"optimizer.name = {name!r} is not in optax ({', '.join(known)})")
    clip = optax.identity() if config.max_grad_norm is None else optax.clip_by_global_norm(config.max_grad_norm)
    chosen = _made(getattr(optax, name), "optimizer", name, learning_rate(config), **arguments)
    encoders = [optax.stateless(slower(config.text_encoder_rate))] * (config.text_encoder_rate != 1)
    return optax.chain(clip, chosen, *encoders)


def slower(rate: float) -> Callable:
    """Another learning rate of the text encoders, `rate` times that of the UNet: their updates times `rate`."""
    times = lambda part, tree: jax.tree.map(lambda x: rate * x, tree) if part.startswith("text_encoder") else tree
    return lambda updates, params: {part: times(part, tree) for part, tree in updates.items()}


def init_state(params: dict, tx: optax.GradientTransformation, ema: bool) -> State:
    """The state before the first step. Its parameters are copies: the step donates them, the caller's stay."""
    params = jax.tree.map(jnp.copy, params)
    average = jax.tree.map(jnp.copy, params) if ema else {}
    health = Health(jnp.zeros((), jnp.float32), *jnp.zeros((3,), jnp.int32))
    return State(jnp.zeros((), jnp.int32), params, tx.init(params), average, health)


def state_shapes(task: Task, config, tx: optax.GradientTransformation) -> State:
    """The state of a training as shapes, without compute."""
    return jax.eval_shape(lambda trained: init_state(trained, tx, bool(config.ema_decay)), task.trained)


def judge(health: Health, loss, grad_norm, spike: float | None) -> tuple[jax.Array, Health]:
    """(bool[], health after it): is a step of this loss and gradient norm to be taken, or skipped?

    Not if one of them is not finite, nor if the loss is `spike` times what is usual after MEMORY good steps."""
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    if spike is not None:
        good &= (health.good < MEMORY) | (loss <= spike * health.usual)
    share = 1 / jnp.minimum(health.good + 1, MEMORY)
    usual = jnp.where(good, health.usual + share * (loss - health.usual), health.usual)
    in_a_row = jnp.where(good, 0, health.in_a_row + 1)
    return good, Health(usual, health.good + good, health.skipped + ~good, in_a_row)


def mean(function: Callable, inputs, parts: int):
    """`function` of a batch, evaluated on `parts` of it one after another, in the memory of one part.

    function: inputs -> a tree of means over their examples. inputs: a tree of [b, ...], b a multiple of `parts` times
    the devices."""
    if parts == 1:
        return function(inputs)
    # Every part takes examples from all devices: the batch axis is split from within.
    split = lambda x: jnp.swapaxes(x.reshape(-1, parts, *x.shape[1:]), 0, 1)
    add = lambda total, part: (jax.tree.map(jnp.add, total, function(part)), None)
    inputs = jax.tree.map(split, inputs)
    first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], inputs))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), first)
    total, _ = jax.lax.scan(add, zeros, inputs)
    return jax.tree.map(lambda x: x / parts, total)


def make_step(task: Task, config, tx, mesh, state: State) -> tuple[Callable, Callable]:
    """(train_step, evaluate), both compiled once.

    train_step(state, frozen, batch, key) -> (state, metrics): one update, or none if `judge` says so; `state` is
    donated. All randomness is fold_in(key, step). The key is an argument, since another seed must not compile another
    program.
    evaluate(trained, frozen, average, batch) -> metrics: the loss at fixed noise and timesteps, the same at every call
    and, but for rounding, on any number of devices. The batch has any size. On its devices, no more examples are held
    at a time than in a training step: a step that fits has a validation that fits.
    """
    schedule = learning_rate(config)
    shardings = sharding.params(mesh, state)
    frozen = sharding.params(mesh, task.frozen)
    data, everywhere = sharding.batch(mesh), sharding.replicated(mesh)

    def gradients(trained, frozen, average, inputs):
        (_, metrics), grads = jax.value_and_grad(task.loss, has_aux=True)(trained, frozen, average, inputs)
        return grads, metrics

    def train_step(state: State, frozen, batch, key):
        inputs = task.prepare(jax.random.fold_in(key, state.step), batch)
        grads, metrics = mean(lambda x: gradients(state.params, frozen, state.ema, x), inputs, config.accumulate)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        ema = state.ema
        if ema:  # the average of few weights is short, or it would remember the start
            decay = jnp.minimum(config.ema_decay, (1 + state.step) / (10 + state.step))
            ema = jax.tree.map(lambda average, new: decay * average + (1 - decay) * new, ema, params)
        grad_norm = optax.tree.norm(grads)
        good, health = judge(state.health, metrics["loss"], grad_norm, config.bad_steps.spike)
        made, before = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        kept = jax.tree.map(lambda new, old: jnp.where(good, new, old), made, before)
        taken = state.step - state.health.skipped  # a skipped step does not move the optimizer's schedule
        metrics |= {"learning_rate": schedule(taken), "grad_norm": grad_norm}
        metrics |= {"skipped": health.skipped, "skipped_in_a_row": health.in_a_row}
        return State(state.step + 1, *kept, health), metrics

    def evaluate(trained, frozen, average, batch):
        # Noise is sampled before examples are repeated: all count alike, whatever the number of devices.
        inputs = sharding.repeated(task.prepare(jax.random.key(0), batch), mesh)
        examples = len(jax.tree.leaves(inputs)[0]) // mesh.size  # on a device
        fitting = config.batch_size // config.accumulate // mesh.size
        parts = next(n for n in range(1, examples + 1) if examples % n == 0 and examples // n <= fitting)
        return mean(lambda x: task.loss(trained, frozen, average, x)[1], inputs, parts)

    options = sharding.compiler_options(mesh.devices.flat[0].platform, bool(config.remat))
    train = jax.jit(
        train_step,
        in_shardings=(shardings, frozen, data, everywhere),
        out_shardings=(shardings, everywhere),
        donate_argnums=0,
        compiler_options=options,
    )
    return train, jax.jit(
        evaluate,
        in_shardings=(shardings.params, frozen, shardings.ema, everywhere),
        out_shardings=everywhere,
        compiler_options=options,
    )
