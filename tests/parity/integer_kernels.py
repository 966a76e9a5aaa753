"""What x86 processors do with bytes: a numpy model, and which of them add up wrongly."""

from __future__ import annotations

import platform
from pathlib import Path

import numpy as np
import pytest

_INT16 = np.iinfo(np.int16)
# Each of them adds four u8 * s8 products to 32 bits at once.
_EXACT_FLAGS = {"avx512_vnni", "avx_vnni", "amx_int8"}


def u8_s8_product(x, w):
    """Return x (n, k) u8 times w (k, m) s8 as AVX2 and AVX-512BW do: vpmaddubsw, then vpmaddwd.

    Products of neighbours are added in 16 bits with saturation, pairs of them in 32 bits.
    """
    assert (x.dtype, w.dtype) == (np.uint8, np.int8)
    assert x.shape[1] % 2 == 0
    products = x.astype(np.int32)[:, :, None] * w.astype(np.int32)[None]
    pairs = products.reshape(len(x), -1, 2, w.shape[1]).sum(axis=2)
    return np.clip(pairs, _INT16.min, _INT16.max).sum(axis=1)


def u8_u8_product(x, w):
    """Return x (n, k) u8 times w (k, m) u8: widened to 16 bits, then vpmaddwd, which is exact."""
    assert (x.dtype, w.dtype) == (np.uint8, np.uint8)
    products = x.astype(np.int16).astype(np.int32)[:, :, None] * w.astype(np.int32)[None]
    return products.reshape(len(x), -1, 2, w.shape[1]).sum(axis=2).sum(axis=1)


def saturates(machine, flags):
    """Return whether ONNX Runtime's u8 x s8 kernels are wrong for large values there."""
    return machine in ("x86_64", "AMD64") and _EXACT_FLAGS.isdisjoint(flags)


def cpu_flags():
    """Return the processor's flags; none where the system does not tell them."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return set(next((line for line in lines if line.startswith("flags")), "").split())


def skip_where_native_int8_saturates(form, fmt):
    """Skip a test of the native int8 graph where ONNX Runtime would compute it wrongly."""
    if (form, fmt) == ("native", "int8") and saturates(platform.machine(), cpu_flags()):
        pytest.skip(
            "x86 without VNNI: ONNX Runtime adds u8 x s8 products in saturating 16 bits; the "
            "native form is for accelerators"
        )
