"""Failures of the network, whichever HTTP library huggingface_hub uses."""

import logging
import time
from collections.abc import Callable
from typing import TypeVar

from huggingface_hub.errors import HfHubHTTPError

from slimclr_hub.text import first_line

_logger = logging.getLogger(__name__)
_ATTEMPTS = 3
Answer = TypeVar('Answer')


def is_transport_error(error: Exception) -> bool:
    """Whether no answer came, or not all of it: refused, cut off or timed out."""
    # requests, httpx and httpx2 by turns; their classes share no base.
    return type(error).__module__.partition('.')[0] in ('requests', 'httpx', 'httpx2', 'httpcore')


def with_retries(call: Callable[[], Answer]) -> Answer:
    """Call again, after a second and after two, where the server says that it has a problem of its own (5xx)."""
    for attempt in range(1, _ATTEMPTS):
        try:
            return call()
        except HfHubHTTPError as error:
            if error.response is None or error.response.status_code < 500:
                raise
            _logger.info('%s; trying again', first_line(error))
            time.sleep(attempt)
    return call()
