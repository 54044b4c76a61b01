"""Processes that talk to each other, for tests of several."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def in_two_processes(worker: Callable[..., None], store: Path) -> dict[int, Any]:
    """What two processes find, as `in_processes`."""
    return in_processes(2, worker, store)


def in_processes(count: int, worker: Callable[..., None], store: Path) -> dict[int, Any]:
    """What ``worker(rank, size, store, results)`` put into ``results`` as (rank, found), by rank.

    ``store`` is a file for ``torch.distributed.init_process_group``, which the worker calls.
    """
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    workers = [
        context.Process(target=_work, args=(worker, rank, count, store, results))
        for rank in range(count)
    ]
    for process in workers:
        process.start()
    found = dict(results.get(timeout=120) for _ in workers)
    for process in workers:
        process.join(timeout=60)
        assert process.exitcode == 0
    return found


def _work(worker: Callable[..., None], rank: int, count: int, store: Path, results: Any) -> None:
    worker(rank, count, store, results)
    results.close()
    results.join_thread()
    # Gloo's threads may abort a process while the interpreter ends (pytorch/pytorch#190489).
    os._exit(0)
