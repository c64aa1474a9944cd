"""What people run besides train.py: predict, report, export, experiments, bench, check, pretrain.
docs/ has pages on them. They import everything below, and nothing below imports them.
"""

import support  # noqa: F401, before torch, because of Ctrl-C
