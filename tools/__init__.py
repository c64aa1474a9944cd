"""What people run besides train.py: predict, export, experiments, bench; README.md has a page on
each. Everything else lies beneath: nothing imports these but they each other.
"""

import support  # noqa: F401, before torch, because of Ctrl-C
