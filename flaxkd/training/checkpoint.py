"""Nothing is lost: asynchronous Orbax checkpoints of the student, its optimizer, EMA, step and data position.

The teacher is never saved. Randomness needs no state of its own: it is derived from seed and step.
"""

import contextlib
import json
import logging
import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flaxkd.machine import hosts
from flaxkd.training.step import State

# Keys of a config that may differ when a run resumes: they change what it shows, not what it computes. And bad_steps,
# since whoever finds a run stopped by its own caution must be able to go on with more or less of it.
FREE = (
    "checkpoint",
    "log_every",
    "sample",
    "validation",
    "workdir",
    "cpu_devices",
    "compilation_cache",
    "bad_steps",
)


def claim(workdir: Path, config: dict) -> None:
    """Makes `workdir` this run's own: writes config.json, or checks that the one there is the same run's.

    Of several processes, the first writes it and all check. Raises ValueError naming the keys that differ, for a
    workdir that belongs to another configuration, and for one that is not the same folder for all processes."""
    path = workdir / "config.json"
    config = json.loads(json.dumps(config))
    _compare(path, config)
    if hosts.is_first():
        workdir.mkdir(parents=True, exist_ok=True)
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps(config, indent=2) + "\n")
        scratch.rename(path)
    hosts.wait("claimed")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: give all a --workdir on a "
            "file system that their hosts share"
        )
    _compare(path, config)


def _compare(path: Path, config: dict) -> None:
    """Raises ValueError if `path` is there and has another configuration."""
    if not path.is_file():
        return
    before = json.loads(path.read_text())
    differ = [k for k in sorted({*before, *config} - {*FREE}) if before.get(k) != config.get(k)]
    if differ:
        lines = "".join(f"\n  {k}: {before.get(k)!r} there, {config.get(k)!r} here" for k in differ)
        raise ValueError(
            f"{path.parent} holds a run of another configuration:{lines}\n"
            "Choose another --workdir, or delete that one to begin anew."
        )


def manager(workdir: Path, keep: int, keep_every: int | None = None) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints, and for good those of every `keep_every`-th step."""
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, keep_period=keep_every, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: State, data_position: dict) -> None:
    """Begins to save; training may go on meanwhile. data_position: of the batch that comes next, any json.

    Raises OSError, as `wait` does, if this one or the one before cannot be written."""
    step = int(state.step)
    if step not in manager.all_steps():
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_position)
        )
        with _written(manager):
            manager.save(step, args=args)


def wait(manager: ocp.CheckpointManager) -> None:
    """Until all is saved. Raises OSError, saying what is left, if it cannot be written: a disk may be full."""
    with _written(manager):
        manager.wait_until_finished()


@contextlib.contextmanager
def _written(manager: ocp.CheckpointManager):
    try:
        yield
    # Orbax and TensorStore raise many kinds for a full disk, from a thread of their own.
    except Exception as error:
        free = shutil.disk_usage(manager.directory).free / 2**30
        whole = [step for step in manager.all_steps() if (manager.directory / str(step)).is_dir()]
        raise OSError(
            f"a checkpoint cannot be written to {manager.directory}, which has {free:.1f} GiB free: "
            f"{_in_a_line(error)}\n"
            f"The newest whole one is {f'that of step {max(whole)}' if whole else 'none'}. Make room, or lower "
            "checkpoint.keep; the same command goes on from there."
        ) from error


def _in_a_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def restore(manager: ocp.CheckpointManager, like: State, shardings: State) -> tuple[State, dict] | None:
    """(state, data position) of the newest checkpoint that can be read, on `shardings`; None if there is none.

    A broken one, as a full disk or a power cut leaves it, is moved out of the way with a warning, and the one
    before is taken. Raises ValueError if there are checkpoints but none can be read."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like._asdict(), shardings._asdict()
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    errors, found = [], None
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            found = manager.restore(step, args=args)
        except Exception as error:  # Orbax and TensorStore raise many kinds for a file cut short
            errors.append(f"{step}: {_in_a_line(error)}")
            logging.warning("checkpoint %s cannot be read, taking the one before", errors[-1])
            continue
        break
    if not hosts.same(-1 if found is None else step):
        raise ValueError(
            f"process {jax.process_index()} can read another checkpoint of {manager.directory} than the others: "
            f"{step}. Move the newest one away, which is broken for some. {' '.join(errors)}"
        )
    if found is not None:
        for broken in [s for s in manager.all_steps() if s > step]:
            manager.delete(broken)  # or the run could not save this step again
        return State(**found.state), found.data
    if errors:
        folder = manager.directory
        raise ValueError(f"no checkpoint in {folder} can be read:\n  " + "\n  ".join(errors))
    return None
