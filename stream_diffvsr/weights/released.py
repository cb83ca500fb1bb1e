"""The released weights: where they are published, and the names under which they are stored."""

from __future__ import annotations

from dataclasses import dataclass

RELEASED = "v1"
"""Name of the released Stream-DiffVSR model."""

REVISION_VARIABLE = "STREAM_DIFFVSR_REVISION"
"""Environment variable that names a branch, tag or commit to download instead of main."""


@dataclass(frozen=True)
class Release:
    """One published model, which is downloaded to a folder of the same name."""

    name: str
    family: str
    repository: str
    gigabytes: float
    """Approximate size of the download."""
    folders: tuple[str, ...] = ()
    """Other folder names that identify it, in lower case, without hyphens, underscores or dots."""
    version: str | None = None
    """The model's version, if the files alone do not reveal it."""


RELEASES = {
    release.name: release
    for release in (
        Release("v1", "diffvsr", "Jamichsu/Stream-DiffVSR", 4, ("streamdiffvsr",)),
        Release(
            "mix",
            "diffvsr",
            "Jamichsu/Stream-DiffVSR-Mix-Degradation",
            4,
            ("streamdiffvsrmix", "streamdiffvsrmixdegradation"),
        ),
        # The prompt is not included; it is published with the code.
        Release("flashvsr-v1", "flashvsr", "JunhaoZhuang/FlashVSR", 7, ("flashvsr",), "v1"),
        Release("flashvsr-v1.1", "flashvsr", "JunhaoZhuang/FlashVSR-v1.1", 7, version="v1.1"),
        Release("swiftvr", "swiftvr", "H-oliday/SwiftVR", 20),
    )
}
"""All releases, by the name that `load_pipeline` accepts."""


def release_named(folder: str) -> Release | None:
    """Return the release that a folder's name identifies, or None."""
    plain = _plain(folder)
    return next((each for each in RELEASES.values() if plain in (_plain(each.name), *each.folders)), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "-_.")
