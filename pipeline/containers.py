"""One container file of a source -> its images with the labels it gives them, and their bytes: zip, tar, Parquet, IDX.

Files and members go by their `shown` paths; a disk or container knows them by the `native` ones. Sizes are bytes, and
those that a header claims are bounded. Nothing is ever unpacked by its own name, followed as a link or unpickled.

A container that is not whole raises UserError or one of DAMAGE, which `Files.damage_told` makes a UserError; a single
member that cannot be used is Rejected, by what reads it.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re
import stat
import struct
import tarfile
import tempfile
import weakref
import zipfile
import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate
from math import prod
from pathlib import PurePosixPath
from typing import Any, BinaryIO, TypeVar, cast

from gradine.configs.schema import UserError, require
from gradine.stages.pixels import Rejected
from gradine.stages.store import Store

SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm", ".gif"}
CONTAINERS = {"zip": (".zip",), "parquet": (".parquet",), "idx": ("idx3-ubyte", "idx3-ubyte.gz"),
              "tar": (".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz", ".tar.bz2", ".tbz2", ".tar.zst", ".tzst")}
UNPACKERS: dict[bytes, Callable[[Any], Any]] = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}
IMAGE_COLUMNS = ("image", "img", "jpg", "png", "bytes")  # of Parquet, as are the labels'
LABEL_COLUMNS = ("label", "labels", "class")
LONGEST_IMAGE = 1 << 30  # bytes of one member, unpacked
LONGEST_HEADER = 1 << 16  # bytes of one tar member's headers, long names and attributes included
LONGEST_NAME = 4096  # a tar member's, or a class's in a .cls
DAMAGE = (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, struct.error, ValueError,
          OverflowError, NotImplementedError, RecursionError)
REMEMBERED: dict[str, tuple[object, Any]] = {}
UNSHOWABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\\\]")

Reader = Callable[[], bytes]
T = TypeVar("T")


@dataclass(frozen=True)
class Found:
    """One source image. `size` in bytes, -1 where unknown."""

    path: str
    size: int
    label: str | None


def list_members(files: Files, name: str) -> tuple[list[Found], list[str]]:
    """The images of a container, labelled as it does, and the paths of its other members."""
    listers = {"zip": _list_zip, "tar": _list_tar, "parquet": _list_parquet, "idx": _list_idx}
    return listers[kind(name)](files, name)


def read_members(files: Files, name: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
    """Each member, in the order asked, with what reads its bytes until the next is taken."""
    readers = {"zip": _read_zip, "tar": _read_tar, "parquet": _read_parquet, "idx": _read_idx}
    return readers[kind(name)](files, name, members)


# ---- Names


def kind(name: str) -> str:
    """Of container; "" for any other file."""
    return next((kind for kind, ends in CONTAINERS.items() if name.lower().endswith(ends)), "")


def is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES


def is_hidden(name: str) -> bool:
    return any(part.startswith((".", "__MACOSX")) and part != ".." for part in PurePosixPath(name).parts)


def shown(name: str) -> str:
    """Plain text: what no terminal or UTF-8 file could show stands as \\uXXXX, a backslash too."""
    return UNSHOWABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", name)


def native(name: str) -> str:
    """What `shown` was made from."""
    return re.sub(r"\\u([0-9a-f]{4})", lambda match: chr(int(match[1], 16)), name)


# ---- Files


@dataclass(frozen=True)
class Files:
    """The files of a source, by their shown paths."""

    store: Store
    source: str  # as messages name it
    single: str  # its only file, if it is no folder
    sizes: dict[str, int | None] = field(default_factory=dict)

    def size(self, name: str) -> int | None:
        """Bytes, asked for once; None if there is no such file."""
        if name not in self.sizes:
            self.sizes[name] = self.store.size(native(name))
        return self.sizes[name]

    def open(self, name: str) -> BinaryIO:
        return self.store.open(native(name))

    @contextmanager
    def unpacked(self, name: str) -> Iterator[BinaryIO]:
        """A file opened, and unpacked if it is compressed."""
        require(not name.lower().endswith("zst"), f"{name} in data.source={self.source!r} is packed with zstd, which "
                                                  "is not read here. Unpack it, or pack it as .tar.gz.")
        with self.open(name) as file:
            if unpacker := _unpacker(file):
                with unpacker(file) as stream:
                    yield stream
            else:
                yield file

    def remembered(self, what: str, name: str, make: Callable[[], T], part: int = 0) -> T:
        """`make()`, once for the slices of a file that one process reads one after another: the headers of a million
        members take half a minute to read, and every slice needs them.
        """
        changed = None if self.store.remote else (self.store.folder / native(name)).stat().st_mtime_ns
        key = self.store.location, name, part, self.size(name), changed
        if REMEMBERED.get(what, (None, None))[0] != key:
            REMEMBERED.pop(what, None)  # first, so that no two are in memory
            REMEMBERED[what] = key, make()
        return cast(T, REMEMBERED[what][1])

    @contextmanager
    def damage_told(self, name: str) -> Iterator[None]:
        """UserError for what reading a damaged file raises."""
        try:
            yield
        except UserError:
            raise
        except (*DAMAGE, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # the machine's, not the file's: what unpacks a file raises those without a number
            where = f" ({name})" if name and name != self.single else ""
            raise UserError(f"data.source={self.source!r}{where} is damaged: {one_line(error)}. "
                            "Fetch or pack it again.") from error


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


def _unpacker(file: BinaryIO) -> Callable[[Any], Any] | None:
    head = file.read(6)
    file.seek(0)
    return next((unpacker for magic, unpacker in UNPACKERS.items() if head.startswith(magic)), None)


# ---- What several kinds share


def label_text(value: Any, of: str) -> str | None:
    require(value is None or isinstance(value, int | str),
            f"label {str(value)[:60]} of {of} is neither a whole number nor text. One class an image is what is used.")
    return None if value is None or value == "" else str(value)


def _sorted_out(files: Iterable[tuple[str, int]]) -> tuple[list[Found], list[str]]:
    """Images, unlabelled, and the paths of what is none or hidden."""
    images, others = [], []
    for path, size in files:
        if is_image(path) and not is_hidden(path):
            images.append(Found(path, size, None))
        else:
            others.append(path)
    return images, others


def _read_span(file: BinaryIO, offset: int, size: int) -> bytes:
    _bounded(size)
    file.seek(offset)
    content = file.read(size)
    if len(content) != size:
        raise Rejected(f"is cut short: {len(content)} of {size} bytes")
    return content


def _bounded(size: int) -> None:
    if size > LONGEST_IMAGE:
        raise Rejected(f"claims {size:,} bytes, more than {LONGEST_IMAGE:,}")


# ---- Zip


def _zip(files: Files, name: str) -> zipfile.ZipFile:
    def make() -> zipfile.ZipFile:
        with ExitStack() as stack:
            archive = zipfile.ZipFile(stack.enter_context(files.open(name)))
            weakref.finalize(archive, stack.pop_all().close)
            return archive

    return files.remembered("zip", name, make)


def _list_zip(files: Files, name: str) -> tuple[list[Found], list[str]]:
    members = {shown(info.filename): info for info in _zip(files, name).infolist()}  # the last one counts
    return _sorted_out([(path, info.file_size) for path, info in members.items() if not info.is_dir()])


def _read_zip(files: Files, name: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
    archive = _zip(files, name)
    for member in members:
        yield member, partial(_read_zip_member, archive, native(member))


def _read_zip_member(archive: zipfile.ZipFile, name: str) -> bytes:
    info = archive.getinfo(name)
    if info.flag_bits & 1:
        raise Rejected("is encrypted")
    if stat.S_ISLNK(info.external_attr >> 16):
        raise Rejected("is no plain file in the zip")
    _bounded(info.file_size)
    return archive.read(info)


# ---- Tar


class _Headers:
    """What tarfile reads headers through: it would hold a long name or attribute of any length in memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.left, self.last = stream, LONGEST_HEADER, b""
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        self.left -= size
        if size < 0 or self.left < 0:
            raise tarfile.ReadError(f"the headers before byte {self.tell()} are longer than {LONGEST_HEADER} bytes")
        self.last = self.stream.read(size)
        return self.last


