"""Makes tests/ranks.py importable, here and on the ranks that it starts."""

import gc
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parent))


def pytest_collection_finish():
    """What the libraries made when they were imported is there to stay: collections need not look at it."""
    gc.freeze()
