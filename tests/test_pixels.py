"""Claims about opening image files: colours against arithmetic by hand, damage refused, bombs refused from the header.

`image_bytes.py` writes the files that no encoder writes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
import webdataset
from PIL import Image

from gradine.configs.schema import Data, UserError
from gradine.stages.pixels import (
    Picture,
    Rejected,
    colour,
    decode,
    encode,
    levels,
    open_image,
    span_means,
    squares,
    suffix,
)

from . import image_bytes as made

Colour = tuple[int, ...]


def settings(**changes: Any) -> Data:
    return Data(**{"source": "x", "shards": "y", **changes})


def shown(content: bytes, **changes: Any) -> np.ndarray:
    """[H, W, C] as whole numbers that may be subtracted."""
    return open_image(content, settings(**changes)).pixels.astype(int)


def noise(seed: int, width: int, height: int | None = None, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height or width, width, channels), dtype=np.uint8)


def image_of(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels if pixels.shape[2] > 1 else pixels[..., 0])


def row_of(mode: str, values: list[Any]) -> Image.Image:
    """One pixel per value, each as a flat 16 px block: JPEG keeps it as it is."""
    image = Image.new(mode, (len(values), 1))
    image.putdata(values)
    return image.resize((16 * len(values), 16), Image.Resampling.NEAREST)


def close(pixels: np.ndarray, expected: list[Any], within: int = 1) -> None:
    """The middle of each block of a row, or each pixel of a single one."""
    found = pixels[8, 8::16] if len(pixels) == 16 else pixels[0]
    wanted = np.array([value if isinstance(value, tuple) else (value,) * found.shape[1] for value in expected])
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= within, found.tolist()


# ---- Modes of images, by hand; a value alone is a gray


def over(paint: Colour, alpha: int, ground: Colour) -> Colour:
    return tuple(round((p * alpha + g * (255 - alpha)) / 255) for p, g in zip(paint, ground, strict=True))


GROUNDS = {"white": (255, 255, 255), "black": (0, 0, 0), "#102030": (16, 32, 48)}


def gray16(kind: str, values: list[int]) -> bytes:
    return made.saved(Image.fromarray(np.array([values], np.uint16)), kind)


def palette_image(**options: Any) -> bytes:
    image = row_of("P", [0, 1, 2])
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    return made.saved(image, **options)


@pytest.mark.parametrize(("content", "expected"), [
    (made.saved(row_of("L", [0, 77, 255])), [0, 77, 255]),
    (made.saved(row_of("L", [0, 77, 255]), "JPEG", quality=100), [0, 77, 255]),
    (made.saved(row_of("1", [0, 255])), [0, 255]),
    (b"P4 8 1\n\xa0", [0, 255, 0, 255, 255, 255, 255, 255]),  # in a PBM one is black
    (b"P5 2 1 100\n\x32\x64", [128, 255]),  # 50 of 100 is 127.5 of 255
    (made.png(4, 1, 2, 0, [b"\x1b"]), [0, 85, 170, 255]),  # n of 3 is 85 n of 255
    # 16 bit: value / 257, so that 65535 is 255 and 51400 is 200
    (gray16("PNG", [0, 300, 51400, 65535]), [0, 1, 200, 255]),
    (made.tiff("<", 4, 1, 16, np.array([0, 300, 51400, 65535], "<u2").tobytes()), [0, 1, 200, 255]),
    (made.tiff(">", 4, 1, 16, np.array([0, 300, 51400, 65535], ">u2").tobytes()), [0, 1, 200, 255]),
    (b"P5 2 1 65535\n" + np.array([300, 51400], ">u2").tobytes(), [1, 200]),
    # white is zero: 65535 - value, as 8 bit 255 - value
    (made.tiff("<", 3, 1, 16, np.array([0, 51400, 65535], "<u2").tobytes(), photometric=0), [255, 55, 0]),
    (made.tiff("<", 3, 1, 8, bytes([0, 200, 255]), photometric=0), [255, 55, 0]),
    # 12 bit, packed: 0x800 = 2048 of 4095 is 127.5, 0xfff is 255
    (made.tiff("<", 2, 1, 12, b"\x80\x0f\xff"), [128, 255]),
    (made.png(2, 1, 16, 2, [np.array([257, 51400, 65535, 300, 0, 25700], ">u2").tobytes()]),
     [(1, 200, 255), (1, 0, 100)]),
    (made.saved(row_of("RGB", [(10, 20, 30), (200, 0, 255)]), "BMP"), [(10, 20, 30), (200, 0, 255)]),
    (palette_image(), [(255, 0, 0), (0, 255, 0), (0, 0, 255)]),
    # (1 - ink) * (1 - black) * 255; the last is 255 * .8 and 204 * .8 of 255 without magenta
    (made.saved(row_of("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 51, 51)]), "TIFF"),
     [255, (0, 255, 255), 0, (204, 0, 163)]),
    # Pillow writes what Adobe does: inverted inks and Adobe's marker
    (made.saved(row_of("CMYK", [(0, 0, 0, 0), (255, 0, 0, 0), (0, 0, 0, 255), (0, 255, 51, 51)]), "JPEG", quality=100),
     [255, (0, 255, 255), 0, (204, 0, 163)]),
    # CIE L*a*b* without colour: L of 100 % is white, of 53.585 % (137 of 255: 53.73) the middle gray 119
    (made.saved(row_of("LAB", [(255, 128, 128), (137, 128, 128), (0, 128, 128)]), "TIFF"), [255, 128, 0]),
], ids=["gray", "gray-jpeg", "bilevel", "pbm", "pgm-of-100", "2-bit", "gray16-png", "gray16-tiff",
        "gray16-tiff-big-endian", "gray16-pgm", "gray16-white-is-zero", "gray8-white-is-zero", "gray12", "rgb16", "bmp",
        "palette", "cmyk-tiff", "cmyk-jpeg", "lab"])
def test_f30_a_mode_of_image_becomes_rgb_as_computed_by_hand(content: bytes, expected: list[Any]) -> None:
    close(shown(content), expected)


@pytest.mark.row
def test_f30_a_ycck_jpeg_is_read_by_adobes_formula() -> None:
    # Stored: Y, Cb, Cr of the inks and inverted black. Y 100, Cb 128, Cr 178: the inks are
    # C = 100 + 1.402 * 50 = 170.1, M = 100 - 0.7141 * 50 = 64.3, Y = 100; black is 255 - 204 = 51
    # R = (255 - 170.1) * 204 / 255 = 67.9, G = 190.7 * .8 = 152.6, B = 155 * .8 = 124
    stored = (100, 128, 178, 204)
    jpeg = made.saved(row_of("CMYK", [tuple(255 - v for v in stored)]), "JPEG", quality=100)
    marker = jpeg.index(b"Adobe")
    assert jpeg[marker + 11] == 0
    close(shown(jpeg[:marker + 11] + b"\2" + jpeg[marker + 12:]), [(68, 153, 124)])


@pytest.mark.parametrize("background", GROUNDS)
def test_f30_what_is_clear_shows_the_background(background: str) -> None:
    ground, paint = GROUNDS[background], (10, 20, 30)
    some = [over(paint, alpha, ground) for alpha in (255, 0, 51)]
    gray = [over((100, 100, 100), alpha, ground) for alpha in (255, 0, 51)]
    red, green, blue = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    rgba = row_of("RGBA", [(*paint, alpha) for alpha in (255, 0, 51)])
    deep = np.array([[2570, 5140, 7710, 65535, 2570, 5140, 7710, 0, 2570, 5140, 7710, 13107]], ">u2")
    files = [
        (made.saved(rgba), some), (made.saved(rgba, "WEBP", lossless=True, exact=True), some),
        (made.saved(rgba, "TIFF"), some), (made.png(3, 1, 16, 6, [deep.tobytes()]), some),
        (made.saved(row_of("LA", [(100, 255), (100, 0), (100, 51)])), gray),
        (palette_image(), [red, green, blue]),
        (palette_image(transparency=0), [ground, green, blue]),
        (palette_image(transparency=b"\xff\x00\x33"), [red, ground, over(blue, 51, ground)]),
        # colour keys: in 8 bit, in 16, in gray of 1, 2, 4, 8 and 16 bit
        (made.png(2, 1, 8, 2, [bytes([1, 2, 3, 4, 5, 6])], made.chunk(b"tRNS", b"\0\1\0\2\0\3")), [ground, (4, 5, 6)]),
        (made.png(2, 1, 16, 2, [b"\1\0\2\0\3\0" + bytes(6)], made.chunk(b"tRNS", b"\1\0\2\0\3\0")), [ground, 0]),
        (made.png(2, 1, 1, 0, [b"\x80"], made.chunk(b"tRNS", b"\0\1")), [ground, 0]),
        (made.png(2, 1, 2, 0, [b"\x60"], made.chunk(b"tRNS", b"\0\1")), [ground, 170]),
        (made.png(2, 1, 4, 0, [b"\x3a"], made.chunk(b"tRNS", b"\0\3")), [ground, 170]),
        (made.png(2, 1, 8, 0, [b"\x03\x04"], made.chunk(b"tRNS", b"\0\3")), [ground, 4]),
        (made.png(2, 1, 16, 0, [b"\x03\x04\x03\x05"], made.chunk(b"tRNS", b"\3\4")), [ground, 3])]
    for content, expected in files:
        close(shown(content, background=background), expected)


def test_f30_a_progressive_jpeg_is_its_baseline_twin() -> None:
    image = made.smooth(1, 70, 50)
    twins = [shown(made.saved(image, "JPEG", quality=90, progressive=progressive)) for progressive in (False, True)]
    np.testing.assert_array_equal(*twins)


def test_f30_the_first_frame_of_an_animation_is_its_image() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255))]
    for kind in ("GIF", "PNG", "WEBP", "TIFF"):
        lossless = {"lossless": True} if kind == "WEBP" else {}
        close(shown(made.saved(frames[0], kind, save_all=True, append_images=frames[1:], **lossless)), [(255, 0, 0)], 0)


@pytest.mark.parametrize(("width", "height"), [(1, 40), (40, 1), (1, 1)])
def test_f30_an_image_of_one_pixel_across_is_opened_whole(width: int, height: int) -> None:
    pixels = noise(0, width, height)
    for kind in ("PNG", "BMP", "TIFF", "PPM"):
        np.testing.assert_array_equal(shown(made.saved(image_of(pixels), kind)), pixels)
    assert shown(made.saved(image_of(pixels), "JPEG")).shape == pixels.shape
    assert [s.shape for s in squares(Picture(pixels), "a", settings(small="upscale"), 8)] == [(8, 8, 3)]


@pytest.mark.row
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_f30_exif_turns_the_image_upright(kind: str, orientation: int) -> None:
    # EXIF 2.3, tag 0x0112: where the stored row 0 and column 0 lie in the upright image
    row, column = [("top", "left"), ("top", "right"), ("bottom", "right"), ("bottom", "left"),
                   ("left", "top"), ("right", "top"), ("right", "bottom"), ("left", "bottom")][orientation - 1]
    stored = np.array([[10, 50, 90], [130, 170, 210]], np.uint8)
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    image = Image.fromarray(stored.repeat(16, 0).repeat(16, 1)).convert("RGB")
    upright = shown(made.saved(image, kind, exif=made.exif(orientation), **options))[8::16, 8::16]
    assert upright.shape[:2] == ((2, 3) if orientation < 5 else (3, 2))
    for (i, j), value in np.ndenumerate(stored):
        at = {"top": i, "left": i, "bottom": 1 - i, "right": 1 - i}[row], {
            "left": j, "top": j, "right": 2 - j, "bottom": 2 - j}[column]
        y, x = at if row in ("top", "bottom") else at[::-1]
        assert np.abs(upright[y, x] - int(value)).max() <= 1


@pytest.mark.parametrize("torn", [b"junk" * 4, b"MM\0*\0\0\0\x08\0\5", b"", made.ifd(">", [(0x0112, 3, 1, 77)])[:-4],
                                  b"MM\0*\0\0\0\x08\0\1\x01\x12\0\2\0\0\0\x03ab\0\0\0\0\0\0"])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_f30_torn_metadata_costs_no_pixel(kind: str, torn: bytes) -> None:
    close(shown(made.saved(row_of("RGB", [(9, 9, 9)]), kind, exif=b"Exif\0\0" + torn)), [9])


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "JPEG"])
def test_gray_is_the_luma_of_itu_r_601(kind: str) -> None:
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (200, 100, 50), (255, 255, 255)]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    luma = [round(0.299 * r + 0.587 * g + 0.114 * b) for r, g, b in colours]
    found = shown(made.saved(row_of("RGB", colours), kind, **options), channels=1)
    assert found.shape == (16, 80, 1)
    close(found, luma)
    close(shown(made.saved(row_of("RGBA", [(200, 100, 50, 0)])), channels=1, background="#102030"), [29])  # of 16 32 48


@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_has_the_channels_that_were_asked_for(channels: int) -> None:
    image = made.smooth(2, 12, 8)
    for kind, modes in (("PNG", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"]), ("JPEG", ["L", "RGB", "CMYK"]),
                        ("TIFF", ["1", "L", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16"]),
                        ("GIF", ["L", "P"]), ("BMP", ["1", "L", "P", "RGB"]), ("WEBP", ["RGB", "RGBA"]),
                        ("PPM", ["1", "L", "RGB"])):
        for mode in modes:
            same = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
            if mode == "LAB":
                same = Image.new("LAB", image.size)
            opened = open_image(made.saved(same, kind), settings(channels=channels))
            assert (opened.size, opened.pixels.shape, opened.pixels.dtype) == ((12, 8), (8, 12, channels), np.uint8)


# ---- ICC profiles, by hand


def srgb_encoded(linear: Any) -> np.ndarray:
    """IEC 61966-2-1."""
    linear = np.clip(linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def srgb_decoded(values: Any) -> np.ndarray:
    values = np.asarray(values) / 255
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def in_srgb(primaries: Any, linear: np.ndarray) -> np.ndarray:
    """Both whites are D65, so no adaptation: through XYZ with the matrices of the two sets of primaries."""
    return srgb_encoded(np.linalg.solve(made.to_xyz(made.SRGB), made.to_xyz(primaries) @ linear))


WIDE = [(200, 100, 50), (90, 160, 120), (255, 255, 255), (30, 30, 30), (128, 128, 200), (0, 0, 0)]
# lcms interpolates the curves of 8-bit pixels: within 2 of the formula, near black most
PROFILES = {"P3": (made.icc(made.P3, made.srgb_curve()), lambda c: in_srgb(made.P3, srgb_decoded(c))),
            "Adobe": (made.icc(made.ADOBE, made.curve(563 / 256)),
                      lambda c: in_srgb(made.ADOBE, (np.array(c) / 255) ** (563 / 256))),
            "linear": (made.icc(made.SRGB, made.curve(1.0), "Linear sRGB"), lambda c: srgb_encoded(np.array(c) / 255))}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_f30_colours_are_taken_through_the_embedded_profile(kind: str, name: str) -> None:
    profile, formula = PROFILES[name]
    options = {"lossless": True} if kind == "WEBP" else {"quality": 100, "subsampling": 0} if kind == "JPEG" else {}
    content = made.saved(row_of("RGB", WIDE), kind, icc_profile=profile, **options)
    stored = [tuple(c) for c in simplejpeg.decode_jpeg(content)[8, 8::16].tolist()] if kind == "JPEG" else WIDE
    expected = [tuple(np.rint(formula(c)).astype(int)) for c in stored]
    assert np.abs(np.array(expected) - WIDE).max() > 5, "the profile says something"
    close(shown(content), expected, 2)


def test_f30_a_gray_profile_counts_and_so_does_one_beside_alpha_or_a_palette() -> None:
    tone = made.icc(None, made.curve(1.8))
    curved = srgb_encoded((np.array([0, 60, 128, 255]) / 255) ** 1.796875)  # 1.8 to 8 bits behind the point
    expected = [int(v) for v in np.rint(curved)]
    for content in (made.saved(row_of("L", [0, 60, 128, 255]), icc_profile=tone),
                    made.saved(row_of("L", [0, 60, 128, 255]), "JPEG", quality=100, icc_profile=tone),
                    made.saved(Image.fromarray(np.array([[0, 60, 128, 255]], np.uint16) * 257), icc_profile=tone)):
        for channels in (1, 3):
            close(shown(content, channels=channels), expected)
    profile, formula = PROFILES["P3"]
    inside = tuple(np.rint(formula((90, 160, 120))).astype(int).tolist())
    alpha = row_of("RGBA", [(90, 160, 120, 255), (90, 160, 120, 0), (90, 160, 120, 51)])
    close(shown(made.saved(alpha, icc_profile=profile), background="#102030"),
          [over(inside, a, (16, 32, 48)) for a in (255, 0, 51)], 2)
    palette = Image.new("P", (16, 16))
    palette.putpalette([90, 160, 120])
    close(shown(made.saved(palette, icc_profile=profile)), [inside], 2)


def test_f30_a_profile_for_other_pixels_or_a_broken_one_is_passed_over() -> None:
    p3, gray = PROFILES["P3"][0], made.icc(None, made.curve(1.8))
    inks = row_of("CMYK", [(0, 255, 51, 51)])
    close(shown(made.saved(inks, "TIFF", icc_profile=p3)), [(204, 0, 163)])
    close(shown(made.saved(inks, "JPEG", quality=100, icc_profile=p3)), [(204, 0, 163)])
    close(shown(made.saved(row_of("L", [60]), icc_profile=p3)), [60], 0)
    rng = np.random.default_rng(0)
    broken = [b"", b"junk", p3[:100], p3[:-50], p3[:4] + bytes(len(p3) - 4), gray, rng.bytes(3000),
              p3[:128] + b"\xff\xff\xff\xff" + p3[132:]]
    for profile in broken:
        for kind in ("PNG", "TIFF"):
            close(shown(made.saved(row_of("RGB", [(90, 160, 120)]), kind, icc_profile=profile)), [(90, 160, 120)], 0)


def test_srgb_by_whatever_name_leaves_every_pixel_as_it_is() -> None:
    pixels = noise(3, 32)
    for name in ("sRGB IEC61966-2.1", "a camera"):
        content = made.saved(image_of(pixels), icc_profile=made.icc(made.SRGB, made.srgb_curve(), name))
        np.testing.assert_array_equal(shown(content), pixels)


# ---- Damage, bombs

RUN = """
import json, resource, sys
from pathlib import Path
from gradine.configs.schema import Data
from gradine.stages.pixels import open_image

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024

