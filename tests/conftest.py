"""Fixtures that several test files share."""

import os
import sys
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing import Pipe
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is there: models are small, and tests run side by side

from helpers import SMALL_AST, campaign_words, make_esc50

import train
from tools import campaign, experiments


@pytest.fixture(scope="session")
def esc50_dir(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC-50")


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def train_main(esc50_dir, cache_dir, tmp_path):
    """`train.main` on the miniature with the small AST, two epochs of fold 1; more options override these."""

    def call(*options) -> int:
        defaults = ["--dataset", "esc10", "--data-dir", esc50_dir, "--weights", SMALL_AST, "--epochs", 2, "--folds", 1]
        places = ["--cache-dir", cache_dir, "--out", tmp_path / "runs"]
        return train.main([str(word) for word in (*defaults, *places, *options)])

    return call


@pytest.fixture(scope="session")
def sounds(tmp_path_factory) -> Path:
    return make_esc50(tmp_path_factory.mktemp("data") / "ESC", takes=2)


class Here:
    """Stands for a worker and the pipe to it: trains a cell in this process, while it is being sent."""

    def __init__(self, started):
        self.started, (self.answers, self.sender) = started, Pipe()
        self.process = self.pipe = self

    def send(self, job):
        folder, words = job
        with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
            answer = campaign.train_cell(folder, words)
        self.started += [] if answer == campaign.BUSY else [folder]
        self.sender.send(answer)

    def recv(self):
        return self.answers.recv()

    def fileno(self):
        return self.answers.fileno()

    def terminate(self):
        pass


@pytest.fixture
def here(monkeypatch, sounds, cache_dir, tmp_path):
    """Runs a campaign without processes of its own. `here.started`: the folders of the cells that were started, in
    order; `here.hired`: the workers."""

    def call(*options, out="out") -> int:
        return experiments.main(campaign_words(sounds, cache_dir, tmp_path / out, *options))

    def hire():
        call.hired.append(Here(call.started))
        return call.hired[-1]

    call.started, call.hired, call.hire, call.out = [], [], campaign.hire, tmp_path / "out"
    monkeypatch.setattr(campaign, "hire", hire)
    monkeypatch.setattr(campaign, "print_to", lambda log: None)
    monkeypatch.setattr(campaign, "PATIENCE", 0)
    monkeypatch.setattr(sys, "argv", ["experiments.py"])
    return call
