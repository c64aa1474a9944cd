"""Fixtures that several test files share."""

import os
import signal
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

# before torch is there: models are small, and tests run side by side
os.environ.setdefault("OMP_NUM_THREADS", "1")

from helpers import SMALL_AST, campaign_words, make_esc50

import train
from support import checkpoints
from tools import campaign, experiments

# A shell that starts the tests in the background lets them and their processes ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def forgetful_hub():
    """What one test fetched is not there for the next."""
    checkpoints.fetch.cache_clear()


@pytest.fixture(scope="session")
def esc50_dir(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC-50")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train_main(esc50_dir, cache_dir, tmp_path):
    """`train.main` on the miniature with the small AST, two epochs of fold 1, clips of one second;
    more options override these.
    """

    def call(*options) -> int:
        defaults = [
            "--dataset",
            "esc10",
            "--data-dir",
            esc50_dir,
            "--weights",
            SMALL_AST,
            "--folds",
            1,
            "--seconds",
            1,
        ]
        if not {"probe", "logmel"}.intersection(options):  # these have no epochs
            defaults += ["--epochs", 2]
        places = ["--cache-dir", cache_dir, "--out", tmp_path / "runs"]
        return train.main([str(word) for word in (*defaults, *places, *options)])

    return call


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC", takes=2)


class Here:
    """Stands for the process of a cell: trains the cell in this process, while it is being
    started.
    """

    def __init__(self, cell, plan, started):
        folder = plan.out / cell.name
        with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
            try:
                self.returncode = campaign.train_cell(
                    folder, [*campaign.options(cell, plan), "--resume"]
                )
            except Exception:
                traceback.print_exc()
                self.returncode = 1
            # A test may put a train_cell here that returns what went wrong, or nothing.
            if isinstance(self.returncode, str):
                print(self.returncode)
                self.returncode = 1 if self.returncode else 0
        started += [] if self.returncode == campaign.BUSY else [folder]

    def poll(self):
        return self.returncode

    def terminate(self):
        pass

    wait = terminate


@pytest.fixture
def here(monkeypatch, sounds, cache_dir, tmp_path):
    """Runs a campaign without processes of its own. `here.started`: the folders of the cells that
    were started, in order; `here.start` starts a process after all.
    """

    def call(*options, out="out") -> int:
        return experiments.main(campaign_words(sounds, cache_dir, tmp_path / out, *options))

    call.started, call.start, call.out = [], campaign.start, tmp_path / "out"
    monkeypatch.setattr(campaign, "start", lambda cell, plan: Here(cell, plan, call.started))
    monkeypatch.setattr(campaign, "PAUSE", 0)
    monkeypatch.setattr(sys, "argv", ["experiments.py"])
    return call
