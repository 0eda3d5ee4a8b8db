"""Fixture of the tests against recorded training steps."""

from collections.abc import Iterator

import pytest
import torch

from tests.methods.plain import plain_paths


@pytest.fixture
def as_recorded() -> Iterator[None]:
    """Threads and paths that the numbers were recorded with: how sums are split changes their rounding, and four steps
    of this steep start turn a difference in the last bit into one per cent."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with plain_paths():
        yield
    torch.set_num_threads(threads)
