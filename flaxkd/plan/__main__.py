"""python -m flaxkd.plan: see table.py."""

import sys
import time
from pathlib import Path

import jax

from flaxkd.machine import command, files
from flaxkd.plan import devices
from flaxkd.plan.table import largest, markdown, next_size, row


def main(_=None) -> None:
    config, begin = FLAGS.config, time.time()
    rows = []
    with command.reported():
        if FLAGS.largest and FLAGS.whole:
            raise ValueError("--largest compiles several steps, which takes hours with --whole: leave one out")
        targets = [devices.target(name) for name in FLAGS.device]
        for target in targets:
            if not FLAGS.largest:
                rows.append(row(config, target, FLAGS.whole))
                continue
            found = largest(config, target)
            rows += found
            if found:
                rows += next_size(config, target, found[-1]["per_device"] // config.accumulate)
    out = Path(FLAGS.out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / "plan.json", rows)
    files.write_text(out / "plan.md", markdown(rows))
    print(markdown(rows))
    print(f"wrote {out / 'plan.json'}\nwrote {out / 'plan.md'}   ({time.time() - begin:.0f} s)")


if __name__ == "__main__":
    # A plan needs no accelerator, and a training may hold the one of this machine.
    jax.config.update("jax_platforms", "cpu")
    from absl import app, flags
    from ml_collections import config_flags

    config_flags.DEFINE_config_file("config", None, "Configuration, e.g. configs/small.py:sd15")
    flags.DEFINE_multi_string(
        "device", None, "TPU topology (v5e:4x8) or GPUs (a100-80x8); may be given repeatedly"
    )
    flags.DEFINE_bool("largest", False, "Also look for the largest batch per device that fits")
    flags.DEFINE_bool("whole", False, "Compile for a TPU to the end")
    flags.DEFINE_string("out", "plan", "Folder of the result")
    flags.mark_flags_as_required(["config", "device"])
    FLAGS = flags.FLAGS
    app.run(main, argv=command.underscored(sys.argv, FLAGS))
