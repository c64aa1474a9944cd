"""Fixtures that several test files share."""

from pathlib import Path

import pytest
from helpers import SMALL_AST, make_esc50

import train


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
