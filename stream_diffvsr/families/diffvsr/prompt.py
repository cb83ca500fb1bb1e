"""Prompt embeddings, kept in a small file so that the text encoder is loaded only for missing embeddings."""

from __future__ import annotations

import hashlib
import logging
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, ModelNotFoundError
from ...files import fingerprint, read_json, read_tensors, save_tensors
from .components import TEXT_ENCODER, TOKENIZER, build, fill, open_component

log = logging.getLogger(__name__)

FILE = "prompt_embeddings.safetensors"
ENCODER_KEY = "text_encoder"


class PromptEmbeddings:
    """Embeddings of prompts for one checkpoint folder."""

    def __init__(self, folder: Path, cache_folder: Path) -> None:
        self.folder = folder
        self.cache_folder = cache_folder
        self._known: dict[str, Tensor] = {}

    def get(self, prompt: str) -> Tensor:
        """Return an embedding (1, 77, D) float32 on the CPU; run the text encoder only if none is stored."""
        if prompt not in self._known:
            stored = self._stored(prompt)
            self._known[prompt] = self._encode_and_keep(prompt) if stored is None else stored
        return self._known[prompt]

    def has(self, prompt: str) -> bool:
        """Return whether `get` works without the text encoder."""
        return prompt in self._known or self._stored(prompt) is not None

    @cached_property
    def encoder(self) -> str:
        """Fingerprint of the text encoder; '' if the folder has none, so any encoder's embeddings match."""
        try:
            return fingerprint(open_component(self.folder, TEXT_ENCODER).files)
        except ModelNotFoundError:
            return ""

    def _files(self) -> list[Path]:
        """Return the possible embedding files: one next to the weights, and this encoder's in the cache."""
        cached = self.cache_folder / f"{self.encoder[:16]}.{FILE}" if self.encoder else None
        return [self.folder / FILE, *([cached] if cached else [])]

    def _stored(self, prompt: str) -> Tensor | None:
        for path in self._files():
            embedding = self._read(path).get(prompt_key(prompt))
            if embedding is not None:
                return embedding.float()
        return None

    def _read(self, path: Path) -> dict[str, Tensor]:
        """Read this encoder's embeddings from a file; ignore a damaged file, since it can be recreated.

        The tensors are copied, since Windows does not allow memory-mapped files to be replaced.
        """
        try:
            tensors, metadata = read_tensors(path) if path.is_file() else ({}, {})
        except (CheckpointError, OSError) as error:
            log.warning("stored prompt embeddings cannot be used: %s", error)
            return {}
        ours = self.encoder in ("", metadata.get(ENCODER_KEY))
        return {key: value.clone() for key, value in tensors.items()} if ours else {}

    def _encode_and_keep(self, prompt: str) -> Tensor:
        embedding = encode(self.folder, prompt)
        beside, *elsewhere = self._files()
        for path in [beside, *elsewhere]:
            if self._keep(path, prompt, embedding):
                break
        return embedding

    def _keep(self, path: Path, prompt: str, embedding: Tensor) -> bool:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(
                path, {**self._read(path), prompt_key(prompt): embedding}, {ENCODER_KEY: self.encoder}
            )
        except OSError as error:
            log.info("the prompt embedding could not be stored in %s: %s", path, error)
            return False
        return True


def prompt_key(prompt: str) -> str:
    """Return the name of a prompt's tensor in the file."""
    return hashlib.sha256(prompt.encode()).hexdigest()[:16]


def encode(folder: Path, prompt: str) -> Tensor:
    """Run the folder's text encoder; return (1, 77, D) float32 on the CPU, after the final layer norm."""
    try:
        part = open_component(folder, TEXT_ENCODER)
    except ModelNotFoundError as error:
        what = f"the prompt {prompt!r}" if prompt else "the empty prompt"
        raise ModelNotFoundError(
            f"text encoder (needed for the embedding of {what})",
            error.expected_path,
            "Add it, or use the empty prompt." if prompt else f"Add it, or put {FILE} next to the weights.",
        ) from error
    ids = token_ids(folder / TOKENIZER, prompt, part.config.get("max_position_embeddings", 77))
    model: Any = fill(build(part), part, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).last_hidden_state.float()


def token_ids(tokenizer: Path, prompt: str, length: int) -> list[int]:
    """Return the token ids of a prompt, padded to `length`.

    The empty prompt needs only three ids, which are read from the tokenizer's files. The padding id differs
    between model families and affects the result, as no attention mask hides it.
    """
    if prompt:
        return _tokenize(tokenizer, prompt, length)
    bos, eos, pad = (special_id(tokenizer, name) for name in ("bos_token", "eos_token", "pad_token"))
    return [bos, eos, *[pad] * (length - 2)]


def _tokenize(tokenizer: Path, prompt: str, length: int) -> list[int]:
    if not (tokenizer / "merges.txt").is_file():
        raise ModelNotFoundError(
            "tokenizer part merges.txt", tokenizer / "merges.txt", "Only the empty prompt works without it."
        )
    from transformers import CLIPTokenizer

    encoder = CLIPTokenizer.from_pretrained(tokenizer)
    return encoder(prompt, padding="max_length", max_length=length, truncation=True).input_ids


def special_id(tokenizer: Path, name: str) -> int:
    """Find a special token's id in `tokenizer_config.json`, `special_tokens_map.json` and `vocab.json`."""
    try:
        return _special_id(tokenizer, name)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{tokenizer} does not contain the id of its {name}; download the folder again."
        ) from error


def _special_id(tokenizer: Path, name: str) -> int:
    config = _optional_json(tokenizer / "tokenizer_config.json")
    token = config.get(name) or _optional_json(tokenizer / "special_tokens_map.json").get(name)
    text = token.get("content") if isinstance(token, dict) else token
    for number, entry in config.get("added_tokens_decoder", {}).items():
        if entry.get("content") == text:
            return int(number)
    return int(_optional_json(tokenizer / "vocab.json")[text])  # type: ignore[index]


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