data = Data(source="x", shards="y")
open_image(Path(sys.argv[1]).read_bytes(), data)  # what every format imports and allocates once
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for path in sys.argv[2:]:
    content = Path(path).read_bytes()
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before, start = peak(), resource.getrusage(resource.RUSAGE_SELF)
    try:
        picture = open_image(content, data)
        said = [picture.size[0], picture.size[1], str(picture.pixels.dtype)]
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    end = resource.getrusage(resource.RUSAGE_SELF)
    cpu = end.ru_utime + end.ru_stime - start.ru_utime - start.ru_stime
    print(json.dumps({"said": said, "cpu_s": cpu, "peak_mb": peak() - before}))
"""


def verdicts(folder: Path, files: dict[str, bytes]) -> dict[str, dict[str, Any]]:
    """What a fresh process says of each file, and what that took. It must live to say so."""
    warm = folder / "warm"
    warm.write_bytes(made.saved(made.smooth(0, 8)))
    paths = []
    for number, content in enumerate(files.values()):
        paths.append(folder / str(number))
        paths[-1].write_bytes(content)
    done = subprocess.run([sys.executable, "-c", RUN, warm, *paths], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-1000:]
    return dict(zip(files, map(json.loads, done.stdout.splitlines()), strict=True))


@pytest.mark.fault
def test_f28_no_pixel_comes_from_a_corrupt_or_truncated_file(tmp_path: Path) -> None:
    files = made.corrupt_files()
    found = verdicts(tmp_path, files)
    print(f"{len(files)} files")
    assert len(files) >= 40
    assert {name: one["said"] for name, one in found.items() if not isinstance(one["said"], str)} == {}
    assert max(one["peak_mb"] for one in found.values()) < 64
    assert max(one["cpu_s"] for one in found.values()) < 0.5


@pytest.mark.fault
def test_f28_a_file_cut_anywhere_is_refused_or_whole_and_a_flip_gives_no_other_kind_of_array(tmp_path: Path) -> None:
    image, rng = made.smooth(0, 40, 30), np.random.default_rng(0)
    kinds: list[tuple[str, dict[str, Any]]] = [
        ("JPEG", {}), ("JPEG", {"progressive": True}), ("PNG", {}), ("WEBP", {}), ("WEBP", {"lossless": True}),
        ("GIF", {}), ("TIFF", {}), ("TIFF", {"compression": "tiff_lzw"}), ("TIFF", {"compression": "jpeg"}),
        ("BMP", {}), ("PPM", {})]
    whole = [made.saved(image, kind, **options) for kind, options in kinds]
    cuts = {f"{n}/{cut}": content[:cut] for n, content in enumerate(whole)
            for cut in rng.integers(0, len(content), 40).tolist()}
    flips = {f"{n}/{at}/{bit}": made.flipped(content, at, bit) for n, content in enumerate(whole)
             for at, bit in zip([*range(40), *rng.integers(0, len(content), 80).tolist()],
                                rng.integers(0, 8, 120).tolist(), strict=True)}
    (tmp_path / "cuts").mkdir()
    (tmp_path / "flips").mkdir()
    for name, one in verdicts(tmp_path / "cuts", cuts).items():
        if not isinstance(one["said"], str):  # the end of a PNG or GIF holds no pixels
            content = whole[int(name.split("/")[0])]
            np.testing.assert_array_equal(shown(cuts[name]), shown(content))
    found = verdicts(tmp_path / "flips", flips)
    assert all(isinstance(one["said"], str) or one["said"][2] == "uint8" for one in found.values())
    undetected = [name for name, one in found.items() if not isinstance(one["said"], str)]
    print(f"{len(cuts)} cuts, {len(flips)} flips; {len(undetected)} flips are images too, mostly without a checksum")
    for name in undetected:
        if name.startswith("2/"):  # PNG has checksums
            np.testing.assert_array_equal(shown(flips[name]), shown(whole[2]))


def test_f28_a_flip_in_plain_pixels_is_an_image_with_that_flip() -> None:
    pixels = noise(4, 9, 7)
    for kind in ("BMP", "PPM", "TIFF"):
        content = made.saved(image_of(pixels), kind)
        place = len(content) // 2
        off = np.abs(shown(made.flipped(content, place, 4)) - pixels)
        assert (np.count_nonzero(off), off.max()) == (1, 16)


def test_f28_a_wrong_name_or_kind_is_no_obstacle() -> None:
    """The name is not asked: ever so many .jpg are PNG."""
    close(shown(made.saved(row_of("RGB", [(1, 2, 3)]))), [(1, 2, 3)], 0)


def sos_without_range(jpeg: bytes) -> bytes:
    start = jpeg.rindex(b"\xff\xda")
    end = start + 2 + int.from_bytes(jpeg[start + 2:start + 4], "big")
    return jpeg[:end - 3] + b"\0\0\0" + jpeg[end:]


def with_bytes(jpeg: bytes, extra: bytes) -> bytes:
    """Before its second segment."""
    parts, rest = made.segments(jpeg)
    return b"".join([*parts[:2], extra, *parts[2:]]) + rest


def with_torn_profile(jpeg: bytes) -> bytes:
    return made.with_segment(jpeg, 0xE2, b"ICC_PROFILE\0\5\2abcd")


BENIGN: dict[str, Callable[[bytes], bytes]] = {
    "bytes after its end": lambda jpeg: jpeg + bytes(1000) + b"a film" * 100,
    "a second image after its end": lambda jpeg: jpeg + jpeg,
    "filling before a marker": lambda jpeg: with_bytes(jpeg, b"\xff\xff\xff"),
    "three bytes between segments": lambda jpeg: with_bytes(jpeg, b"\0\1\2"),
    "an unknown JFIF version": lambda jpeg: jpeg.replace(b"JFIF\0\1", b"JFIF\0\2"),
    "a torn profile": with_torn_profile,
    "a scan without a range": sos_without_range,
    "all of these": lambda jpeg: with_bytes(sos_without_range(with_torn_profile(jpeg)), b"\0\xff") + b"\0"}


@pytest.mark.parametrize("name", BENIGN)
def test_f28_what_cameras_get_wrong_without_harm_is_let_through_and_damage_beside_it_is_not(name: str) -> None:
    image = made.smooth(5, 64, 48)
    for jpeg in (made.saved(image.convert(mode), "JPEG") for mode in ("RGB", "L", "CMYK")):
        odd = BENIGN[name](jpeg)
        np.testing.assert_array_equal(shown(odd), shown(jpeg))
        middle = len(jpeg) - len(made.segments(jpeg)[1]) // 2 + odd.index(b"\xff\xda") - jpeg.index(b"\xff\xda")
        with pytest.raises(ValueError, match="Corrupt|Premature|Invalid SOS|unknown JFIF"):
            shown(odd[:middle] + bytes(60) + odd[middle + 60:])


def test_f28_a_few_hundred_bytes_between_segments_may_be_a_lost_one_and_are_refused() -> None:
    with pytest.raises(ValueError, match="4 extraneous bytes"):
        shown(with_bytes(made.saved(made.smooth(5, 64), "JPEG"), b"\xfe\0\1\2"))


BOMBS = made.bombs()


@pytest.mark.fault
@pytest.mark.parametrize("name", BOMBS)
def test_f29_a_bomb_takes_under_64_mb_and_half_a_second(name: str, tmp_path: Path) -> None:
    content = BOMBS[name]()
    assert len(content) < 2 << 20
    one = verdicts(tmp_path, {name: content})[name]
    print(f"{name}: {len(content):,} bytes, {one['peak_mb']:.1f} MB, {one['cpu_s']:.3f} s, {one['said']}")
    assert one["peak_mb"] < 64
    assert one["cpu_s"] < 0.5
    opened_cheaply = ("frames", "EXIF", "comment")
    assert isinstance(one["said"], str) or any(word in name for word in opened_cheaply)


def test_f29_the_136_kb_bomb_is_refused_from_its_header() -> None:
    content = BOMBS["144 megapixels.png"]()
    assert 130_000 < len(content) < 145_000
    with pytest.raises(Rejected, match="12000x12000 is more than data.max_pixels=100000000"):
        open_image(content, settings())
    with pytest.raises(Rejected, match="20x20 is more than data.max_pixels=399"):
        open_image(made.saved(image_of(noise(0, 20))), settings(max_pixels=399))
    assert shown(made.saved(image_of(noise(0, 19))), max_pixels=361).shape == (19, 19, 3)


def test_f29_a_jpeg_that_hides_a_second_larger_header_is_refused() -> None:
    jpeg = made.saved(made.smooth(0, 8), "JPEG")
    for inner in (made.saved(made.smooth(0, 640), "JPEG"), made.bombs()["65,500 px.jpg"]()):
        parts, rest = made.segments(inner)
        frame = next(part for part in parts if part[1] == 0xC0)
        start = jpeg.index(b"\xff\xc0")
        for content in (jpeg[:start] + frame + jpeg[start:], jpeg[:start] + b"\xff\xe5\0\2" + frame[:2] + jpeg[start:]):
            with pytest.raises((ValueError, OSError, Rejected)):
                open_image(content, settings())


# ---- Crops


def crops(pixels: np.ndarray, resolution: int = 4, path: str = "a.png", **changes: Any) -> list[np.ndarray]:
    channels = {"channels": pixels.shape[2], **changes}
    return list(squares(Picture(pixels), path, settings(**channels), resolution))


def refusal(call: Callable[[], Any]) -> str:
    with pytest.raises(Rejected) as caught:
        call()
    return str(caught.value)


@pytest.mark.parametrize(("side", "resolution"), [(5, 4), (13, 8), (12, 4), (31, 16), (64, 8)])
def test_a_side_that_is_no_power_of_two_is_reduced_to_exact_area_means(side: int, resolution: int) -> None:
    pixels = noise(side, side)
    source, cell = pixels.tolist(), Fraction(side, resolution)

    def overlap(pixel: int, out: int) -> Fraction:
        return max(Fraction(0), Fraction(min(pixel + 1, (out + 1) * cell) - max(pixel, out * cell)))

    spans = [[(p, w) for p in range(side) if (w := overlap(p, out))] for out in range(resolution)]
    expected = [[[float(sum(wy * wx * source[y][x][c] for y, wy in spans[row] for x, wx in spans[column]) / cell**2)
                  for c in range(3)] for column in range(resolution)] for row in range(resolution)]
    np.testing.assert_allclose(crops(pixels, resolution)[0], np.array(expected), atol=1e-4, rtol=0)


def test_span_means_share_out_every_row_once() -> None:
    rng = np.random.default_rng(0)
    for count, rows in [(1, 1), (1, 9), (4, 4), (7, 8), (8, 1500), (512, 777), *rng.integers(1, 200, (20, 2)).tolist()]:
        values = rng.random((max(count, rows), 3), np.float32)
        np.testing.assert_allclose(span_means(values, count).mean(0), values.mean(0), rtol=1e-4)


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_centre_third_of_a_three_to_one_image_is_what_remains(tall: bool, channels: int) -> None:
    thirds = [np.full((4, 4, channels), value, np.uint8) for value in (10, 20, 30)]
    thirds[1] = noise(6, 4, channels=channels)
    np.testing.assert_array_equal(crops(np.concatenate(thirds, axis=0 if tall else 1)), [thirds[1]])


def test_none_takes_squares_only() -> None:
    assert refusal(lambda: crops(noise(0, 9, 8), crop="none")) == "9x8 is not square and data.crop is none"
    assert len(crops(noise(0, 8), crop="none")) == 1


def test_tiles_are_all_squares_of_the_full_size_in_the_middle_and_none_overlaps() -> None:
    pixels = noise(7, 15, 10)  # 3 x 2 squares of 4; (15 - 12) // 2 = 1 left, (10 - 8) // 2 = 1 above
    boxes = [(1, 1), (1, 5), (1, 9), (5, 1), (5, 5), (5, 9)]
    np.testing.assert_array_equal(crops(pixels, crop="tile"), [pixels[y:y + 4, x:x + 4] for y, x in boxes])
    assert [c.shape for c in crops(noise(7, 7, 4), crop="tile")] == [(4, 4, 3)]


def boxes_of(width: int, height: int, path: str, resolution: int = 8, **changes: Any) -> list[tuple[int, ...]]:
    """(left, top, side) of each crop, from an image whose channels are its coordinates, a slope that means keep."""
    y, x = np.mgrid[0:height, 0:width].astype(np.uint8)
    found = []
    for crop in crops(np.stack([x, y, y], axis=2), resolution, path, **changes):
        along = [crop[0, :, 0].astype(float), crop[:, 0, 1].astype(float)]
        across, down = ((line[-1] - line[0]) * resolution / (resolution - 1) for line in along)
        assert across == pytest.approx(down, abs=1e-3), "a square"
        side = round(across)
        left, top = (line[0] + 0.5 - side / resolution / 2 for line in along)
        for value in (left, top, across):
            assert value == pytest.approx(round(value), abs=0.3), "whole pixels"
        found.append((round(left), round(top), side))
    return found


def test_random_crops_are_whole_squares_inside_the_image_and_depend_on_seed_and_path_alone() -> None:
    first = boxes_of(90, 60, "a.png", crop="random-50")
    assert all(8 <= side <= 60 and 0 <= left <= 90 - side and 0 <= top <= 60 - side for left, top, side in first)
    assert len({side for *_, side in first}) > 20
    assert len({left for left, *_ in first}) > 15
    boxes_of(33, 44, "b.png", crop="random-9")
    assert boxes_of(90, 60, "a.png", crop="random-50") == first
    assert boxes_of(90, 60, "a.png", crop="random-3") == first[:3]
    assert boxes_of(90, 60, "b.png", crop="random-50") != first
    assert boxes_of(90, 60, "a.png", crop="random-50", crop_seed=1) != first


@pytest.mark.parametrize("crop", ["centre", "tile", "random-2"])
def test_a_small_image_is_rejected_upscaled_or_padded_as_asked(crop: str) -> None:
    pixels = noise(8, 6, 3)
    assert refusal(lambda: crops(pixels, 8, crop=crop)) == "6x3 is smaller than 8x8"
    flat = crops(np.full((3, 6, 3), 77, np.uint8), 8, crop=crop, small="upscale")
    np.testing.assert_array_equal(flat, [np.full((8, 8, 3), 77)])
    ground = np.full((8, 8, 3), (16, 32, 48), np.uint8)
    ground[2:5, 1:7] = pixels  # (8 - 3) // 2 above, (8 - 6) // 2 on the left
    padded = crops(pixels, 8, crop=crop, small="pad", background="#102030")
    np.testing.assert_array_equal(padded, [ground] * len(padded))
    assert len(padded) == (2 if crop == "random-2" else 1)
    gray = crops(pixels[..., :1], 8, crop=crop, small="pad", background="#102030")[0]
    np.testing.assert_array_equal(gray[2:5, 1:7], pixels[..., :1])
    assert (gray[0] == 29).all()  # 0.299 * 16 + 0.587 * 32 + 0.114 * 48 = 29.04


def test_upscaling_keeps_a_slope() -> None:
    slope = np.tile(np.arange(16, dtype=np.uint8) * 10, (16, 1))[..., None]
    large = crops(slope, 32, small="upscale")[0][16, :, 0].astype(float)
    inside = np.arange(32)[6:-6]
    np.testing.assert_allclose(large[6:-6], (inside + 0.5) / 2 * 10 - 5, atol=1)


def test_a_colour_that_is_none_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match="data.background='whitish' is no colour. Use a name such as white"):
        colour("whitish")
    assert [colour(name) for name in GROUNDS] == list(GROUNDS.values())


# ---- Levels


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", [np.uint8, np.float32])
def test_levels_are_the_means_of_the_top_rounded_once_and_halves_go_to_even(kind: type, channels: int) -> None:
    for top in (noise(9, 256, channels=channels), np.full((64, 64, channels), 255, np.uint8),
                noise(10, 64, channels=channels) % 2):  # many exact halves
        chain = dict(levels(top.astype(kind)))
        assert list(chain) == [size for size in (256, 128, 64, 32, 16, 8, 4) if size <= len(top)]
        for size, level in chain.items():
            cell = len(top) // size
            exact = top.astype(np.float64).reshape(size, cell, size, cell, channels).mean((1, 3))
            np.testing.assert_array_equal(level, np.rint(exact))  # a mean of at most 4096 bytes is exact in float64
            assert level.dtype == np.uint8


def test_float_levels_of_1024_px_are_within_a_rounding_of_their_means() -> None:
    top = np.random.default_rng(11).uniform(0, 255, (1024, 1024, 1)).astype(np.float32)
    for size, level in levels(top):
        exact = top.astype(np.float64).reshape(size, 1024 // size, size, 1024 // size).mean((1, 3))[..., None]
        assert np.abs(level - exact).max() <= 0.5 + 1e-3


# ---- Encodings

KINDS = ["raw", "png", "webp", "jpeg"]


@pytest.fixture(params=[1, 3])
def channels(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("kind", ["raw", "png", "webp"])
@pytest.mark.parametrize("size", [4, 16, 128])
def test_a_lossless_kind_gives_back_every_bit(kind: str, size: int, channels: int) -> None:
    for seed in range(5):
        pixels, back = noise(seed, size, channels=channels), np.zeros((size, size, channels), np.uint8)
        decode(encode(pixels, kind), kind, back)
        np.testing.assert_array_equal(back, pixels)


@pytest.mark.parametrize("size", [4, 64, 256])
def test_jpeg_keeps_a_smooth_image_at_45_db(size: int, channels: int) -> None:
    image = np.asarray(made.smooth(12, 256).resize((size, size), Image.Resampling.BOX))[..., :channels]
    back = np.zeros_like(image)
    decode(encode(np.ascontiguousarray(image), "jpeg"), "jpeg", back)
    error = np.mean((back.astype(float) - image) ** 2)
    assert 10 * np.log10(255**2 / error) > (45 if size > 4 else 35)


def test_a_crop_of_a_larger_array_is_encoded_as_itself(channels: int) -> None:
    large = noise(13, 32, channels=channels)
    for kind in KINDS:
        assert encode(large[3:19, 5:21], kind) == encode(large[3:19, 5:21].copy(), kind)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_webdataset_decodes_it_by_its_suffix(kind: str, channels: int) -> None:
    pixels = np.asarray(made.smooth(14, 16))[..., :channels]
    content = encode(np.ascontiguousarray(pixels), kind)
    name = suffix(kind, channels)
    assert name == {"raw": ("pgm", "ppm")[channels == 3], "jpeg": "jpg"}.get(kind, kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        read = webdataset.imagehandler("rgb8", extensions=("jpg", "png", "ppm", "pgm", "webp"))(name, content)
    assert read.shape == (16, 16, 3)
    off = np.abs(read.astype(int) - pixels)
    assert off.max() <= (8 if kind == "jpeg" else 0)


def hostile(kind: str) -> Iterator[tuple[str, bytes]]:
    """What is no `kind` of 16x16x3."""
    def of(size: int, height: int | None = None) -> bytes:
        image = image_of(noise(15, size, height))
        if kind == "raw":
            return made.saved(image, "PPM")
        return made.saved(image, kind.upper(), **({"lossless": True} if kind == "webp" else {}))

    good = of(16)
    yield "larger", of(64)
    yield "smaller", of(8)
    yield "wider", of(32, 16)
    yield "higher", of(16, 32)
    yield "as many pixels", of(32, 8)
    yield "empty", b""
    yield "text", b"not an image"
    yield "cut", good[:len(good) // 2]
    yield "cut early", good[:20]
    yield "another kind", made.saved(image_of(noise(15, 16)), "GIF")
    yield "claims more", {"raw": good.replace(b"16 16", b"99 99"), "jpeg": BOMBS["65,500 px.jpg"](),
                          "png": BOMBS["one row of 2 billion.png"](), "webp": BOMBS["16,383 px.webp"]()}[kind]
    if kind == "raw":
        yield "another depth", good.replace(b"255", b"254")
        yield "with a comment", good.replace(b"P6\n", b"P6\n#\n")
        yield "more bytes", good + b"\0"


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_such_image_is_a_value_error_and_nothing_is_written_beyond_the_buffer(kind: str) -> None:
    for name, content in hostile(kind):
        memory = np.full(3 * 16 * 16 * 3, 0xA5, np.uint8)
        third = 16 * 16 * 3
        with pytest.raises(ValueError):  # noqa: PT011 - decoders say it in their own words
            decode(content, kind, memory[third:2 * third].reshape(16, 16, 3))
        assert (memory[:third] == 0xA5).all(), name
        assert (memory[2 * third:] == 0xA5).all(), name


@pytest.mark.parametrize("kind", KINDS)
def test_flips_in_an_encoded_image_never_write_beyond_the_buffer(kind: str, channels: int) -> None:
    content, rng = encode(noise(16, 16, channels=channels), kind), np.random.default_rng(0)
    refused = 0
    for at, bit in zip(rng.integers(0, len(content), 300).tolist(), rng.integers(0, 8, 300).tolist(), strict=True):
        size = 16 * 16 * channels
        memory = np.full(3 * size, 0xA5, np.uint8)
        try:
            decode(made.flipped(content, at, bit), kind, memory[size:2 * size].reshape(16, 16, channels))
        except ValueError:
            refused += 1
        assert (memory[:size] == 0xA5).all()
        assert (memory[2 * size:] == 0xA5).all()
    print(f"{kind}: {refused} of 300 refused")
