"""Any image file -> upright squares in sRGB or gray -> a chain of 2x2 means -> encoded levels, and back to pixels.

Arrays are [H, W, C] in 0..255, C 3 (RGB) or 1 (gray). A decoder never sees an image whose header claims too much.
"""

from __future__ import annotations

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import simplejpeg
from PIL import ExifTags, Image, ImageCms, ImageColor, PngImagePlugin, TiffImagePlugin, UnidentifiedImageError

from gradine.configs.schema import Data, UserError
from gradine.stages.growth import random_seed

Image.MAX_IMAGE_PIXELS = None  # `open_image` has the bound of data.max_pixels instead, and refuses from the header
PngImagePlugin.MAX_TEXT_MEMORY = 8 << 20  # texts are inflated with the header: 64 MB of them are a bomb
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")  # a file named .png may be any other; none runs programs
JPEG_QUALITY = 95
JPEG_SCANS = 100  # encoders write up to some twenty; a few hundred kB of empty ones take minutes
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}  # by EXIF orientation


class Rejected(Exception):
    """Why an image cannot be used."""


@dataclass(frozen=True)
class Picture:
    """An upright image: uint8 [H, W, C]."""

    pixels: np.ndarray

    @property
    def size(self) -> tuple[int, int]:
        """(width, height)"""
        return self.pixels.shape[1], self.pixels.shape[0]


