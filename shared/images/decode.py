"""Compressed images: their size without decoding them, and pixels that are right or an error, never half a picture."""

import functools
import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator

import numpy as np
import simplejpeg
from PIL import Image

MAX_PIXELS = 178_956_970  # what Pillow refuses beyond; memory is not allocated for a larger image
MAX_FILE_BYTES = 1 << 28
# torchvision's list, other names of JPEG files, and what Pillow reads besides; of several frames the first one counts
EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
EXTENSIONS += (".jfif", ".jpe", ".mpo", ".gif", ".avif")
# What a file may be, whatever its name says. Pillow knows more: an EPS file is a program, which it has Ghostscript run.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
_ORIENTATION_TAG = 0x0112
# of a TIFF file: sides, bits, whether 0 is white, channels, whether these lie apart, what those beyond RGB are
_WIDTH_TAG, _HEIGHT_TAG, _BITS_TAG, _PHOTOMETRIC_TAG, _SAMPLES_TAG, _PLANES_TAG = 256, 257, 258, 262, 277, 284
_EXTRA_SAMPLES_TAG = 338
WHITE_IS_ZERO, APART = 0, 2
_PNG = b"\x89PNG\r\n\x1a\n"


class ImageError(ValueError):
    """A file that cannot be read as an image; the message holds its name and the reason."""


class DecodedImage:
    """Pixels in memory with the interface of :class:`EncodedImage`.

    Args:
        pixels: RGB, uint8, shape (H, W, 3).
    """

    def __init__(self, pixels: np.ndarray):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    def decode(self, reduction: int = 1) -> np.ndarray:
        """The pixels at full size, whatever ``reduction`` allows."""
        return self.pixels


