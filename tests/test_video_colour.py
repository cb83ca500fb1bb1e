"""Code values to RGB and back: every matrix, range, depth and layout, against plain arithmetic."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import av.filter
import clips
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stream_diffvsr.errors import VideoError
from stream_diffvsr.media import colour as colours
from stream_diffvsr.media.codecs import choose_encoding
from stream_diffvsr.media.colour import (
    LAYOUTS,
    LUMA_WEIGHTS,
    SITINGS,
    Colour,
    Planes,
    downsample_chroma,
    frame_to_rgb,
    planar,
    planes_to_frame,
    rgb_to_planes,
)
from stream_diffvsr.media.read import Span, VideoSource
from stream_diffvsr.media.streams import SourceInfo
from stream_diffvsr.media.write import SegmentWriter

YUV = [name for name, layout in LAYOUTS.items() if not layout.rgb]


def smooth(height: int, width: int) -> torch.Tensor:
    """A gradient inside the gamut of every matrix, (1, 3, h, w)."""
    y, x = torch.meshgrid(torch.linspace(0.2, 0.8, height), torch.linspace(0.3, 0.7, width), indexing="ij")
    return torch.stack([y, x, (x + y) / 2])[None]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("matrix", [1, 6, 9])
def test_there_and_back(name: str, full: bool, matrix: int) -> None:
    """RGB formats take no notice of matrix and range."""
    colour = Colour(matrix, full, 1, 1)
    layout = LAYOUTS[name]
    rgb = smooth(24, 32)
    frame = planes_to_frame(rgb_to_planes(rgb, name, colour), name)
    back, alpha = frame_to_rgb(frame, colour)
    assert alpha is None
    # Chroma that was halved is interpolated at the borders; else it is rounding, of three values.
    allowed = 4 / 2**layout.bits + (0.02 if layout.chroma_width > 1 else 0)
    assert float((back - rgb).abs().max()) <= allowed


@pytest.mark.parametrize("siting", SITINGS)
def test_strips_give_what_the_whole_gives(siting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, where strips meet, too."""
    values = torch.randint(0, 256, (150, 34)).byte().numpy()
    colour = replace(Colour(1, False, 1, 1), siting=siting)
    chroma = values[::2, ::2].copy(), values[1::2, 1::2].copy()
    planes = Planes((values, *chroma), (8, 8, 8), False, False, (150, 34), colour)
    strips, _ = planes.to_rgb()
    monkeypatch.setattr(colours, "STRIP", 1000)
    assert torch.equal(strips, planes.to_rgb()[0])
    for step in (2, 7):
        assert torch.equal(strips[:, :, ::step, ::step], planes.to_rgb(step=step)[0])


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("share", [0.25, 0.75])
def test_values_are_rounded_and_not_cut(name: str, full: bool, share: float) -> None:
    """Greys that lie between two codes."""
    layout = LAYOUTS[name]
    codes = torch.arange(40, 48, dtype=torch.float64).repeat(8, 1) * 2 ** (layout.bits - 8)
    step, top = 2.0 ** (layout.bits - 8), 2**layout.bits - 1
    full = full or layout.rgb
    low, span = (0, top) if full else (16 * step, 219 * step)
    grey = (codes + share - low) / span
    first = rgb_to_planes(grey.expand(1, 3, 8, 8), name, Colour(1, full, 1, 1))[0]
    got = torch.from_numpy(first.astype(np.float64)).reshape(8, 8, -1)[..., 0]
    assert torch.equal(got, codes + round(share))


