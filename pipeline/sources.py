"""Any pile of files -> one sorted list of images with labels, and the bytes of each.

A source is a folder, a single file or a remote prefix. If any of its files is an image by suffix, the images are the
source and everything else is ignored; else every container in it is expanded:

    .zip, .tar (.gz .xz .bz2)    members that are images; in a tar, WebDataset's `<key>.cls` is the label of <key>
    .parquet                     one image a row, as Hugging Face lays them out
    *idx3-ubyte (.gz)            gray images as MNIST has them, handed on as PGM; labels from the idx1 file beside it

Paths are unique and plain text, as `shown` makes them. A container that is not whole is an error.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import Any, cast
from urllib.parse import unquote, urlsplit, urlunsplit

from gradine.configs.schema import RECIPES, UserError, require
from gradine.pipeline.containers import (
    SUFFIXES,
    Files,
    Found,
    Reader,
    idx_labels,
    is_hidden,
    is_image,
    kind,
    label_text,
    list_members,
    native,
    one_line,
    read_members,
    shown,
)
from gradine.stages.pixels import Rejected
from gradine.stages.store import Store, is_remote


@dataclass(frozen=True)
class Listing:
    images: list[Found]  # sorted by path
    classes: list[str]
    ignored: int  # files that are no images


def locate(source: str) -> str:
    """Absolute path or URL; `bundled:` names a file that ships with gradine."""
    require("?***" not in source, f"data.source={source!r}: what followed the ? is kept secret, and was not written "
                                  "down. Give the whole URL again, as data.source=URL.")
    if is_remote(source):
        return source
    bundled = source.removeprefix("bundled:")
    path = RECIPES / bundled if bundled != source else Path(source).expanduser().absolute()
    require(path.exists(), f"data.source={source!r} does not exist. Give a folder, .zip or .tar of images, "
                           "a .parquet or IDX file, or a URL.")
    return str(path)


def digest(source: str, labels: str, deadline_s: float) -> str:
    """sha256 over the (path, bytes) of the files the images come from and the labels file; opens no container."""
    pile = _Pile(source, deadline_s)
    content = hashlib.sha256(json.dumps(pile.origin).encode())
    others = [] if pile.archive else [name for name, _ in pile.unhidden]
    if file := _labels_file(pile, labels, [name for name, _ in pile.origin], others):
        content.update(file[1])
    return content.hexdigest()


def list_source(source: str, labels: str, deadline_s: float) -> Listing:
    """Every image with its label. UserError if there is none, a container is not whole or a label is missing."""
    pile = _Pile(source, deadline_s)
    images, others, count = pile.contents()
    require(bool(images), f"data.source={pile.files.source!r} holds no image ({count} other files). Images end in "
                          f"{', '.join(sorted(SUFFIXES))}; containers in .zip, .tar, .parquet or idx3-ubyte.")
    images = sorted(_labelled(pile, labels, images, others), key=lambda image: image.path)
    return Listing(images, _sorted_classes({image.label for image in images if image.label is not None}), count)


def _sorted_classes(names: set[str]) -> list[str]:
    if all(re.fullmatch(r"-?\d+", name, re.ASCII) for name in names):
        return sorted(names, key=lambda name: (int(name), name))
    return sorted(names)


def read_images(source: str, paths: Sequence[str], deadline_s: float) -> Iterator[tuple[str, Reader]]:
    """Each path, in the order asked, with what reads its encoded bytes; call that before taking the next.

    Neighbours in one container are read together: for a compressed tar, that is one pass from its start.
    """
    pile = _Pile(source, deadline_s)
    for container, group in groupby(map(pile.split, paths), key=lambda names: names[0]):
        prefix = f"{container}/" if container != pile.archive else ""
        with pile.files.damage_told(container):
            for member, read in pile.read(container, [member for _, member in group]):
                yield prefix + member, read


# ---- The files of a source


class _Pile:
    """What of a source's files is an image, a container or neither."""

    def __init__(self, source: str, deadline_s: float) -> None:
        store, single = Store(source, deadline_s), ""
        named = store.shown
        folder, name = _beside(source)
        usable = bool(kind(name) or is_image(name))
        if usable if is_remote(source) else Path(source).is_file():
            require(usable, f"data.source={source!r} is neither a folder nor a zip or tar, Parquet or IDX file. "
                            "Give one of these.")
            beside = Store(folder, deadline_s)
            if beside.size(name) is not None:  # else a folder with such a name
                store, single = beside, shown(name)
        self.files = Files(store, named, single)
        self.archive = single if kind(single) in ("zip", "tar") else ""  # its paths are the source's paths

    @cached_property
    def everything(self) -> list[tuple[str, int]]:
        """(path, bytes) of each file."""
        single = self.files.single
        if not single:
            return [(shown(name), size) for name, size in self.files.store.list()]
        labels = idx_labels(self.files, single) if kind(single) == "idx" else None
        return [(name, cast(int, self.files.size(name))) for name in (single, labels) if name]

    @cached_property
    def unhidden(self) -> list[tuple[str, int]]:
        return [(name, size) for name, size in self.everything if self.files.single or not is_hidden(name)]

    @cached_property
    def origin(self) -> list[tuple[str, int]]:
        """Those that images come from, sorted: images if there are any, else containers and IDX labels."""
        images = [(name, size) for name, size in self.unhidden if is_image(name)]
        return sorted(images or [(name, size) for name, size in self.unhidden if kind(name) or "idx1-ubyte" in name])

    def contents(self) -> tuple[list[Found], list[str], int]:
        """Every image, labelled only as its container does; the source's own other files; how many files are none."""
        taken = [name for name, _ in self.origin]
        beside = sorted({name for name, _ in self.everything} - set(taken))
        containers = [name for name in taken if kind(name)]
        if not containers:
            return [Found(name, size, None) for name, size in self.origin if is_image(name)], beside, len(beside)
        images, count = [], len(beside)
        for container in containers:
            with self.files.damage_told(container):
                found, others = list_members(self.files, container)
            count += len(others)
            if self.archive:
                return found, others, count
            images += [replace(image, path=f"{container}/{image.path}") for image in found]
        return images, beside, count

    def split(self, path: str) -> tuple[str, str]:
        """The container that a path leads into ("" for a plain file), and the rest of the path."""
        if self.archive:
            return self.archive, path
        parts = path.split("/")
        for end in range(1, len(parts)):
            if kind(name := "/".join(parts[:end])) and self.files.size(name) is not None:
                return name, "/".join(parts[end:])
        return "", path

    def read(self, container: str, members: list[str]) -> Iterator[tuple[str, Reader]]:
        if container:
            return read_members(self.files, container, members)
        return ((name, partial(self.files.store.read, native(name))) for name in members)


