import argparse
import io
import os
import struct
import zlib

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

import shared.images.decode
from shared.images.decode import EncodedImage, ImageError, read_image
from shared.images.sources import open_source, reading
from tests.shared.photographs import encoded, photograph

PHOTOGRAPH = photograph(0, 37, 53)
ORIENTATION = 0x0112


def rotated(image, orientation: int, file_format: str = "JPEG") -> bytes:
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, file_format, exif=exif)


def decode(data: bytes, reduction: int = 1) -> np.ndarray:
    image = EncodedImage(data, "picture")
    pixels = image.decode(reduction)
    assert pixels.dtype == np.uint8 and pixels.flags.c_contiguous and pixels.shape[2] == 3
    if reduction == 1:
        assert pixels.shape[:2] == (image.height, image.width)
    return pixels


@pytest.mark.parametrize("subsampling", [0, 1, 2])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpegs_decode_as_pillow_decodes_them(subsampling, progressive):
    data = encoded(PHOTOGRAPH, "JPEG", subsampling=subsampling, progressive=progressive)
    expected = np.asarray(Image.open(io.BytesIO(data)))
    # Both are libjpeg-turbo; other versions of it may round differently.
    assert np.abs(decode(data).astype(int) - expected).max() <= 2


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "PPM", "TIFF"])
def test_lossless_formats_keep_every_pixel(file_format):
    np.testing.assert_array_equal(decode(encoded(PHOTOGRAPH, file_format)), PHOTOGRAPH)


@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
@pytest.mark.parametrize("orientation", [1, 6])
def test_reduced_jpegs_have_sides_rounded_up(reduction, orientation):
    pixels = decode(rotated(PHOTOGRAPH, orientation), reduction)
    sides = (-(-37 // reduction), -(-53 // reduction))
    assert pixels.shape[:2] == (sides if orientation == 1 else sides[::-1])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF"])
def test_rotated_photographs_stand_upright(orientation, file_format):
    data = rotated(PHOTOGRAPH, orientation, file_format)
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    image = EncodedImage(data)
    assert (image.width, image.height) == upright.size == ((53, 37) if orientation < 5 else (37, 53))
    assert np.abs(image.decode().astype(int) - np.asarray(upright)).max() <= 2


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_orientation_is_ignored():
    for exif in (b"Exif\0\0garbage", b"Exif\0\0", b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x63\0\0"):
        assert decode(encoded(PHOTOGRAPH, "JPEG", exif=exif)).shape == (37, 53, 3)


def test_grey_is_repeated():
    grey = np.asarray(Image.fromarray(PHOTOGRAPH).convert("L"))
    np.testing.assert_array_equal(decode(encoded(grey, "PNG")), grey[..., None].repeat(3, axis=-1))
    jpeg = decode(encoded(grey, "JPEG"))
    assert (jpeg == jpeg[..., :1]).all() and np.abs(jpeg[..., 0].astype(int) - grey).mean() < 10


def test_16_bit_grey_uses_the_whole_range():
    levels = np.array([[0, 257, 128 * 257], [255 * 257, 65535, 200 * 257 + 90]], dtype=np.uint16)
    for file_format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(levels), file_format))
        assert image[..., 0].tolist() == [[0, 1, 128], [255, 255, 200]]


def test_16_bit_tiff_files_are_right_or_an_error(tmp_path):
    levels = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    tifffile.imwrite(tmp_path / "white.tif", 65535 - levels, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "black.tif", levels, photometric="minisblack")
    white, black = (decode((tmp_path / f"{name}.tif").read_bytes()) for name in ("white", "black"))
    np.testing.assert_array_equal(white, black)
    planes = levels.repeat(3).reshape(20, 30, 3).transpose(2, 0, 1)
    tifffile.imwrite(tmp_path / "planes.tif", planes, photometric="rgb", planarconfig="separate")
    with pytest.raises(ImageError, match="16-bit colours in planes; --in_chans 3 --value_range 0 65535 reads them"):
        decode((tmp_path / "planes.tif").read_bytes())


def test_palettes_bilevel_and_cmyk_become_rgb():
    image = Image.fromarray(PHOTOGRAPH)
    palette = image.quantize(32)
    np.testing.assert_array_equal(decode(encoded(palette, "PNG")), np.asarray(palette.convert("RGB")))
    bilevel = image.convert("1")
    np.testing.assert_array_equal(decode(encoded(bilevel, "PNG")), np.asarray(bilevel.convert("RGB")))
    cmyk = decode(encoded(image.convert("CMYK"), "JPEG", quality=95))
    assert np.abs(cmyk.astype(int) - PHOTOGRAPH).mean() < 6


def test_transparent_pixels_lie_over_white():
    alpha = np.full((37, 53, 1), 255, np.uint8)
    alpha[:10] = 0
    alpha[10:20] = 51
    pixels = decode(encoded(np.concatenate([PHOTOGRAPH, alpha], axis=-1), "PNG"))
    assert (pixels[:10] == 255).all()
    np.testing.assert_allclose(pixels[10:20], 0.8 * 255 + 0.2 * PHOTOGRAPH[10:20], atol=1)
    np.testing.assert_array_equal(pixels[20:], PHOTOGRAPH[20:])

    palette = Image.fromarray(PHOTOGRAPH).quantize(8)
    hidden = np.asarray(palette) == 3
    pixels = decode(encoded(palette, "PNG", transparency=3))
    assert (pixels[hidden] == 255).all() and not (pixels[~hidden] == 255).all()


def test_floating_point_pixels_are_refused():
    data = encoded(Image.fromarray(np.ones((4, 4), np.float32)), "TIFF")
    with pytest.raises(ImageError, match="picture: floating-point"):
        decode(data)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "BMP", "TIFF", "WEBP"])
