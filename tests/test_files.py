"""Weight files that are not what their names or headers say."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from stream_diffvsr import CheckpointError
from stream_diffvsr.files import read_shapes, read_weights

READERS = (read_shapes, read_weights)
TENSORS = {name: torch.arange(6.0).reshape(2, 3) + index for index, name in enumerate("abc")}


def whole() -> tuple[dict[str, dict[str, object]], bytes]:
    """Header and content of a good file."""
    content = save(TENSORS)
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write(path: Path, header: bytes, content: bytes) -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + content)
    return path


def test_a_good_file(tmp_path: Path):
    header, content = whole()
    path = write(tmp_path / "x.safetensors", json.dumps(header).encode(), content)
    assert read_shapes(path) == dict.fromkeys("abc", (2, 3))
    assert all(torch.equal(value, TENSORS[name]) for name, value in read_weights(path).items())


LIES = {
    "shape": (None, 6, [], [3], [-2, -3], ["2", "3"], [6.0], {}, [2, 3, 10**30]),
    "dtype": (None, "I8", "XX", 3, [], "F64"),
    "data_offsets": (None, [], [0], [0, 0], [24, 0], ["0", "24"], [0, 10**30], [0, 12], [24, 48]),
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field in LIES for value in LIES[field]])
@pytest.mark.parametrize("read", READERS)
def test_a_header_that_contradicts_itself_or_the_file(tmp_path: Path, read, field: str, value: object):
    header, content = whole()
    header["a"][field] = value
    path = write(tmp_path / "x.safetensors", json.dumps(header).encode(), content)
    with pytest.raises(CheckpointError, match="copy or download it again") as caught:
        read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("header", [b"[]", b"5", b"null", b'{"a": 5}', b'{"a": {}}', b"[" * 100_000, b"\xff"])
@pytest.mark.parametrize("read", READERS)
def test_a_header_of_another_kind(tmp_path: Path, read, header: bytes):
    with pytest.raises(CheckpointError, match="copy or download it again"):
        read(write(tmp_path / "x.safetensors", header, whole()[1]))


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_pickles_are_read_or_refused(tmp_path: Path, checkpoint: Path, zipped: bool):
    """Whatever torch makes of them, it comes out as one kind of error."""
    chance, path, refused = random.Random(0), tmp_path / "x.bin", 0
    weights = load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors")
    torch.save(weights, path, _use_new_zipfile_serialization=zipped)
    good = path.read_bytes()
    for _ in range(100):
        damaged = bytearray(good)
        for end in (3000, len(good)):
            damaged[chance.randrange(end)] = chance.randrange(256)
            damaged[-1 - chance.randrange(end)] = chance.randrange(256)
        path.write_bytes(damaged)
        for read in READERS:
            try:
                read(path)
            except CheckpointError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 20
