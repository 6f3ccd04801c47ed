"""Work shared out to processes: the same results, and no hang whatever happens to them."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from trueup.data.workers import CAN_FORK, in_order
from trueup.errors import ModelError, Problem, ResourceError

needs_fork = pytest.mark.skipif(not CAN_FORK, reason="processes are forked on Linux only")


@pytest.mark.parametrize("workers", [0, 1, 2, 3, 50])
def test_results_come_in_order_from_any_number_of_workers(workers):
    assert list(in_order(lambda i: i * i, 7, workers)) == [i * i for i in range(7)]


@needs_fork
def test_work_is_done_elsewhere():
    assert os.getpid() not in list(in_order(lambda i: os.getpid(), 4, 2))


@needs_fork
def test_what_a_call_raises_is_raised_here():
    def call(number):
        if number == 3:
            raise ModelError([Problem("a template without end", "row 3", fix="another one")])
        return number

    with pytest.raises(ModelError, match="without end") as caught:
        list(in_order(call, 6, 2))
    assert caught.value.problems[0].fix == "another one"


@needs_fork
def test_a_worker_that_dies_is_an_error_with_a_message():
    with pytest.raises(ResourceError, match="signal 9"):
        list(in_order(lambda i: os.kill(os.getpid(), signal.SIGKILL) if i == 2 else i, 6, 2))


@needs_fork
def test_nobody_is_left_behind_when_the_rest_is_not_wanted():
    def call(number):
        if number > 1:
            time.sleep(60)
        return os.getpid()

    results = in_order(call, 6, 2)
    pids = [next(results), next(results)]
    results.close()
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids)


@needs_fork
def test_ctrl_c_while_waiting_ends_it_at_once():
    timer = threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(in_order(lambda i: time.sleep(60), 2, 2))
    assert time.monotonic() - began < 20


@needs_fork
def test_large_results_do_not_block_each_other():
    sizes = [len(data) for data in in_order(lambda i: bytes(3_000_000), 5, 3)]
    assert sizes == [3_000_000] * 5
