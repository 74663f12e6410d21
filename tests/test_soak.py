"""A run that is killed again and again, at random moments, ends in the parameters of one that is not, bit for bit.

By hand: FLAXKD_SOAK=20 says how often. The suite has one kill (tests/faults/), and `python -m tests.faults` has one at
every stage of a run.
"""

import os
import random
import re
import signal
import subprocess
import time

import pytest

from tests.running import assert_same_bits, finish, records, state, wait_for

KILLS = int(os.environ.get("FLAXKD_SOAK", "0"))
EVERY = 20  # steps between checkpoints
DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)  # the last saves first, if it comes late enough


@pytest.mark.skipif(not KILLS, reason="takes minutes: FLAXKD_SOAK is the number of kills")
def test_kills_at_random_moments_change_nothing(plain, command, tmp_path):
    workdir, chance = tmp_path / "killed", random.Random(0)
    keys = plain | {"checkpoint.every": EVERY, "validation.every": 100, "log_every": EVERY}
    start = lambda workdir, steps: command(workdir, **keys, **{"steps": steps, "learning_rate.decay_steps": 100_000})
    checkpoints = lambda: {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}

    begin, process = time.time(), start(workdir, 100_000)
    wait_for(workdir / "checkpoints" / str(EVERY), process)
    usual = time.time() - begin
    process.kill()
    process.communicate()
    for _ in range(KILLS - 1):
        process = start(workdir, 100_000)
        try:
            process.communicate(timeout=chance.uniform(0, 2 * usual))
        except subprocess.TimeoutExpired:
            process.send_signal(chance.choice(DEADLY))
        output = "".join(process.communicate())
        assert process.returncode in (-signal.SIGKILL, -signal.SIGTERM, 143), output

    before, process = checkpoints(), start(workdir, 100_000)
    while not checkpoints() - before:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output = finish(process, 143)
    assert "resuming at step" in output
    steps = int(re.search(r"stopped at step (\d+)", output)[1])
    print(f"killed {KILLS} times on the way to step {steps}, checkpoint every {EVERY}")

    finish(start(tmp_path / "straight", steps))
    assert_same_bits(state(workdir, steps), state(tmp_path / "straight", steps))
    trained = [r["step"] for r in records(workdir) if "grad_norm" in r and r["step"] % EVERY == 0]
    assert trained == list(range(EVERY, steps + 1, EVERY))  # none twice, none missing