def open_image(content: bytes, data: Data) -> Picture:
    """Encoded bytes -> the whole image, upright, with data.channels. Raises Rejected, or as decoders do."""
    mode = _mode(data.channels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata: the pixels are what counts
        try:
            opened = Image.open(io.BytesIO(content), formats=FORMATS)
        except UnidentifiedImageError:  # its own words name an object in memory, other ones every time
            raise Rejected("no image, or of a kind that is not read here") from None
        with opened:
            width, height = opened.size
            if width * height > data.max_pixels:
                raise Rejected(f"{width}x{height} is more than data.max_pixels={data.max_pixels}")
            if opened.format in ("JPEG", "MPO"):
                pixels, turn = _decoded_jpeg(opened, content), _turn(opened)
                if opened.mode == mode and turn is None and _profile_transform(opened) is None:
                    return Picture(pixels)  # most photographs: Pillow's two copies take half as long as decoding
                raw = "CMYK;I" if opened.mode == "CMYK" else opened.mode  # inks are inverted in a JPEG, as by Adobe
                image = Image.frombuffer(opened.mode, opened.size, pixels, "raw", raw, 0, 1)
                image.info = opened.info
            else:
                image = _loaded(opened, content)
                turn = _turn(opened)
            image = _on_background(_in_srgb(_eight_bit(image)), data.background)
            image = image if image.mode == mode else image.convert(mode)
            image = image if turn is None else image.transpose(turn)
            return Picture(np.asarray(image).reshape(image.height, image.width, data.channels))


def _mode(channels: int) -> str:
    return "RGB" if channels == 3 else "L"


def _turn(opened: Image.Image) -> Image.Transpose | None:
    try:
        return TURNS.get(opened.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # torn metadata under whole pixels: any reader of it may fail in any way
        return None


def _decoded_jpeg(opened: Image.Image, content: bytes) -> np.ndarray:
    """[H, W, C] as stored, by a decoder that refuses what Pillow would take with a grey half."""
    marks = b"".join(re.findall(rb"\xff([\xd9\xda])", content))  # starts of scans, ends of images
    if max(map(len, marks.split(b"\xd9"))) > JPEG_SCANS:
        raise Rejected(f"a JPEG of more than {JPEG_SCANS} scans")
    space = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}[opened.mode]
    try:
        return simplejpeg.decode_jpeg(content, space)
    except ValueError as error:
        try:
            return simplejpeg.decode_jpeg(_mended(content), space)
        except ValueError:
            raise error from None


def _mended(content: bytes) -> bytes:
    """A JPEG without the oddities of its header that do no harm, so that only real damage is left to be refused.

    Up to three bytes between segments (a lost segment is longer), an unknown JFIF version, a torn profile, and the
    spectral range of a sequential scan, which means nothing there and which Samsung's phones leave at 0.
    """
    kept, at, sequential = [content[:2]], 2, False
    while True:
        start = content.index(b"\xff", at)
        if start - at > 3:
            raise ValueError("too much between segments")
        while content[start + 1:start + 2] == b"\xff":
            start += 1
        at = start + 2 + int.from_bytes(content[start + 2:start + 4], "big")
        marker, segment = content[start + 1:start + 2], content[start:at]
        sequential |= marker in (b"\xc0", b"\xc1")
        if marker == b"\xda":
            return b"".join(kept) + (segment[:-3] + b"\0\x3f\0" if sequential else segment) + content[at:]
        if segment[4:9] == b"JFIF\0":
            segment = segment[:9] + b"\1" + segment[10:]
        if marker != b"\xe2":
            kept.append(segment)


def _loaded(opened: Image.Image, content: bytes) -> Image.Image:
    """Where Pillow would invent pixels, or look for the clear colour at another depth, it is helped."""
    if isinstance(opened, TiffImagePlugin.TiffImageFile):
        _check_tiff(opened)
    if opened.format == "PNG":
        _check_png(content)
    opened.load()
    if opened.format == "PNG" and (clear := opened.info.get("transparency")) is not None:
        depth = content[24]
        if opened.mode == "L":
            opened.info["transparency"] = clear * 255 // (2**depth - 1)
        elif opened.mode == "RGB" and depth == 16:
            opened.info["transparency"] = tuple(value >> 8 for value in clear)
    return opened


def _check_png(content: bytes) -> None:
    """The checksums of the pixels, which Pillow does not look at."""
    at = 8
    while at < len(content):
        end = at + 8 + int.from_bytes(content[at:at + 4], "big")
        kind, checksum = content[at + 4:at + 8], int.from_bytes(content[end:end + 4], "big")
        if kind == b"IDAT" and zlib.crc32(memoryview(content)[at + 4:end]) != checksum:
            raise Rejected("a PNG whose data does not match its checksum")
        at = end + 4


def _check_tiff(opened: TiffImagePlugin.TiffImageFile) -> None:
    pixels, tags = opened.width * opened.height, opened.tag_v2
    across, down = tags.get(TiffImagePlugin.TILEWIDTH, 0), tags.get(TiffImagePlugin.TILELENGTH, 0)
    if across * down > max(pixels, 1 << 22):  # libtiff holds a whole one, however little of it is shown
        raise Rejected(f"{opened.width}x{opened.height} in tiles of {across}x{down}")
    if opened.tile[0].codec_name == "raw":
        planes = len(opened.getbands()) if tags.get(TiffImagePlugin.PLANAR_CONFIGURATION) == 2 else 1
        boxes = [tile.extents for tile in opened.tile if tile.extents]
        if sum((right - left) * (low - high) for left, high, right, low in boxes) < pixels * planes:
            raise Rejected("some of its strips or tiles are missing")


def _eight_bit(image: Image.Image) -> Image.Image:
    """Gray of 9 to 16 bits is scaled, not clipped; palettes and L*a*b* become colours."""
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
        raise Rejected("pixels of 32 bits or with a sign have no known range; save it as 8 or 16 bit")
    if image.mode.startswith("I"):
        tags = getattr(image, "tag_v2", {})  # of a TIFF
        stored, most = np.asarray(image), 2 ** tags.get(TiffImagePlugin.BITSPERSAMPLE, (16,))[0] - 1
        gray = most - stored if tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0 else stored
        eight = Image.fromarray(np.rint(gray * (255 / most)).astype(np.uint8))
        if isinstance(clear := image.info.get("transparency"), int):
            eight.putalpha(Image.fromarray(np.where(stored == clear, 0, 255).astype(np.uint8)))
        eight.info["icc_profile"] = image.info.get("icc_profile")
        return eight
    if image.mode in ("P", "PA", "1", "La", "RGBa", "LAB") or "transparency" in image.info:
        clear = "transparency" in image.info or image.mode in ("PA", "La", "RGBa")
        return image.convert("RGBA" if clear else "L" if image.mode == "1" else "RGB")
    return image


def _in_srgb(image: Image.Image) -> Image.Image:
    """Through the embedded profile, alpha kept; one that is broken or for another kind of pixels is passed over."""
    transform = _profile_transform(image)
    if transform is None:
        return image
    alpha = image.getchannel("A") if image.mode in ("RGBA", "LA") else None
    converted = ImageCms.applyTransform(image.convert(image.mode[:-1]) if alpha else image, transform)
    assert converted is not None, "not in place"
    if alpha:
        converted.putalpha(alpha)
    return converted


def _profile_transform(image: Image.Image) -> ImageCms.ImageCmsTransform | None:
    profile = image.info.get("icc_profile")
    return _to_srgb(profile, image.mode.removesuffix("A")) if profile else None


@lru_cache(maxsize=16)
def _to_srgb(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """None where there is nothing to do: a broken profile, one for other pixels, or sRGB by whatever name."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK"}.get(mode):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    shown = np.indices((16, 16, 16), np.uint8).transpose(1, 2, 3, 0).reshape(64, 64, 3) * 17
    converted = ImageCms.applyTransform(Image.fromarray(shown), transform) if mode == "RGB" else None
    same = converted is not None and np.abs(np.asarray(converted, np.int16) - shown).max() <= 1
    return None if same else transform


def _on_background(image: Image.Image, background: str) -> Image.Image:
    if image.mode not in ("RGBA", "LA"):
        return image
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, colour(background)), image)


def colour(background: str) -> tuple[int, int, int]:
    try:
        return ImageColor.getrgb(background)[:3]
    except ValueError:
        raise UserError(f"data.background={background!r} is no colour. Use a name such as white, or #rrggbb.") from None


def squares(image: Picture, path: str, data: Data, resolution: int) -> Iterator[np.ndarray]:
    """The crops of an image, [R, R, C]: uint8 where nothing is averaged, else float32 area means. Or Rejected."""
    width, height = image.size
    if data.crop == "none" and width != height:
        raise Rejected(f"{width}x{height} is not square and data.crop is none")
    if min(width, height) < resolution and data.small == "reject":
        raise Rejected(f"{width}x{height} is smaller than {resolution}x{resolution}")
    pixels = image.pixels
    if min(width, height) < resolution and data.small == "pad":
        pixels = _padded(pixels, data, resolution)
    for left, top, side in _boxes(pixels.shape[1], pixels.shape[0], path, data, resolution):
        square = np.ascontiguousarray(pixels[top:top + side, left:left + side])
        if side < resolution:
            small = Image.fromarray(square.squeeze(2) if data.channels == 1 else square)
            large = small.resize((resolution, resolution), Image.Resampling.BICUBIC)
            square = np.asarray(large).reshape(resolution, resolution, data.channels)
        yield square if len(square) == resolution else _reduced(square, resolution)


def _padded(pixels: np.ndarray, data: Data, resolution: int) -> np.ndarray:
    """In the middle of data.background, at least `resolution` wide and high."""
    height, width, channels = pixels.shape
    wide, high = max(width, resolution), max(height, resolution)
    ground = Image.new("RGB", (wide, high), colour(data.background)).convert(_mode(channels))
    padded = np.array(ground).reshape(high, wide, channels)
    top, left = (high - height) // 2, (wide - width) // 2
    padded[top:top + height, left:left + width] = pixels
    return padded


def _boxes(width: int, height: int, path: str, data: Data, resolution: int) -> Iterator[tuple[int, int, int]]:
    """(left, top, side) of each crop. Random ones are a function of data.crop_seed and the image's path alone."""
    short = min(width, height)
    if data.crop == "tile" and short >= resolution:
        across, down = width // resolution, height // resolution
        left, top = (width - across * resolution) // 2, (height - down * resolution) // 2
        for row, column in np.ndindex(down, across):
            yield left + column * resolution, top + row * resolution, resolution
    elif data.crop.startswith("random-") and short >= resolution:
        count = int(data.crop.removeprefix("random-"))
        for size, x, y in np.random.Philox(random_seed(data.crop_seed, path, 0)).random_raw((count, 3)).tolist():
            side = resolution + size % (short - resolution + 1)
            yield x % (width - side + 1), y % (height - side + 1), side
    else:
        yield (width - short) // 2, (height - short) // 2, short


def _reduced(pixels: np.ndarray, resolution: int) -> np.ndarray:
    """[S, S, C] -> float32 [R, R, C], R < S."""
    rows = span_means(pixels.reshape(len(pixels), -1), resolution).reshape(resolution, len(pixels), -1)
    columns = np.ascontiguousarray(rows.transpose(1, 0, 2)).reshape(len(pixels), -1)
    return span_means(columns, resolution).reshape(resolution, resolution, -1).transpose(1, 0, 2)


def span_means(rows: np.ndarray, count: int) -> np.ndarray:
    """[n, m] -> float32 [count, m], count <= n: means over equal spans of rows; a row that a span cuts counts in part.

    Pillow's BOX counts it wholly or not at all: up to 100 grey levels off where n is no multiple of `count`.
    """
    starts = np.arange(count) * len(rows) / count
    ends = starts + len(rows) / count
    first, means = starts.astype(int), np.zeros((count, rows.shape[1]), np.float32)
    for index in first + np.arange(math.ceil(len(rows) / count) + 1)[:, None]:
        share = np.clip(np.minimum(index + 1, ends) - np.maximum(index, starts), 0, 1) * count / len(rows)
        means += rows[np.minimum(index, len(rows) - 1)] * share.astype(np.float32)[:, None]
    return means


def levels(top: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """[R, R, C] uint8 or float32 -> (size, uint8 [size, size, C]) from R down to 4, rounded half to even.

    The chain holds exact sums (of 4, 16, 64, ... pixels), so that nothing is rounded twice.
    """
    sums, halvings = top, 0
    while True:
        yield len(sums), _rounded(sums, 2 * halvings)
        if len(sums) == 4:
            return
        halvings += 1
        exact = np.float32 if top.dtype == np.float32 else np.uint16 if halvings <= 4 else np.uint32
        sums = _sums_of_four(sums, exact)


def _sums_of_four(pixels: np.ndarray, dtype: type) -> np.ndarray:
    """[2S, 2S, C] -> [S, S, C]. Channel by channel: numpy is slow over an axis of length 3."""
    half, channels = len(pixels) // 2, pixels.shape[2]
    rows = np.add(pixels[0::2].reshape(half, -1), pixels[1::2].reshape(half, -1), dtype=dtype)
    sums = np.empty((half, half * channels), dtype)
    for c in range(channels):
        np.add(rows[:, c::2 * channels], rows[:, c + channels::2 * channels], out=sums[:, c::channels])
    return sums.reshape(half, half, channels)


def _rounded(sums: np.ndarray, shift: int) -> np.ndarray:
    """round(sums / 2**shift) as uint8; exact halves go to the even neighbour."""
    if sums.dtype == np.uint8:
        return sums
    if sums.dtype == np.float32:
        return np.rint(sums * np.float32(0.5**shift)).clip(0, 255).astype(np.uint8)
    odd = (sums >> shift) & 1
    return ((sums + np.array((1 << (shift - 1)) - 1, sums.dtype) + odd) >> shift).astype(np.uint8)


def suffix(kind: str, channels: int) -> str:
    """The file name extension of an encoding, as WebDataset decodes by it."""
    return {"raw": "ppm" if channels == 3 else "pgm", "png": "png", "webp": "webp", "jpeg": "jpg"}[kind]


def _raw_header(size: int, channels: int) -> bytes:
    return f"P{6 if channels == 3 else 5}\n{size} {size}\n255\n".encode()


def encode(pixels: np.ndarray, kind: str) -> bytes:
    """uint8 [S, S, C] -> bytes of `kind`; all but jpeg are lossless."""
    size, _, channels = pixels.shape
    if kind == "raw":
        return _raw_header(size, channels) + pixels.tobytes()
    if kind == "jpeg":
        space = "RGB" if channels == 3 else "GRAY"
        return simplejpeg.encode_jpeg(np.ascontiguousarray(pixels), JPEG_QUALITY, space, "444", fastdct=False)
    image, buffer = Image.fromarray(pixels if channels == 3 else pixels[..., 0]), io.BytesIO()
    if kind == "png":
        image.save(buffer, "PNG", compress_level=1)
    else:  # the fastest method is within 10 % of the size of the next one, which takes four times as long
        image.save(buffer, "WEBP", lossless=True, quality=0, method=0)
    return buffer.getvalue()


def decode(content: bytes, kind: str, pixels: np.ndarray) -> None:
    """Bytes of `kind` into `pixels`, uint8 [S, S, C], contiguous. ValueError where they are no such image."""
    size, _, channels = pixels.shape
    if kind == "raw":
        header = _raw_header(size, channels)
        if not content.startswith(header) or len(content) != len(header) + pixels.size:
            raise ValueError(f"no raw image of {size}x{size}x{channels}")
        pixels[:] = np.frombuffer(content, np.uint8, offset=len(header)).reshape(pixels.shape)
    elif kind == "jpeg":
        height, width, *_ = simplejpeg.decode_jpeg_header(content)
        _check_size(width, height, size)
        simplejpeg.decode_jpeg(content, "RGB" if channels == 3 else "GRAY", buffer=pixels)
    else:
        mode = "RGB" if channels == 3 or kind == "webp" else "L"  # WebP has no gray: three equal channels
        try:
            with Image.open(io.BytesIO(content), formats=[kind.upper()]) as image:
                _check_size(*image.size, size)
                shown = np.asarray(image if image.mode == mode else image.convert(mode))
        except (OSError, SyntaxError, EOFError, struct.error) as error:
            raise ValueError(f"no {kind} image: {error}") from error
        pixels[:] = shown.reshape(size, size, -1)[..., :channels]


def _check_size(width: int, height: int, size: int) -> None:
    if (width, height) != (size, size):
        raise ValueError(f"{width}x{height} is not {size}x{size}")