def test_truncated_files_are_detected_never_half_a_picture(file_format):
    data = encoded(photograph(1, 60, 80), file_format)
    for kept in (0, 1, 3, 20, len(data) // 4, len(data) // 2, len(data) - 60):
        with pytest.raises(ImageError, match="picture"):
            decode(data[:kept])


def test_bytes_before_the_end_marker_of_a_jpeg_do_no_harm():
    data = encoded(PHOTOGRAPH, "JPEG")
    np.testing.assert_array_equal(decode(data[:-2] + b"\0\0\0" + data[-2:]), decode(data))
    np.testing.assert_array_equal(decode(data[:-2] + b"\0\0\0" + data[-2:], 2), decode(data, 2))


def changed(data: bytes, marker: int, offset: int, *values: int) -> bytes:
    """A JPEG whose first segment with this marker has other bytes from an offset behind the marker on."""
    start = data.index(bytes([0xFF, marker])) + offset
    return data[:start] + bytes(values) + data[start + len(values) :]


def padded(data: bytes, marker: int) -> bytes:
    start = data.index(bytes([0xFF, marker]))
    return data[:start] + b"\x00\x11\x00" + data[start:]


def with_adobe_instead_of_jfif(data: bytes, transform: int) -> bytes:
    adobe = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([transform])
    start = data.index(b"\xff\xe0")
    return data[:start] + adobe + data[start + 18 :]


SCAN_PARAMETERS = 11  # of three channels, behind the marker and the length, the channels' number and tables
HARMLESS = {
    "scan parameters": lambda data: changed(data, 0xDA, SCAN_PARAMETERS, 0, 0, 0),
    **{f"revision {a}.{b}": lambda data, a=a, b=b: changed(data, 0xE0, 9, a, b) for a, b in ((0, 0), (0, 2), (2, 0))},
    **{f"padding before {m:x}": lambda data, m=m: padded(data, m) for m in (0xDB, 0xC0, 0xC4, 0xDA)},
    "Adobe transform": lambda data: with_adobe_instead_of_jfif(data, 7),
    "several": lambda data: padded(changed(changed(data, 0xE0, 9, 2, 0), 0xDA, SCAN_PARAMETERS, 1, 5, 0), 0xDB),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_jpegs_whose_header_is_out_of_order_are_read_whole_and_hide_no_damage(change):
    data = encoded(PHOTOGRAPH, "JPEG", quality=95)
    np.testing.assert_array_equal(decode(change(data)), decode(data))
    data = change(data)
    middle = len(data) * 2 // 3
    for damaged in (data[:middle], data[:middle] + b"\xff\xd9"):
        with pytest.raises(ImageError):
            decode(damaged)


def test_a_grey_rotated_jpeg_with_padding_stands_upright():
    data = rotated(Image.fromarray(PHOTOGRAPH).convert("L"), 6)
    np.testing.assert_array_equal(decode(padded(data, 0xE1)), decode(data))
    assert decode(data).shape == (53, 37, 3)


def png_chunk(kind: bytes, content: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


PROFILE = b"profile\0\0" + zlib.compress(bytes(3 << 20))
TEXT = b"Comment\0\0" + zlib.compress(bytes(3 << 20))


@pytest.mark.parametrize(
    "chunk",
    [png_chunk(b"iCCP", PROFILE), png_chunk(b"zTXt", TEXT), png_chunk(b"tEXt", b"Comment\0hello", crc=1)],
    ids=["large profile", "large text", "wrong checksum"],
)
def test_a_png_is_read_whatever_its_texts_and_profiles_are(chunk):
    data = encoded(PHOTOGRAPH, "PNG")
    after_header = data.index(b"IDAT") - 4
    np.testing.assert_array_equal(decode(data[:after_header] + chunk + data[after_header:]), PHOTOGRAPH)
    end = data.index(b"IEND") - 4
    np.testing.assert_array_equal(decode(data[:end] + chunk + data[end:]), PHOTOGRAPH)
    with pytest.raises(ImageError):
        decode(data[:after_header] + chunk + data[after_header : len(data) // 2])
    damaged = bytearray(data)
    damaged[len(data) // 2] ^= 1
    with pytest.raises(ImageError):
        decode(bytes(damaged[:after_header]) + chunk + bytes(damaged[after_header:]))


def test_other_files_are_refused_with_their_name(tmp_path):
    (tmp_path / "text.jpg").write_text("no image at all")
    (tmp_path / "empty.png").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    reasons = {
        "text.jpg": "not an image",
        "empty.png": "empty file",
        "missing.png": "No such file",
        ".": "not a regular file",
        "pipe.jpg": "not a regular file",
    }
    for name, reason in reasons.items():
        with pytest.raises(ImageError, match=f"{tmp_path / name}: {reason}"):
            read_image(tmp_path / name)


@pytest.mark.parametrize("file_format", ["EPS", "PCX", "TGA", "ICO", "SGI"])
def test_formats_that_nobody_trains_on_are_refused_whatever_the_name(file_format):
    """Above all EPS, which is a program: Pillow would start an interpreter for it."""
    with pytest.raises(ImageError, match=r"picture\.jpg: not an image of a known format"):
        EncodedImage(encoded(PHOTOGRAPH, file_format), "picture.jpg")


@pytest.mark.parametrize("file_format", ["GIF", "MPO", "JPEG2000"])
def test_further_formats_are_read_whatever_the_name(file_format):
    assert np.abs(decode(encoded(PHOTOGRAPH, file_format)).astype(int) - PHOTOGRAPH).mean() < 20


def png_header(width: int, height: int) -> bytes:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"")


def test_decompression_bombs_are_refused_before_they_are_decoded():
    jpeg = bytearray(encoded(PHOTOGRAPH, "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = struct.pack(">HH", 65000, 65000)
    for bomb in (png_header(60000, 60000), png_header(20000, 9000), bytes(jpeg)):
        with pytest.raises(ImageError, match=r"picture: .* are more than --max_megapixels 178.957 allows"):
            EncodedImage(bomb, "picture")


def test_the_limit_of_pixels_can_be_moved(tmp_path):
    (tmp_path / "map.png").write_bytes(png_header(20000, 10000))
    flags = argparse.Namespace(allow_absolute_paths=False, max_megapixels=200)
    image = open_source(tmp_path, **reading(flags)).load(0)
    assert (image.height, image.width) == (10000, 20000)
    flags.max_megapixels = 199.9
    with pytest.raises(ImageError, match=r"map.png: 20000x10000 pixels are more than --max_megapixels 199.9 allows"):
        open_source(tmp_path, **reading(flags)).load(0)


def test_oversized_files_are_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shared.images.decode, "MAX_FILE_BYTES", 100)
    (tmp_path / "large.jpg").write_bytes(b"0" * 101)
    with pytest.raises(ImageError, match=r"large\.jpg: 101 bytes are more than the limit of 100"):
        read_image(tmp_path / "large.jpg")


SMALL = photograph(2, 16, 16)
FILES = [encoded(SMALL, name) for name in ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")]


@pytest.mark.filterwarnings("ignore")
@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(st.sampled_from(FILES), st.lists(st.tuples(st.integers(0, 3000), st.binary(max_size=4)), max_size=6))
@example(FILES[0], [(0, b"\xff\xd8\xff\xe1\xff\xff")])
def test_damaged_files_give_a_picture_or_an_image_error(data, damages):
    data = bytearray(data)
    for position, damage in damages:
        position %= len(data)
        data[position : position + len(damage)] = damage
    try:
        decode(bytes(data))
    except ImageError as error:
        assert str(error).startswith("picture: ")


@pytest.mark.parametrize("kind, is_alpha", [(2, True), (1, True), (0, False)])
def test_a_fourth_channel_of_a_tiff_file_is_transparency_only_where_the_file_says_so(kind, is_alpha):
    data = encoded(Image.fromarray(np.full((4, 4, 4), 100, np.uint8), "RGBA"), "TIFF")
    entry = struct.pack("<HHI", 338, 3, 1)  # tag ExtraSamples, one number of 16 bits
    assert data.count(entry + b"\2\0") == 1
    image = EncodedImage(data.replace(entry + b"\2\0", entry + bytes([kind, 0])), "infrared.tif")
    if is_alpha:
        assert image.decode().shape == (4, 4, 3)
        return
    with pytest.raises(ImageError, match=r"infrared\.tif: 4 channels, and none of them is said to be transparency"):
        image.decode()
