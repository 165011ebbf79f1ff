"""Where kernels run: on a GPU if there is one, in Triton's interpreter under TRITON_INTERPRET=1, else as torch twins.

The same tests run on all three: `dtype` is the widest that what is under test takes, `close` what may be asked of it.
Marked `twin` is what says nothing of the kernels, and `kernels` what says nothing of the twins; test_device_only.py has
what only a GPU can show.
"""

import pytest
import torch
import triton
import triton.language as tl

INTERPRETED = triton.knobs.runtime.interpret
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
KERNELS = INTERPRETED or DEVICE == "cuda"


def pytest_configure(config):
    config.addinivalue_line("markers", "twin: float64, or one that no kernel takes part in")
    config.addinivalue_line("markers", "kernels: what a torch twin does not have")


def pytest_collection_modifyitems(config, items):
    others = [item for item in items if item.get_closest_marker("twin" if KERNELS else "kernels")]
    config.hook.pytest_deselected(items=others)
    items[:] = [item for item in items if item not in others]


def pytest_ignore_collect(collection_path):
    return True if collection_path.name == "test_device_only.py" and DEVICE != "cuda" else None


@pytest.fixture(scope="session")
def device():
    return torch.device(DEVICE)


@pytest.fixture(scope="session")
def dtype():
    return torch.float32 if KERNELS else torch.float64


@pytest.fixture(scope="session")
def close():
    """Tensors, or nested lists of them, are equal but for the rounding of `dtype`; of the size of the largest value."""

    def check(actual, expected, name=""):
        if not isinstance(expected, torch.Tensor):
            for i, pair in enumerate(zip(actual, expected, strict=True)):
                check(*pair, name=f"{name}[{i}]")
            return
        tolerance = 2e-5 if KERNELS else 1e-12
        size = max([1e-3, *expected.detach().abs().nan_to_num(0, 0).flatten().tolist()])
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=5 * tolerance, atol=tolerance * size, equal_nan=True,
            msg=lambda message: f"{name}: {message}",
        )  # fmt: skip

    return check


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned(monkeypatch):
    """New uninitialised floating tensors hold NaN, so that what a kernel does not write shows."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def as_accurate():
    """The oracle: against float64, RMS error at most 1.1x and largest at most 1.5x that of torch in the same dtype."""

    def check(ours, torchs, exact, name=""):
        exact = exact.double()
        finite = exact.isfinite()
        assert torch.equal(ours.isnan(), exact.isnan()), f"{name}: NaN elsewhere"
        assert torch.equal(ours.double()[~finite & ~exact.isnan()], exact[~finite & ~exact.isnan()]), (
            f"{name}: infinite"
        )
        room = 1e-6 * exact[finite].abs().clamp(min=1)
        errors, wanted = ((x.double()[finite] - exact[finite]).abs() for x in (ours, torchs))
        if errors.numel():
            assert (errors <= 1.5 * wanted.max() + room).all(), f"{name}: {errors.max()} against {wanted.max()}"
            rms, wanted_rms = errors.square().mean().sqrt(), wanted.square().mean().sqrt()
            assert rms <= 1.1 * wanted_rms + room.square().mean().sqrt(), f"{name}: RMS {rms} against {wanted_rms}"

    return check


def mend_interpreter():
    """The interpreter holds bf16 as uint16, multiplies the bit patterns in tl.dot, truncates where it rounds, and
    rounds the product of a tl.fma.

    Its fp32 products sum in an order that depends on the tile, so that scores differ between passes; a GPU's do not.
    """
    import numpy as np
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    plain_cast = InterpreterBuilder.cast_impl

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
        a, b = (widen(x).data.astype(np.float32) for x in (a, b))
        return TensorHandle((a[:, None] * b.T).sum(-1) + d.data, d.dtype.scalar)

    def create_fma(self, x, y, z):
        fused = x.data.astype(np.float64) * y.data + z.data
        return TensorHandle(fused.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = cast_impl, create_dot
    InterpreterBuilder.create_fma = create_fma
    hasten_interpreter()


def hasten_interpreter():
    """The interpreter puts its own functions into triton.language at every call of a device function, which takes
    longer than what the function does: those that its caller has put there stay there. It computes whether integers
    overflow, a third of its time, and looks at it under `debug` alone; and makes a table of types for every result.
    """
    import dataclasses
    import inspect
    from functools import cache

    from triton.runtime import interpreter

    @cache
    def languages(fn):
        return [m for m in fn.__globals__.values() if inspect.ismodule(m) and m in (tl, tl.core)]

    def call(self, *arguments, **named):
        if any(tl.core.is_builtin(language.load) for language in languages(self.fn)):
            interpreter._patch_lang(self.fn)
        try:
            return self.rewrite()(*arguments, **named)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)
    of_scalar = cache(interpreter._get_np_dtype)
    interpreter._get_np_dtype = lambda type: of_scalar(tl.uint64 if type.scalar.is_ptr() else type.scalar)


if INTERPRETED:
    mend_interpreter()
