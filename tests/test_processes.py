"""What a process does that loses the others. test_train_seeds.py has runs of several."""

import os
import signal

import pytest
import torch
import torch.distributed as dist

from support import processes
from support.command import UserError
from support.processes import process_group

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def sigterm():
    """What SIGTERM does, afterwards as before."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "error", [dist.DistBackendError("lost"), RuntimeError("[gloo/pair.cc] closed by peer")]
)
def test_an_exchange_that_fails_is_a_process_lost(error, monkeypatch):
    """In one line, and torchrun's SIGTERM, which follows, adds none."""
    monkeypatch.delenv("RANK", raising=False)
    message = r"^process None stops: another process of this run has ended .* --resume"
    with pytest.raises(UserError, match=message), process_group(CPU):
        raise error
    os.kill(os.getpid(), signal.SIGTERM)


def test_other_errors_stay_what_they_are(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(RuntimeError, match=r"^shapes$"), process_group(CPU):
        raise RuntimeError("shapes")


def test_torchruns_signal_ends_a_process_in_one_line(monkeypatch):
    joined = []
    monkeypatch.setattr(processes, "join", joined.append)
    monkeypatch.setenv("RANK", "3")
    with pytest.raises(UserError, match=r"^process 3 stops"), process_group(CPU):
        assert joined == [CPU]
        os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
