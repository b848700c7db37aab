"""A thread's team of OpenMP ends when it hands a request to another thread."""

import os
from collections.abc import Iterator

import pytest
import torch

from lossfns.backend.futures import RequestThread
from lossfns.backend.openmp import gnu_openmp


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(gnu_openmp() is None, reason="PyTorch uses no OpenMP of GNU")
def test_the_caller_has_no_openmp_threads_while_a_request_runs(two_threads: None) -> None:
    """Two threads: the second one is the whole team. The caller computes as before afterwards."""

    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    x = torch.ones(200_000)
    assert x.add(1).sum() == 400_000
    worker = RequestThread()
    assert x.add(1).sum() == 400_000
    team = threads()
    seen = worker.submit(threads).result()
    assert len(team - seen) == 1 and not seen - team
    assert x.add(1).sum() == 400_000 and len(threads()) == len(team)
    worker.shutdown()
