"""Compare the speed of this checkout with that of another one.

    uv run python benchmarks/beside.py OTHER_CHECKOUT --model nano --size 160x90 --threads 1 2

Both run at once and compute the same frames alternately, so that other load slows both equally. The ratio is
the median over pairs of processor time, other / this; the difference between their pictures shows whether
both still compute the same. Both use this interpreter and its packages.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent

CYCLE = 8
"""Number of different frames; after these, they repeat."""


class Child:
    """A checkout that runs in a separate process."""

    def __init__(self, checkout: Path, threads: int, *settings: str) -> None:
        spin = os.environ.get("GOMP_SPINCOUNT", "2000")  # as the command sets it
        told = {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": str(threads), "GOMP_SPINCOUNT": spin}
        command = [sys.executable, __file__, "--child", str(checkout), *settings]
        self.process = subprocess.Popen(
            command, cwd=checkout, env={**os.environ, **told}, stdin=-1, stdout=-1, text=True
        )

    def frame(self) -> tuple[float, float, float]:
        """Compute one more frame; return its processor and wall time in milliseconds, and the mean |hq|."""
        assert self.process.stdin and self.process.stdout
        try:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            processor, clock, total = json.loads(self.process.stdout.readline())
        except (OSError, ValueError):
            sys.exit(f"the process that measures has ended: {self.process.args}")
        return processor, clock, total

    def end(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        self.process.wait()


def child(args: argparse.Namespace) -> None:
    """Compute a frame for each line of standard input, and print its figures as JSON."""
    import torch

    from stream_diffvsr import UpscaleOptions
    from stream_diffvsr.bench import networks

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    # Older checkouts call this function `open_model`.
    opened = getattr(networks, "open_measured", None) or networks.open_model
    pipe = opened(args.model, "cpu", "float32", "auto")
    if args.runtime != "torch":
        from stream_diffvsr.families.diffvsr.fastest import with_runtime

        pipe = with_runtime(pipe, args.runtime, "auto", "float32", "none")
    # Older checkouts lack this option; with it off, both checkouts do the same work.
    known = "occlusion" in {field.name for field in dataclasses.fields(UpscaleOptions)}
    options = UpscaleOptions(**({"occlusion": "off"} if known else {}))
    width, height = map(int, args.size.split("x"))
    generator = torch.Generator().manual_seed(0)
    rough = torch.rand((1, 3, height // 4 + 2, width // 4 + 4), generator=generator) * 2 - 1
    picture = torch.nn.functional.interpolate(rough, size=(height, width + CYCLE), mode="bicubic")
    state, index = None, 0
    for _ in sys.stdin:
        lq = picture[..., index % CYCLE : index % CYCLE + width].clamp(-1, 1).contiguous()
        processor, clock = time.process_time(), time.perf_counter()
        result = pipe.process_frame(lq, state, options)
        times = time.process_time() - processor, time.perf_counter() - clock
        state, index = result.state, index + 1
        print(
            json.dumps([1000 * times[0], 1000 * times[1], float(result.hq.double().abs().mean())]), flush=True
        )


def compare(args: argparse.Namespace, threads: int) -> dict[str, float]:
    """Return medians over the pairs; ratios are other / this."""
    common = "--model", args.model, "--size", args.size
    this = Child(HERE, threads, *common, "--runtime", args.runtime)
    other = Child(args.other.resolve(), threads, *common)
    pairs, difference = [], 0.0
    for index in range(2 + args.rounds):
        if index % 2:
            ours, theirs = this.frame(), other.frame()
        else:
            theirs, ours = other.frame(), this.frame()
        difference = max(difference, abs(ours[2] - theirs[2]))
        pairs += [(ours, theirs)] if index >= 2 else []  # the first two warm up
    this.end()
    other.end()
    ratios = [theirs[0] / ours[0] for ours, theirs in pairs]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "this": statistics.median(ours[0] for ours, _ in pairs),
        "other": statistics.median(theirs[0] for _, theirs in pairs),
        "ratio": statistics.median(ratios),
        "low": low,
        "high": high,
        "clock": statistics.median(theirs[1] / ours[1] for ours, theirs in pairs),
        "difference": difference,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("other", type=Path, help="The other checkout.")
    parser.add_argument("--model", default="nano", help="nano, random (released widths), or a folder.")
    parser.add_argument("--size", default="160x90", help="LQ size as WIDTHxHEIGHT.")
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="One run for each.")
    parser.add_argument(
        "--rounds", type=int, default=20, help="Pairs of frames to measure, after two warm-up pairs."
    )
    parser.add_argument("--runtime", default="torch", help="Of this checkout; the other one has PyTorch.")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    print(f"{args.model} at {args.size}, runtime {args.runtime}, {args.rounds} pairs\n")
    print("| threads | processor ms, this | other | ratio (quartiles) | by the clock | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for threads in args.threads:
        x = compare(args, threads)
        spread = f"{x['ratio']:.3f} ({x['low']:.3f} to {x['high']:.3f})"
        times = f"{x['this']:.0f} | {x['other']:.0f} | {spread} | {x['clock']:.3f}"
        print(f"| {threads} | {times} | {x['difference']:.1e} |", flush=True)


if __name__ == "__main__":
    main()
