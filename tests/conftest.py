"""What tests share: a Ray of their own, a folder of images made by hand, runs of a few hundred weights."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Ray reads these when it is imported, torch when it starts its threads.
os.environ.pop("RAY_ADDRESS", None)
os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32),
                  RAY_worker_niceness="0", OMP_NUM_THREADS="1")

import numpy as np
import pytest
import torch
from PIL import Image

from gradine.configs.schema import Data, Run, assign, from_dict
from gradine.pipeline.cluster import worker_environment
from tests import unpickling

unpickling.watch()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _nothing_is_unpickled_by_gradine() -> Iterator[None]:
    """The hook raises where it happens; this fails the test even where that was caught."""
    yield
    found = [*unpickling.offences]
    unpickling.offences.clear()
    assert not found, found


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Any]:
    """One local Ray for the whole session, joined to no other."""
    import ray

    ray.init(address="local", num_cpus=4, include_dashboard=False, object_store_memory=150 << 20, log_to_driver=False,
             configure_logging=False, runtime_env=worker_environment(threads=1))
    yield ray
    ray.shutdown()


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """48 smooth colour images, 40x32 and 32x32, PNG and JPEG, in two class folders."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for number in range(48):
        width = 40 if number % 2 else 32
        corners = rng.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        image = Image.fromarray(corners).resize((width, 32), Image.Resampling.BILINEAR)
        path = folder / ("day" if number % 3 else "night") / f"{number:03d}.{'jpg' if number % 4 == 0 else 'png'}"
        path.parent.mkdir(exist_ok=True)
        image.save(path)
    return folder


@pytest.fixture(scope="session")
def shards(image_folder: Path, ray_cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of images as shards from 4 to 32 px, 16 images each."""
    from gradine.pipeline.shards import shard

    out = tmp_path_factory.mktemp("shards") / "set"
    shard(Data(source=str(image_folder), shards=str(out), shard_images=16), 32)
    return out


def run_maker(shards: Path, image_folder: Path, folder: Path) -> Callable[..., Run]:
    def make(changes: dict[str, Any] | None = None, stages: int = 2) -> Run:
        raw: dict[str, Any] = {
            "name": "tiny", "runs": str(folder / "runs"),
            "data": {"source": str(image_folder), "shards": str(shards), "shard_images": 16,
                     "cache_dir": str(folder / "cache")},
            "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8},
            # as training.precision=auto may not choose: runs are compared bit by bit
            "training": {"average_half_life": 100, "precision": "float32", "channels_last": False},
            "stages": [{"resolution": 4 * 2**n, "fade_images": 80, "hold_images": 80, "batch_size": 8, "threads": 1}
                       for n in range(stages)],
            "checkpoints": {"every_images": 40}, "evaluation": {"samples": 8}}
        for path, value in (changes or {}).items():
            assign(raw, path, value)
        return from_dict(raw)

    return make


@pytest.fixture
def tiny_run(shards: Path, image_folder: Path, tmp_path: Path) -> Callable[..., Run]:
    """Makes a run of two stages, 4 and 8 px, three phases of 80 images; changes by dotted keys."""
    return run_maker(shards, image_folder, tmp_path)


@pytest.fixture(scope="module")
def module_run(shards: Path, image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Run]:
    """Like `tiny_run`, for what a module does once."""
    return run_maker(shards, image_folder, tmp_path_factory.mktemp("module"))