@settings(max_examples=60)
@given(
    st.sampled_from(sorted(LUMA_WEIGHTS)),
    st.booleans(),
    st.tuples(st.integers(40, 200), st.integers(100, 150), st.integers(100, 150)),
)
def test_the_matrix_is_the_standards(matrix: int, full: bool, codes: tuple[int, int, int]) -> None:
    y, cb, cr = codes
    frame = av.VideoFrame(16, 16, "yuv420p")
    for plane, value in zip(frame.planes, codes, strict=True):
        plane.update(bytes([value]) * plane.buffer_size)
    red, blue = LUMA_WEIGHTS[matrix]
    luma = y / 255 if full else (y - 16) / 219
    b, r = ((c - 128) / (255 if full else 224) for c in (cb, cr))
    wanted = [luma + 2 * (1 - red) * r, 0, luma + 2 * (1 - blue) * b]
    wanted[1] = (luma - red * wanted[0] - blue * wanted[2]) / (1 - red - blue)
    rgb, _ = frame_to_rgb(frame, Colour(matrix, full))
    assert torch.allclose(rgb[0, :, 5, 5], torch.tensor(wanted).clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("matrix", [1, 6])
@pytest.mark.parametrize("full", [False, True])
def test_as_swscale_has_it(matrix: int, full: bool) -> None:
    """FFmpeg's own conversion is coarser; it agrees within its rounding."""
    rgb = smooth(32, 48)
    frame = planes_to_frame(rgb_to_planes(rgb, "yuv444p", Colour(matrix, full)), "yuv444p")
    theirs = frame.reformat(
        format="rgb24",
        src_colorspace={1: 1, 6: 5}[matrix],
        src_color_range=2 if full else 1,
        dst_color_range=2,
    ).to_ndarray()
    ours, _ = frame_to_rgb(frame, Colour(matrix, full))
    assert np.abs(theirs - ours[0].movedim(0, -1).numpy() * 255).max() < 2


PACKED = """
yuv410p yuv411p yuv440p nv12 nv21 p010le yuyv422 uyvy422 yuv444p16be yuva420p yuv420p12be y210le
gray gray10le gray16be ya8 rgb24 bgr24 bgra argb rgb48be rgba64le gbrp gbrap16le rgb8
"""


@pytest.mark.parametrize("name", PACKED.split())
def test_every_layout_of_a_decoder_is_read(name: str) -> None:
    """Also those that must be unpacked first: the same grey everywhere. FFmpeg's own grey is full range."""
    grey = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 128, np.uint8))
    full = name.startswith(("gray", "ya8"))
    frame = grey.reformat(format=name, dst_color_range=2 if full else 1)
    colour = Colour(0, True) if frame.format.is_rgb else Colour(6, full)
    rgb, _ = frame_to_rgb(frame, colour)
    assert rgb.shape == (1, 3, 16, 16)
    tolerance = 0.2 if name == "rgb8" else 2.1 / 255
    assert float((rgb - 128 / 255).abs().max()) <= tolerance


def test_unpacking_loses_nothing() -> None:
    generator = np.random.default_rng(0)
    for name, shape, kind in (
        ("rgb48be", (8, 8, 3), ">u2"),
        ("bgra", (8, 8, 4), "u1"),
        ("rgb24", (8, 8, 3), "u1"),
    ):
        frame = av.VideoFrame(8, 8, name)
        values = generator.integers(0, 65536 if kind == ">u2" else 256, shape)
        rows = np.frombuffer(frame.planes[0], np.uint8).reshape(8, -1)
        packed = values.astype(kind).reshape(8, -1).view(np.uint8)
        rows[:, : packed.shape[1]] = packed
        rgb, alpha = frame_to_rgb(frame, Colour(0, True))
        top = 65535 if kind == ">u2" else 255
        got = (rgb[0].movedim(0, -1).numpy() * top).round().astype(int)
        wanted = values[..., 2::-1] if name == "bgra" else values
        assert np.array_equal(got, wanted[..., :3])
        if name == "bgra":
            assert alpha is not None
            # Older FFmpeg is off by one here, in alpha alone.
            assert np.abs((alpha[0, 0].numpy() * 255).round() - values[..., 3]).max() <= 1
        assert planar(planar(frame)) is not None


def test_ten_bits_are_not_cut() -> None:
    frame = av.VideoFrame(16, 16, "yuv420p10le")
    luma = np.frombuffer(frame.planes[0], np.uint16).reshape(16, -1)
    luma[:, :16] = np.arange(256).reshape(16, 16) + 400
    for plane in frame.planes[1:]:
        np.frombuffer(plane, np.uint16)[:] = 512
    rgb, _ = frame_to_rgb(frame, Colour(1, False))
    assert len(rgb[0, 0].unique()) == 256


