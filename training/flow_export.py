"""Export the flow network in the form that the engine opens, in half precision:

python -m training.flow_export training/runs/flow.safetensors
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from safetensors.torch import save_file

from stream_diffvsr.flow.open import BUNDLED
from stream_diffvsr.training.trainer import of_state
from training.flow import CONFIG


def export(checkpoint: Path, path: Path) -> None:
    """Write the moving average of the weights, and the configuration beside it."""
    average = of_state(checkpoint, "average")
    path.parent.mkdir(parents=True, exist_ok=True)
    config = json.dumps(CONFIG, indent=2, sort_keys=True) + "\n"
    path.with_name("config.json").write_text(config, encoding="utf-8")
    weights = {name: value.half().contiguous() for name, value in average.items()}
    save_file(weights, path, metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--path", type=Path, default=BUNDLED)
    args = parser.parse_args()
    export(args.checkpoint, args.path)
    print(f"{args.path}: {args.path.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
