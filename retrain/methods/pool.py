"""Independent layers solved by joblib's workers, each with its share of the threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import joblib
from threadpoolctl import threadpool_limits

from solvers.workers import workers

Task = TypeVar("Task")
Answer = TypeVar("Answer")


def solve_layers(
    solve: Callable[[Task, Any], Answer],
    tasks: Iterable[Task],
    options: Any,
    *,
    jobs: int,
    threads: int,
) -> Iterator[Answer]:
    """Solve independent layers, yielding each as it is done.

    Tasks are stated one by one as workers take them, so that no more than `jobs` layers'
    activations are held. The backend is whatever ``joblib.parallel_config`` says.

    Parameters
    ----------
    solve : callable
        (task, options) -> answer; a function at the top of a module, so that it can be sent.
    tasks : iterable
        One task per layer.
    options : object
        Passed on to `solve`.
    jobs : int
        Layers solved at a time.
    threads : int
        BLAS threads of each worker.

    Yields
    ------
    object
        Answers in order of completion.
    """
    pool = workers(jobs, pre_dispatch=jobs, return_as="generator_unordered")
    yield from pool(joblib.delayed(_limited)(solve, task, options, threads) for task in tasks)


def _limited(
    solve: Callable[[Task, Any], Answer], task: Task, options: Any, threads: int
) -> Answer:
    with threadpool_limits(threads):
        return solve(task, options)
