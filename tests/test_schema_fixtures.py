"""Checkpoints and settings of every release load under today's code, to the value, and training goes on from them.

`tests/releases/schemaN/` was written by the last release of schema N: a run's config.yaml and two checkpoints, the end
of a stage of 4 px and one inside the fade to 8 px. `expected.json` beside them holds what an independent reading finds.
When SCHEMA changes, write the new fixture once, by the code that is about to be released, and commit it:

    python -m tests.test_schema_fixtures

It refuses to replace what is there. A fixture is never written anew: it is what a user's disk holds.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import struct
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open

from gradine.configs.schema import Run, as_dict, dump, from_dict, load
from gradine.pipeline.plan import make_plan, refuse_changes
from gradine.stages import checkpoint, commits
from gradine.stages.loop import initial_state, run_stage

RELEASES = Path(__file__).parent / "releases"
FIXTURES = sorted(RELEASES.glob("schema*"))
WEIGHTS = ("generator", "discriminator", "average", "optimizers")
CPU = torch.device("cpu")
by_release = pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)


def tensors_by_hand(path: Path) -> dict[str, np.ndarray]:
    """A safetensors file read by its description alone: length, JSON, bytes."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8:8 + length])
    return {name: np.frombuffer(content[8 + length:][slice(*about["data_offsets"])], "<f4").reshape(about["shape"])
            for name, about in header.items() if name != "__metadata__"}


def reading_of(checkpoint: Path) -> dict[str, Any]:
    """What expected.json keeps of one checkpoint: sums and digests of every tensor, and the state."""
    found: dict[str, Any] = {"state": json.loads((checkpoint / "state.json").read_text()), "tensors": {}}
    for part in WEIGHTS:
        for name, values in tensors_by_hand(checkpoint / f"{part}.safetensors").items():
            found["tensors"][f"{part}/{name}"] = [list(values.shape), hashlib.sha256(values.tobytes()).hexdigest()[:16]]
    return found


def checkpoints_of(fixture: Path) -> tuple[Path, Path]:
    end, inside = sorted((fixture / "checkpoints").glob("r*"))
    return end, inside


def digest(tensor: torch.Tensor) -> list[Any]:
    values = tensor.detach().contiguous().numpy()
    return [list(values.shape), hashlib.sha256(values.tobytes()).hexdigest()[:16]]


@by_release
def test_f11_every_releases_checkpoints_load_to_the_values_an_independent_reading_finds(fixture: Path) -> None:
    expected = json.loads((fixture / "expected.json").read_text())
    run = load(fixture / "config.yaml")
    assert len(expected) == 2
    for path in checkpoints_of(fixture):
        kept = expected[path.name]
        assert reading_of(path) == kept  # the fixture is what it was
        stage = [stage.resolution for stage in run.stages].index(kept["state"]["resolution"])
        state = initial_state(run, stage, str(path), CPU, None)
        ours = {f"{file}/{name}": digest(tensor) for file, part in checkpoint.parts_of(state).items()
                for name, tensor in part.items()}
        assert ours == kept["tensors"]
        assert state.images_seen == kept["state"]["images_seen"]
        counted = kept["state"]["skipped" if kept["state"]["schema"] == 1 else "masked"]
        assert state.masked.tolist() == counted
        for part in WEIGHTS:  # and by the format's own library
            with safe_open(path / f"{part}.safetensors", "np") as file:
                for name in file.keys():  # noqa: SIM118 (it is no dict)
                    values = file.get_tensor(name)
                    assert digest(torch.from_numpy(values)) == kept["tensors"][f"{part}/{name}"]


@by_release
def test_f11_every_releases_checkpoints_are_found_described_and_planned_from(fixture: Path) -> None:
    run = load(fixture / "config.yaml")
    found, passed = commits.find(fixture / "checkpoints")
    assert passed == []
    assert [(one.resolution, one.phase, one.images_seen, one.stage_end) for one in found] == [
        (4, "hold", 80, True), (8, "fade", 120, False)]
    plan = make_plan(run, found)
    assert (plan.images_seen, plan.stages) == (120, (1,))
    (chosen, files), damaged = commits.newest_valid(found)  # type: ignore[misc]
    assert (chosen.images_seen, damaged) == (120, [])
    assert commits.state_of(files["state.json"])["masked"] == [0, 0]


