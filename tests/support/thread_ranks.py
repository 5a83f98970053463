"""Ranks that are threads of one process, for tests of what ranks save and load together."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class ThreadRanks:
    """What `gather` promises, with a barrier. One rank computes at a time: Paddle numbers what it
    makes by counters that threads would share.
    """

    def __init__(
        self, rank: int, size: int, barrier: threading.Barrier, board: list[Any], turn: threading.Lock
    ) -> None:
        self.rank, self.size, self.barrier, self.board, self.turn = rank, size, barrier, board, turn

    def gather(self, value: Any) -> list[Any]:
        self.board[self.rank] = value
        self.turn.release()
        try:
            self.barrier.wait(20)
            out = list(self.board)
            self.barrier.wait(20)
        finally:
            self.turn.acquire()
        return out


def on_ranks(size: int, work: Callable[[ThreadRanks], Any]) -> list[Any]:
    """`work(ranks)` on every rank; what each returned or raised."""
    barrier, board, turn = threading.Barrier(size), [None] * size, threading.Lock()
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        with turn:
            try:
                results[rank] = work(ThreadRanks(rank, size, barrier, board, turn))
            except (OSError, ValueError) as error:
                results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive(), "a rank waits for one that left"
    return results