def _beside(source: str) -> tuple[str, str]:
    """The location that a file lies in, and its name there."""
    if source.lower().startswith("http"):
        parts = urlsplit(source)
        folder, _, name = parts.path.rpartition("/")
        return urlunsplit(parts._replace(path=f"{folder}/")), unquote(name)
    folder, _, name = source.rpartition("/")
    return folder or "/", name


# ---- Labels


def _labelled(pile: _Pile, setting: str, images: list[Found], others: list[str]) -> list[Found]:
    """The images with the labels that the setting asks for: all have one, or none has."""
    if file := _labels_file(pile, setting, [image.path for image in images], others):
        # `auto` takes a dataset.json in a folder around all images too, and its paths begin there
        base = file[0].removesuffix("dataset.json") if setting == "auto" else ""
        names = [_comparable(image.path.removeprefix(base)) for image in images]
        labels = _parse_labels(*file, set(names))
        if labels is None:
            return [replace(image, label=None) for image in images]
        require(any(name in labels for name in names),
                f"labels file {file[0]!r} names none of the {len(images)} images of {pile.files.source!r} (it begins "
                f"with {next(iter(labels), '')!r}, they with {min(names)!r}). Its paths are relative to the source.")
        images = [replace(image, label=labels.get(name)) for image, name in zip(images, names, strict=True)]
    elif setting == "none":
        return [replace(image, label=None) for image in images]
    elif setting == "folders" or (setting == "auto" and all(image.label is None for image in images)):
        return _by_folder(images, inside=not is_image(pile.origin[0][0]))
    require(setting == "auto" or file is not None,
            f"data.labels={setting!r} is neither a file here nor in "
            f"{pile.files.source!r}. Give the path of a .json, .csv or .jsonl file.")
    unlabelled = [image.path for image in images if image.label is None]
    require(not unlabelled, f"data.labels={setting!r}: {len(unlabelled)} of {len(images)} images have no label (first: "
                            f"{min(unlabelled, default='')}). Label them, or set data.labels=none.")
    return images