@by_release
def test_f11_every_releases_settings_load_and_mean_what_they_meant(fixture: Path) -> None:
    run = load(fixture / "config.yaml")
    assert (run.network.latent_size, run.network.fmap_base, run.network.fmap_max) == (8, 32, 4)
    assert [(s.resolution, s.fade_images, s.hold_images, s.batch_size, s.micro_batch) for s in run.stages] == [
        (4, 80, 80, 8, 8), (8, 80, 80, 8, 8)]
    assert (run.training.average_half_life, run.checkpoints.every_images) == (100, 40)
    refuse_changes(from_dict(as_dict(run)), run)  # written out today and read again it is the same run


@by_release
@pytest.mark.parametrize("which", [0, 1], ids=["grown from a stage's end", "on inside a fade"])
def test_f11_training_goes_on_from_every_releases_checkpoints_under_a_new_term(
        which: int, fixture: Path, tiny_run: Callable[..., Run], tmp_path: Path) -> None:
    old = load(fixture / "config.yaml")
    run = tiny_run({"network.fmap_base": 32, "network.fmap_max": 4, "training.seed": old.training.seed})
    folder = Path(shutil.copytree(fixture / "checkpoints", tmp_path / "checkpoints"))
    for path in checkpoints_of(fixture)[which + 1:]:
        shutil.rmtree(folder / path.name)
    start = commits.find(folder)[0][-1]
    term = commits.begin_term(folder, start)
    events = list(run_stage(run, 1, start.path, tmp_path, term=term))
    assert events[-1]["event"] == "stage_end"
    assert events[-1]["images_seen"] == 240
    saved = [event["path"] for event in events if event["event"] == "checkpoint"]
    found, passed = commits.find(folder)
    assert [one.path for one in found[which + 1:]] == saved
    assert passed == []
    assert {json.loads(Path(path, "state.json").read_text())["schema"] for path in saved} == {commits.SCHEMA}
    before, after = (tensors_by_hand(Path(path) / "average.safetensors") for path in (start.path, saved[-1]))
    assert all(not np.array_equal(values, after[name]) for name, values in before.items() if name in after)


def test_f11_each_schema_that_is_read_has_a_fixture_and_so_has_the_one_that_is_written() -> None:
    numbers = [int(path.name.removeprefix("schema")) for path in FIXTURES]
    assert numbers == sorted(commits.READABLE)
    assert commits.SCHEMA in commits.READABLE, "python -m tests.test_schema_fixtures writes the fixture of a new schema"
    for number, fixture in zip(numbers, FIXTURES, strict=True):
        for path in checkpoints_of(fixture):
            assert json.loads((path / "MANIFEST.json").read_text())["schema"] == number


@by_release
def test_f11_a_fixture_is_small_and_names_no_machine(fixture: Path) -> None:
    files = [path for path in fixture.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 200_000
    for path in files:
        content = path.read_bytes()
        for word in (b"/tmp/", b"/home/", b"/root", b"/work", b"/Users/", b"pid "):
            assert word not in content, path


def write_fixture() -> None:
    """Trains 15 steps of the first fixture's run on noise and keeps what today's code saves of it."""
    os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # else Ray writes one into the home
    import ray
    from PIL import Image

    from gradine.pipeline.shards import shard

    target = RELEASES / f"schema{commits.SCHEMA}"
    if target.exists():
        raise SystemExit(f"{target} exists, and a fixture is never written anew.")
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        (folder / "images").mkdir()
        for number in range(16):
            pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{number:02d}.png")
        raw = as_dict(load(RELEASES / "schema1" / "config.yaml")) | {"name": target.name}
        places = {"source": "images", "cache_dir": "cache", "shards": "shards"}
        run = from_dict(raw | {"data": raw["data"] | {key: str(folder / name) for key, name in places.items()}})
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        shard(run.data, 8)
        ray.shutdown()
        term = commits.begin_term(folder / "checkpoints", None)
        (end,) = [e["path"] for e in run_stage(run, 0, None, folder, term=term) if e["event"] == "checkpoint" and
                  e["stage_end"]]
        for event in run_stage(run, 1, end, folder, term=term):
            if event["event"] == "checkpoint":
                break
        for path in (end, event["path"]):
            shutil.copytree(path, target / "checkpoints" / Path(path).name)
    (target / "config.yaml").write_text(dump(from_dict(raw)))
    (target / "expected.json").write_text(json.dumps({path.name: reading_of(path) for path in checkpoints_of(target)}))


if __name__ == "__main__":
    sys.exit(write_fixture())
