"""Iteration ahead of the consumer, on a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from queue import SimpleQueue
from typing import TypeVar

ItemT = TypeVar("ItemT")


def prefetch(items: Iterable[ItemT], ahead: int) -> Generator[ItemT]:
    """Yield items that a thread prepares, at most `ahead` of them before they are asked for.

    The thread ends with the items, or after the current one when the iterator is closed. Its errors are raised here.
    """
    room, queue, closed = threading.Semaphore(ahead), SimpleQueue[tuple[ItemT] | BaseException | None](), False

    def work() -> None:
        try:
            for item in items:
                queue.put((item,))
                room.acquire()
                if closed:
                    return
            queue.put(None)
        except BaseException as error:
            queue.put(error)

    threading.Thread(target=work, name="read", daemon=True).start()
    try:
        while (found := queue.get()) is not None:
            if isinstance(found, BaseException):
                raise found
            room.release()
            yield found[0]
    finally:
        closed = True
        room.release()
