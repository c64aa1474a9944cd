"""How far long work is: a bar in a terminal, and elsewhere, as in the log of a job, a line a minute."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator

from tqdm import tqdm

from support.processes import is_first

EVERY = 60  # seconds
UNITS = {"B": "bytes", "s": "s"}  # of a bar in words, where an s does not make the plural


def in_words(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            number = seconds / length
            return f"{number:.{1 if number < 10 else 0}f} {unit}"
    return f"{seconds:.0f} s"


class Signs:
    """Signs of life: called as often as one likes, at most once a minute says what, how far and how long to go.

    `done`: how much of the `total`, if that is known, there is at the start. Nothing in a terminal.
    """

    def __init__(self, total: int | None, unit: str, done: int = 0, clock: Callable[[], float] = time.monotonic):
        self.total, self.unit, self.first, self.clock = total, unit, done, clock
        self.silent = not is_first() or sys.stderr.isatty()
        self.start = self.last = clock()

    def __call__(self, done: int, what: str) -> None:
        now = self.clock()
        if self.silent or now - self.last < EVERY or done <= self.first:
            return
        self.last, far = now, f"{done:,.0f} {self.unit}"
        if self.total:
            left = (now - self.start) / (done - self.first) * (self.total - done)
            far = f"{done:,.0f} of {self.total:,.0f} {self.unit}, about {in_words(left)} to go"
        print(f"{what}: {far}", file=sys.stderr, flush=True)


class Bar(tqdm):
    """tqdm's bar, of the first process alone; without a terminal signs of life."""

    def __init__(self, iterable: Iterable | None = None, desc: str = "", unit="clip", clock=time.monotonic, **options):
        super().__init__(iterable, desc, unit=unit, **options, disable=None if is_first() else True)
        self.what, self.signs = desc, Signs(self.total, UNITS.get(unit, f"{unit}s"), self.n, clock)

    def update(self, n: int = 1) -> None:
        super().update(n)
        if self.disable:
            self.n += n
            self.signs(self.n, self.what)

    def __iter__(self) -> Iterator:
        if not self.disable:
            yield from super().__iter__()
            return
        for item in self.iterable:
            yield item
            self.update()