def test_untagged_video_is_taken_by_its_size() -> None:
    assert Colour().resolved(720, 480) == Colour(6, False, 6, 6)
    assert Colour().resolved(1279, 576).matrix == 6
    assert Colour().resolved(1280, 544) == Colour(1, False, 1, 1)
    assert Colour().resolved(960, 577).matrix == 1
    assert Colour(primaries=9).resolved(720, 480) == Colour(6, False, 9, 2)
    assert Colour(9, True, 9, 16).resolved(100, 100) == Colour(9, True, 9, 16)
    with pytest.raises(VideoError, match="matrix 8"):
        Colour(8).resolved(720, 480)


def edges(height: int = 32, width: int = 48) -> torch.Tensor:
    """Patches of strong colours with edges at odd and even places, (1, 3, h, w)."""
    generator = torch.Generator().manual_seed(1)
    patches = torch.rand(3, 8, 8, generator=generator) * 0.6 + 0.2
    rows, columns = torch.arange(height) * 7 // (height + 1), torch.arange(width) * 7 // (width - 1)
    return patches[:, rows][:, :, columns][None]


def scaled(frame: av.VideoFrame, options: str, pix_fmt: str) -> np.ndarray:
    """FFmpeg's scale filter, with the arithmetic that it does best."""
    graph = av.filter.Graph()
    source = graph.add_buffer(
        width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
    )
    exact = "flags=bilinear+accurate_rnd+full_chroma_int+full_chroma_inp"
    steps = [
        graph.add("scale", f"{exact}:{options}"),
        graph.add("format", pix_fmt),
        graph.add("buffersink"),
    ]
    graph.link_nodes(source, *steps).configure()
    frame.pts, frame.time_base = 0, Fraction(1)
    graph.push(frame)
    return graph.pull().to_ndarray()


@pytest.mark.parametrize("siting", SITINGS)
def test_chroma_is_read_where_it_sits_as_swscale_has_it(siting: str) -> None:
    """At colour edges; any other siting is many times further away."""
    frame = planes_to_frame(rgb_to_planes(edges(), "yuv420p", Colour(1)), "yuv420p")
    ranges = "in_color_matrix=bt709:in_range=limited:out_range=full"
    theirs = scaled(frame, f"{ranges}:in_chroma_loc={siting}", "gbrp").astype(np.float32)
    planes = [theirs[2], theirs[0], theirs[1]] if theirs.shape[0] == 3 else list(np.moveaxis(theirs, -1, 0))

    def error(name: str) -> float:
        ours, _ = frame_to_rgb(frame, Colour(1, siting=name))
        return float(np.abs(ours[0].numpy() * 255 - np.stack(planes)).mean())

    errors = {name: error(name) for name in SITINGS}
    assert errors[siting] < 1, errors
    assert min(value for name, value in errors.items() if name != siting) > 2 * errors[siting], errors


def test_chroma_is_written_at_the_left_with_one_two_one() -> None:
    """A colour edge, by hand: each sample is a weighted mean around its even column, and of two rows."""
    rgb = torch.zeros(1, 3, 4, 8)
    rgb[:, 2, :, 3:] = 1
    blue = rgb_to_planes(rgb, "yuv420p", Colour(1))[1]
    full, none = (224 * 0.5 + 128), 128
    share = [0, (0 + 0 + 1) / 4, 1, 1]  # columns 0, 2, 4 and 6: two's right neighbour is blue
    wanted = [none + (full - none) * s for s in share]
    assert np.abs(blue - np.array(wanted)[None]).max() <= 0.5
    row = torch.zeros(1, 3, 4, 8)
    row[:, 2, 1:] = 1
    assert np.abs(rgb_to_planes(row, "yuv420p", Colour(1))[1][0] - (none + (full - none) / 2)).max() <= 0.5


