"""Make demo_images.zip, the bundled set of small real photographs, from two Debian packages.

    apt-get download endless-sky-high-dpi endless-sky-data       # 136 MB and 70 MB
    for deb in endless-sky-*.deb; do dpkg-deb -x "$deb" unpacked; done
    python configs/demo_images.py unpacked demo_images.zip

Three squares of each 1440x720 photograph (left, centre, right; neighbours share half their width, so split by
photograph where a held-out part is needed), averaged down to 64x64 and stored as `class/photograph-square.webp`.
The class is the letters the file name begins with. Standard output is the list of photographs by licence stanza
that demo_images.md carries.

Only the public domain part of the 273 photographs is used. By the letter of the copyright format the last matching
stanza wins, and that gives 198. But 17 of them end in an author's name (`mountain10-sfiera`), have a CC-BY-SA-4.0
stanza of their own (`images/land/*-sfiera*`) and fall to public domain only because a later glob, meant for
`mountain1`, is `images/land/mountain1*`. So every stanza about `images/land` that matches must say public domain: 181.

Verified with endless-sky-high-dpi 0.9.8-1 and endless-sky-data 0.9.8-1.2: 181 photographs, 543 images; the copyright
files of both packages agree on each; two runs give the same bytes (Pillow 13.0.0, libwebp 1.6.0; another libwebp may
encode differently).
"""

import argparse
import re
import sys
from dataclasses import dataclass
from fnmatch import fnmatchcase
from io import BytesIO
from pathlib import Path
from zipfile import ZIP_STORED, ZipFile, ZipInfo

from PIL import Image

PHOTOGRAPHS = "usr/share/games/endless-sky/plugins/endless-sky-high-dpi/images/land"
COPYRIGHT = "usr/share/doc/endless-sky-data/copyright"
PHOTOGRAPH_SIZE = (1440, 720)  # pixels, width x height
SQUARE_OFFSETS = {"left": 0, "centre": 360, "right": 720}  # pixels from the left edge
RESOLUTION = 64  # pixels per side
WEBP_QUALITY = 88
ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest a zip can hold: the bytes do not depend on when it was made


@dataclass(frozen=True)
class Stanza:
    """One `Files:` paragraph of a Debian copyright file; `licence` is the short name and the text below it."""

    globs: tuple[str, ...]
    holder: str
    licence: str

    @property
    def is_public_domain(self) -> bool:
        return self.licence.split()[0] == "public-domain"


def read_stanzas(copyright_file: Path) -> list[Stanza]:
    """The `Files:` paragraphs that speak of `images/land`, in order of the file."""
    stanzas = []
    for paragraph in re.split(r"\n\s*\n", copyright_file.read_text(encoding="utf-8")):
        values = dict(re.findall(r"^([\w-]+):((?:.*)(?:\n[ \t].*)*)", paragraph, flags=re.MULTILINE))
        globs = tuple(values.get("Files", "").split())
        if any(glob.startswith("images/land/") for glob in globs):
            holder, licence = (" ".join(values[field].split()) for field in ("Copyright", "License"))
            stanzas.append(Stanza(globs, holder, licence))
    return stanzas


def stanzas_of(name: str, stanzas: list[Stanza]) -> list[Stanza]:
    """All stanzas that match a photograph; the last one names its source."""
    return [s for s in stanzas if any(fnmatchcase(f"images/land/{name}.jpg", glob) for glob in s.globs)]


def squares(photograph: Path) -> dict[str, bytes]:
    """The WebP bytes of each square, without colour profile and EXIF."""
    with Image.open(photograph) as image:
        if image.size != PHOTOGRAPH_SIZE:
            sys.exit(f"{photograph.name}: size {image.size}, expected {PHOTOGRAPH_SIZE}: another package version?")
        pixels = image.convert("RGB")
    side = PHOTOGRAPH_SIZE[1]
    encoded: dict[str, bytes] = {}
    for square, left in SQUARE_OFFSETS.items():
        small = pixels.resize((RESOLUTION, RESOLUTION), Image.Resampling.BOX, box=(left, 0, left + side, side))
        buffer = BytesIO()
        small.save(buffer, "WEBP", quality=WEBP_QUALITY, method=6, icc_profile=b"", exif=b"")
        encoded[square] = buffer.getvalue()
    return encoded


def write_zip(path: Path, files: dict[str, bytes]) -> None:
    with ZipFile(path, "w", ZIP_STORED) as archive:
        for name in sorted(files):
            entry = ZipInfo(name, ZIP_DATE)
            entry.create_system, entry.external_attr = 3, 0o644 << 16  # Unix, whatever machine this runs on
            archive.writestr(entry, files[name])


def print_by_stanza(title: str, names_by_stanza: dict[Stanza, list[str]]) -> None:
    print(f"## {title}: {sum(map(len, names_by_stanza.values()))}\n")
    for stanza, names in names_by_stanza.items():
        print(f"Copyright: {stanza.holder}  \nLicense: {stanza.licence}  \n{len(names)}: {', '.join(names)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the bundled photographs from two unpacked Debian packages.")
    parser.add_argument("deb_folder", type=Path, help="where both packages were unpacked (it contains usr/)")
    parser.add_argument("out", type=Path, help="the zip to write")
    args = parser.parse_args()
    photographs = {p.name.removesuffix("@2x.jpg"): p for p in (args.deb_folder / PHOTOGRAPHS).glob("*@2x.jpg")}
    copyright_file = args.deb_folder / COPYRIGHT
    for needed, is_there in ((f"{PHOTOGRAPHS}/*@2x.jpg", photographs), (COPYRIGHT, copyright_file.is_file())):
        if not is_there:
            sys.exit(f"{args.deb_folder} has no {needed}: unpack both packages there, see the head of this script.")

    stanzas = read_stanzas(copyright_file)
    files: dict[str, bytes] = {}
    used: dict[Stanza, list[str]] = {}
    left_out: dict[Stanza, list[str]] = {}
    for name, photograph in sorted(photographs.items()):
        matching = stanzas_of(name, stanzas)
        if not matching:
            sys.exit(f"{name}: no stanza of {COPYRIGHT} names it, so its licence is unknown.")
        restricted = [s for s in matching if not s.is_public_domain]
        if restricted:
            left_out.setdefault(restricted[-1], []).append(name)
            continue
        used.setdefault(matching[-1], []).append(name)
        class_name = re.split(r"\d", name)[0]
        files.update({f"{class_name}/{name}-{square}.webp": data for square, data in squares(photograph).items()})
    write_zip(args.out, files)
    print_by_stanza("Photographs used", used)
    print_by_stanza("Photographs left out", left_out)


if __name__ == "__main__":
    main()
