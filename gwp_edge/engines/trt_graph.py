"""CUDA graphs through the driver's C interface.

PyCUDA has no graphs (its pull request 424 is open), and cuda-bindings would be one more wheel tied
to the CUDA of the machine. Six functions of libcuda, whose C interface has been stable since CUDA
11.4, are enough; they work on PyCUDA's streams and context. Not yet run on hardware.

Source: CUDA Driver API, Stream Management and Graph Management.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any, Final

from gwp_edge.errors import DeviceError, PerformanceIssue

_LIBRARY: Final = "libcuda.so.1"
_SUCCESS: Final = 0
# Other threads' calls, of cameras' libraries say, must not spoil a capture.
_CAPTURE_THREAD_LOCAL: Final = 1
_RECORD_EXTERNAL: Final = 1

_SIGNATURES: Final[dict[str, tuple[Any, ...]]] = {
    "cuStreamBeginCapture_v2": (ctypes.c_void_p, ctypes.c_int),
    "cuStreamEndCapture": (ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p)),
    "cuGraphInstantiateWithFlags": (
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
        ctypes.c_ulonglong,
    ),
    "cuGraphLaunch": (ctypes.c_void_p, ctypes.c_void_p),
    "cuGraphExecDestroy": (ctypes.c_void_p,),
    "cuGraphDestroy": (ctypes.c_void_p,),
    "cuEventCreate": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_uint),
    "cuEventRecord": (ctypes.c_void_p, ctypes.c_void_p),
    "cuEventRecordWithFlags": (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint),
    "cuEventElapsedTime": (ctypes.POINTER(ctypes.c_float), ctypes.c_void_p, ctypes.c_void_p),
    "cuEventDestroy_v2": (ctypes.c_void_p,),
    "cuGetErrorName": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
}


def load_libcuda() -> Any:  # noqa: ANN401 - a C library
    """Return the driver's library, which comes with the driver and not with the toolkit."""
    return ctypes.CDLL(_LIBRARY)


class CudaDriver:
    """The functions of libcuda that graphs and timing need. Threads: one owner.

    Args:
        library: stands in for libcuda in tests; None loads it.

    Raises:
        PerformanceIssue: libcuda is not there or too old for graphs.
    """

    def __init__(self, library: Any = None) -> None:  # noqa: ANN401 - a C library
        try:
            self._library = load_libcuda() if library is None else library
            for name, arguments in _SIGNATURES.items():
                function = getattr(self._library, name)
                function.argtypes, function.restype = arguments, ctypes.c_int
        except (OSError, AttributeError) as e:
            raise PerformanceIssue(
                f"{_LIBRARY} has no CUDA graphs ({e}); install the driver of CUDA 11.4 or newer"
            ) from e

    def call(self, name: str, *arguments: object) -> None:
        """Call a function.

        Raises:
            DeviceError: it failed; names the function and the error.
        """
        code = int(getattr(self._library, name)(*arguments))
        if code != _SUCCESS:
            text = ctypes.c_char_p()
            self._library.cuGetErrorName(code, ctypes.byref(text))
            error = (text.value or b"unknown error").decode(errors="replace")
            raise DeviceError(f"CUDA: {name} failed with {error} ({code}); restart gwp-edge")


class Events:
    """Marks in a stream whose distances in time can be asked for afterwards."""

    def __init__(self, driver: CudaDriver, n: int) -> None:
        self._driver = driver
        self._events: list[ctypes.c_void_p] = []
        for _ in range(n):
            event = ctypes.c_void_p()
            driver.call("cuEventCreate", ctypes.byref(event), 0)
            self._events.append(event)

    def record(self, index: int, stream: int, *, captured: bool) -> None:
        """Put mark ``index`` into a stream; ``captured`` while the stream is being captured."""
        if captured:
            # Without the flag a capture turns the mark into a mere dependency, without a time.
            self._driver.call(
                "cuEventRecordWithFlags", self._events[index], stream, _RECORD_EXTERNAL
            )
        else:
            self._driver.call("cuEventRecord", self._events[index], stream)

    def laps_ns(self, n_marks: int) -> tuple[int, ...]:
        """Return the times between the first ``n_marks`` marks, ns; the stream must be done."""
        laps = []
        for first, second in zip(self._events[: n_marks - 1], self._events[1:n_marks], strict=True):
            ms = ctypes.c_float()
            self._driver.call("cuEventElapsedTime", ctypes.byref(ms), first, second)
            laps.append(round(ms.value * 1e6))
        return tuple(laps)

    def close(self) -> None:
        """Free the marks; safe to call twice."""
        while self._events:
            self._driver.call("cuEventDestroy_v2", self._events.pop())


class CapturedGraph:
    """Work of a stream, recorded once and launched as one. Threads: one owner."""

    def __init__(self, driver: CudaDriver, stream: int, enqueue: Callable[[], None]) -> None:
        """Record what ``enqueue`` puts into ``stream``; nothing of it runs.

        Raises:
            DeviceError: something in it cannot be captured.
        """
        self._driver = driver
        self._exec = ctypes.c_void_p()
        graph = ctypes.c_void_p()
        driver.call("cuStreamBeginCapture_v2", stream, _CAPTURE_THREAD_LOCAL)
        try:
            enqueue()
        except BaseException:
            # The stream must leave capture mode, or every later call on it fails.
            self._abandon(stream)
            raise
        driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
        try:
            driver.call("cuGraphInstantiateWithFlags", ctypes.byref(self._exec), graph, 0)
        finally:
            driver.call("cuGraphDestroy", graph)

    def _abandon(self, stream: int) -> None:
        graph = ctypes.c_void_p()
        try:
            self._driver.call("cuStreamEndCapture", stream, ctypes.byref(graph))
            if graph.value:
                self._driver.call("cuGraphDestroy", graph)
        except DeviceError:
            # An invalidated capture ends with an error; the first failure is the one to tell.
            return

    def launch(self, stream: int) -> None:
        """Start it; returns at once.

        Raises:
            DeviceError: it could not be started.
        """
        self._driver.call("cuGraphLaunch", self._exec, stream)

    def close(self) -> None:
        """Free it; must happen before the execution contexts that it calls; twice is safe."""
        if self._exec.value:
            executable, self._exec = self._exec, ctypes.c_void_p()
            self._driver.call("cuGraphExecDestroy", executable)
