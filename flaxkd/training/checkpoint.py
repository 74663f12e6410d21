"""Nothing is lost: asynchronous Orbax checkpoints of what is trained, its optimizer, EMA, step and data position.

The teacher is never saved. Randomness needs no state of its own: it is derived from seed and step.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flaxkd.machine import checkpoints, files, hosts
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


CLAIM = {
    "differ": "holds a run of another configuration",
    "remedy": "Choose another --workdir, or delete that one to begin anew.",
    "free": FREE,
}


def claim(workdir: Path, config: dict) -> None:
    """Makes `workdir` this run's own: writes config.json, or checks that the one there is the same run's.

    The first of several processes writes it, and all check. Raises ValueError naming the keys that differ, for a
    workdir that belongs to another configuration, and for one that is not the same folder for all processes."""
    path = workdir / "config.json"
    if hosts.is_first():
        files.claim(path, config, **CLAIM)
    hosts.wait("claimed")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: give all a --workdir on a "
            "file system that their hosts share"
        )
    files.compare(path, config, **CLAIM)


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


def _written(manager: ocp.CheckpointManager):
    folder = Path(manager.directory)
    return checkpoints.written(folder, lambda: [s for s in manager.all_steps() if (folder / str(s)).is_dir()])


def restore(manager: ocp.CheckpointManager, like: State, shardings: State) -> tuple[State, dict] | None:
    """(state, data position) of the newest checkpoint that can be read, on `shardings`; None if there is none.

    A broken one is removed, and the one before is taken. Raises ValueError if there are checkpoints but none can be
    read, or if processes can read different ones."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like._asdict(), shardings._asdict()
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    failure, found = None, None
    try:
        read = lambda step: manager.restore(step, args=args)
        found = checkpoints.newest(Path(manager.directory), manager.all_steps(), read)
    except ValueError as error:  # told after all processes have been asked, or the others would wait for this one
        failure = error
    if not hosts.same(-1 if found is None else found[0]):
        raise ValueError(
            f"process {jax.process_index()} can read another checkpoint of {manager.directory} than the others: "
            f"{'none' if found is None else found[0]}. Move the newest one away, which is broken for some. "
            f"{failure or ''}"
        )
    if failure:
        raise failure
    if found is None:
        return None
    step, restored = found
    for broken in [s for s in manager.all_steps() if s > step]:
        manager.delete(broken)  # or the run could not save this step again
    return State(**restored.state), restored.data
