"""Worker processes that end with the process that they work for.

A process that is killed cannot end its workers, and joblib's wait for tasks that nobody sends any
more, each with all that it has imported. So each worker watches its parent: the system gives a
process whose parent is gone to another one, which shows in `os.getppid` on Linux and macOS alike.
(Linux's PR_SET_PDEATHSIG would need no thread, but it sends its signal at the end of the *thread*
that started the worker, and joblib starts some from threads that end early.) What the workers had
in shared memory and in temporary folders, joblib's resource tracker removes as soon as the last of
them is gone, and then ends itself.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import joblib

_WATCH_SECONDS = 0.5
"""How often a worker looks for its parent: at most so long does it outlive it, unless one call of a
library holds the interpreter's lock for longer."""

_watched: set[int] = set()


def workers(jobs: int, **options: Any) -> Any:
    """Open `joblib.Parallel` with workers that end with this process.

    Parameters
    ----------
    jobs : int
        How many tasks run at a time.
    **options : object
        As `joblib.Parallel` takes them. The backend is whatever ``joblib.parallel_config`` says;
        threads need no watching, and are not watched.

    Returns
    -------
    joblib.Parallel
    """
    return joblib.Parallel(
        n_jobs=jobs, initializer=end_with_parent, initargs=(os.getpid(),), **options
    )


def end_with_parent(parent: int) -> None:
    """Have this process end, at once and without any clearing up, when its parent is no more.

    Parameters
    ----------
    parent : int
        Process number of the parent. In that process itself (where threads are the workers), and
        where the system does not tell (Windows), nothing is done.
    """
    if parent == os.getpid() or parent in _watched or os.name != "posix":
        return
    _watched.add(parent)
    if os.getppid() != parent:  # it was killed while this process started
        os._exit(1)
    threading.Thread(target=_watch, args=(parent,), name="parent watch", daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_WATCH_SECONDS)
    os._exit(1)
