"""Nothing is lost: asynchronous Orbax checkpoints of parameters, optimizer, EMA, step and data position.

The teacher is never saved. Neither is a random state: random numbers derive from seed and step.
"""

from pathlib import Path

import jax
import orbax.checkpoint as ocp

from flaxkd.machine import checkpoints, files, hosts
from flaxkd.training.step import State

# Keys of a config that may differ when a run resumes: they change what it shows, not what it computes. bad_steps
# is among them: a run stopped by its bad steps must be able to resume with other limits.
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
    "remedy": "Choose another --workdir, or delete that one to start over.",
    "free": FREE,
}


def claim(workdir: Path, config: dict) -> None:
    """Claims `workdir` for this run: writes config.json, or checks that the one there belongs to the same run.

    The first process writes it, and all processes check. Raises ValueError if the workdir belongs to another
    configuration (the message names the differing keys), or if the processes do not share the folder."""
    path = workdir / "config.json"
    if hosts.is_first():
        files.claim(path, config, **CLAIM)
    hosts.wait("claimed")
    if not path.is_file():
        raise ValueError(
            f"process {jax.process_index()} does not see what process 0 wrote to {workdir}: give all a --workdir on a "
            "file system shared by their hosts"
        )
    files.compare(path, config, **CLAIM)


def manager(workdir: Path, keep: int, keep_every: int | None = None) -> ocp.CheckpointManager:
    """Keeps the newest `keep` checkpoints, and that of every `keep_every`-th step for good."""
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every, enable_async_checkpointing=True)
    return ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options)


def save(manager: ocp.CheckpointManager, state: State, data_position: dict) -> None:
    """Starts a save; training may continue meanwhile. data_position: of the next batch, any JSON.

    Raises OSError, as `wait` does, if this checkpoint or the one before cannot be written."""
    step = int(state.step)
    if step not in manager.all_steps():
        args = ocp.args.Composite(state=ocp.args.StandardSave(state._asdict()), data=ocp.args.JsonSave(data_position))
        with _written(manager):
            manager.save(step, args=args)


def wait(manager: ocp.CheckpointManager) -> None:
    """Waits until all is saved. Raises OSError that says what is left if a save fails: a disk may be full."""
    with _written(manager):
        manager.wait_until_finished()


def _written(manager: ocp.CheckpointManager):
    folder = Path(manager.directory)
    return checkpoints.written(folder, lambda: [s for s in manager.all_steps() if (folder / str(s)).is_dir()])


def restore(manager: ocp.CheckpointManager, like: State, shardings: State) -> tuple[State, dict] | None:
    """(state, data position) of the newest readable checkpoint, on `shardings`; None if there are no checkpoints.

    A broken one is removed, and the one before is used. Raises ValueError if there are checkpoints but none can be
    read, or if processes can read different ones."""
    abstract = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like._asdict(), shardings._asdict()
    )
    args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), data=ocp.args.JsonRestore())
    failure, found = None, None
    try:
        read = lambda step: manager.restore(step, args=args)
        found = checkpoints.newest(Path(manager.directory), manager.all_steps(), read)
    except ValueError as error:  # raised below, once all processes have compared: they wait for this one
        failure = error
    if not hosts.same(-1 if found is None else found[0]):
        raise ValueError(
            f"process {jax.process_index()} and the others can read different checkpoints of {manager.directory}; it "
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
