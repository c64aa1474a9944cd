"""How far long work is: a bar in a terminal; elsewhere, as in a job's log, a line a minute."""

import sys

from tqdm import tqdm

from support.command import printable
from support.processes import is_first

EVERY = 60  # seconds from one line to the next


def in_words(seconds: float) -> str:
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            number = seconds / length
            return f"{number:.{1 if number < 10 else 0}f} {unit}"
    return f"{seconds:.0f} s"


class Bar(tqdm):
    """The bar of tqdm, in the first process. Without a terminal a line a minute, else nothing."""

    def __init__(self, iterable=None, desc: str = "", unit: str = "clip", **options):
        self.is_terminal = sys.stderr.isatty()
        if not self.is_terminal:
            options |= {"mininterval": EVERY, "delay": EVERY, "miniters": 1, "ncols": 0}
            options["leave"] = False
        super().__init__(iterable, printable(desc), unit=unit, disable=not is_first(), **options)

    def display(self, msg=None, pos=None):
        """Called by tqdm when it is time, but also around any other output."""
        if self.is_terminal:
            return super().display(msg, pos)
        if msg is None and self._time() - self.last_print_t >= EVERY:
            print(self, file=sys.stderr, flush=True)

    def clear(self, nolock=False):
        if self.is_terminal:
            super().clear(nolock)
