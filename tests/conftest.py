"""One thread for the tests' own arithmetic: at these tiny shapes, threads cost more in waiting than they gain, and what
differs only in form is equal to the last bit, which MKL on two threads does not always grant."""

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """A process group chooses the number of threads, and leaves it so."""
    torch.set_num_threads(1)
