"""Which image comes when: functions of (seed, epoch) or (seed, position), so that resuming needs no replay.

A sample is a number, 0..n-1 in the order of shards and of images inside them. Sorting raw Philox output keeps an order
the same under every numpy version.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np

from gradine.stages.growth import random_seed

BLOCK_SHARDS = 16  # shards shuffled together: a reader stays within these for a while


def epoch_shards(shards: int, seed: int, epoch: int) -> np.ndarray:
    """The shards in the order in which an epoch reads them, a block of them at a time."""
    return np.argsort(np.random.Philox(random_seed(seed, "order", epoch)).random_raw(shards), kind="stable")


@lru_cache(maxsize=4)
def epoch_order(shard_images: tuple[int, ...], seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch shows the samples 0..n-1, int64 [n].

    Shards are shuffled, then the samples within each block of shards, so that reading stays local. Sorting raw Philox
    output keeps the order the same under every numpy version.
    """
    bits = np.random.Philox(random_seed(seed, "order", epoch))
    bits.random_raw(len(shard_images))  # those that `epoch_shards` takes
    first, shards = np.cumsum((0, *shard_images[:-1])), epoch_shards(len(shard_images), seed, epoch)
    blocks = []
    for start in range(0, len(shards), BLOCK_SHARDS):
        block = shards[start:start + BLOCK_SHARDS]
        samples = np.concatenate([np.arange(first[s], first[s] + shard_images[s]) for s in block])
        blocks.append(samples[np.argsort(bits.random_raw(len(samples)), kind="stable")])
    return np.concatenate(blocks)


@lru_cache(maxsize=4096)
def shuffled(count: int, seed: int, purpose: str, turn: int) -> np.ndarray:
    """A permutation of 0..count-1."""
    return np.argsort(np.random.Philox(random_seed(seed, purpose, turn)).random_raw(count), kind="stable")


def balanced_order(classes: list[np.ndarray], seed: int, start: int, count: int) -> np.ndarray:
    """Sample ids at positions start..start+count-1, every class once in each round of len(classes) positions.

    `classes` holds each class's sample ids; a class shows all of its own, shuffled anew, before it repeats one.
    """
    ids = []
    for position in range(start, start + count):
        turn, place = divmod(position, len(classes))
        number = shuffled(len(classes), seed, "classes", turn)[place]
        own = classes[number]
        epoch, index = divmod(turn, len(own))
        ids.append(own[shuffled(len(own), seed, f"class/{number}", epoch)[index]])
    return np.array(ids)


def coming_shards(shard_images: tuple[int, ...], seed: int, position: int) -> list[int]:
    """The shards of the block that `position` lies in and of the next one, in the order in which they are used."""
    epoch, within = divmod(position, sum(shard_images))
    shards = epoch_shards(len(shard_images), seed, epoch)
    before = np.cumsum(np.take(shard_images, shards))
    start = int(np.searchsorted(before, within, side="right")) // BLOCK_SHARDS * BLOCK_SHARDS
    following = epoch_shards(len(shard_images), seed, epoch + 1)
    return np.concatenate([shards[start:], following])[:2 * BLOCK_SHARDS].tolist()
