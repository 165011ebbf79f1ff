"""Where kernels run: on a GPU if there is one, in Triton's interpreter under TRITON_INTERPRET=1, else as torch twins.

Files named test_*_triton.py test what only the kernels have; they are left out where the twins run.
"""

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"


def pytest_ignore_collect(collection_path):
    return True if collection_path.name.endswith("_triton.py") and not (INTERPRETED or DEVICE == "cuda") else None


@pytest.fixture
def device():
    return torch.device(DEVICE)


def mend_interpreters_bf16():
    """The interpreter holds bf16 as uint16, multiplies the bit patterns in tl.dot, and truncates where it rounds."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast, plain_dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def widen(handle):
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def cast_impl(self, src, dst_type):
        src = widen(src)
        if dst_type.scalar != tl.bfloat16:
            return plain_cast(self, src, dst_type)
        rounded = torch.from_numpy(np.array(src.data, dtype=np.float32)).bfloat16()
        return TensorHandle(rounded.view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return plain_dot(self, widen(a), widen(b), d, input_precision, max_num_imprecise_acc)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot


if INTERPRETED:
    mend_interpreters_bf16()
