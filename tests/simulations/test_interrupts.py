from __future__ import annotations

import multiprocessing as mp
import os
import signal
import threading
import time

import pytest

from simulations.interrupts import without_interrupts


def _interrupted_at_once() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("other_threads", [0, 3])
def test_an_interrupt_while_a_process_is_started_is_heard_afterwards_by_the_one_that_starts_it(other_threads):
    # A signal is given to any thread that does not hold it back.
    over = threading.Event()
    threads = [threading.Thread(target=over.wait) for _ in range(other_threads)]
    for thread in threads:
        thread.start()
    process, reached = mp.get_context("spawn").Process(target=_interrupted_at_once), []
    try:
        with pytest.raises(KeyboardInterrupt):
            with without_interrupts():
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(0.1)
                process.start()
                reached.append("the end")
            time.sleep(1)
    finally:
        over.set()
    process.join(60)
    assert reached and process.exitcode == 0  # which never heard of its own


def test_others_are_heard_as_before():
    with without_interrupts():
        pass
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
