"""TensorRT, PyCUDA and the GPU: opened in one place, their errors made ours.

Not yet run on hardware.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final

from gwp_edge.errors import DeviceError, GwpError, PerformanceIssue
from gwp_edge.planning.memory import available_bytes, total_bytes

if TYPE_CHECKING:
    import pycuda.driver as drv
    import tensorrt as trt

logger = logging.getLogger(__name__)

# Ends with a NUL; "NVIDIA Jetson AGX Orin Developer Kit" and the like.
_BOARD: Final = Path("/proc/device-tree/model")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceFacts:
    """What identifies a GPU and its TensorRT.

    Attributes:
        name: of the GPU.
        capability: compute capability, such as (8, 7).
        n_multiprocessors: modules of one family differ in it alone.
        board: what the device tree calls the machine; empty where there is none.
        integrated: it shares the processor's memory, as every Jetson's does.
        tensorrt: version of the library.
        memory_bytes: all of it: the machine's where integrated, else the GPU's.
    """

    name: str
    capability: tuple[int, int]
    n_multiprocessors: int
    board: str
    integrated: bool
    tensorrt: str
    memory_bytes: int

    @property
    def capability_text(self) -> str:
        """Compute capability as ``8.7``."""
        return f"{self.capability[0]}.{self.capability[1]}"


def board_name(path: Path = _BOARD) -> str:
    """Return what the device tree calls this machine, or an empty string on a PC."""
    try:
        return path.read_bytes().decode("utf-8", errors="replace").strip("\0 \n")
    except OSError:
        return ""


def require_tensorrt() -> None:
    """Import tensorrt, so that a plain import after it cannot fail.

    Raises:
        PerformanceIssue: it is not installed; says how.
    """
    try:
        import tensorrt  # noqa: F401
    except ImportError as e:
        raise PerformanceIssue(
            f"tensorrt cannot be imported ({e}); on a Jetson: sudo apt-get install "
            "python3-libnvinfer and a venv made with --system-site-packages; on x86: "
            "pip install 'gwp-edge[jetson]'"
        ) from e


def require_driver() -> None:
    """Import and initialise pycuda.driver, so that a plain import after it cannot fail.

    Raises:
        PerformanceIssue: PyCUDA is not installed.
        DeviceError: there is no working GPU.
    """
    try:
        import pycuda.driver as drv
    except ImportError as e:
        raise PerformanceIssue(
            f"pycuda cannot be imported ({e}); PATH=/usr/local/cuda/bin:$PATH pip install "
            "'gwp-edge[jetson]'"
        ) from e
    with cuda_errors("starting CUDA"):
        drv.init()
        if drv.Device.count() < 1:
            raise DeviceError("CUDA finds no GPU; check the driver with: gwp-edge doctor")


@contextmanager
def cuda_errors(what: str) -> Iterator[None]:
    """Turn errors of PyCUDA into DeviceError; the run loop then holds the arm.

    After an illegal access or a launch failure the context answers nothing but that error, so no
    retry is offered.
    """
    try:
        yield
    except GwpError:
        raise
    except Exception as e:
        if not type(e).__module__.startswith("pycuda"):
            raise
        line = (str(e).strip().splitlines() or [type(e).__name__])[0]
        raise DeviceError(
            f"CUDA failed while {what}: {line}; restart gwp-edge, and if it comes back see "
            "`dmesg` and docs/jetson.md"
        ) from e


class PrimaryContext:
    """The GPU's primary context, current in the calling thread. Threads: the one that opens it.

    The primary one, because TensorRT uses the runtime API, which lives there; a context of our own
    would split memory and streams between two. Opened in the policy process alone and after it
    was started, as CUDA does not survive a fork.
    """

    def __init__(self) -> None:
        require_driver()
        import pycuda.driver

        with cuda_errors("opening the context"):
            self.device = pycuda.driver.Device(0)
            self._context = self.device.retain_primary_context()
            self._context.push()
        self._open = True

    def close(self) -> None:
        """Take the context off this thread; safe to call twice."""
        if self._open:
            self._open = False
            import pycuda.driver

            with cuda_errors("closing the context"):
                pycuda.driver.Context.pop()

    def stream(self) -> drv.Stream:
        """Return a new stream of this context."""
        import pycuda.driver

        with cuda_errors("making a stream"):
            return pycuda.driver.Stream()

    def facts(self) -> DeviceFacts:
        """Return what identifies this device."""
        require_tensorrt()
        import pycuda.driver
        import tensorrt

        with cuda_errors("asking for the device"):
            capability = self.device.compute_capability()
            kinds = pycuda.driver.device_attribute
            integrated = bool(self.device.get_attribute(kinds.INTEGRATED))
            on_board = int(pycuda.driver.mem_get_info()[1])
            return DeviceFacts(
                name=self.device.name(),
                capability=(int(capability[0]), int(capability[1])),
                n_multiprocessors=int(self.device.get_attribute(kinds.MULTIPROCESSOR_COUNT)),
                board=board_name(),
                integrated=integrated,
                tensorrt=str(tensorrt.__version__),
                memory_bytes=total_bytes() if integrated else on_board,
            )

    def free_bytes(self, facts: DeviceFacts) -> int:
        """Return memory that can be had: of the system where it is shared, else of the GPU."""
        if facts.integrated:
            return available_bytes()
        import pycuda.driver

        with cuda_errors("asking for free memory"):
            return int(pycuda.driver.mem_get_info()[0])


def shared_logger() -> trt.ILogger:
    """Return the process's TensorRT logger, which writes to ours and keeps the last error.

    One for all: TensorRT sends what concerns no single object to the first logger it was given,
    so that a second one would miss errors. ``last_error`` gives what was said. Threads: any.
    """
    require_tensorrt()
    import tensorrt

    global _logger
    if _logger is None or _logger[0] is not tensorrt:
        _logger = tensorrt, _make_logger()
    return _logger[1]


# The library and its logger; another library, as in tests, gets another one.
_logger: tuple[ModuleType, trt.ILogger] | None = None


def _make_logger() -> trt.ILogger:
    import tensorrt

    class _Logger(tensorrt.ILogger):
        def __init__(self) -> None:
            # The bindings insist on this form.
            tensorrt.ILogger.__init__(self)
            self.last_error = ""

        def log(self, severity: object, msg: str) -> None:
            kinds = tensorrt.Logger.Severity
            if severity in (kinds.INTERNAL_ERROR, kinds.ERROR):
                self.last_error = " ".join(str(msg).split())
                logger.error("TensorRT: %s", msg)
            elif severity == kinds.WARNING:
                logger.warning("TensorRT: %s", msg)
            else:
                logger.debug("TensorRT: %s", msg)

    return _Logger()


def last_error(made: trt.ILogger) -> str:
    """Return the last error that a logger saw, once: it must not explain a later failure."""
    text = str(getattr(made, "last_error", "")) or "TensorRT gave no reason"
    made.last_error = ""  # type: ignore[attr-defined]
    return text
