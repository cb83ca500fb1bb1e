"""Pictures of every kind become RGB, and are written with the depth and the alpha that they had."""

from __future__ import annotations

import os
import struct
from fractions import Fraction
from pathlib import Path

import av
import clips
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from stream_diffvsr import UpscaleOptions, VideoError
from stream_diffvsr.jobs.run import VideoJob, run
from stream_diffvsr.media import pictures
from stream_diffvsr.media.pictures import Picture

RGB = clips.picture(3)
ALPHA = np.tile(np.linspace(0, 255, clips.WIDTH).astype(np.uint8), (clips.HEIGHT, 1))
DEEP = (RGB.astype(np.uint16) * 257 + np.arange(clips.WIDTH, dtype=np.uint16)[None, :, None]).clip(0, 65535)


def values(tensor: torch.Tensor, top: int = 255) -> np.ndarray:
    return (tensor[0].movedim(0, -1).numpy() * top).round()


def save_deep(path: Path, array: np.ndarray) -> Path:
    """A 16-bit picture, written by PyAV: Pillow cannot."""
    names = {1: "gray16", 3: "rgb48", 4: "rgba64"}
    order = "be" if path.suffix == ".png" else "le"
    name = names[array.shape[-1]] + order
    frame = av.VideoFrame(array.shape[1], array.shape[0], name)
    rows = np.frombuffer(frame.planes[0], np.uint8).reshape(array.shape[0], -1)
    packed = array.astype(">u2" if order == "be" else "<u2").reshape(array.shape[0], -1).view(np.uint8)
    rows[:, : packed.shape[1]] = packed
    encoder = av.CodecContext.create("png" if path.suffix == ".png" else "tiff", "w")
    encoder.width, encoder.height, encoder.pix_fmt, encoder.time_base = (
        *array.shape[1::-1],
        name,
        Fraction(1, 25),
    )
    path.write_bytes(b"".join(bytes(p) for p in [*encoder.encode(frame), *encoder.encode(None)]))
    return path


