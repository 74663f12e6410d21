"""python -m flaxkd.bench: see benchmark.py."""

import sys
from pathlib import Path

import jax

from flaxkd import students
from flaxkd.bench import torch_works
from flaxkd.bench.benchmark import changes, run
from flaxkd.machine import command, cpu

RIVALS = {None: [], "eager": [torch_works.EAGER], "torch": [torch_works.EAGER, torch_works.COMPILED]}


def main(_=None) -> None:
    config = FLAGS.config
    jax.config.update("jax_num_cpu_devices", config.cpu_devices)
    command.keep_compiled_programs()
    cpu.keep_memory()
    with command.reported():
        run(
            config,
            names=[name for names in FLAGS.students for name in names.split(",") if name],
            against=RIVALS[FLAGS.against],
            unet=changes(FLAGS.unet),
            rounds=FLAGS.rounds,
            steps=FLAGS.steps,
            out=Path(FLAGS.out),
        )


if __name__ == "__main__":
    from absl import app, flags
    from ml_collections import config_flags

    everyone = [student.names[0] for student in students.TABLE]
    config_flags.DEFINE_config_file(
        "config", "configs/small.py", "Whose training step; its student does not matter"
    )
    flags.DEFINE_multi_string(
        "students", everyone, "A row of python -m flaxkd.students; may be given repeatedly, or several with commas"
    )
    flags.DEFINE_enum("against", None, ["eager", "torch"], "PyTorch, eager or also with torch.compile")
    flags.DEFINE_multi_string("unet", [], "KEY=JSON of the teacher's unet/config.json, with random weights")
    flags.DEFINE_integer("rounds", 7, "Times that each is done")
    flags.DEFINE_integer("steps", 25, "Denoising steps of a picture")
    flags.DEFINE_string("out", "bench", "Folder of the result")
    FLAGS = flags.FLAGS
    app.run(main, argv=command.underscored(sys.argv, FLAGS))
