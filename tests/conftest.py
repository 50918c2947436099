"""Fixtures of all tests."""

import gc
import os
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

hypothesis.settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=60)
hypothesis.settings.load_profile("repeatable")

# As ``make test`` does: sums of several threads are not bit-equal on a machine that has other work.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

# A fifth of the time went into looking for garbage among what three frameworks keep: seldom, and not there.
gc.set_threshold(50_000, 20, 10)

REPO = Path(__file__).resolve().parents[1]


def pytest_collection_finish() -> None:
    """What is imported stays."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def repo() -> Path:
    """The root of the repository."""
    return REPO


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder with the numbers recorded from the published code."""
    place = Path(os.environ.get("HEAD_PRUNING_REFERENCE") or REPO.parent / "shared" / "reference")
    if not (place / "gates.npz").is_file():
        pytest.skip(f"there are no recorded numbers in {place}; set HEAD_PRUNING_REFERENCE to their folder")
    return place


@pytest.fixture(scope="session")
def load_arrays(reference):
    """Reads one npz file of the recorded numbers into a dict."""

    def load(name: str) -> dict[str, np.ndarray]:
        with np.load(reference / name, allow_pickle=False) as arrays:
            return dict(arrays)

    return load


@pytest.fixture(autouse=True)
def one_thread():
    """Sums in one fixed order, so that bit-equality can be asked for."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