@pytest.mark.parametrize("siting", SITINGS)
def test_chroma_is_written_where_it_sits_as_swscale_has_it(siting: str) -> None:
    """At colour edges; any other siting is further away. Halfway, its filter is wider than a mean of two."""
    rgb = edges()
    whole = av.VideoFrame.from_ndarray((rgb[0].movedim(0, -1).numpy() * 255).round().astype(np.uint8))
    ranges = "out_color_matrix=bt709:in_range=full:out_range=limited"
    theirs = scaled(whole, f"{ranges}:out_chroma_loc={siting}", "yuv420p")[32:].reshape(2, 16, 24)

    def error(name: str) -> float:
        planes = rgb_to_planes(rgb, "yuv420p", Colour(1, siting=name))[1:]
        return float(np.abs(np.stack(planes).astype(float) - theirs).mean())

    errors = {name: error(name) for name in SITINGS}
    assert errors[siting] < 1.5, errors
    assert min(value for name, value in errors.items() if name != siting) > 1.5 * errors[siting], errors


@pytest.mark.parametrize("size", [(1, 1), (3, 5), (4, 6)])
@pytest.mark.parametrize("siting", SITINGS)
def test_a_linear_colour_is_written_exactly_wherever_it_sits(siting: str, size: tuple[int, int]) -> None:
    """But at the borders, which are held."""
    height, width = size
    ramp = (torch.arange(height)[:, None] * 3 + torch.arange(width)[None] * 5).float()[None, None]
    got = downsample_chroma(ramp, LAYOUTS["yuv420p"], siting)
    x, y = SITINGS[siting]
    rows = torch.arange(-(-height // 2))[:, None] * 2 + y
    columns = torch.arange(-(-width // 2))[None] * 2 + x
    inside = (rows >= 1) & (rows <= height - 2) & (columns >= 1) & (columns <= width - 2)
    assert got.shape == (1, 1, -(-height // 2), -(-width // 2))
    assert torch.equal(got[0, 0][inside], (rows * 3 + columns * 5)[inside])


def test_the_siting_that_a_file_names_is_found(tmp_path: Path) -> None:
    for number, name in enumerate(("left", "center", "topleft", "top", "bottomleft", "bottom")):
        options = {"x264-params": f"chromaloc={number}"}
        path = clips.write_video(tmp_path / f"{name}.mp4", 1, options=options)
        assert VideoSource(path).info.colour.siting == name
    jpeg = clips.write_video(tmp_path / "a.avi", 1, codec="mjpeg", pix_fmt="yuvj420p")
    assert VideoSource(jpeg).info.colour.siting == "center"


@pytest.mark.parametrize(
    ("codec", "place", "wanted"),
    [
        *(("h264", place, place) for place in SITINGS),
        ("h265", "topleft", "topleft"),
        ("h265", "center", "center"),
        ("av1", "topleft", "topleft"),
        ("av1", "center", "left"),
    ],
)
def test_the_output_says_where_its_chroma_sits(codec, place, wanted, tmp_path: Path) -> None:
    """And the samples are there: read back by what the file says, colour edges are where they were."""
    info = SourceInfo(48, 32, 8, Fraction(1, 25), Fraction(25), 1, Colour(1, siting=place))
    encoding = choose_encoding(codec, None, 1, info, (64, 96))
    rgb = edges(64, 96)
    segment = SegmentWriter(tmp_path / "a.mp4", encoding)
    segment.add(rgb_to_planes(rgb, encoding.pix_fmt, encoding.colour), 0)
    segment.finish()
    source = VideoSource(tmp_path / "a.mp4")
    assert source.info.colour.siting == wanted
    planes = next(source.frames(Span())).pixels.planes  # type: ignore[attr-defined]

    def error(name: str) -> float:
        shown, _ = replace(planes, colour=replace(planes.colour, siting=name)).to_rgb()
        return float((shown - rgb).abs().mean())

    assert min(SITINGS, key=error) == wanted


def test_what_cannot_say_it_has_its_chroma_at_the_left() -> None:
    info = SourceInfo(48, 32, 8, Fraction(1, 25), Fraction(25), 1, Colour(1, siting="topleft"))
    for codec, pix_fmt in (("ffv1", None), ("prores", None), ("h264_nvenc", None), ("h264", "yuv422p")):
        encoding = choose_encoding(codec, pix_fmt, None, info, (128, 192))
        assert encoding.colour.siting == "left" and "chroma_sample_location" not in encoding.options
