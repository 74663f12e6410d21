"""A bar's rate is that of its units, its time left is honest, and without a terminal it is lines now and then."""

import io
import sys
import types

import pytest

from flaxkd.machine import progress


@pytest.fixture
def clock(monkeypatch):
    """clock.now in seconds, of all bars; nothing else moves it."""
    made = types.SimpleNamespace(now=0.0)
    monkeypatch.setattr(progress, "time", types.SimpleNamespace(monotonic=lambda: made.now))
    monkeypatch.setattr(progress, "_clock", lambda bar, over: None)  # its thread
    monkeypatch.setattr("tqdm.std.time", lambda: made.now)
    return made


def test_compilation_is_no_step_and_pauses_are_in_the_time_left_alone(clock):
    """As a training of 30 steps of 2 s each: a minute of compiling, then 20 s of drawing after every 10 steps."""
    with progress.Bar(30, first=progress.COMPILING) as bar:
        clock.now = 60.0
        assert bar.rate() is None and bar.left() is None
        bar.update()
        assert bar.rate() is None and bar.left() is None  # a program's first run may cost more than the others
        for _ in range(9):
            clock.now += 2
            bar.update()
        assert bar.rate() == pytest.approx(0.5) and bar.left() == pytest.approx(20 * 2)
        with bar.during("drawing"):
            clock.now += 20
            assert bar.rate() == pytest.approx(0.5)
        for _ in range(10):
            clock.now += 2
            bar.update()
        assert bar.rate() == pytest.approx(0.5)
        assert bar.left() == pytest.approx(10 * (19 * 2 + 20) / 19)  # 30.5 s; 40 s are true


def test_what_was_done_before_makes_nothing_faster(clock):
    with progress.Bar(100, initial=50) as bar:
        bar.skip(10)
        bar.update()
        clock.now += 3
        bar.skip(10)
        bar.update(3)
        assert bar.n == 74 and bar.rate() == pytest.approx(1) and bar.left() == pytest.approx(26)


def test_without_a_terminal_there_are_whole_lines_and_few(clock, capsys):
    with progress.Bar(1000, "training", first=progress.COMPILING) as bar:
        for _ in range(1000):
            clock.now += 0.125
            bar.update()
            bar.refresh()
        with bar.during("validating"), progress.Bar(4, "drawing", unit=" pictures", leave=False) as inner:
            inner.update(4)
        progress.write("step 7: skipped")
    text = capsys.readouterr().err
    lines = text.splitlines()
    assert "\r" not in text and "\x1b" not in text and "" not in lines
    assert lines[0] == "training, compiling: 0/1000 steps (0%), 00:00 elapsed, ? left, ? steps/s"
    assert lines[1] == "training: 240/1000 steps (24%), 00:30 elapsed, 01:35 left, 8.0 steps/s"
    assert lines[5:] == ["step 7: skipped", "training: 1000/1000 steps (100%), 02:05 elapsed, 00:00 left, 8.0 steps/s"]


def test_a_closed_stderr_ends_no_work(clock, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with progress.Bar(2, first=progress.COMPILING) as bar:
        sys.stderr.close()
        bar.update()
        progress.write("a line")
        bar.describe("words")
        bar.update()
    assert bar.n == 2


@pytest.mark.parametrize(
    ("rate", "said"), [(0.1, "10.0 s/step"), (1.0, "1.0 steps/s"), (12.34, "12.3 steps/s"), (5432.1, "5,432 steps/s")]
)
def test_a_rate_is_read_at_a_glance(clock, rate, said):
    with progress.Bar(100) as bar:
        bar.update()
        clock.now += 10 / rate
        bar.update(10)
        assert said in str(bar)
