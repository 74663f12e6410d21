"""The one thread that owns the models: it warms up their programs, and draws what waits in the queue.

A batch is always filled up to the same number of pictures, so that one compiled program draws a picture alone and
beside others: the same seed gives the same bytes. A sampler without noise between its steps adds noise of weight 0,
which changes nothing and saves a second program. The loop over the steps is Python's, as everywhere in flaxkd
(diffusion/sampling.py): progress is counted there, and a cancelled batch ends there, without a callback in the program.
"""

import dataclasses
import functools
import io
import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from flaxkd.drawing import batches, grids
from flaxkd.machine import progress
from flaxkd.serve.jobs import Queue, Row
from flaxkd.serve.metrics import Metrics
from flaxkd.serve.requests import Limits, Program, Request, Served, checked

log = logging.getLogger(__name__)


class Abandoned(Exception):
    """Everybody who waited for a batch has gone."""


class Device(threading.Thread):
    """batch_size: pictures drawn together, rounded up to a multiple of the devices.

    Its attributes: programs, all that may be asked for, in the order to warm them up; warm, those that are."""

    def __init__(self, models: Mapping[str, Served], queue: Queue, metrics: Metrics, batch_size: int):
        super().__init__(name="device", daemon=True)
        self.models, self.queue, self.metrics = models, queue, metrics
        devices = next(iter(models.values())).pipeline.mesh.size
        self.batch_size = -(-batch_size // devices) * devices
        self.programs = [*dict.fromkeys(self._wanted())]
        self.warm: set[Program] = set()
        self.encoder = ThreadPoolExecutor(1, "encoder")  # PNG files are written while the device draws on

    def _wanted(self):
        """First what each model does by default, then the rest of what may be asked for."""
        for usual in (True, False):
            for served in self.models.values():
                for size in served.sizes:
                    guided = served.pipeline.folder.guidance > 1
                    yield Program(served.name, *size, guided if usual else not guided)

    @property
    def ready(self) -> bool:
        """Whether nothing that may be asked for has to be compiled."""
        return len(self.warm) == len(self.programs)

    def run(self) -> None:
        words, total = "warming up", len(self.programs)
        with progress.Bar(total, words, " programs", first=progress.COMPILING) as bar:
            while not (self.ready or self.queue.closed):
                if rows := self.queue.take(self.batch_size, 0):
                    self._draw(rows)  # whoever comes now waits for no program but its own
                else:
                    self._warm_up(next(each for each in self.programs if each not in self.warm))
                    bar.update()
        while rows := self.queue.take(self.batch_size, None):
            self._draw(rows)
        self.encoder.shutdown()

    def _warm_up(self, program: Program) -> None:
        """Compiles what a program needs, with and without an image to start from."""
        fields = {"model": program.model, "prompt": "warm-up", "width": program.width, "height": program.height}
        fields |= {"steps": 1, "guidance": 2.0 if program.guided else 1.0}
        request = checked(fields, self.models, Limits())
        blank = np.zeros((program.height, program.width, 3), np.float32)
        for image in (None, blank):
            rows = [dataclasses.replace(request, image=image)]
            list(self._pictures(self.models[program.model], rows, [0], tick=lambda: None))
        self.warm.add(program)

    def _pictures(self, served: Served, requests: list[Request], indices: list[int], tick):
        """Pictures uint8[H, W, 3] of requests that can be drawn together, the i-th of each as `indices` say."""
        first, pipeline = requests[0], served.pipeline
        schedule = first.schedule
        if schedule.noise is None:
            schedule = schedule._replace(noise=np.zeros_like(schedule.limit))
        factor, channels = pipeline.folder.factor, pipeline.modules["vae"].config.latent_channels
        shape = (first.height // factor, first.width // factor, channels)
        return batches.draw(
            pipeline,
            [each.prompt for each in requests],
            lambda i: batches.noise_of(requests[i].seed + indices[i], shape, schedule),
            schedule,
            [each.guidance for each in requests],
            batch_size=self.batch_size,
            negatives=[each.negative_prompt for each in requests],
            images=None if first.image is None else [each.image for each in requests],
            tick=tick,
        )

    def _draw(self, rows: list[Row]) -> None:
        jobs = list(dict.fromkeys(row.job for row in rows))
        requests, began = [row.job.request for row in rows], time.monotonic()

        def tick() -> None:
            if all(job.cancelled for job in jobs):
                raise Abandoned
            for row in rows:
                row.job.steps_done += 1

        try:
            served, indices = self.models[requests[0].model], [row.index for row in rows]
            drawn = list(self._pictures(served, requests, indices, tick))
        except Abandoned:
            return
        except Exception as error:  # a client's picture must not end the server
            log.exception("a batch of %s failed", requests[0].model)
            for job in jobs:
                self.queue.fail(job, f"{type(error).__name__}: {error}")
            return
        seconds = time.monotonic() - began
        self.warm.add(requests[0].program)
        self.metrics.drawn(requests[0].model, len(rows), seconds, [row.job for row in rows if row.index == 0])
        for job in jobs:
            job.seconds, job.batch = job.seconds + seconds, max(job.batch, len(rows))
        for row, picture in zip(rows, drawn, strict=True):
            self.encoder.submit(functools.partial(_finish, row, picture))


def _finish(row: Row, picture: np.ndarray) -> None:
    """Keeps a picture as a PNG with its settings, and ends its job with the last one."""
    image, file, job = Image.fromarray(picture), io.BytesIO(), row.job
    image.info = job.request.info(row.index)
    grids.write(image, file)
    job.pictures[row.index] = file.getvalue()
    if all(job.pictures):
        job.end()
