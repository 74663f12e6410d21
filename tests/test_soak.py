"""A run that is killed again and again, at random moments, ends in the parameters of one that is not, bit for bit.

By hand: FLAXKD_SOAK=20 says how often. The suite has one kill (tests/faults/), and `python -m tests.faults` has one at
every stage of a run.
"""

import os
import random
import re
import signal
import time

import pytest

from tests.running import assert_same_bits, records, state

KILLS = int(os.environ.get("FLAXKD_SOAK", "0"))
EVERY = 20  # steps between checkpoints
DEADLY = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)  # the last saves first, if it comes late enough


@pytest.mark.skipif(not KILLS, reason="takes minutes: FLAXKD_SOAK is the number of kills")
def test_kills_at_random_moments_change_nothing(place, tmp_path):
    workdir, chance = tmp_path / "killed", random.Random(0)
    keys = {"checkpoint.every": EVERY, "validation.every": 100, "log_every": EVERY}
    keys["learning_rate.decay_steps"] = 100_000
    start = lambda workdir, steps: place.train(workdir, steps=steps, **keys)
    checkpoints = lambda: {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}

    begin, job = time.time(), start(workdir, 100_000)
    job.until((workdir / "checkpoints" / str(EVERY)).exists, "a save")
    usual = time.time() - begin
    job.send(signal.SIGKILL)
    job.end(None)
    for _ in range(KILLS - 1):
        job = start(workdir, 100_000)
        time.sleep(chance.uniform(0, 2 * usual))
        job.send(chance.choice(DEADLY))
        output = job.end(None)
        assert job.status in (-signal.SIGKILL, -signal.SIGTERM, 143), output

    before, job = checkpoints(), start(workdir, 100_000)
    job.until(lambda: checkpoints() - before, "another save")
    job.send(signal.SIGTERM)
    output = job.end(143)
    assert "resuming at step" in output
    steps = int(re.search(r"stopped at step (\d+)", output)[1])
    print(f"killed {KILLS} times on the way to step {steps}, checkpoint every {EVERY}")

    start(tmp_path / "straight", steps).end(within=3600)
    assert_same_bits(state(workdir, steps), state(tmp_path / "straight", steps))
    trained = [r["step"] for r in records(workdir) if "grad_norm" in r and r["step"] % EVERY == 0]
    assert trained == list(range(EVERY, steps + 1, EVERY))  # none twice, none missing
