"""What the tests against recorded training steps share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as the numbers were recorded with: how sums are split changes their rounding, and four steps of this
    steep start turn a difference in the last bit into one per cent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)
