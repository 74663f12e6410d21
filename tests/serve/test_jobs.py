"""The queue alone, without a device."""

import pytest

from flaxkd.serve import jobs
from flaxkd.serve.requests import Refused, checked
from tests.serve.conftest import LIMITS


@pytest.fixture
def ask(models):
    return lambda count=1, **fields: checked({"prompt": "x", "count": count, **fields}, models, LIMITS)


def test_a_batch_is_filled_with_what_fits_the_longest_wait(ask):
    queue = jobs.Queue(10)
    first, other, third = (queue.submit(ask(**kind), "") for kind in ({}, {"model": "student"}, {"count": 2}))
    assert queue.ahead(third) == 2 and first.state == "queued"
    taken = queue.take(2, 0)
    assert [(row.job, row.index) for row in taken] == [(first, 0), (third, 0)] and first.state == "generating"
    assert [row.job for row in queue.take(2, 0)] == [other]
    assert [(row.job, row.index) for row in queue.take(2, 0)] == [(third, 1)]
    assert queue.take(2, 0) == []


def test_a_full_queue_refuses_and_takes_again_later(ask):
    queue = jobs.Queue(3)
    queue.submit(ask(2), "")
    with pytest.raises(Refused, match="2 pictures wait, and at most 3 may") as refused:
        queue.submit(ask(2), "")
    assert refused.value.status == 429
    queue.take(4, 0)
    assert queue.submit(ask(3), "").state == "queued"


def test_a_cancelled_job_is_not_drawn_and_a_finished_one_stays(ask):
    queue = jobs.Queue(10)
    gone, kept = queue.submit(ask(3), ""), queue.submit(ask(), "")
    queue.cancel(gone)
    assert gone.state == "cancelled" and gone.done.done()
    assert [row.job for row in queue.take(9, 0)] == [kept]
    kept.end()
    queue.cancel(kept)
    assert kept.state == "completed"


def test_closing_ends_what_waits_and_leaves_what_is_begun(ask):
    queue = jobs.Queue(10)
    begun, waits = queue.submit(ask(2), ""), queue.submit(ask(), "")
    queue.take(1, 0)
    queue.close()
    assert (begun.state, waits.state, waits.error) == ("generating", "failed", "the server is shutting down")
    assert [row.job for row in queue.take(4, None)] == [begun] and queue.take(4, None) == []
    with pytest.raises(Refused) as refused:
        queue.submit(ask(), "")
    assert refused.value.status == 503


def test_old_jobs_are_forgotten(ask, monkeypatch):
    monkeypatch.setattr(jobs, "KEPT", 2)
    queue, request = jobs.Queue(100), ask()
    made = [queue.submit(request, "") for _ in range(4)]
    for job in made[:3]:
        job.end()
    queue.submit(request, "")
    assert [job in queue.jobs.values() for job in made] == [False, True, True, True]
