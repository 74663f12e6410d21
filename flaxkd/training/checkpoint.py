"""Nothing is lost: asynchronous Orbax checkpoints of parameters, optimizer, EMA, step and data position.

The teacher is never saved. Neither is a random state: random numbers derive from seed and step.
"""

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from flaxkd import export, students
from flaxkd.machine import checkpoints, files, hosts, owners
from flaxkd.training import metrics
from flaxkd.training.step import State

# Keys of a config that may differ when a run resumes: they change what it shows, or its next steps alone. bad_steps is
# among them: a run stopped by its bad steps must be able to resume with other limits.
FREE = (
    "steps",
    "checkpoint",
    "log_every",
    "sample",
    "validation",
    "workdir",
    "cpu_devices",
    "compilation_cache",
    "bad_steps",
)


CONFIG = "config.json"
# What a run writes before its first step, beside its claim.
BEGUN = (metrics.FILE, "tensorboard", "samples", "samples.png", "curves.png", "blank", *students.CHOSEN)


def reached(workdir: Path) -> int:
    """The last optimizer step in the checkpoints or figures of a workdir; 0 for none."""
    recorded = (record["step"] for record in metrics.read(workdir))
    return max(export.newest_step(workdir) or 0, *recorded, 0)


def check_claim(workdir: Path, config: dict) -> int | None:
    """The `steps` of the run in `workdir`, if it took one and may go on with this configuration; None without a run.

    `steps` may change, though not below those taken, and the horizon of the schedule with it. A key younger than the
    run does not count. A run that ended before its first step claims nothing: another configuration may take its place.
    Raises ValueError that names the keys in which the workdir's configuration differs, or if it is none of a run."""
    path, done = workdir / CONFIG, reached(workdir)
    if path.is_file() and not _of_a_run(path):
        raise ValueError(f"{path} is no configuration of a run: choose another --workdir, flaxkd writes its own there")
    if not done or not path.is_file():
        return None
    before = files.read_json(path)
    given_by_keep = ("student",) if config.get("keep") else ()  # a file of the workdir, which may have moved
    files.compare(
        path,
        _older(config, before) | {"learning_rate": _following(config, before)},
        differ="holds a run of another configuration",
        remedy="Choose another --workdir, or delete that one to start over.",
        free=[key for key in (*FREE, *given_by_keep) if key != "steps" or config["steps"] >= done],
    )
    return before["steps"]


def _older(config: dict, before: dict) -> dict:
    """The keys of `config` that `before` has, too; its optimizer, whose keys are arguments, is whole."""
    common = {key: value for key, value in config.items() if key in before}
    groups = [key for key in common if isinstance(common[key], dict) and isinstance(before[key], dict)]
    return common | {key: _older(common[key], before[key]) for key in groups if key not in ("optimizer", "blank")}


def _following(config: dict, before: dict) -> Any:
    """config.learning_rate, with the horizon of `before` if both have as many steps as their schedules."""
    now, then = config.get("learning_rate"), before.get("learning_rate")
    ends = lambda of, rate: isinstance(rate, dict) and rate.get("decay_steps") == of["steps"]
    return now | {"decay_steps": before["steps"]} if ends(config, now) and ends(before, then) else now


@contextlib.contextmanager
def claimed(workdir: Path, config: dict) -> Iterator[None]:
    """In this context, `workdir` is this run's alone, and able to hold its checkpoints. The first process holds it.

    Raises owners.Held if another process trains there, OSError if it cannot hold a checkpoint, and as `claim` does."""
    with contextlib.ExitStack() as held:
        if hosts.is_first():
            workdir.mkdir(parents=True, exist_ok=True)
            held.enter_context(owners.alone(workdir, "a training"))
            for folder in (workdir, workdir / "samples"):
                files.clear(folder)
            if not (workdir / "checkpoints").is_dir():
                probe(workdir)
        claim(workdir, config)
        yield


def claim(workdir: Path, config: dict) -> None:
    """Claims `workdir` for this run: writes config.json, unless it holds a run of another configuration.

    The first process writes it, and all processes check. Raises ValueError, as `check_claim` does, or if the processes
    do not share the folder."""
    path = workdir / CONFIG
    check_claim(workdir, config)
    if hosts.is_first() and not _holds(path, config):
        files.write_json(path, config)
    hosts.wait("claimed")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: give all a --workdir on a "
            "file system shared by their hosts"
        )


def clear(workdir: Path, config: dict) -> None:
    """Removes what a run of another configuration left that ended before its first step.

    Raises owners.Held if it has not ended."""
    path = workdir / CONFIG
    if reached(workdir) or not path.is_file() or not _of_a_run(path) or _holds(path, config):
        return
    with owners.alone(workdir, "a training"):
        for left in (workdir / name for name in BEGUN):
            if left.is_dir():
                shutil.rmtree(left)
            left.unlink(missing_ok=True)


