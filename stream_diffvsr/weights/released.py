"""The released weights: where they are published, and under which names they are kept."""

from __future__ import annotations

from dataclasses import dataclass

RELEASED = "v1"
"""The released Stream-DiffVSR."""

REVISION_VARIABLE = "STREAM_DIFFVSR_REVISION"
"""Environment variable that names a branch, tag or commit to download instead of main."""


@dataclass(frozen=True)
class Release:
    """One published model; its name is also that of the folder it is downloaded to."""

    name: str
    family: str
    repository: str
    gigabytes: float
    """What a download takes, about."""
    folders: tuple[str, ...] = ()
    """Further names of folders that are taken for it; small letters, without - _ and dots."""
    version: str | None = None
    """Where the files of several versions are alike."""


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
        # Without the prompt, which is published with the code.
        Release("flashvsr-v1", "flashvsr", "JunhaoZhuang/FlashVSR", 7, ("flashvsr",), "v1"),
        Release("flashvsr-v1.1", "flashvsr", "JunhaoZhuang/FlashVSR-v1.1", 7, version="v1.1"),
        Release("swiftvr", "swiftvr", "H-oliday/SwiftVR", 20),
    )
}
"""By name, as `load_pipeline` takes it."""


def release_named(folder: str) -> Release | None:
    """The release that a folder's name says it holds."""
    plain = _plain(folder)
    return next((each for each in RELEASES.values() if plain in (_plain(each.name), *each.folders)), None)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter not in "-_.")
