"""ONNX models of one product, written without the onnx package, which robots do not have."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gwp_edge.types import Float32Array

_FLOAT, _UINT8, _INT32 = 1, 2, 6
_OPSET = 20
_IR_VERSION = 10


def float_product(n: int, weight: Float32Array, turns: int) -> bytes:
    """Return a serialised model: ``y_i = x @ w_i``, x (n, k), each w_i a copy of its own."""
    data = weight.astype("<f4").tobytes()
    # Engines join equal constants, so each copy differs in its last element.
    weights = [data[:-4] + struct.pack("<f", i) for i in range(turns)]
    return _model(n, weight.shape, weights, "MatMul", (_FLOAT, _FLOAT), b"")


def integer_product(n: int, weight: npt.NDArray[np.uint8], turns: int) -> bytes:
    """Return likewise ``y_i = (x - 128) @ (w_i - 128)`` of codes, in 32-bit integers."""
    data = weight.tobytes()
    weights = [data[:-2] + struct.pack("<H", i) for i in range(turns)]
    middle = _field(2, _UINT8) + _field(8, "middle") + _field(9, bytes([128]))
    return _model(n, weight.shape, weights, "MatMulInteger", (_UINT8, _INT32), _field(5, middle))


def _model(
    n: int,
    shape: tuple[int, ...],
    weights: Sequence[bytes],
    operator: str,
    types: tuple[int, int],
    constants: bytes,
) -> bytes:
    k, m = shape
    of_input, of_output = types
    extra = 2 * _field(1, "middle") if constants else b""
    parts = [_field(2, "products"), constants]
    for i, own in enumerate(weights):
        tensor = _field(1, k) + _field(1, m) + _field(2, of_input) + _field(8, f"w{i}")
        inputs = _field(1, "x") + _field(1, f"w{i}") + extra
        node = inputs + _field(2, f"y{i}") + _field(4, operator)
        parts.append(_field(1, node) + _field(5, tensor + _field(9, own)))
        parts.append(_field(12, _value_info(f"y{i}", (n, m), of_output)))
    graph = b"".join(parts) + _field(11, _value_info("x", (n, k), of_input))
    opset = _field(1, "") + _field(2, _OPSET)
    return _field(1, _IR_VERSION) + _field(7, graph) + _field(8, opset)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: bytes | str | int) -> bytes:
    """One protobuf field: an int as varint, everything else with its length."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _value_info(name: str, shape: Sequence[int], element: int) -> bytes:
    dims = b"".join(_field(1, _field(1, side)) for side in shape)
    tensor_type = _field(1, element) + _field(2, dims)
    return _field(1, name) + _field(2, _field(1, tensor_type))
