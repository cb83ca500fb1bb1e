"""Test reading, side streams and whole jobs with damaged media files, to find crashes, hangs and bad errors.

    uv run python benchmarks/soak.py [--files 1000] [--seed 0] [--every 5] [--keep FOLDER]

Each file is small, in one of many formats, with flipped bits, a cut, or a piece that is moved, repeated or
zeroed. A child process opens it, reads its frames and prepares its side streams; for every fifth file it runs
a whole job. The outcome must be a readable result or an error of one sentence; a file that takes longer than
30 s or ends the process is a fault. The exit code is 1 after any fault; `--keep` keeps the files that caused
one.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import selectors
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LIMIT_SECONDS = 30
VIDEOS = {
    "a.mp4": ("libx264", "aac"),
    "a.mov": ("mpeg4", "pcm_s16le"),
    "a.mkv": ("libx264", "libopus"),
    "a.webm": ("libvpx-vp9", "libopus"),
    "a.avi": ("mjpeg", "pcm_s16le"),
    "a.ts": ("mpeg2video", "mp2"),
    "a.mpg": ("mpeg2video", "mp2"),
    "a.flv": ("flv1", "aac"),
    "a.wmv": ("msmpeg4v3", "wmav2"),
    "b.mkv": ("ffv1", "flac"),
    "a.m2v": ("mpeg2video", None),
    "a.h264": ("libx264", None),
    "a.mxf": ("mpeg2video", "pcm_s16le"),
}
PICTURES = ("a.png", "a.jpg", "a.webp", "a.tif", "a.bmp", "a.gif")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--files", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=5, help="whole jobs: one for so many files")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work()
    outcomes: Counter[str] = Counter()
    faults = []
    with tempfile.TemporaryDirectory() as folder:
        originals = make(Path(folder))
        child = Child()
        for number in range(args.files):
            chance = random.Random(args.seed * 1_000_003 + number)
            original = originals[number % len(originals)]
            file = Path(folder) / f"{number:05}{original.suffix}"
            file.write_bytes(damaged(original.read_bytes(), chance))
            outcome = child.do(file, number // len(originals) % args.every == 0)
            outcomes[outcome.split(":")[0]] += 1
            if outcome.startswith("FAULT"):
                faults.append(outcome)
                print(f"{file.name}: {outcome}", flush=True)
                if args.keep:
                    args.keep.mkdir(exist_ok=True)
                    shutil.copy(file, args.keep)
            for each in Path(folder).glob(f"{file.stem}*"):
                shutil.rmtree(each) if each.is_dir() else each.unlink()
        child.stop()
    print(f"{args.files} files:", ", ".join(f"{count} {name}" for name, count in outcomes.most_common()))
    return 1 if faults else 0


class Child:
    """The child process that handles the files, restarted after a crash or a hang."""

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None

    def do(self, file: Path, whole: bool) -> str:
        """Handle a file, and return the outcome in one line."""
        if self.process is None:
            command = [sys.executable, __file__, "--worker"]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            self.process = subprocess.Popen(command, text=True, **pipes)
            self._line(600)
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([str(file), whole]) + "\n")
        self.process.stdin.flush()
        line = self._line(LIMIT_SECONDS)
        if line:
            return line
        code = self.process.poll()
        self.stop()
        return f"FAULT: {'took too long' if code is None else f'the process ended with {code}'}"

    def _line(self, seconds: float) -> str:
        """Return the process's next line, or an empty one if it ended or sent none in time."""
        assert self.process is not None and self.process.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            ready = selector.select(seconds)
        line = self.process.stdout.readline().strip() if ready else ""
        if ready and not line:
            self.process.wait()
        return line

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


def work() -> int:
    """Read file names from standard input, and print the outcome of each."""
    import torch

    from stream_diffvsr import load_pipeline

    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    pipe = load_pipeline("nano", device="cpu", flow="none")
    print("ready", flush=True)
    for line in sys.stdin:
        name, whole = json.loads(line)
        print(outcome_of(pipe, Path(name), whole), flush=True)
    return 0


