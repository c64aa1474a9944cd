"""What any program needs, whatever it computes: commands, files, processes, the records of a run.
No method, dataset or sound is made here; variants.py and console.py know some by name."""

import os
import signal
import sys
from pathlib import Path


def stop(*_) -> None:
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


# A command imports this first. Until `exit_code` takes over, Ctrl-C is one line as well: to import
# torch takes seconds. While python -m looks for a module, sys.argv[0] is "-m".
is_command = sys.argv[0] == "-m" or Path(sys.argv[0]).name == "train.py"
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)
