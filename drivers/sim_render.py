"""Off-screen pictures of the simulated table-top, on a machine without a display.

MuJoCo draws through EGL or OSMesa. Which one works is found by drawing one small picture in a
process of its own: a failed attempt leaves a process in which the other one cannot start any more.
"""

from __future__ import annotations

import functools
import importlib
import logging
import os
import subprocess
import sys
from types import TracebackType
from typing import Any, Final, Literal, cast, get_args

import numpy as np

from gwp_edge.errors import DeviceError
from gwp_edge.types import ImageArray

logger = logging.getLogger(__name__)

Backend = Literal["egl", "osmesa"]
_DEBIAN_PACKAGES: Final = {
    "egl": "libegl1 libgl1 libglx-mesa0 libegl-mesa0",
    "osmesa": "libosmesa6",
}
_PROBE_TIMEOUT_S: Final = 60.0
_PROBE_MJCF: Final = """<mujoco><worldbody>
  <light pos="0 0 3"/><geom size="0.3"/><camera name="probe" pos="0 0 2"/>
</worldbody></mujoco>"""


def import_mujoco() -> Any:  # noqa: ANN401 - MuJoCo has no type information
    """Return the ``mujoco`` module.

    Raises:
        DeviceError: it is not installed.
    """
    try:
        return importlib.import_module("mujoco")
    except ImportError as e:
        raise DeviceError(
            f"the simulated robot needs MuJoCo, which cannot be imported ({e}): "
            "pip install 'gwp-edge[sim]'"
        ) from e


@functools.cache
def choose_backend() -> Backend:
    """Return the first of EGL and OSMesa that draws here; MUJOCO_GL narrows the choice to one.

    Raises:
        DeviceError: none does; names the Debian packages.
    """
    import_mujoco()
    asked = os.environ.get("MUJOCO_GL", "").lower()
    backends: tuple[Backend, ...] = get_args(Backend)
    if asked:
        if asked not in backends:
            raise DeviceError(
                f"MUJOCO_GL={asked}: the sim draws off-screen; expected egl or osmesa, or unset it"
            )
        backends = tuple(b for b in backends if b == asked)
    reasons = []
    for backend in backends:
        reason = _probe(backend)
        if reason is None:
            logger.info("sim renders with %s", backend)
            return backend
        reasons.append(f"{backend}: {reason}")
    packages = " or ".join(_DEBIAN_PACKAGES[b] for b in backends)
    raise DeviceError(
        f"no off-screen renderer works ({'; '.join(reasons)}); apt-get install {packages}"
    )


class SceneRenderer:
    """Draws cameras of one model at one size. Threads: the one that made it."""

    def __init__(self, model: Any, width_px: int, height_px: int, backend: Backend) -> None:  # noqa: ANN401
        self._mujoco = mujoco = import_mujoco()
        self._model = model
        self._size = (height_px, width_px)
        self._context = self._mjr = None
        try:
            self._context = _gl_context(backend, width_px, height_px)
            self._context.make_current()
            self._mjr = mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_100.value)
            mujoco.mjr_setBuffer(mujoco.mjtFramebuffer.mjFB_OFFSCREEN.value, self._mjr)
        except (ImportError, AttributeError, OSError, RuntimeError, mujoco.FatalError) as e:
            self.close()
            raise DeviceError(
                f"the renderer {backend} does not start ({e}); "
                f"apt-get install {_DEBIAN_PACKAGES[backend]}"
            ) from e
        self._scene = mujoco.MjvScene(model, maxgeom=400)
        # Shadows and reflections cost ten times the rest on a CPU.
        for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
            self._scene.flags[flag.value] = 0
        self._option = mujoco.MjvOption()
        self._rect = mujoco.MjrRect(0, 0, width_px, height_px)
        self._camera = mujoco.MjvCamera()
        self._camera.type = mujoco.mjtCamera.mjCAMERA_FIXED.value

    def render(self, data: Any, camera: str) -> ImageArray:  # noqa: ANN401
        """Draw ``camera`` of ``data``; return uint8 RGB, shape (h, w, 3)."""
        mujoco = self._mujoco
        if self._context is None:
            raise DeviceError("the renderer is closed")
        self._context.make_current()
        self._camera.fixedcamid = self._model.camera(camera).id
        category = mujoco.mjtCatBit.mjCAT_ALL.value
        mujoco.mjv_updateScene(
            self._model, data, self._option, None, self._camera, category, self._scene
        )
        mujoco.mjr_render(self._rect, self._scene, self._mjr)
        bottom_up = np.empty((*self._size, 3), np.uint8)
        mujoco.mjr_readPixels(bottom_up, None, self._rect, self._mjr)
        return np.ascontiguousarray(bottom_up[::-1])

    def close(self) -> None:
        """Free the graphics context; safe to call twice."""
        if self._mjr is not None and self._context is not None:
            self._context.make_current()
            self._mjr.free()
        if self._context is not None:
            self._context.free()
        self._mjr = self._context = None

    def __enter__(self) -> SceneRenderer:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _gl_context(backend: Backend, width_px: int, height_px: int) -> Any:  # noqa: ANN401
    # MuJoCo's C library looks MUJOCO_GL up when it loads OpenGL; the Python context is imported by
    # its own name, because mujoco.GLContext was fixed when mujoco was first imported.
    os.environ["MUJOCO_GL"] = backend
    return importlib.import_module(f"mujoco.{backend}").GLContext(width_px, height_px)


def _probe(backend: Backend) -> str | None:
    """Return None if ``backend`` draws in a fresh process, else the reason in one line."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", __name__, backend],
            capture_output=True,
            text=True,
            timeout=_PROBE_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"no picture within {_PROBE_TIMEOUT_S:.0f} s"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1][:200] if lines else f"exit code {done.returncode}"


def _draw_probe(backend: Backend) -> None:
    mujoco = import_mujoco()
    model = mujoco.MjModel.from_xml_string(_PROBE_MJCF)
    data = mujoco.MjData(model)
    mujoco.mj_forward(model, data)
    with SceneRenderer(model, 32, 32, backend) as renderer:
        if renderer.render(data, "probe").std() == 0:
            raise DeviceError("the picture is blank")


if __name__ == "__main__":
    _draw_probe(cast("Backend", sys.argv[1]))