def outcome_of(pipe, file: Path, whole: bool) -> str:
    from stream_diffvsr.errors import StreamDiffVSRError

    try:
        return job(pipe, file) if whole else read(file)
    except (StreamDiffVSRError, OSError) as error:
        said = " ".join(str(error).split())
        return f"refused: {said}" if len(said) < 600 else f"FAULT: not one sentence: {said[:300]}"
    except Exception as error:
        return f"FAULT: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def read(file: Path) -> str:
    """Read a file's frames, and prepare its sound and subtitles for three containers."""
    from stream_diffvsr.media import pictures
    from stream_diffvsr.media.read import FolderSource, VideoSource, open_source
    from stream_diffvsr.media.sides import make_sides
    from stream_diffvsr.media.span import Span

    source = FolderSource(file, Fraction(1)) if pictures.is_picture(file) else open_source(file)
    count = sum(1 for _ in source.frames(Span()))
    if count == 0:
        return "no frame"
    list(source.frames(Span(start=count // 2)))
    if isinstance(source, VideoSource):
        for form in ("mp4", "matroska", "webm"):
            folder = file.with_name(f"{file.stem}-{form}")
            folder.mkdir()
            make_sides(file, form, folder)
    return "read"


def job(pipe, file: Path) -> str:
    """Run a whole job; its output must be readable and have as many frames as the job reported."""
    from stream_diffvsr import UpscaleOptions
    from stream_diffvsr.jobs.run import VideoJob, run
    from stream_diffvsr.media import pictures

    output = file.with_name(f"{file.stem}-out{'.png' if pictures.is_picture(file) else '.mp4'}")
    options, small = UpscaleOptions(num_inference_steps=1), 0.1 if file.suffix == ".mxf" else 1.0
    task, done = VideoJob(source=file, output=output, options=options, pre_scale=small), 0
    for step in run(pipe, task):
        done = step.done
    with av.open(str(output)) as container:
        frames = sum(1 for _ in container.decode(video=0))
    return "whole job" if frames == done else f"FAULT: {frames} of {done} frames are in the output"


def make(folder: Path) -> list[Path]:
    """Write a small undamaged file in each format that this FFmpeg can write, and return their paths."""
    from PIL import Image

    made = []
    for name, (codec, sound) in VIDEOS.items():
        path = folder / f"whole-{name}"
        try:
            write(path, codec, sound)
        except (ValueError, av.FFmpegError):
            print(f"{name} is left out: this FFmpeg does not write it")
            continue
        made.append(path)
    for name in PICTURES:
        frames = [Image.fromarray(picture(index, 16, 12)) for index in range(3)]
        more = {"save_all": True, "append_images": frames[1:]} if name.endswith(("gif", "tif")) else {}
        frames[0].save(folder / f"whole-{name}", **more)
        made.append(folder / f"whole-{name}")
    return made


def picture(index: int, width: int, height: int) -> np.ndarray:
    return np.random.default_rng(index).integers(0, 255, (height, width, 3), np.uint8)


def write(path: Path, codec: str, sound: str | None) -> None:
    """Write a video of six frames at 25 per second, with sound unless `sound` is None."""
    side = 256 if path.suffix == ".mxf" else 16
    with av.open(str(path), "w") as out:
        video = out.add_stream(codec, rate=25)
        video.width, video.height = side, side
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        audio = None if sound is None else out.add_stream(sound, rate=48000, layout="stereo")
        if sound == "wmav2":
            audio.codec_context.bit_rate = 128_000  # its own default is rejected
        for index in range(6):
            out.mux(video.encode(av.VideoFrame.from_ndarray(picture(index, side, side), format="rgb24")))
        out.mux(video.encode(None))
        if audio is not None:
            wave = np.sin(np.arange(11520) / 20).astype(np.float32)
            frame = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts, frame.time_base = 48000, 0, Fraction(1, 48000)
            audio.codec_context.open(strict=False)
            even = av.AudioResampler(audio.format, "stereo", 48000, audio.frame_size or None)
            for piece in [*even.resample(frame), *even.resample(None)]:
                out.mux(audio.encode(piece))
            out.mux(audio.encode(None))


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return the data with one to three kinds of damage."""
    found = bytearray(data)
    for _ in range(chance.randint(1, 3)):
        kind, length = chance.randrange(6), max(2, len(found))
        place, size = chance.randrange(length - 1), chance.randint(1, max(1, length // 4))
        if kind == 0:
            for _ in range(chance.randint(1, 30)):
                found[chance.randrange(len(found))] ^= 1 << chance.randrange(8)
        elif kind == 1:
            del found[max(1, place) :]
        elif kind == 2:
            piece, to = bytes(found[place : place + size]), chance.randrange(length)
            del found[place : place + size]
            found[to:to] = piece
        elif kind == 3:
            found[place:place] = found[place : place + size]
        elif kind == 4:
            found[place : place + size] = bytes(len(found[place : place + size]))
        else:
            # At the start, where boxes and headers are.
            for _ in range(chance.randint(1, 8)):
                found[chance.randrange(min(len(found), 400))] = chance.randrange(256)
        if len(found) < 2:
            break
    return bytes(found)


if __name__ == "__main__":
    sys.exit(main())
