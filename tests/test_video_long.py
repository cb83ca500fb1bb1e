"""A job of 10,000 frames that is killed three times: whole at its end, and no larger than at its begin."""

from __future__ import annotations

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import clips
import pytest

FRAMES = int(os.environ.get("STREAM_DIFFVSR_LONG_FRAMES", "10000"))
"""STREAM_DIFFVSR_LONG_FRAMES=2000 pytest -m long tests/test_video_long.py: a shorter one."""
KILLED_AT = [FRAMES // 4, FRAMES // 2, 3 * FRAMES // 4]

SCRIPT = """
import sys
from pathlib import Path
import psutil, torch
from stream_diffvsr import UpscaleOptions, load_pipeline
from stream_diffvsr.jobs.run import VideoJob, run

torch.set_num_threads(1)
checkpoint, source, output, every = sys.argv[1:]
pipe = load_pipeline(checkpoint, device="cpu", flow="none")
job = VideoJob(source=Path(source), output=Path(output), options=UpscaleOptions(num_inference_steps=1))
me = psutil.Process()
handles = me.num_handles if sys.platform == "win32" else me.num_fds
for step in run(pipe, job):
    if step.index % int(every) == 0:
        print(step.index, me.memory_info().rss, handles(), me.num_threads(), flush=True)
"""


@pytest.mark.long
def test_ten_thousand_frames_with_three_kills(checkpoint: Path, tmp_path: Path) -> None:
    """Memory within 5 % from the first quarter of a run on; handles and threads the same all the time."""
    source = clips.write_video(tmp_path / "a.mp4", FRAMES, size=(16, 16), audio=1, audio_packets=2 * FRAMES)
    output, every = tmp_path / "b.mp4", max(1, FRAMES // 100)
    arguments = [sys.executable, "-c", SCRIPT, checkpoint, source, output, every]
    begins, measured = [], []
    for kill_at in [*KILLED_AT, None]:
        process = subprocess.Popen(list(map(str, arguments)), stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        rows = []
        for line in process.stdout:
            rows.append([int(word) for word in line.split()])
            if kill_at is not None and rows[-1][0] >= kill_at:
                process.kill()
                break
        process.stdout.close()
        assert process.wait() == (0 if kill_at is None else process.returncode)
        begins.append(rows[0][0])
        measured.append(rows)
        print(f"frames {rows[0][0]}-{rows[-1][0]}: {rows[0][1:]} -> {rows[-1][1:]} bytes, handles, threads")
    # Each run went on where the one before it had come to, less the segment that was being written.
    for begin, killed in zip(begins[1:], KILLED_AT, strict=True):
        assert killed - 120 - every <= begin <= killed + 120 + every
    for rows in measured:
        memory, handles, threads = zip(*[row[1:] for row in rows[len(rows) // 4 :]], strict=True)
        assert max(memory) <= 1.05 * memory[0]
        assert max(handles) - min(handles) <= 2 and max(threads) - min(threads) <= 1
    with av.open(str(output)) as container:
        times = [frame.pts * frame.time_base for frame in container.decode(video=0)]
    assert times == [Fraction(index, 25) for index in range(FRAMES)]
    assert clips.packets_of(output, "audio") == clips.packets_of(source, "audio")
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == ["a.mp4", "b.mp4"]
