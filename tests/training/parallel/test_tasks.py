"""Tasks that overlap: their order, which run side by side, and what an error does to the rest."""

from __future__ import annotations

import threading
from functools import partial

import pytest
import torch

from training.parallel.tasks import Tasks

WAIT_S = 30


def test_tasks_that_use_the_same_thing_run_in_the_order_they_were_added() -> None:
    ran: list[int] = []
    with Tasks(3) as tasks:
        for number in range(200):
            tasks.add(partial(ran.append, number), uses=["the list"])
    assert ran == list(range(200))


def test_tasks_that_use_nothing_in_common_run_side_by_side() -> None:
    both = threading.Barrier(2)
    with Tasks(2) as tasks:
        found = [tasks.add(partial(both.wait, WAIT_S), uses=[name]) for name in ("a", "b")]
        assert sorted(each.result() for each in found) == [0, 1]


def test_a_task_takes_the_results_that_it_needs_and_waits_for_all_it_uses() -> None:
    begin = threading.Event()
    ran: list[str] = []

    def wait() -> int:
        begin.wait(WAIT_S)
        ran.append("slow")
        return 5

    with Tasks(2) as tasks:
        slow = tasks.add(wait, uses=["a"])
        other = tasks.add(lambda: ran.append("other"), uses=["b"])
        both = tasks.add(lambda: ran.append("both"), uses=["a", "b"])
        total = tasks.add(lambda value: value + 1, uses=["c"], needs=[slow])
        other.result(WAIT_S)
        assert not both.done()
        assert not total.done()
        begin.set()
        assert total.result(WAIT_S) == 6
    assert ran == ["other", "slow", "both"]


def test_of_the_tasks_that_can_run_the_first_added_does() -> None:
    begin = threading.Event()
    ran: list[str] = []
    with Tasks(1) as tasks:
        first = tasks.add(partial(begin.wait, WAIT_S), uses=["a"])
        tasks.add(lambda _: ran.append("second"), uses=["b"], needs=[first])
        tasks.add(lambda: ran.append("third"), uses=["c"])
        begin.set()
    assert ran == ["second", "third"]


def test_each_task_has_one_thread_inside_and_the_gradient_mode_of_a_new_thread() -> None:
    with torch.no_grad(), Tasks(2) as tasks:
        found = tasks.add(lambda: (torch.get_num_threads(), torch.is_grad_enabled()), uses=[0])
    assert found.result() == (1, True)


def test_after_an_error_nothing_more_is_begun() -> None:
    ran: list[str] = []

    def fail() -> None:
        raise KeyError("lost")

    with Tasks(2) as tasks:
        failed = tasks.add(fail, uses=["a"])
        needing = tasks.add(lambda _: ran.append("needs it"), uses=["b"], needs=[failed])
        later = tasks.add(lambda: ran.append("uses the same"), uses=["a"])
        for each in (failed, needing, later):
            with pytest.raises(KeyError, match="lost"):
                each.result(WAIT_S)
        with pytest.raises(KeyError, match="lost"):
            tasks.add(lambda: ran.append("something else"), uses=["d"]).result(WAIT_S)
    assert ran == []


def test_leaving_on_an_error_waits_for_what_runs_and_drops_the_rest() -> None:
    running, ran = threading.Event(), list[str]()

    def slow() -> None:
        running.set()
        leaving.wait(WAIT_S)
        ran.append("slow")

    def interrupted() -> None:
        with Tasks(1) as tasks:
            tasks.add(slow, uses=["a"])
            tasks.add(lambda: ran.append("next"), uses=["a"])
            assert running.wait(WAIT_S)
            threading.Timer(0.05, leaving.set).start()
            raise KeyboardInterrupt

    leaving = threading.Event()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ran == ["slow"]