def _by_folder(images: list[Found], inside: bool) -> list[Found]:
    """Labels from the first sub-folder, if there is more than one; containers (`inside` them) are no folders."""
    folders = [tuple(part for part in PurePosixPath(image.path).parts[:-1] if not (inside and kind(part)))
               for image in images]
    # an archive often has one folder around all others
    shared = next((depth for depth, names in enumerate(zip(*folders, strict=False)) if len(set(names)) > 1),
                  min(map(len, folders)))
    tops = [parts[shared] if len(parts) > shared else "" for parts in folders]
    many = len(set(tops)) > 1
    return [replace(image, label=top if many else None) for image, top in zip(images, tops, strict=True)]


def _labels_file(pile: _Pile, setting: str, images: list[str], others: list[str]) -> tuple[str, bytes] | None:
    """Name and content of the labels file in use, if there is one among the `others`, or on this machine."""
    if setting in ("none", "folders"):
        return None
    if setting != "auto" and (local := Path(setting).expanduser()).is_file():
        return setting, local.read_bytes()
    around = (name for name in others if PurePosixPath(name).name == "dataset.json"
              and all(path.startswith(name.removesuffix("dataset.json")) for path in images))
    name = min(around, key=len, default="") if setting == "auto" else shown(setting)
    if name not in others:
        return None
    try:
        with pile.files.damage_told(name):
            contents = [read() for _, read in pile.read(pile.archive, [name])]
    except Rejected as error:
        raise UserError(f"labels file {name!r} of {pile.files.source!r} {error}. Pack it again.") from error
    return name, contents[0]


def _parse_labels(name: str, content: bytes, images: set[str]) -> dict[str, str | None] | None:
    """Path -> label of a .json, .csv or .jsonl file; None if it says that there are no labels."""
    try:
        text = content.decode("utf-8-sig")
        if name.endswith(".json"):
            given = json.loads(text)["labels"]
            if given is None:
                return None
            pairs: Iterable[Sequence[Any]] = given.items() if isinstance(given, dict) else given
        elif name.endswith(".jsonl"):
            pairs = [_jsonl_pair(json.loads(line)) for line in text.splitlines() if line.strip()]
        else:
            rows = [row for row in csv.reader(io.StringIO(text)) if row]
            header = bool(rows) and _comparable(shown(rows[0][0].strip())) not in images
            pairs = [(row[0].strip(), row[1].strip()) for row in rows[header:]]
        labels: dict[str, str | None] = {}
        for path, value in pairs:
            key, label = _comparable(shown(path)), label_text(value, f"{path} in labels file {name!r}")
            require(key not in labels or labels[key] == label,
                    f"labels file {name!r} labels {path} both {labels.get(key)!r} and {label!r}. Keep one.")
            labels[key] = label
        return labels
    except UserError:
        raise
    except (ValueError, KeyError, TypeError, IndexError, csv.Error, RecursionError) as error:
        raise UserError(f"labels file {name!r} cannot be read ({type(error).__name__}: {one_line(error)}). Use .json "
                        'as StyleGAN has it ({"labels": [["path", 5], ...]}), .csv with path,label or .jsonl with '
                        '{"file_name": "path", "label": 5}.') from error


def _jsonl_pair(line: dict[str, Any]) -> tuple[str, Any]:
    path = next(line[key] for key in ("file_name", "path", "file", "image") if key in line)
    return path, next((line[key] for key in ("label", "class") if key in line), None)


def _comparable(path: str) -> str:
    """A path as it is compared with those of a labels file, which may come from Windows."""
    return str(PurePosixPath(native(path).replace("\\", "/")))
