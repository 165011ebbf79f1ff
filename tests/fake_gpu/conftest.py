"""Each test of this folder runs in a process of its own: torch is told there of a GPU, and does not forget it.

The processes are forked off one that has imported everything (tests/ranks.py), so one costs little.
"""

import inspect

import pytest

import ranks
from fake_gpu.device import build, why_not


def pytest_collection_modifyitems(items):
    for item in items:
        if why_not() and item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.skip(reason=why_not()))


def pytest_pyfunc_call(pyfuncitem):
    names = inspect.signature(pyfuncitem.function).parameters
    build()
    ranks.run(pyfuncitem.function, 1, *(pyfuncitem.funcargs[name] for name in names))
    return True