def _members(stream: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """Every member in the archive's order. ReadError unless the archive is whole up to its end marker.

    tarfile takes the first header that it cannot read for the end of the archive.
    """
    headers = _Headers(stream)
    tar = tarfile.TarFile(fileobj=cast(BinaryIO, headers), encoding="utf-8")
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # it keeps all
        if member.size < 0 or len(member.name) > LONGEST_NAME or len(tar.pax_headers) > 64:
            raise tarfile.ReadError(f"the header before byte {member.offset_data} is not credible")
        headers.left = LONGEST_HEADER
        yield member
    marker = headers.last + stream.read(512)  # the block that tarfile ended at; a step back would unpack all again
    whole = len(marker) == 1024 and not any(marker)
    while whole and (chunk := stream.read(1 << 20)):
        whole = chunk.count(0) == len(chunk)
    if not whole:
        raise tarfile.ReadError(f"no valid header and no end of the archive at byte {tar.offset}")


def _is_plain(member: tarfile.TarInfo) -> bool:
    leads_out = member.name.startswith("/") or ".." in PurePosixPath(member.name).parts
    return member.isreg() and not member.issparse() and not leads_out


def _tar_path(member: tarfile.TarInfo) -> str:
    return shown(str(PurePosixPath(member.name)))


def _list_tar(files: Files, name: str) -> tuple[list[Found], list[str]]:
    sizes, labels = {}, {}
    with files.unpacked(name) as stream:
        for member in _members(stream):
            if member.isdir():
                continue
            path = _tar_path(member)
            key, extension = _sample(path)
            sizes[path] = member.size  # the last one counts
            if extension == "cls" and _is_plain(member):
                labels[key] = _cls_text(stream, member)
    images, others = _sorted_out((path, size) for path, size in sizes.items() if _sample(path)[1] != "cls")
    return [replace(image, label=labels.get(_sample(image.path)[0])) for image in images], others


def _sample(path: str) -> tuple[str, str]:
    """WebDataset's key and extension: what stands before and after the first dot of the base name."""
    folder, slash, base = path.rpartition("/")
    key, _, extension = base.partition(".")
    return folder + slash + key, extension


def _cls_text(stream: BinaryIO, member: tarfile.TarInfo) -> str | None:
    stream.seek(member.offset_data)
    content = stream.read(min(member.size, LONGEST_NAME))
    where, rule = f"{_tar_path(member)} in a tar", "it is to hold a class, a number or short name. Pack it again."
    require(member.size <= LONGEST_NAME, f"{where} has {member.size} bytes: {rule}")
    try:
        return content.decode().strip() or None
    except UnicodeDecodeError:
        raise UserError(f"{where} is no text: {rule}") from None


def _tar_index(file: BinaryIO) -> dict[str, tuple[int, int] | None]:
    """Path -> (offset, bytes) of each plain member of an uncompressed tar; None for other kinds."""
    return {_tar_path(member): (member.offset_data, member.size) if _is_plain(member) else None
            for member in _members(file) if not member.isdir()}


def _read_tar(files: Files, name: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
    with ExitStack() as stack:
        file = stack.enter_context(files.open(name))
        if _unpacker(file):
            file = cast(BinaryIO, stack.enter_context(tempfile.TemporaryFile()))
            index = _unpack(files, name, set(members), file)
        else:
            index = files.remembered("tar", name, partial(_tar_index, file))
        for member in members:
            yield member, partial(_read_tar_member, file, index.get(member))


def _unpack(files: Files, name: str, wanted: set[str], spool: BinaryIO) -> dict[str, tuple[int, int] | None]:
    """Copies the members that are wanted, in the order they come, and tells where each lies: the last one counts."""
    index: dict[str, tuple[int, int] | None] = {}
    with files.unpacked(name) as stream:
        for member in _members(stream):
            if (path := _tar_path(member)) not in wanted or member.isdir():
                continue
            index[path] = (spool.tell(), member.size) if _is_plain(member) else None
            left = member.size if _is_plain(member) and member.size <= LONGEST_IMAGE else 0
            stream.seek(member.offset_data)
            while left and (chunk := stream.read(min(left, 1 << 20))):
                left -= spool.write(chunk)
    return index


def _read_tar_member(file: BinaryIO, place: tuple[int, int] | None) -> bytes:
    if place is None:
        raise Rejected("is no plain file in the tar")
    return _read_span(file, *place)


# ---- Parquet


def _parquet(files: Files) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"data.source={files.source!r} is Parquet, which needs pyarrow. Install it with "
                        "pip install 'gradine[parquet]'.") from None
    return pyarrow.parquet


def _image_column(schema: Any, name: str) -> str:
    def holds_bytes(field: Any) -> bool:
        return str(field.type) in ("binary", "large_binary", "binary_view")

    structs = [column.name for column in schema
               if any(part.name == f"{column.name}.bytes" and holds_bytes(part) for part in column.flatten())]
    plain = [column.name for column in schema if column.name in IMAGE_COLUMNS and holds_bytes(column)]
    known = sorted((column for column in structs + plain if column in IMAGE_COLUMNS), key=IMAGE_COLUMNS.index)
    require(bool(known or structs), f"{name} has no column of images among {', '.join(schema.names)[:200]}. Name one "
                                    f"{', '.join(IMAGE_COLUMNS)}: the bytes of a file a row, or a struct with `bytes`.")
    return (known or structs)[0]


def _list_parquet(files: Files, name: str) -> tuple[list[Found], list[str]]:
    parquet = _parquet(files)
    with files.open(name) as file:
        table = parquet.ParquetFile(file)
        _image_column(table.schema_arrow, name)
        labels: list[str | None] = [None] * table.metadata.num_rows
        column = next((column for column in LABEL_COLUMNS if column in table.schema_arrow.names), None)
        if column:
            values, class_names = table.read(columns=[column]).column(column).to_pylist(), _class_names(table, column)
            labels = [_parquet_label(value, class_names, f"row {row} of {name}") for row, value in enumerate(values)]
    return [Found(f"{row:08d}", -1, label) for row, label in enumerate(labels)], []


def _class_names(table: Any, column: str) -> list[str]:
    """What Hugging Face's `datasets` writes into the file about a column of ClassLabel."""
    try:
        info = json.loads((table.schema_arrow.metadata or {})[b"huggingface"])
        return [str(name) for name in info["info"]["features"][column]["names"]]
    except (KeyError, TypeError, ValueError):
        return []


def _parquet_label(value: Any, names: list[str], of: str) -> str | None:
    text = label_text(value, of)
    if not names or not isinstance(value, int):
        return text
    require(-1 <= value < len(names), f"label {value} of {of} is none of its {len(names)} classes. Write it again.")
    return names[value] if value >= 0 else None  # -1: unknown


def _read_parquet(files: Files, name: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
    parquet = _parquet(files)
    with files.open(name) as file:
        table = parquet.ParquetFile(file)
        column = _image_column(table.schema_arrow, name)
        groups = range(table.metadata.num_row_groups)
        ends = list(accumulate(table.metadata.row_group(group).num_rows for group in groups))
        for member in members:
            group = bisect_right(ends, int(member))
            load = partial(table.read_row_group, group, columns=[column])
            rows = partial(files.remembered, "parquet", name, load, group)
            yield member, partial(_read_row, rows, column, int(member) - (ends[group - 1] if group else 0))


def _read_row(rows: Callable[[], Any], column: str, row: int) -> bytes:
    value = rows().column(column)[row].as_py()
    content = value["bytes"] if isinstance(value, dict) else value
    if content is None:
        raise Rejected("has no bytes in its row")
    return content


# ---- IDX


def idx_labels(files: Files, name: str) -> str | None:
    """The file of labels beside one of images; either may be compressed."""
    folder, slash, base = name.rpartition("/")
    labels = folder + slash + base.replace("images", "labels").replace("idx3", "idx1").removesuffix(".gz")
    return next((file for file in (labels, f"{labels}.gz") if files.size(file) is not None), None)


def _idx_shape(stream: BinaryIO, name: str, magic: int) -> list[int]:
    """The dimensions in an IDX file's header, which must agree with its length."""
    found, *shape = struct.unpack(f">{1 + magic % 256}I", stream.read(4 + 4 * (magic % 256)))
    require(found == magic, f"{name} begins with {found:#010x}, an IDX file of this kind with {magic:#010x}. "
                            "Give images and labels as MNIST has them: unsigned bytes.")
    length = 0
    while chunk := stream.read(1 << 20):
        length += len(chunk)
    if length != prod(shape):
        raise EOFError(f"its header says {' x '.join(map(str, shape))} bytes, it has {length}")
    return shape


def _list_idx(files: Files, name: str) -> tuple[list[Found], list[str]]:
    with files.unpacked(name) as stream:
        count, height, width = _idx_shape(stream, name, 0x803)
    labels: list[str | None] = [None] * count
    if beside := idx_labels(files, name):
        with files.damage_told(beside), files.unpacked(beside) as stream:
            there, = _idx_shape(stream, beside, 0x801)
            require(there == count, f"{beside} has {there} labels for the {count} images of {name}. Give a pair.")
            stream.seek(8)
            labels = [str(value) for value in stream.read(count)]
    return [Found(f"{row:08d}", width * height, label) for row, label in enumerate(labels)], []


def _read_idx(files: Files, name: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
    with files.unpacked(name) as stream:
        _, _, height, width = struct.unpack(">4I", stream.read(16))
        for member in members:
            yield member, partial(_read_idx_row, stream, int(member), width, height)


def _read_idx_row(stream: BinaryIO, row: int, width: int, height: int) -> bytes:
    size = width * height
    return b"P5\n%d %d\n255\n" % (width, height) + _read_span(stream, 16 + row * size, size)

