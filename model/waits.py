"""A word on the screen for what may take long, and no word where it does not."""

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_PATIENCE_S = 3.0


@contextmanager
def word_for(what: str) -> Iterator[None]:
    """Says what is being waited for once that has taken three seconds, on the first rank."""
    timer = threading.Timer(_PATIENCE_S, print, [what], {"file": sys.stderr, "flush": True})
    timer.daemon = True
    if os.environ.get("RANK", "0") == "0":
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
