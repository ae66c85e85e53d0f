"""Camera pictures of one simulation."""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from experiments.robot.libero.simulator.backend import (
    BLANK_SPREAD,
    RenderError,
    RenderingUnavailable,
    _why_not,
    simulator,
)

RENDERERS = ("robosuite", "fast")


MIN_RESOLUTION = 16


class CameraRenderer:
    """Draws square camera pictures of one MuJoCo model.

    Args:
        model: `mujoco.MjModel`; a fast renderer switches its multisampling off.
        resolution: side of the pictures in pixels.
        kind: `robosuite` gives the very pixels of robosuite's own renderer, as in the published datasets; `fast` leaves
            out multisampling, reflections and shadows, which takes about a third of the time.
    """

    def __init__(self, model: Any, resolution: int, kind: str = "robosuite") -> None:
        if kind not in RENDERERS:
            raise ValueError(f"unknown renderer {kind!r}; known: {', '.join(RENDERERS)}")
        if resolution < MIN_RESOLUTION:
            raise ValueError(f"the resolution is {resolution} px; expected at least {MIN_RESOLUTION}")
        mujoco = simulator().mujoco
        buffer = model.vis.global_
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, resolution), max(buffer.offheight, resolution)
        self._disabled_flags: tuple[Any, ...] = ()
        if kind == "fast":
            model.vis.quality.offsamples = 0
            self._disabled_flags = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)
        try:
            self._renderer = renderer_class()(model, resolution, resolution)
        except Exception as error:
            raise RenderingUnavailable(_why_not(f"no renderer: {error}", os.environ)) from error
        self._options = mujoco.MjvOption()
        self._options.geomgroup[0] = 0  # collision shapes
        self._solid = mujoco.MjvOption()
        self._solid.geomgroup[0] = 0
        self._solid.sitegroup[:] = 0  # marks that pictures do not show are drawn where things are told apart
        self._model, self._geom = model, int(mujoco.mjtObj.mjOBJ_GEOM)
        self._effects = (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION)

    def render(self, data: Any, camera: str) -> NDArray[np.uint8]:
        """Draws one camera, (H, W, 3): the simulator's bottom-up picture turned by 180 degrees, as datasets store it.

        Raises:
            RenderError: when the picture is blank.
        """
        self._renderer.update_scene(data, camera, self._options)
        for flag in self._disabled_flags:
            self._renderer.scene.flags[flag] = 0
        image = self._renderer.render()
        if int(image.max()) - int(image.min()) <= BLANK_SPREAD:
            raise RenderError(
                f"camera {camera!r} gave a blank picture; run one environment per process (a second renderer in a "
                "process can return blank pictures)"
            )
        # MuJoCo's renderer has already turned the picture upside down; what is missing from 180 degrees is the mirror.
        return np.ascontiguousarray(image[:, ::-1])

    def bodies(self, data: Any, camera: str) -> NDArray[np.int32]:
        """Which body every pixel of `render`'s picture shows, (H, W); -1 where it shows none."""
        scene = self._renderer.scene
        before = scene.flags.copy()
        self._renderer.enable_segmentation_rendering()
        try:
            self._renderer.update_scene(data, camera, self._solid)
            for flag in self._effects:
                scene.flags[flag] = 0
            found = self._renderer.render()
        finally:
            self._renderer.disable_segmentation_rendering()
            scene.flags[:] = before
        ids, kinds = found[..., 0], found[..., 1]
        bodies = np.where(kinds == self._geom, self._model.geom_bodyid[np.maximum(ids, 0)], -1)
        return np.ascontiguousarray(bodies[:, ::-1].astype(np.int32))

    def close(self) -> None:
        self._renderer.close()


@cache
def renderer_class() -> Any:
    """MuJoCo's renderer, which may go before it is whole: stopped inside its making it would end in a traceback."""

    class Renderer(simulator().mujoco.Renderer):  # type: ignore[misc]
        def __del__(self) -> None:
            with suppress(AttributeError):
                super().__del__()

    return Renderer