def _of_a_run(path: Path) -> bool:
    """Whether this config.json is flaxkd's: each part of a model has a file of that name, too."""
    content = files.read_json(path)
    return isinstance(content, dict) and {"steps", "batch_size", "learning_rate"} <= content.keys()


def _holds(path: Path, config: dict) -> bool:
    return path.is_file() and files.read_json(path) == json.loads(json.dumps(config))  # JSON has no tuples


class Manager(ocp.CheckpointManager):
    """Orbax's manager of the checkpoints in `folder`, which it may know under a plainer name."""

    def __init__(self, folder: Path, **options):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        super().__init__(files.plain(folder), options=ocp.CheckpointManagerOptions(**options))


def manager(workdir: Path, keep: int | None, keep_every: int | None = None) -> Manager:
    """Keeps the newest `keep` checkpoints (None: all), and that of every `keep_every`-th step for good (0: none)."""
    return Manager(
        workdir / "checkpoints", max_to_keep=keep, keep_period=keep_every or None, enable_async_checkpointing=True
    )


def probe(workdir: Path) -> None:
    """Raises OSError, with the reason, if a folder cannot hold a checkpoint: it saves a small one, and reads it."""
    folder = workdir / owners.unfinished("probe")
    processes = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}, barrier_sync_key_prefix="probe"
    )
    try:
        with Manager(folder, multiprocessing_options=processes, create=False) as made:
            made.save(0, args=ocp.args.Composite(state=ocp.args.StandardSave({"step": np.zeros((), np.int32)})))
            made.wait_until_finished()
            _check(made)
    except Exception as error:
        raise OSError(
            f"{workdir} cannot hold a checkpoint: {checkpoints.in_a_line(error)}; {files.free(workdir)} are free. Give "
            "a --workdir on another disk or by another name"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def save(manager: Manager, state: State, data_position: dict) -> None:
    """Starts a save; training may continue meanwhile. data_position: of the next batch, any JSON.

    Raises OSError, as `wait` does, if this checkpoint or the one before cannot be written."""
    wait(manager)
    step = int(state.step)
    if step not in manager.all_steps():
        args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_position))
        with _written(manager, sum(x.nbytes for x in jax.tree.leaves(state))):
            manager.save(step, args=args)


def is_good(state: State) -> bool:
    """Whether a checkpoint of this state is worth keeping: its last step was taken. It waits for the device.

    A run that diverges would otherwise replace its good checkpoints by those of skipped steps."""
    return int(state.health.in_a_row) == 0


def wait(manager: Manager) -> None:
    """Waits until all is saved and known to be readable.

    Raises OSError that says what is left if a save fails: a disk may be full."""
    with _written(manager):
        manager.wait_until_finished()
        if hosts.is_first():
            _check(manager)


def _check(manager: Manager) -> None:
    """Reads the number of the newest checkpoint's step. What Orbax calls finished may still lack its arrays."""
    if (step := manager.latest_step()) is not None:
        if checkpoints.read_scalar(manager.folder / str(step) / "state", "step") != step:
            raise ValueError(f"what was written for step {step} cannot be read")


def _written(manager: Manager, needed: int | None = None):
    whole = lambda: [s for s in manager.all_steps() if (manager.folder / str(s)).is_dir()]
    return checkpoints.written(manager.folder, whole, needed)


def restore(manager: Manager, like: State, shardings: State) -> tuple[State, dict] | None:
    """(state, data position) of the newest readable checkpoint, on `shardings`; None if there are no checkpoints.

    A broken one, or one with NaN, is removed, and the one before is used. Raises ValueError if there are checkpoints
    but none can be read, or if processes can read different ones."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like._asdict(), shardings._asdict()
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    failure, found = None, None
    try:
        found = checkpoints.newest(manager.folder, manager.all_steps(), lambda step: _read(manager, step, args))
    except ValueError as error:  # raised below, once all processes have compared: they wait for this one
        failure = error
    if not hosts.same(-1 if found is None else found[0]):
        raise ValueError(
            f"process {jax.process_index()} and the others can read different checkpoints of {manager.folder}; it "
            f"can read {'none' if found is None else found[0]}. Move the newest one away: it is broken for some. "
            f"{failure or ''}"
        )
    if failure:
        raise failure
    if found is None:
        return None
    step, restored = found
    for broken in [s for s in manager.all_steps() if s > step]:
        manager.delete(broken)  # else the run could not save this step again
    return State(**restored.state), restored.data


def _read(manager: Manager, step: int, args):
    """The content of a checkpoint. Raises ValueError for NaN: a run that starts with it never comes back."""
    restored = manager.restore(step, args=args)
    checkpoints.check_finite({name: restored.state[name] for name in ("params", "ema")})
    checkpoints.check_finite({"opt_state": restored.state["opt_state"]}, infinite=True)  # some start at infinity
    return restored
