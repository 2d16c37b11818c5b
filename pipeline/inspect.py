"""What a set of shards holds, whether it is whole, and how it looks."""

from __future__ import annotations

import re
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from gradine.configs.schema import Data, UserError, require
from gradine.pipeline.shards import absolute_location, read_lines, source_of
from gradine.stages.growth import resolutions
from gradine.stages.store import Store

SHEET_PIXELS = 3072  # a contact sheet is at most that wide and high, of at most 8 by 8 images


def inspect_shards(shards: str, resolution: int, sheet: Path) -> None:
    """Prints the set level by level and writes a contact sheet. UserError names every shard that is damaged."""
    import torch

    from gradine.stages.data import Images, read_index
    from gradine.stages.generate import grid, save_png

    store = Store(absolute_location(shards))
    there = dict(store.list())
    sizes = sorted({int(match[1]) for name in there if (match := re.fullmatch(r"r(\d{4})/index\.json", name))})
    require(bool(sizes), f"{shards!r} holds no finished shards (no rNNNN/index.json). Make them with gradine shard.")
    resolution = resolution or min(sizes, key=lambda size: (abs(size - 128), size))
    require(resolution in sizes, f"--resolution={resolution}: no such level in {shards!r}. "
                                 f"Use one of: {', '.join(map(str, sizes))}.")
    damaged = [f"The {size}px level has no index. Run gradine shard again."
               for size in resolutions(sizes[-1]) if size not in sizes]
    whole: dict[str, Any] = {}  # an index to tell from what the set is
    shown = "no contact sheet"
    print("   px  encoding  images  shards        MB  kB/image  intact")
    for size in sizes:
        try:
            index = read_index(Data(source="", shards=store.location), size)
            images = Images(Data(source="", shards=store.location, cache_gb=0, channels=index["channels"]), size)
        except UserError as error:
            damaged.append(str(error))
            print(f"{size:>5}  {error}")
            continue
        with closing(images):
            whole = index
            bad = list(images.damaged())
            damaged += bad
            held = sum(shard["bytes"] for shard in index["shards"])
            print(f"{size:>5}  {index['encoding']:<8}{len(images):>8,}{len(images.shards):>8}{held / 1e6:>10,.1f}"
                  f"{held / len(images) / 1e3:>10,.1f}  {'all' if not bad else f'{len(bad)} damaged'}")
            if size == resolution and not bad:
                columns = min(8, max(1, SHEET_PIXELS // size))
                chosen = np.linspace(0, len(images) - 1, min(len(images), columns**2)).astype(int)
                save_png(grid(torch.from_numpy(images.pixels(chosen)), columns), sheet)
                shown = f"contact sheet of {resolution}px: {sheet}"
    if whole:
        _tell_source(store, there, whole)
    print(shown)
    require(not damaged, f"{len(damaged)} shards of {shards!r} are damaged: {' '.join(damaged)}")


def _tell_source(store: Store, there: dict[str, int], index: dict[str, Any]) -> None:
    about = source_of(store)
    if about:
        added = sum(about["generations"][1:])
        print(f"\nsource   {about['source']}: {about['images']:,} images, {added:,} of them added later; "
              f"{about['ignored']} other files")
    print(f"pixels   {index['channels']} channels, crop {index['crop']}, small ones: {index['small']}, "
          f"{index['upscaled']:,} upscaled, filter {index['filter']}")
    counts = Counter(label for shard in index["shards"] for label in shard.get("labels") or ())
    if counts:
        shown = sorted(counts, key=lambda label: (label is None, label))[:20]
        names = [f"{'none' if label is None else index['classes'][label]} {counts[label]:,}" for label in shown]
        print(f"classes  {len(counts)}: {', '.join(names)}{', ...' if len(counts) > len(shown) else ''}")
    lines = read_lines(store, "rejected.jsonl") if "rejected.jsonl" in there else []
    print(f"rejected {len(lines)}")
    reasons = Counter(re.sub(r"\d+", "#", line["reason"]) for line in lines)
    for reason, count in reasons.most_common(20):
        first = next(line for line in lines if re.sub(r"\d+", "#", line["reason"]) == reason)
        print(f"  {count:>6}  {first['reason']}  ({first['path']})")
