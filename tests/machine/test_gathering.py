"""Processes that meet, and messages that say who did not come."""

import re
import socket
import threading
import time

import pytest

from flaxkd.machine import gathering


def port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def meet(numbers, count=3, seconds=1.5, late=0.0, counts=None) -> dict[int, str]:
    """{place: "" or the error} of processes with these numbers, threads here. The first one comes `late`."""
    said, address = {}, f"127.0.0.1:{port()}"

    def come(place, number):
        time.sleep(late * (place == 0))
        try:
            gathering.gather(address, (counts or {}).get(number, count), number, seconds)
            said[place] = ""
        except (gathering.Missing, OSError) as error:
            said[place] = str(error)

    threads = [threading.Thread(target=come, args=entry) for entry in enumerate(numbers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    return said


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(gathering, "TRY", 0.2)


@pytest.mark.parametrize("late", [0.0, 0.7])
def test_all_meet_whoever_comes_first(late):
    assert meet([0, 1, 2], late=late, seconds=10) == {0: "", 1: "", 2: ""}
    assert meet([0], count=1) == {0: ""}


@pytest.mark.parametrize(
    "numbers, message",
    [
        ([0, 2], "process 1 of 3 did not come within"),
        ([0], "processes 1, 2 of 3 did not come within"),
        ([1, 2], r"process 0 cannot be reached at 127\.0\.0\.1:\d+ within .* refused"),
        ([0, 1, 1], "two processes have the number 1"),
    ],
)
def test_all_are_told_who_is_missing(numbers, message):
    said = meet(numbers)
    assert len(said) == len(numbers) and all(re.search(message, text) for text in said.values()), said


def test_processes_that_count_differently_are_told():
    said = meet([0, 1, 2], counts={1: 2})
    assert all("process 1 counts 2 processes, and process 0 counts 3" in text for text in (said[0], said[1])), said
    with pytest.raises(gathering.Missing, match="numbers are 0 to N - 1"):
        gathering.gather("127.0.0.1:1", 2, 2, 1)


def test_a_port_in_use_is_said():
    with socket.create_server(("", 0)) as taken, pytest.raises(OSError, match="in use"):
        gathering.gather(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0, 1)
