"""What the page's controls ask under `lightvla play`."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Mapping
from typing import Annotated, Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import Response
from pydantic import BaseModel, Field, StringConstraints
from starlette.concurrency import run_in_threadpool

from experiments.robot.libero.play.desk import Desk
from experiments.robot.libero.play.messages import Begin, Run
from experiments.robot.libero.play.moves import FARTHEST_M

PANEL = "/play/panel.js"
"""The module that the page loads."""
FILES = {"js": "text/javascript", "css": "text/css"}

Metres = Annotated[float, Field(ge=-FARTHEST_M, le=FARTHEST_M)]
Sentence = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=300)]


class BeginRequest(BaseModel):
    """A new episode."""

    instruction: Sentence
    initial_state: int = Field(0, ge=0)
    offsets: dict[str, tuple[Metres, Metres]] = Field({}, max_length=50)
    runs: bool = True


class RunRequest(BaseModel):
    """Act, or pause."""

    runs: bool


class PrunerRequest(BaseModel):
    """Another pruner for the policy."""

    pruner: str = Field(max_length=200)


def play_router(desk: Desk, pruners: Mapping[str, str], set_pruner: Callable[[str], None]) -> APIRouter:
    """The routes.

    Args:
        desk: the way to the simulator.
        pruners: what a person chooses -> the pruner's specification.
        set_pruner: switches the policy's; may raise ValueError, and may take a while.
    """
    router = APIRouter(include_in_schema=False)
    chosen = next(iter(pruners))

    @router.get("/play/{name}.{kind}")
    async def file(name: str, kind: str) -> Response:
        if name != "panel" or kind not in FILES:
            raise HTTPException(404, f"play has no file {name}.{kind}")
        text = importlib.resources.files(__package__).joinpath(f"panel.{kind}").read_text(encoding="utf-8")
        return Response(text, media_type=FILES[kind], headers={"Cache-Control": "no-cache"})

    @router.get("/play/state")
    async def state() -> dict[str, Any]:
        return {**desk.status(), "pruners": list(pruners), "pruner": chosen}

    @router.post("/play/begin")
    def begin(wanted: BeginRequest) -> dict[str, Any]:
        status = desk.status()
        if status["phase"] == "starting":
            raise HTTPException(409, "the simulator is still starting; try again in a moment")
        if (count := status["num_initial_states"]) and wanted.initial_state >= count:
            raise HTTPException(422, f"initial state {wanted.initial_state}: expected 0 to {count - 1}")
        desk.send(Begin(wanted.instruction, wanted.initial_state, wanted.offsets, wanted.runs))
        return {}

    @router.post("/play/run")
    def run(wanted: RunRequest) -> dict[str, Any]:
        desk.send(Run(wanted.runs))
        return {}

    @router.post("/play/pruner")
    async def switch(wanted: PrunerRequest) -> dict[str, Any]:
        nonlocal chosen
        if wanted.pruner not in pruners:
            raise HTTPException(422, f"unknown pruner {wanted.pruner!r}; known: {', '.join(pruners)}")
        try:
            await run_in_threadpool(set_pruner, pruners[wanted.pruner])
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        chosen = wanted.pruner
        return {}

    return router
