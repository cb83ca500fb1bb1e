"""The peak memory of a job does not grow with the number of its frames."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import clips
import pytest

FRAMES = tuple(int(n) for n in os.environ.get("STREAM_DIFFVSR_MEMORY_FRAMES", "30,150").split(","))
"""STREAM_DIFFVSR_MEMORY_FRAMES=100,2000 pytest tests/test_video_memory.py: the full count."""

SCRIPT = """
import ctypes, gc, resource, sys
import torch
from samples import shift_flow
from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.jobs.run import VideoJob, run

torch.set_num_threads(1)
checkpoint, *pairs = sys.argv[1:]
pipe = load_pipeline(checkpoint, device="cpu", flow=shift_flow)
options = UpscaleOptions(num_inference_steps=1)
for source in pairs:
    job = VideoJob(source=source, output=source + ".out.mp4", options=options, segment_frames=25)
    for step in run(pipe, job):
        pass
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, flush=True)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the peak is asked for differently there")
def test_constant_memory(checkpoint: Path, tmp_path: Path) -> None:
    """In one process, the short clip first: a longer one may raise the peak by 5 % at most."""
    sources = [
        clips.write_video(
            tmp_path / f"{frames}.mp4", frames, size=(24, 16), audio=1, audio_packets=2 * frames
        )
        for frames in FRAMES
    ]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(checkpoint), *map(str, sources)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    short, long = map(int, result.stdout.split())
    print(f"peak {short >> 10} MB for {FRAMES[0]} frames, {long >> 10} MB for {FRAMES[1]}")
    assert long <= 1.05 * short
