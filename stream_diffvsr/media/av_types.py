"""Types for the parts of PyAV that this package uses.

PyAV's own stubs allow None nearly everywhere (`pts`, `time_base`, `rate`). With those stubs, every use of a
value that `timeline.py` or `streams.py` has already checked would need another assertion.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Any, Protocol


class Named(Protocol):
    name: str


class Format(Named, Protocol):
    flags: int
    components: Sequence[Any]
    is_rgb: bool
    has_palette: bool
    is_big_endian: bool


class Codec(Named, Protocol):
    canonical_name: str
    audio_rates: Sequence[int] | None
    audio_formats: Sequence[Named] | None


class Coded(Named, Protocol):
    """The attributes that a stream and its codec context have in common, for video and sound."""

    time_base: Fraction
    rate: Any
    width: int
    height: int
    pix_fmt: str
    format: Any
    layout: Any
    sample_aspect_ratio: Fraction | None

    def decode(self, packet: Packet | None = None) -> list[Any]: ...
    def encode(self, frame: Any = None) -> list[Packet]: ...


class Context(Coded, Protocol):
    """The context of a decoder or an encoder."""

    codec: Codec
    framerate: Fraction
    sample_rate: int
    colorspace: int
    color_range: int
    color_trc: int
    color_primaries: int
    codec_tag: str
    options: dict[str, str]
    thread_count: int

    def open(self) -> None: ...


class Frame(Protocol):
    """A frame of video or sound."""

    pts: int
    dts: int | None
    time: float
    time_base: Fraction
    duration: int
    is_corrupt: bool
    rotation: int
    format: Format
    planes: Sequence[Any]
    side_data: Any
    # Video only.
    width: int
    height: int
    key_frame: bool
    interlaced_frame: bool
    colorspace: int
    color_range: int
    color_trc: int
    color_primaries: int
    # Sound only.
    samples: int
    sample_rate: int
    layout: Any

    def reformat(self, *args: Any, **kwargs: Any) -> Frame: ...
    def to_ndarray(self, *args: Any, **kwargs: Any) -> Any: ...


class Stream(Coded, Protocol):
    """A stream in a file that is being read or written."""

    type: str
    index: int
    id: int
    container: Container
    codec_context: Context
    metadata: dict[str, str]
    disposition: Any
    start_time: int | None
    duration: int | None
    frames: int
    profile: str | None
    average_rate: Fraction | None
    guessed_rate: Fraction | None
    mimetype: str
    data: bytes
    discard: Any


class Packet(Protocol):
    """A packet of a coded stream."""

    stream: Stream
    pts: Any  # an int, or None if the packet has no timestamp
    dts: Any
    pos: int | None
    duration: int | None
    time_base: Fraction
    size: int
    is_corrupt: bool
    is_discard: bool

    def decode(self) -> list[Any]: ...
    def has_sidedata(self, kind: str) -> bool: ...
    def get_sidedata(self, kind: str) -> Any: ...
    def __bytes__(self) -> bytes: ...


class Streams(Protocol):
    video: Sequence[Stream]
    audio: Sequence[Stream]

    def __iter__(self) -> Iterator[Stream]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Stream: ...


class Container(Protocol):
    """A file that is open for reading; a `with` block closes it."""

    streams: Streams
    metadata: dict[str, str]
    format: Format
    duration: int | None
    start_time: int | None
    size: int
    name: str

    def __enter__(self) -> Container: ...
    def __exit__(self, *args: Any) -> None: ...
    def close(self) -> None: ...
    def chapters(self) -> list[Any]: ...
    def demux(self, *streams: Any, **kwargs: Any) -> Iterator[Packet]: ...
    def decode(self, *streams: Any, **kwargs: Any) -> Iterator[Any]: ...
    def seek(self, offset: int, **kwargs: Any) -> None: ...


class Output(Protocol):
    """A file that is open for writing."""

    streams: Any
    metadata: Any
    format: Any

    def close(self) -> None: ...
    def add_stream(self, codec_name: Any, rate: Any = None, **kwargs: Any) -> Any: ...
    def add_stream_from_template(self, template: Any, **kwargs: Any) -> Any: ...
    def add_mux_stream(self, *args: Any, **kwargs: Any) -> Any: ...
    def add_attachment(self, name: str, mimetype: str, data: bytes) -> Any: ...
    def set_chapters(self, chapters: Any) -> None: ...
    def mux(self, packets: Any) -> None: ...
