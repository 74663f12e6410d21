"""A student, and the workdir of its training."""

import shutil
from pathlib import Path

import pytest

from tests.export import trainings


@pytest.fixture(scope="package")
def student(tiny_pipeline) -> tuple[dict, dict]:
    return trainings.random_student(tiny_pipeline)


@pytest.fixture(scope="package")
def trained(tiny_pipeline, student, tmp_path_factory) -> Path:
    return trainings.leave(tmp_path_factory.mktemp("trained") / "run", tiny_pipeline, student)


@pytest.fixture
def workdir(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "run")
