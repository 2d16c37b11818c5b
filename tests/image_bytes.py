"""Image files written by hand, byte by byte: what no encoder writes, or what an oracle must not get from one."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from PIL import Image


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def smooth(seed: int, width: int, height: int | None = None) -> Image.Image:
    """Colours that change slowly, as in photographs: JPEG keeps them."""
    corners = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), dtype=np.uint8)
    return Image.fromarray(corners).resize((width, height or width), Image.Resampling.BICUBIC)


# ---- PNG


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, depth: int, colour: int, rows: bytes | Iterable[bytes], *extra: bytes) -> bytes:
    """`rows`: unfiltered rows, or the compressed stream itself; `extra`: chunks before it."""
    stream = rows if isinstance(rows, bytes) else zlib.compress(b"".join(b"\0" + row for row in rows))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def zeros(count: int) -> bytes:
    """A zlib stream of that many zeros: a thousandth of their size."""
    deflate, piece = zlib.compressobj(9), bytes(1 << 20)
    whole = b"".join(deflate.compress(piece) for _ in range(count >> 20))
    return whole + deflate.compress(bytes(count & ((1 << 20) - 1))) + deflate.flush()


# ---- TIFF and EXIF

SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8}  # bytes of a value by its TIFF type: byte, text, short, long, fraction


def ifd(order: str, entries: list[tuple[int, int, int, int]], start: int = 8, following: int = 0) -> bytes:
    """A TIFF header and a directory of (tag, type, count, value or offset)."""
    short = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HI", 42, start)
    body = b"".join(struct.pack(order + "HHI", tag, kind, count)
                    + (struct.pack(order + "HH", value, 0) if (kind, count) == (3, 1)
                       else struct.pack(order + "I", value)) for tag, kind, count, value in entries)
    return short + struct.pack(order + "H", len(entries)) + body + struct.pack(order + "I", following)


def tiff(order: str, width: int, height: int, bits: int, pixels: bytes, **changes: int) -> bytes:
    """One strip of one channel; `changes` by the names of tags."""
    tags = {"width": 256, "height": 257, "bits": 258, "compression": 259, "photometric": 262, "offset": 273,
            "orientation": 274, "channels": 277, "rows": 278, "bytes": 279, "tile_width": 322, "tile_height": 323,
            "tile_offset": 324, "tile_bytes": 325, "format": 339}
    values = {"width": width, "height": height, "bits": bits, "compression": 1, "photometric": 1, "channels": 1,
              "rows": height, "bytes": len(pixels), "offset": 0, **changes}
    if "tile_width" in values:
        for name in ("offset", "rows", "bytes"):
            del values[name]
    at = 8 + 2 + 12 * len(values) + 4
    for name in ("offset", "tile_offset"):
        if name in values and values[name] == 0:
            values[name] = at
    long = ("width", "height", "offset", "bytes", "rows", "tile_width", "tile_height", "tile_offset", "tile_bytes")
    entries = [(tags[name], 4 if name in long else 3, 1, value) for name, value in values.items()]
    return ifd(order, sorted(entries)) + pixels


def exif(orientation: int) -> bytes:
    return b"Exif\0\0" + ifd(">", [(0x0112, 3, 1, orientation)])


def ifd_bomb(entries: int, size: int) -> bytes:
    """Every entry is the same `size` bytes."""
    start = 8 + 2 + 12 * entries + 4
    return ifd("<", [(tag, 1, size, start) for tag in range(1, entries + 1)]) + bytes(size)


# ---- GIF and WebP


def gif(canvas: tuple[int, int], frame: tuple[int, int], frames: int = 1, before: bytes = b"") -> bytes:
    """Frames of `frame` pixels whose data is that of one pixel."""
    image = b"," + struct.pack("<HHHHB", 0, 0, *frame, 0) + b"\x02\x02\x44\x01\x00"
    control = b"!\xf9\x04\0\1\0\0\0"
    return (b"GIF89a" + struct.pack("<HHBBB", *canvas, 0x80, 0, 0) + b"\x10\x20\x30\x40\x50\x60" + before
            + (control + image) * frames + b";")


def riff(*parts: tuple[bytes, bytes]) -> bytes:
    body = b"WEBP" + b"".join(kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)
                              for kind, content in parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def vp8l(width: int, height: int) -> bytes:
    """A whole lossless WebP frame of that size, in which no pixel takes a bit: five codes of one symbol each."""
    bits = "".join(f"{value:0{count}b}"[::-1] for value, count in ((width - 1, 14), (height - 1, 14), (0, 1), (0, 3)))
    bits += "000" + "1000" * 5
    bits += "0" * (-len(bits) % 8)
    return b"\x2f" + bytes(int(bits[at:at + 8][::-1], 2) for at in range(0, len(bits), 8)) + b"\0\0"


def webp_animation(canvas: tuple[int, int], frame: bytes, frame_size: tuple[int, int], frames: int) -> bytes:
    def three(value: int) -> bytes:
        return struct.pack("<I", value)[:3]

    header = three(0) + three(0) + three(frame_size[0] - 1) + three(frame_size[1] - 1) + three(1) + b"\0"
    piece = header + b"VP8L" + struct.pack("<I", len(frame)) + frame + b"\0" * (len(frame) % 2)
    return riff((b"VP8X", b"\x12\0\0\0" + three(canvas[0] - 1) + three(canvas[1] - 1)), (b"ANIM", bytes(6)),
                *[(b"ANMF", piece)] * frames)


# ---- JPEG


def segments(jpeg: bytes) -> tuple[list[bytes], bytes]:
    """The segments from SOI up to the first SOS, and the rest from SOS on."""
    found, at = [jpeg[:2]], 2
    while jpeg[at + 1] != 0xDA:
        end = at + 2 + int.from_bytes(jpeg[at + 2:at + 4], "big")
        found.append(jpeg[at:end])
        at = end
    return found, jpeg[at:]


def with_segment(jpeg: bytes, marker: int, content: bytes) -> bytes:
    """After the JFIF segment."""
    parts, rest = segments(jpeg)
    parts.insert(2, bytes([0xFF, marker]) + struct.pack(">H", len(content) + 2) + content)
    return b"".join(parts) + rest


def scan_bomb(scans: int, width: int, height: int) -> bytes:
    """A progressive JPEG whose scans say nothing: blocks without coefficients, in runs as long as they may be."""
    frame = b"\xff\xc2" + struct.pack(">HBHHB", 11, 8, height, width, 1) + b"\1\x11\0"
    quantizer = b"\xff\xdb\0\x43\0" + b"\1" * 64
    code = b"\xff\xc4" + struct.pack(">HB", 2 + 1 + 16 + 1, 0x10) + b"\1" + bytes(15) + b"\xe0"  # one code: long run
    scan = b"\xff\xda" + struct.pack(">HB", 8, 1) + b"\1\0" + bytes([1, 63, 0]) + bytes(64)
    return b"\xff\xd8" + quantizer + frame + code + scan * scans + b"\xff\xd9"


# ---- ICC profiles, of matrix and curves

D50 = (0.9642, 1.0, 0.8249)
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))


def xyz_of(xy: tuple[float, float]) -> np.ndarray:
    return np.array([xy[0] / xy[1], 1, (1 - xy[0] - xy[1]) / xy[1]])


def to_xyz(primaries: Iterable[tuple[float, float]]) -> np.ndarray:
    """Linear RGB -> XYZ under the white D65, from the chromaticities of the primaries."""
    columns = np.stack([xyz_of(xy) for xy in primaries], axis=1)
    return columns * np.linalg.solve(columns, xyz_of((0.3127, 0.3290)))


def curve(gamma: float) -> bytes:
    return b"curv" + struct.pack(">III", 0, 1, 0)[:8] + struct.pack(">H", round(gamma * 256)) + b"\0\0"


def srgb_curve() -> bytes:
    numbers = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
    return b"para" + struct.pack(">IHH", 0, 3, 0) + struct.pack(">5i", *(round(n * 65536) for n in numbers))


def icc(primaries: Iterable[tuple[float, float]] | None, tone: bytes, name: str = "made by hand") -> bytes:
    """A display profile; of gray pixels where there are no primaries."""
    def xyz(values: Iterable[float]) -> bytes:
        return b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(float(v) * 65536) for v in values))

    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name.encode() + b"\0" + bytes(78)
    tags = {b"desc": text + b"\0" * (-len(text) % 4), b"wtpt": xyz(D50), b"cprt": b"text\0\0\0\0none"}
    if primaries is None:
        tags[b"kTRC"] = tone
    else:
        adapt = np.linalg.inv(BRADFORD) @ np.diag(BRADFORD @ D50 / (BRADFORD @ xyz_of((0.3127, 0.3290)))) @ BRADFORD
        for letter, column in zip("rgb", (adapt @ to_xyz(primaries)).T, strict=True):
            tags[f"{letter}XYZ".encode()], tags[f"{letter}TRC".encode()] = xyz(column), tone
    at = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for tag, content in tags.items():
        table += tag + struct.pack(">II", at + len(body), len(content))
        body += content
    space = b"GRAY" if primaries is None else b"RGB "
    header = (struct.pack(">I4sI", at + len(body), b"none", 0x02400000) + b"mntr" + space + b"XYZ " + bytes(12)
              + b"acsp" + bytes(28) + struct.pack(">3i", *(round(v * 65536) for v in D50)))
    return header.ljust(128, b"\0") + table + body


# ---- Files that must be refused, by F28


def flipped(content: bytes, at: int, bit: int = 0) -> bytes:
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def corrupt_files() -> dict[str, bytes]:
    """No image can be had from any of these."""
    image = smooth(0, 64, 48)
    good = {"jpg": saved(image, "JPEG", quality=90), "progressive.jpg": saved(image, "JPEG", progressive=True),
            "gray.jpg": saved(image.convert("L"), "JPEG"), "cmyk.jpg": saved(image.convert("CMYK"), "JPEG"),
            "png": saved(image), "palette.png": saved(image.quantize(16)), "webp": saved(image, "WEBP"),
            "lossless.webp": saved(image, "WEBP", lossless=True), "gif": saved(image, "GIF"),
            "tif": saved(image, "TIFF"), "lzw.tif": saved(image, "TIFF", compression="tiff_lzw"),
            "deflate.tif": saved(image, "TIFF", compression="tiff_adobe_deflate"), "bmp": saved(image, "BMP"),
            "ppm": saved(image, "PPM")}
    files = {}
    for name, content in good.items():
        for share in (3, 50, 90):
            files[f"cut at {share} %.{name}"] = content[:len(content) * share // 100]
    jpeg, plain = good["jpg"], good["png"]
    parts, rest = segments(jpeg)
    tables = [part for part in parts if part[1] == 0xC4]
    half = len(jpeg) - len(rest) // 2
    files |= {
        "empty.jpg": b"", "one byte.png": b"\x89", "text.jpg": b"not an image at all\n" * 50,
        "page.jpg": b"<!DOCTYPE html><html><body>404 not found</body></html>", "zeros.png": bytes(5000),
        "archive.jpg": b"PK\x05\x06" + bytes(18), "program.png": b"\x7fELF" + bytes(200),
        "postscript.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n",
        "noise.webp": np.random.default_rng(0).bytes(3000), "magic alone.gif": b"GIF89a",
        "without its end.jpg": jpeg[:-2], "zeros from the middle.jpg": jpeg[:half] + bytes(len(jpeg) - half),
        "a hole of zeros.jpg": jpeg[:half] + bytes(300) + jpeg[half + 300:],
        "ones from the middle.jpg": jpeg[:half] + b"\xff" * (len(jpeg) - half),
        "without a middle piece.jpg": jpeg[:half] + jpeg[half + 100:],
        "another file's end.jpg": jpeg[:half] + plain[len(plain) // 2:],
        "no codes.jpg": b"".join(part for part in parts if part[1] != 0xC4) + rest[:40] + b"\xff\xd9",
        "a lost marker.jpg": jpeg.replace(tables[0], b"\xfe" + tables[0][1:]),
        "more symbols than codes.jpg": jpeg.replace(tables[0], tables[0][:5] + b"\xff" + tables[0][6:]),
        "no quantizers.jpg": b"".join(part for part in parts if part[1] != 0xDB) + rest,
        "no frame.jpg": b"".join(part for part in parts if part[1] != 0xC0) + rest,
        "two frames.jpg": b"".join(part * 2 if part[1] == 0xC0 else part for part in parts) + rest,
        "damaged inks.jpg": _with_hole(good["cmyk.jpg"]), "damaged gray.jpg": _with_hole(good["gray.jpg"]),
        "half-written.png": plain[:len(plain) // 2] + bytes(len(plain) - len(plain) // 2),
        "a flip in its data.png": flipped(plain, len(plain) // 2), "a flip in its header.png": flipped(plain, 17, 3),
        "wrong checksum.png": flipped(plain, 30), "no data.png": png(4, 4, 8, 2, b""),
        "no kind of colour.png": png(4, 4, 8, 5, [bytes(4)]),
        "no depth.png": png(4, 4, 7, 0, [bytes(4)] * 4), "no width.png": png(0, 4, 8, 0, [b""] * 4),
        "endless codes.gif": gif((64, 64), (64, 64)),
        "strips elsewhere.tif": tiff("<", 4, 4, 8, bytes(16), offset=10**6),
        "strips beyond 2 GB.tif": tiff("<", 4, 4, 8, bytes(16), offset=2**32 - 1),
        "one strip of two.tif": tiff("<", 4, 4, 8, bytes(16), rows=2),
        "no directory.tif": b"II*\0" + struct.pack("<I", 10**9), "a directory in itself.tif": ifd("<", [], following=8),
        "floats.tif": tiff("<", 2, 2, 32, bytes(16), format=3), "32 bits.tif": tiff("<", 2, 2, 32, bytes(16)),
        "signed.tif": tiff("<", 2, 2, 16, bytes(8), format=2),
        "absurd size.bmp": bmp(2**31 - 1, 2**31 - 1), "no size.bmp": bmp(0, 0), "negative width.bmp": bmp(-9, 9),
        "less data than rows.bmp": bmp(9, 9), "absurd size.ppm": b"P6 99999999 99999999 255\n123",
        "endless number.ppm": b"P6 " + b"9" * 4000 + b" 1 255\n1", "words.ppm": b"P6 many more 255\n123",
        "less data than rows.pgm": b"P5 9 9 255\n123", "floats.pfm": b"Pf 2 2 -1.0\n" + bytes(16),
        "no pixels in it.webp": riff((b"VP8L", b"\x2f" + bytes(4))), "a chunk past the end.webp":
        b"RIFF\xff\xff\xff\x7fWEBPVP8L\xff\xff\xff\x7f" + vp8l(8, 8)}
    return files


def _with_hole(jpeg: bytes) -> bytes:
    start = len(jpeg) - len(segments(jpeg)[1]) // 2
    return jpeg[:start] + bytes(60) + jpeg[start + 60:]


def bmp(width: int, height: int, pixels: bytes = b"") -> bytes:
    info = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(pixels), 0, 0, 54) + info + pixels


# ---- Bombs, by F29


def apng(frames: int) -> bytes:
    control = [chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, 1, 1, 0, 0, 1, 1, 0, 0)) for number in range(frames)]
    data = zlib.compress(b"\0\x10\x20\x30")
    after = b"".join(one + chunk(b"fdAT", struct.pack(">I", frames + number) + data)
                     for number, one in enumerate(control[1:]))
    whole = png(1, 1, 8, 2, data, chunk(b"acTL", struct.pack(">II", frames, 0)), control[0])
    return whole[:-12] + after + whole[-12:]


def bombs() -> dict[str, Callable[[], bytes]]:
    """Small files that claim or hold far too much."""
    dot = smooth(0, 8)
    text = zlib.compress(bytes(1 << 20), 9)
    return {
        "144 megapixels.png": lambda: png(12_000, 12_000, 8, 0, zeros(12_000 * 12_001)),
        "one row of 2 billion.png": lambda: png(2**31 - 1, 1, 8, 2, zeros(1 << 20)),
        "60,000 px.tif": lambda: tiff("<", 60_000, 60_000, 8, zeros(1 << 24), compression=8),
        "a tile of 30,000 px.tif": lambda: tiff("<", 16, 16, 8, zeros(30_000 * 30_000), compression=8,
                                                tile_width=30_000, tile_height=30_000, tile_offset=0, tile_bytes=10**6),
        "65,535 entries of 1 MB.tif": lambda: ifd_bomb(65_535, 1 << 20),
        "16,383 px.webp": lambda: riff((b"VP8L", vp8l(16_383, 16_383))),
        "canvas of 65,535 px.webp": lambda: webp_animation((65_535, 65_535), vp8l(8, 8), (8, 8), 1),
        "5,000 frames.webp": lambda: webp_animation((8, 8), vp8l(8, 8), (8, 8), 5000),
        "canvas of 65,535 px.gif": lambda: gif((65_535, 65_535), (1, 1)),
        "frame of 65,535 px.gif": lambda: gif((1, 1), (65_535, 65_535)),
        "20,000 frames.gif": lambda: gif((1, 1), (1, 1), 20_000),
        "a comment in 500,000 pieces.gif": lambda: gif((1, 1), (1, 1), before=b"!\xfe" + b"\1x" * 500_000 + b"\0"),
        "5,000 frames.png": lambda: apng(5000),
        "profile of 256 MB.png": lambda: png(1, 1, 8, 0, [b"\0"], chunk(b"iCCP", b"p\0\0" + zeros(1 << 28))),
        "text of 256 MB.png": lambda: png(1, 1, 8, 0, [b"\0"], chunk(b"zTXt", b"note\0\0" + zeros(1 << 28))),
        "international text of 256 MB.png":
            lambda: png(1, 1, 8, 0, [b"\0"], chunk(b"iTXt", b"note\0\1\0\0\0" + zeros(1 << 28))),
        "500 texts of 1 MB.png":
            lambda: png(1, 1, 8, 0, [b"\0"], *(chunk(b"zTXt", b"%d\0\0" % n + text) for n in range(500))),
        "65,000 entries of 1 MB in its EXIF.png":
            lambda: png(1, 1, 8, 0, [b"\0"], chunk(b"eXIf", ifd_bomb(65_000, 1 << 20))),
        "2,000 entries of 40 kB in its EXIF.jpg":
            lambda: with_segment(saved(dot, "JPEG"), 0xE1, b"Exif\0\0" + ifd_bomb(2000, 40_000)),
        "a circle in its EXIF.jpg": lambda: with_segment(
            saved(dot, "JPEG"), 0xE1, b"Exif\0\0" + ifd("<", [(0x8769, 4, 1, 8), (0x8825, 4, 1, 8)], following=8)),
        "65,500 px.jpg": lambda: _resized_jpeg(65_500),
        "10,000 scans.jpg": lambda: scan_bomb(10_000, 8000, 8000),
        "2 billion px.bmp": lambda: bmp(2**30, 2), "a billion px.pgm": lambda: b"P5 1000000 1000 255\n" + bytes(999),
    }


def _resized_jpeg(side: int) -> bytes:
    jpeg = saved(smooth(0, 8), "JPEG")
    frame = jpeg.index(b"\xff\xc0")
    return jpeg[:frame + 5] + struct.pack(">HH", side, side) + jpeg[frame + 9:]
