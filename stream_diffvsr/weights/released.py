"""The released weights: where they are published, and under which names they are kept."""

RELEASED = "v1"
"""Their name here, and that of the folder they are downloaded to."""

RELEASED_NAMES = ("v1", "streamdiffvsr")
"""Names of folders that are taken for them, in small letters and without - and _."""

REPOSITORY = "Jamichsu/Stream-DiffVSR"

REVISION = "main"
"""Branch, tag or commit of the repository."""

REVISION_VARIABLE = "STREAM_DIFFVSR_REVISION"
"""Environment variable that names another."""
