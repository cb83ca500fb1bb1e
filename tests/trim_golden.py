"""Cut the recorded reference data down to what the default test run needs: trim_golden.py FULL_FOLDER.

Every case stays, with up to three frames. Of case B and of the variants every second row of the
results is kept, and of the variants the last frame only, which depends on the one before it.
"""

import json
import shutil
import sys
from pathlib import Path

from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent / "golden"
KEEP = {
    "A": ["lq_u8", "init_latents", "flows", "hq", "prompt_embeds", "input_ids", "cn_cond_embedding_f1"],
    "B": ["lq_u8", "init_latents", "flows", "hq"],
    "C_resize": ["lq", "init_latents", "flows", "hq"],
    "R_raft": ["lq_u8", "init_latents", "flows", "hq"],
}
FRAMES = 3


def trim_case(full: Path, name: str) -> None:
    data = load_file(full / f"case_{name}.safetensors")
    frames = min(FRAMES, len(data["init_latents"]))
    kept = {}
    for key in KEEP[name]:
        of_pairs = key == "flows"
        per_frame = key in ("lq", "lq_u8", "init_latents", "hq")
        kept[key] = data[key][: frames - of_pairs] if of_pairs or per_frame else data[key]
    if name == "B":
        kept["hq"] = kept["hq"][..., ::2, :]
    write(f"case_{name}", kept)


def trim_variants(full: Path) -> None:
    data = load_file(full / "case_A_variants.safetensors")
    write(
        "case_A_variants",
        {key: value[-1:, :, ::2] for key, value in data.items() if key.endswith(".hq")},
    )


def write(name: str, tensors: dict) -> None:
    path = HERE / f"{name}.safetensors"
    save_file({key: value.contiguous() for key, value in tensors.items()}, path)
    path.chmod(0o644)


def main(full: Path) -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    HERE.mkdir()
    for name in KEEP:
        trim_case(full, name)
    trim_variants(full)
    shutil.copyfile(full / "units.safetensors", HERE / "units.safetensors")
    for source in sorted((full / "checkpoint").rglob("*")):
        target = HERE / "checkpoint" / source.relative_to(full / "checkpoint")
        if source.is_file():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
    manifest = json.loads((full / "manifest.json").read_text())
    cases = {
        case: {key: value for key, value in entry.items() if key not in ("tensors", "flow_recipe")}
        for case, entry in manifest["cases"].items()
    }
    (HERE / "manifest.json").write_text(json.dumps({"cases": cases}, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
