"""Independent jobs on as many threads as the math library would take, each thread with one of the
library's: where single products are too small to be cut, whole jobs beside one another are not.

What a job computes does not depend on who computes it, so results are the same for any number of
threads. Refuses to know: what the jobs are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

from ernie_tune.models import mkl

Job = tuple[Callable[..., None], tuple[Any, ...]]


def run(jobs: Sequence[Job]) -> None:
    """All of them; returns when the last is done. Raises what a job raises."""
    count = min(mkl.max_threads(), len(jobs))
    if count < 2:
        for function, arguments in jobs:
            function(*arguments)
        return

    def share(number: int) -> None:
        with mkl.single_thread():
            for function, arguments in jobs[number::count]:
                function(*arguments)

    list(_pool(os.getpid(), count).map(share, range(count)))


@lru_cache(maxsize=4)
def _pool(_process: int, count: int) -> ThreadPoolExecutor:
    """Threads do not outlive a fork, so each process has its own."""
    return ThreadPoolExecutor(count, "products")