def test_plain_rgb(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    picture = pictures.read(tmp_path / "a.png")
    assert np.array_equal(values(picture.rgb), RGB)
    assert picture.alpha is None and picture.bits == 8


@pytest.mark.parametrize("mode", ["L", "1", "LA", "RGBA", "P", "CMYK", "YCbCr", "HSV", "I;16"])
def test_modes_become_rgb(mode: str, tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(ALPHA))
    if mode == "I;16":
        image = Image.fromarray(DEEP[..., 0])
        expected = np.repeat(DEEP[..., :1], 3, axis=-1) / 65535
    else:
        image = image.convert(mode)
        expected = np.asarray(image.convert("RGBA").convert("RGB")) / 255
    picture = pictures.from_pillow(image)
    assert np.abs(picture.rgb[0].movedim(0, -1).numpy() - expected).max() < 1e-4
    assert (picture.alpha is not None) == (mode in ("LA", "RGBA"))
    if picture.alpha is not None:
        assert np.array_equal(values(picture.alpha)[..., 0], ALPHA)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_sixteen_bits_are_not_cut(suffix: str, channels: int, tmp_path: Path) -> None:
    array = np.concatenate([DEEP, ALPHA[..., None].astype(np.uint16) * 250], axis=-1)[..., :channels]
    picture = pictures.read(save_deep(tmp_path / f"a{suffix}", array))
    assert picture.bits == 16
    wanted = np.repeat(array, 3, axis=-1) if channels == 1 else array[..., :3]
    assert np.array_equal(values(picture.rgb, 65535), wanted)
    if channels == 4:
        assert picture.alpha is not None
        assert np.array_equal(values(picture.alpha, 65535)[..., 0], array[..., 3])


def test_transparency_of_a_palette(tmp_path: Path) -> None:
    image = Image.fromarray(RGB).quantize(16)
    image.save(tmp_path / "a.png", transparency=bytes([0] * 4 + [255] * 12))
    picture = pictures.read(tmp_path / "a.png")
    assert picture.alpha is not None
    assert np.array_equal(values(picture.alpha)[..., 0] == 0, np.asarray(image) < 4)


def test_a_cmyk_jpeg_and_a_grey_one(tmp_path: Path) -> None:
    Image.fromarray(RGB).convert("CMYK").save(tmp_path / "a.jpg", quality=100)
    assert np.abs(values(pictures.read(tmp_path / "a.jpg").rgb) - RGB).mean() < 6
    Image.fromarray(RGB).convert("L").save(tmp_path / "b.jpg")
    assert pictures.read(tmp_path / "b.jpg").rgb.shape == (1, 3, clips.HEIGHT, clips.WIDTH)


def profile_of_inks(lab: list[tuple[int, int, int]]) -> bytes:
    """An ICC profile of CMYK; `lab` are the colours of the 16 mixtures of none or all of each ink."""
    number = lambda value: struct.pack(">i", round(value * 65536))  # noqa: E731
    curve = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(map(number, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table += 4 * curve + b"".join(map(bytes, lab)) + 3 * curve
    table += bytes(-len(table) % 4)
    head = bytes(4) + bytes(4) + b"\x02\x40\0\0" + b"prtrCMYKLab " + struct.pack(">6H", 2020, 1, 1, 0, 0, 0)
    head += b"acsp" + bytes(28) + b"".join(map(number, (0.9642, 1, 0.8249))) + bytes(48)
    tags = struct.pack(">I4sII", 1, b"A2B0", 144, len(table))
    return struct.pack(">I", 144 + len(table)) + head[4:] + tags + table


def test_the_profile_of_inks_is_applied(tmp_path: Path, caplog) -> None:
    """By the profile here all inks are grey, each a quarter of the darkness."""
    inks = profile_of_inks([(255 - 63 * bin(mixture).count("1"), 128, 128) for mixture in range(16)])
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    cyan.save(tmp_path / "plain.tif")
    cyan.save(tmp_path / "inks.tif", icc_profile=inks)
    cyan.save(tmp_path / "damaged.tif", icc_profile=b"none" * 40)
    plain, grey, damaged = (
        values(pictures.read(tmp_path / f"{name}.tif").rgb)[8, 8] for name in ("plain", "inks", "damaged")
    )
    assert plain[0] < 60 < plain[2] and np.array_equal(damaged, plain)
    assert "profile" in caplog.text and "not applied" in caplog.text
    assert np.ptp(grey) <= 2 and abs(grey.mean() - 184) < 4  # L* = 75
    picture = pictures.read(tmp_path / "inks.tif")
    assert "icc_profile" not in picture.profile


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation(orientation: int, tmp_path: Path) -> None:
    """Eight and sixteen bits are turned alike, as Pillow turns."""
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as image:
        wanted = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(values(pictures.read(tmp_path / "a.png").rgb), wanted)
    from stream_diffvsr.media.read import upright

    turned = upright(torch.from_numpy(RGB).movedim(-1, 0)[None], pictures.EXIF_TURNS.get(orientation))
    assert np.array_equal(turned[0].movedim(0, -1).numpy(), wanted)


@pytest.mark.parametrize("suffix", pictures.WRITABLE)
@pytest.mark.parametrize("bits", [8, 16])
def test_written_pictures_read_back(suffix: str, bits: int, tmp_path: Path) -> None:
    rgb = torch.from_numpy(DEEP.astype(np.float32) / 65535).movedim(-1, 0)[None]
    alpha = torch.from_numpy(ALPHA.astype(np.float32) / 255)[None, None]
    pictures.write(tmp_path / f"a{suffix}", Picture(rgb, alpha, bits))
    back = pictures.read(tmp_path / f"a{suffix}")
    deep = bits == 16 and suffix in pictures.DEEP_SUFFIXES
    assert back.bits == (16 if deep else 8)
    tolerance = 0.1 if suffix in (".jpg", ".jpeg") else 0.51 / (65535 if deep else 255)
    assert float((back.rgb - rgb).abs().max()) <= tolerance
    assert (back.alpha is not None) == (suffix in pictures.ALPHA_SUFFIXES)
    assert [file.name for file in tmp_path.iterdir()] == [f"a{suffix}"]


def test_natural_order(tmp_path: Path) -> None:
    for name in ("f10.png", "f2.png", "F1.png", "a.txt", ".hidden.png"):
        Image.fromarray(RGB).save(tmp_path / name, format="PNG")
    assert [file.name for file in pictures.list_folder(tmp_path)] == ["F1.png", "f2.png", "f10.png"]


def upscale(pipe, source: Path, output: Path) -> Path:
    options = UpscaleOptions(num_inference_steps=1)
    for _ in run(pipe, VideoJob(source=source, output=output, options=options)):
        pass
    return output


def test_alpha_is_upscaled_beside_the_colours(pipe, tmp_path: Path) -> None:
    image = Image.fromarray(RGB)
    image.putalpha(Image.fromarray(ALPHA))
    image.save(tmp_path / "a.png")
    with Image.open(upscale(pipe, tmp_path / "a.png", tmp_path / "b.png")) as result:
        assert (result.mode, result.size) == ("RGBA", (128, 96))
        got = np.asarray(result)[..., 3]
    alpha = torch.from_numpy(ALPHA.astype(np.float32))[None, None]
    wanted = F.interpolate(alpha, scale_factor=4, mode="bicubic", align_corners=False).clamp(0, 255)
    assert np.abs(got - wanted[0, 0].numpy()).max() <= 0.51
    with Image.open(upscale(pipe, tmp_path / "a.png", tmp_path / "b.jpg")) as result:
        assert result.mode == "RGB"


def test_the_colours_do_not_depend_on_alpha_or_container(pipe, tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")
    save_deep(tmp_path / "deep.png", RGB.astype(np.uint16) * 257)
    plain = pictures.read(upscale(pipe, tmp_path / "a.png", tmp_path / "a_4x.png"))
    deep = pictures.read(upscale(pipe, tmp_path / "deep.png", tmp_path / "deep_4x.png"))
    assert (plain.bits, deep.bits) == (8, 16)
    assert float((plain.rgb - deep.rgb).abs().max()) <= 0.51 / 255


def test_a_folder_of_different_sizes_and_formats(pipe, tmp_path: Path) -> None:
    """A change of size begins a sequence: each picture is as it is alone at its index."""
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(RGB).save(folder / "1.png")
    Image.fromarray(clips.picture(0, 24, 16)).save(folder / "2.webp", lossless=True)
    Image.fromarray(RGB).convert("P").save(folder / "3.gif")
    result = upscale(pipe, folder, tmp_path / "out")
    sizes = {file.name: Image.open(file).size for file in result.iterdir()}
    assert sizes == {"1.png": (128, 96), "2.webp": (96, 64), "3.png": (128, 96)}


def test_profiles_are_kept(pipe, tmp_path: Path) -> None:
    from PIL import ImageCms

    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).save(tmp_path / "a.png", icc_profile=profile, dpi=(300, 300))
    with Image.open(upscale(pipe, tmp_path / "a.png", tmp_path / "b.png")) as result:
        assert result.info["icc_profile"] == profile
        assert result.info["dpi"] == pytest.approx((300, 300), abs=0.1)


def test_a_folder_with_what_is_no_file(pipe, tmp_path: Path, caplog) -> None:
    """A pipe is refused, a folder is no picture; of an animation one frame is read, which is said."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "c.png").mkdir()
    stills = [Image.fromarray(clips.picture(index, 24, 16)) for index in range(3)]
    stills[0].save(folder / "a.gif", save_all=True, append_images=stills[1:])
    stills[0].save(folder / "b.png")
    made = upscale(pipe, folder, tmp_path / "out")
    assert sorted(file.name for file in made.iterdir()) == ["a.png", "b.png"]
    assert "a.gif has 3 frames, but only the first is read" in caplog.text
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "d.png")
        with pytest.raises(VideoError, match="save it as a file first"):
            upscale(pipe, folder, tmp_path / "new")


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits_keep_profile_and_resolution(suffix: str, tmp_path: Path) -> None:
    from PIL import ImageCms

    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    rgb = torch.from_numpy(DEEP.astype(np.float32) / 65535).movedim(-1, 0)[None]
    path = tmp_path / f"a{suffix}"
    pictures.write(path, Picture(rgb, None, 16, {"icc_profile": icc, "dpi": (300, 300)}))
    back = pictures.read(path)
    assert back.bits == 16 and np.array_equal(values(back.rgb, 65535), DEEP)
    assert back.profile["icc_profile"] == icc
    assert [float(side) for side in back.profile["dpi"]] == pytest.approx([300, 300], abs=0.1)


def test_a_picture_with_more_inside_is_a_picture(tmp_path: Path, caplog) -> None:
    """A phone's JPEG with a second picture, upright, and a TIFF with pages."""
    first, second = Image.fromarray(RGB), Image.fromarray(RGB[::-1])
    exif = Image.Exif()
    exif[0x0112] = 6
    first.save(tmp_path / "a.jpg", format="MPO", save_all=True, append_images=[second], exif=exif)
    Image.fromarray(RGB).save(tmp_path / "a.tif", save_all=True, append_images=[Image.fromarray(RGB[::-1])])
    with Image.open(tmp_path / "a.jpg") as image:
        assert image.format == "MPO" and image.n_frames == 2
    assert pictures.is_picture(tmp_path / "a.jpg") and not pictures.is_animated(tmp_path / "a.jpg")
    assert pictures.read(tmp_path / "a.jpg").rgb.shape[-2:] == (clips.WIDTH, clips.HEIGHT)
    assert pictures.size_of(tmp_path / "a.jpg") == (clips.HEIGHT, clips.WIDTH)
    assert pictures.is_picture(tmp_path / "a.tif")
    assert np.array_equal(values(pictures.read(tmp_path / "a.tif").rgb), RGB)
    assert "2 pages, but only the first" in caplog.text


def test_streams_of_pictures_are_videos(pipe, tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mjpeg"), "w") as out:
        stream = out.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuvj420p"
        for index in range(3):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(clips.picture(index, 16, 16), format="rgb24")))
        out.mux(stream.encode(None))
    assert not pictures.is_picture(tmp_path / "a.mjpeg")
    assert len(clips.frames_of(upscale(pipe, tmp_path / "a.mjpeg", tmp_path / "a.mp4"))) == 3
    Image.fromarray(RGB).save(tmp_path / "one.mjpeg", format="JPEG")
    assert pictures.is_picture(tmp_path / "one.mjpeg")


def test_a_tiff_that_lacks_rows_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    Image.fromarray(RGB).save(path)
    height = struct.pack("<HHII", 257, 4, 1, clips.HEIGHT)
    data = path.read_bytes()
    assert data.count(height) == 1
    path.write_bytes(data.replace(height, struct.pack("<HHII", 257, 4, 1, clips.HEIGHT + 100)))
    with pytest.raises(VideoError, match="rows"):
        pictures.read(path)


def test_an_animation_with_a_frame_that_claims_to_be_huge(tmp_path: Path) -> None:
    from stream_diffvsr.media.read import open_source

    path = tmp_path / "a.gif"
    first, second = (Image.fromarray(clips.picture(index)).quantize(8) for index in range(2))
    first.save(path, save_all=True, append_images=[second])
    data = path.read_bytes()
    place = data.rindex(b"\x2c\0\0")  # the second picture's place and size
    path.write_bytes(data[: place + 5] + b"\xff\xff\xff\xff" + data[place + 9 :])
    with pytest.raises(VideoError, match="damaged"):
        open_source(path)


def test_what_is_no_picture_here_is_one_sentence(tmp_path: Path, monkeypatch) -> None:
    import os
    import sys

    from stream_diffvsr.media.containers import check_readable

    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(100))
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(VideoError, match="pip install pillow-heif"):
        pictures.is_picture(tmp_path / "a.heic")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.fromarray(RGB).save(tmp_path / "huge.png")
    with pytest.raises(VideoError, match="pixels that a picture may have"):
        pictures.is_picture(tmp_path / "huge.png")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(VideoError, match="save it as a file first"):
            check_readable(tmp_path / "pipe")


def test_names_with_signs_of_their_own(pipe, tmp_path: Path, monkeypatch) -> None:
    """A colon is no protocol, a per cent sign no numbered series, a dot in a folder's name no format."""
    monkeypatch.chdir(tmp_path)
    clips.write_video(tmp_path / "Ep1: pilot.mp4", 2, size=(16, 16), audio=1)
    assert len(clips.frames_of(tmp_path / upscale(pipe, Path("Ep1: pilot.mp4"), Path("Ep: 2.mp4")))) == 2
    save_deep(tmp_path / "a: %03d.png", DEEP)
    assert pictures.read(Path("a: %03d.png")).bits == 16
    folder = tmp_path / "shots_2024.05.01"
    folder.mkdir()
    for name in ("a.png", "a.gif", "b.avif", "notes.txt"):
        if name.endswith("txt"):
            (folder / name).write_text("x")
        else:
            Image.fromarray(RGB).save(folder / name)
    output = upscale(pipe, folder, tmp_path / "shots_2024.05.01_4x")
    assert sorted(file.name for file in output.iterdir()) == ["a.gif.png", "a.png", "b.png"]
    with pytest.raises(VideoError, match="a supported extension"):
        upscale(pipe, folder, tmp_path / "out.avi")


def test_pictures_of_several_sizes_are_no_video(pipe, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    Image.fromarray(RGB).save(folder / "1.png")
    Image.fromarray(clips.picture(0, 24, 16)).save(folder / "2.png")
    with pytest.raises(VideoError, match=r"2.png is 24x16, but 1.png is 32x24. All frames"):
        upscale(pipe, folder, tmp_path / "out.mp4")


def test_no_other_output_is_replaced(pipe, tmp_path: Path) -> None:
    source = clips.write_video(tmp_path / "in.mp4", 1)
    (tmp_path / "precious.mp4").write_text("x")
    for name in ("compare", "state_out", "cuts_out"):
        for path, said in (("precious.mp4", "exists"), ("out.mp4", "given for two outputs")):
            task = VideoJob(source=source, output=tmp_path / "out.mp4", **{name: tmp_path / path})
            with pytest.raises(VideoError, match=said):
                next(run(pipe, task))
    assert (tmp_path / "precious.mp4").read_text() == "x"


def test_floating_point_pictures_are_refused(tmp_path: Path) -> None:
    Image.fromarray(RGB[..., 0].astype(np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(VideoError, match="the range of its floating-point samples is unknown"):
        pictures.read(tmp_path / "a.tif")


def test_a_tiff_without_its_size_is_one_sentence(tmp_path: Path) -> None:
    """Pillow raises a TypeError for it."""
    Image.new("RGB", (16, 12)).save(tmp_path / "a.tif")
    data = (tmp_path / "a.tif").read_bytes()
    # The entry of the width becomes one that nobody knows.
    place = data.index(b"\x00\x01\x03\x00" if b"\x00\x01\x03\x00" in data else b"\x00\x01\x04\x00")
    (tmp_path / "a.tif").write_bytes(data[:place] + b"\xfe\xff" + data[place + 2 :])
    with pytest.raises(VideoError, match="cannot be read as a picture"):
        pictures.read(tmp_path / "a.tif")
