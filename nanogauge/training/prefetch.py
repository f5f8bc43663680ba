"""What comes next, made by a thread while the loop works on what it has."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar

_T = TypeVar("_T")


class Prefetch(Generic[_T]):
    """Numbered things in order, `depth` of them made ahead of the one that was last asked for.

    A thing must depend on its number alone: whether it was made ahead can then not be told. One
    that cannot be made raises its error when it is asked for, and not before.
    """

    def __init__(self, make: Callable[[int], _T], depth: int) -> None:
        self._make, self._depth = make, depth
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._ahead: deque[tuple[int, Future[_T]]] = deque()

    def get(self, number: int) -> _T:
        """A thing; after a leap, those that were made ahead in vain are let go."""
        if self._ahead and self._ahead[0][0] != number:
            self._let_go()
        following = self._ahead[-1][0] + 1 if self._ahead else number
        for coming in range(following, number + self._depth + 1):
            self._ahead.append((coming, self._thread.submit(self._make, coming)))
        return self._ahead.popleft()[1].result()

    def close(self) -> None:
        """End the thread, once it has made what it is at."""
        self._let_go()
        self._thread.shutdown()

    def _let_go(self) -> None:
        for _, future in self._ahead:
            future.cancel()
        self._ahead.clear()
