"""One thread: on a shared machine two threads that wait for each other cost more than they bring."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)
sys.path.insert(0, str(Path(__file__).parent))  # for helpers


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Without a CUDA device, a test that needs one is skipped."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that there is."""
    return str(request.param)


@pytest.fixture(autouse=True)
def _no_survivors() -> Iterator[None]:
    """Scripts that a failed test left at work end with it."""
    yield
    import helpers

    while helpers.started:
        helpers.started.pop().kill()
