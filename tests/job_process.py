"""A job in a process of its own, which tests kill; forked from a process that has imported everything."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

import torch

# Imported here so that the fork server does it once.
from diffusers import ControlNetModel, DDIMScheduler, UNet2DConditionModel  # noqa: F401
from family_cases import CASES

from stream_diffvsr import load_pipeline
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.upscaler import Upscaler


def job_of(family: str, model: Upscaler, source: Path, output: Path) -> VideoJob:
    """The job that `start` does."""
    options = model.Options(**CASES[family].options)
    return VideoJob(source=source, output=output, options=options, segment_frames=3)


def work(
    progress: Connection, family: str, checkpoint: Path, source: Path, output: Path, limit: int, hold: int
) -> None:
    """Do the job, sending 'ready', each frame's index, and at the end 'done' or the error."""
    torch.set_num_threads(1)
    # A shell's background job, and what it starts, would ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    model = load_pipeline(checkpoint, device="cpu", **CASES[family].loading)
    job = job_of(family, model, source, output)
    progress.send("ready")
    if limit:
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        for step in run(model, job):
            progress.send(step.index)
            while step.index == hold:
                time.sleep(1)
    except BaseException as error:
        progress.send(repr(error))
        raise
    progress.send("done")


def start(
    checkpoint: Path, source: Path, output: Path, limit: int = 0, family: str = "diffvsr", hold: int = -1
) -> tuple[multiprocessing.process.BaseProcess, Connection]:
    """Start a job of a tiny model, and return when it is ready.

    With `limit`, no file of it can grow beyond that many bytes; after frame `hold` it stands still.
    """
    context = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
    if sys.platform != "win32":
        context.set_forkserver_preload(["job_process"])
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(there, family, checkpoint, source, output, limit, hold))
    # The fork server, which starts here, finds its modules where this process does.
    with patch.dict(os.environ, {"PYTHONPATH": os.pathsep.join(sys.path)}):
        process.start()
    there.close()
    assert here.recv() == "ready"
    return process, here


def messages(connection: Connection) -> list[object]:
    """Everything that is still sent, until the process ends."""
    found = []
    try:
        while True:
            found.append(connection.recv())
    except EOFError:
        return found
