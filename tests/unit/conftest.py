"""Fixtures of the unit tests."""

from collections.abc import Iterator

import pytest

from swinv2_scale import distributed


@pytest.fixture
def one_rank() -> Iterator[None]:
    """This process as the only rank of a run."""
    with distributed.process_group(1):
        yield
