"""A server on the tiny pipeline, twice under two names, in this process."""

import time

import pytest

pytest.importorskip("starlette", reason='the server needs pip install -e ".[serve]"')
pytest.importorskip("uvicorn", reason='the server needs pip install -e ".[serve]"')
pytest.importorskip("prometheus_client", reason='the server needs pip install -e ".[serve]"')

from starlette.testclient import TestClient

from flaxkd.drawing.pipeline import Pipeline
from flaxkd.serve import app
from flaxkd.serve.requests import Limits, Served

LIMITS = Limits(steps=20, count=6, prompt=100, body=2**20)
WAITING = 8


@pytest.fixture(scope="session")
def models(tiny_pipeline):
    pipeline = Pipeline.from_pretrained(tiny_pipeline)
    return {name: Served.of(name, pipeline) for name in ("teacher", "student")}


@pytest.fixture(scope="module")
def client(models):
    """Its pictures are drawn 4 at a time, whatever the number of devices of these tests."""
    made = app.make(models, limits=LIMITS, waiting=WAITING, batch_size=4)
    with TestClient(made, raise_server_exceptions=False) as client:
        end = time.time() + 300
        while client.get("/readyz").status_code != 200:
            assert time.time() < end and client.get("/healthz").status_code == 200
            time.sleep(0.1)
        yield client
