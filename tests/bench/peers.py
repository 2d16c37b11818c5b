"""Reads a set through another library: the bench's own environment runs it, and it imports nothing of gradine.

    python peers.py litdata|mosaic WORKERS FOLDER

Each line on stdin asks for one thing and is answered by a line of JSON:
    {"tars": [...], "kind": "webp", "resolution": 256, "batch": 64}   write these images' bytes in the library's format
    {"sum": true}                                                     one shuffled pass over them: the sum of its pixels
    {"sum": false}                                                    another: its images and seconds
Images come out as uint8 batches [N, R, R, 3], decoded by the decoders that gradine uses, in DataLoader workers.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from PIL import Image

CHUNK = 64 << 20  # bytes of a file; the default of both


def image_bytes(tars: Iterable[str]) -> Iterator[bytes]:
    for path in tars:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.name.endswith(".cls"):
                    yield tar.extractfile(member).read()  # type: ignore[union-attr]


def samples(tars: str) -> Iterator[dict[str, bytes]]:
    yield from ({"image": content} for content in image_bytes(json.loads(tars)))


def decoded(kind: str, resolution: int, sample: dict[str, bytes]) -> np.ndarray:
    """uint8 [R, R, 3]."""
    content = sample["image"]
    if kind == "raw":
        size = resolution * resolution * 3
        return np.frombuffer(content, np.uint8, size, len(content) - size).reshape(resolution, resolution, 3)
    if kind == "jpeg":
        return simplejpeg.decode_jpeg(content, "RGB")
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def stacked(images: list[np.ndarray]) -> torch.Tensor:
    return torch.from_numpy(np.stack(images))


def litdata_loader(folder: Path, tars: list[str], decode: Any, batch: int, workers: dict[str, Any]) -> Any:
    import litdata

    litdata.optimize(samples, [json.dumps(tars)], str(folder), chunk_bytes=CHUNK, num_workers=1, verbose=False)
    dataset = litdata.StreamingDataset(str(folder), shuffle=True, transform=decode)
    return litdata.StreamingDataLoader(dataset, batch_size=batch, collate_fn=stacked, **workers)


def mosaic_loader(folder: Path, tars: list[str], decode: Any, batch: int, workers: dict[str, Any]) -> Any:
    # Its import of torchvision wants two operators that a build of torch for the CPU does not declare.
    operators = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        operators.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from streaming import MDSWriter, StreamingDataset

    operators._destroy()  # the operators stay known for as long as they are needed: the import

    class Decoded(StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return decode(super().__getitem__(at))

    with MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit=CHUNK) as writer:
        for content in image_bytes(tars):
            writer.write({"image": content})
    dataset = Decoded(local=str(folder), shuffle=True, batch_size=batch)
    return torch.utils.data.DataLoader(dataset, batch_size=batch, collate_fn=stacked, **workers)


def serve(library: str, workers: int, folder: Path) -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print is no answer
    torch.set_num_threads(1)
    make = {"litdata": litdata_loader, "mosaic": mosaic_loader}[library]
    options = {"num_workers": workers, **({"persistent_workers": True} if workers else {})}
    loader: Any = None
    for number, line in enumerate(sys.stdin):
        asked = json.loads(line)
        if "tars" in asked:
            loader = None  # ends its workers
            shutil.rmtree(folder, ignore_errors=True)
            decode = partial(decoded, asked["kind"], asked["resolution"])
            loader = make(folder / str(number), asked["tars"], decode, asked["batch"], options)
            answer: dict[str, float] = {}
        elif asked["sum"]:
            answer = {"sum": sum(int(batch.sum(dtype=torch.int64)) for batch in loader)}
        else:
            began = time.perf_counter()
            images = sum(len(batch) for batch in loader)
            answer = {"images": images, "seconds": time.perf_counter() - began}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