class EncodedImage:
    """An image file in memory, decoded on demand.

    ``height`` and ``width`` come from the header and are those after the EXIF rotation. Every mode becomes 8-bit RGB:
    grey is repeated, palettes and CMYK are converted, transparent pixels are laid over white, 16-bit grey is divided
    by 257.

    Args:
        data: Content of the file.
        name: File name for error messages.

    Raises:
        ImageError: If the header is not that of an image or announces more than ``max_pixels``.
    """

    def __init__(self, data: bytes, name: str = "image", max_pixels: int = MAX_PIXELS):
        self.data, self.name = data, name
        self._pil: Image.Image | None = None
        header = _turbo_header(data)
        self._turbo = header is not None
        if header:
            height, width = header
            self.orientation = _jpeg_orientation(data)
        else:
            self._pil = open_with_pil(data, name)
            width, height = self._pil.size
            if self._pil.format == "TIFF":  # whose size Pillow states turned already
                width, height = self._pil.tag_v2[_WIDTH_TAG], self._pil.tag_v2[_HEIGHT_TAG]
            self.orientation = _pil_orientation(self._pil)
        if height * width > max_pixels:
            raise ImageError(
                f"{name}: {width}x{height} pixels are more than --max_megapixels {max_pixels / 1e6:g} allows"
            )
        transposed = self.orientation >= 5
        self.height, self.width = (width, height) if transposed else (height, width)

    def decode(self, reduction: int = 1) -> np.ndarray:
        """RGB pixels, uint8, C-contiguous, shape (H, W, 3).

        Args:
            reduction: 1, 2, 4 or 8; allows sides divided by it (rounded up). JPEG files use it to decode faster, other
                files come at full size, so callers take the scale from the shape.

        Raises:
            ImageError: If the file is truncated or broken.
        """
        if not self._turbo:
            return self._decode_pil()
        return upright(self._decode_turbo(reduction), self.orientation)

    def _decode_turbo(self, reduction: int) -> np.ndarray:
        least = {}
        if reduction > 1:
            height, width = (self.width, self.height) if self.orientation >= 5 else (self.height, self.width)
            least = {"min_height": -(-height // reduction), "min_width": -(-width // reduction)}
        try:
            return _decode_whole_jpeg(self.data, least)
        except ValueError as error:
            # libjpeg reports its first warning only, so one about the header may hide that pixels are missing
            header_in_order = _with_header_in_order(self.data)
            if header_in_order == self.data:
                raise ImageError(f"{self.name}: {error}") from error
        try:
            return _decode_whole_jpeg(header_in_order, least)
        except ValueError as error:
            raise ImageError(f"{self.name}: {error}") from error

    def _decode_pil(self) -> np.ndarray:
        image = self._pil or open_with_pil(self.data, self.name)
        self._pil = None  # loading keeps the pixels alive in the PIL object
        try:
            try:
                image.load()
            except Exception:
                if not self.data.startswith(_PNG):
                    raise
                image = open_with_pil(_without_png_texts(self.data), self.name)
                image.load()
            if self.data.startswith(_PNG) and not all(
                whole for kind, _, whole in _png_chunks(self.data) if kind == b"IDAT"
            ):
                raise ImageError(f"{self.name}: wrong checksum of pixels")  # which Pillow does not look at
            # Pillow turns TIFF files itself when it loads them, and no others
            orientation = _pil_orientation(image) if image.format == "TIFF" else self.orientation
            return upright(np.array(to_rgb(image, self.name)), orientation)  # a copy: PIL's own memory is read-only
        except ImageError:
            raise
        except Exception as error:  # a broken file makes Pillow raise nearly anything; it goes on as one type
            raise ImageError(f"{self.name}: {error or type(error).__name__}") from error


def read_image(path: str | os.PathLike, max_pixels: int = MAX_PIXELS) -> EncodedImage:
    """Read an image file.

    Raises:
        ImageError: If it is missing, unreadable, no regular file, larger than ``MAX_FILE_BYTES`` or no image.
    """
    return EncodedImage(read_file(path), str(path), max_pixels)


def read_file(path: str | os.PathLike) -> bytes:
    """Content of a file; raises ``ImageError`` as :func:`read_image` does."""
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
            raise ImageError(f"{path}: not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(f"{path}: {status.st_size} bytes are more than the limit of {MAX_FILE_BYTES}")
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise ImageError(f"{path}: {error.strerror or error}") from error


def _decode_whole_jpeg(data: bytes, least: dict[str, int]) -> np.ndarray:
    """RGB pixels; ValueError where libjpeg warns, but for bytes before the end marker: these follow the last pixel."""
    try:
        return simplejpeg.decode_jpeg(data, "RGB", **least)
    except ValueError as error:
        if not str(error).endswith("extraneous bytes before marker 0xd9"):
            raise
    return simplejpeg.decode_jpeg(data, "RGB", strict=False, **least)


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the first scan's data, which is that of marker 0xDA."""
    position = 2
    while (position := data.find(b"\xff", position)) >= 0:  # bytes between two segments are padding
        while position + 1 < len(data) and data[position + 1] == 0xFF:
            position += 1
        if position + 4 > len(data):
            return
        marker, length = data[position + 1], struct.unpack_from(">H", data, position + 2)[0]
        yield marker, position, position + 2 + length
        if marker == 0xDA:
            return
        position += 2 + length


def _with_header_in_order(data: bytes) -> bytes:
    """The file without what libjpeg warns of although every pixel is there.

    That is padding between segments, an odd JFIF revision, an unknown Adobe transform, and, in the one scan of a
    sequential file, a range of coefficients other than all of them, which the decoder takes all the same.
    """
    parts, sequential = [data[:2]], False
    end = 2
    for marker, start, end in _jpeg_segments(data):
        segment = bytearray(data[start:end])
        if marker in (0xC0, 0xC1):
            sequential = True
        elif marker == 0xE0 and segment[4:9] == b"JFIF\0" and len(segment) > 11:
            segment[9:11] = b"\x01\x01"
        elif marker == 0xEE and segment[4:9] == b"Adobe" and len(segment) > 15 and segment[15] not in (0, 1, 2):
            segment[15] = 1  # what libjpeg assumes of three channels
        elif marker == 0xDA and sequential and len(segment) > 7:
            segment[-3:] = b"\x00\x3f\x00"
        parts.append(bytes(segment))
    return b"".join([*parts, data[end:]])


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """(kind, chunk, whether its checksum is right) of a PNG."""
    position = len(_PNG)
    while position + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, position)
        chunk = data[position : position + 12 + length]
        yield chunk[4:8], chunk, zlib.crc32(chunk[4:-4]) == int.from_bytes(chunk[-4:], "big")
        position += len(chunk)


def _without_png_texts(data: bytes) -> bytes:
    """A PNG without the chunks that say nothing about its pixels, such as texts and profiles, damaged or huge ones."""
    parts = [_PNG]
    for kind, chunk, is_whole in _png_chunks(data):
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND") or (kind == b"eXIf" and is_whole):
            parts.append(chunk)
    return b"".join(parts)


def _turbo_header(data: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that libjpeg-turbo turns into RGB; None for CMYK, rare layouts and other formats."""
    if data[:3] != b"\xff\xd8\xff":
        return None
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):  # KeyError: a layout it has no name for
        return None
    return (height, width) if colorspace in ("YCbCr", "Gray", "RGB") else None


def open_with_pil(data: bytes, name: str) -> Image.Image:
    """An image of one of ``FORMATS`` whose pixels are not decoded yet; raises ``ImageError``."""
    if not data:
        raise ImageError(f"{name}: empty file")
    try:
        return _open_known_format(data)
    except Image.UnidentifiedImageError as error:
        reason, cause = "not an image of a known format", error
        if data.startswith((b"\x93NUMPY", b"II*\0", b"MM\0*")):
            reason = "an array or TIFF file of other channels than RGB; --in_chans N reads it"
    except Exception as error:  # as in _decode_pil
        reason, cause = str(error) or type(error).__name__, error
    if data.startswith(_PNG) and len(bare := _without_png_texts(data)) < len(data):
        return open_with_pil(bare, name)
    raise ImageError(f"{name}: {reason}") from cause


def _open_known_format(data: bytes) -> Image.Image:
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # the caller's counts
    try:
        return Image.open(io.BytesIO(data), formats=_known_formats())
    finally:
        Image.MAX_IMAGE_PIXELS = limit


@functools.cache
def _known_formats() -> list[str]:
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]  # older versions of Pillow lack AVIF


def to_rgb(image: Image.Image, name: str) -> Image.Image:
    """An image of any mode as 8-bit RGB; ``ImageError`` with its name where that is not defined."""
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags and image.mode.startswith("RGB"):
        channels, extra = tags.get(_SAMPLES_TAG, 3), tags.get(_EXTRA_SAMPLES_TAG, ())
        if channels > 3 and not set(extra) & {1, 2}:  # neither associated alpha nor unassociated
            none = "and none of them is said to be transparency"
            raise ImageError(f"{name}: {channels} channels, {none}; --in_chans {channels} reads them")
        if tags.get(_PLANES_TAG) == APART and max(tags.get(_BITS_TAG, (8,))) > 8:  # Pillow mixes up their bytes
            raise ImageError(
                f"{name}: 16-bit colours in planes; --in_chans {channels} --value_range 0 65535 reads them"
            )
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "F":
        raise ImageError(f"{name}: floating-point pixels have no defined range; --in_chans 1 --value_range LOW HIGH")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ImageError(f"{name}: pixel values outside the 16-bit range")
        if tags.get(_PHOTOMETRIC_TAG) == WHITE_IS_ZERO and image.mode.startswith("I;16"):
            values = 65535 - values
        if values.max() < 65535 / 10:
            # the same text for every image: Python shows it once in a process
            black = "16-bit images without values above a tenth of the range become nearly black"
            warnings.warn(f"{black}; --in_chans 1 --value_range 0.1% 99.9% keeps their levels", stacklevel=2)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _pil_orientation(image: Image.Image) -> int:
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # metadata that cannot be read says nothing about the pixels
        return 1
    return orientation if orientation in range(1, 9) else 1


def _jpeg_orientation(data: bytes) -> int:
    """EXIF orientation of a JPEG file, found by walking over its header segments (microseconds)."""
    for marker, start, end in _jpeg_segments(data):
        if marker == 0xE1 and data[start + 4 : start + 10] == b"Exif\0\0":
            exif = Image.Exif()
            try:
                exif.load(data[start + 4 : end])
                orientation = exif.get(_ORIENTATION_TAG, 1)
            except Exception:  # metadata that cannot be read says nothing about the pixels
                return 1
            return orientation if orientation in range(1, 9) else 1
        if marker in (0xDA, 0xC0, 0xC2):  # the picture begins
            return 1
    return 1


def upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Undo the camera's orientation of pixels (H, W, C), which stay C-contiguous.

    5 to 8 swap the axes, then rows and columns may run backwards.
    """
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
