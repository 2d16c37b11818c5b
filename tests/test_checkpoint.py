"""Claims about checkpoints: bit-exact, whole or absent, verified before use, never unpickled."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from gradine.configs.schema import EnvironmentFault, Run, UserError, from_dict
from gradine.stages import checkpoint, growth
from gradine.stages.loop import initial_state
from gradine.stages.step import Rules, Share, TrainState, new_adam, train_step

CPU = torch.device("cpu")
FILES = ("generator.safetensors", "discriminator.safetensors", "average.safetensors", "optimizers.safetensors",
         "state.json")


def run_of(channels: int = 3, **network: int) -> Run:
    return from_dict({"name": "t", "data": {"source": "none", "shards": "none", "channels": channels},
                      "network": {"latent_size": 8, "fmap_base": 64, "fmap_max": 8, **network},
                      "training": {"average_half_life": 50},
                      "stages": [{"resolution": size, "fade_images": 80, "hold_images": 80, "batch_size": 8}
                                 for size in (4, 8, 16)]})


RUN = run_of()


def shares(seed: int, resolution: int) -> list[Share]:
    source = torch.Generator().manual_seed(seed)
    reals = torch.randint(0, 256, (8, 3, resolution, resolution), generator=source, dtype=torch.uint8)
    return [Share(reals, torch.rand(8, generator=source) < 0.5, torch.randn(8, 8, generator=source),
                  torch.randn(8, 8, generator=source), torch.rand(8, generator=source))]


def step(state: TrainState, stage: int, seed: int, broken: bool = False) -> None:
    (share,) = shares(seed, RUN.stages[stage].resolution)
    if broken:
        share = Share(share.reals, share.mirrored, share.critic_latents * torch.nan, share.generator_latents, share.mix)
    train_step(state, [share], growth.at(growth.schedule(RUN), state.images_seen), Rules.of(RUN, 8, 1))


def trained(stage: int = 1, steps: int = 3) -> TrainState:
    """A few steps into a stage; in one of them the discriminator's gradient was not finite."""
    state = initial_state(RUN, stage, None, CPU, None)
    for number in range(steps):
        step(state, stage, number, broken=number == 1)
    return state


def info(stage: int = 1) -> dict[str, Any]:
    return {"resolution": RUN.stages[stage].resolution, "phase": "fade", "stage_end": False, "workers": 1}


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Every number of a state under a name, read from the networks and optimizers themselves."""
    found = {"skipped": state.skipped, "images_seen": torch.tensor(state.images_seen)}
    for role in ("generator", "discriminator", "average"):
        found |= {f"{role}.{name}": tensor for name, tensor in getattr(state, role).state_dict().items()}
    for role in ("generator", "discriminator"):
        for number, moments in getattr(state, f"{role}_adam").state_dict()["state"].items():
            found |= {f"{role}_adam.{number}.{key}": value for key, value in moments.items()}
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = trained()
    return checkpoint.save(tmp_path_factory.mktemp("saved"), state, info())


@pytest.fixture
def copy(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "checkpoints" / saved.name))


def seal(path: Path) -> None:
    """Writes a manifest that vouches for the folder as it is now."""
    listing = {p.name: {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
               for p in path.iterdir() if p.name != "MANIFEST.json"}
    (path / "MANIFEST.json").write_text(json.dumps({"schema": 1, "name": path.name, "files": listing}))


def small(folder: Path, images: int, stage_end: bool = False, resolution: int = 8) -> Path:
    """A valid checkpoint of a few bytes."""
    described = {"schema": 1, "resolution": resolution, "phase": "hold", "images_seen": images, "stage_end": stage_end}
    name = f"r{resolution:04d}-hold-{images:09d}"
    return checkpoint.commit(folder, folder / name, {"state.json": json.dumps(described).encode(), "weights": b"w"})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Save and restore


@pytest.mark.parametrize("steps", [0, 3])
def test_restoring_a_saved_state_gives_every_bit_back(tmp_path: Path, steps: int) -> None:
    state = trained(steps=steps)
    path = checkpoint.save(tmp_path, state, info())
    assert path.name == f"r0008-fade-{80 + 8 * steps:09d}"
    again = initial_state(RUN, 1, str(path), CPU, None)
    assert_same_bits(everything(state), everything(again))
    if steps:
        assert state.skipped.tolist() == [1, 0]
        kinds = {name.rsplit(".", 1)[1] for name in everything(again) if "_adam" in name}
        assert kinds == {"step", "exp_avg", "exp_avg_sq"}
        assert again.images_seen == 104


def test_training_goes_on_from_a_restored_state_as_if_never_stopped(tmp_path: Path) -> None:
    straight = trained()
    again = initial_state(RUN, 1, str(checkpoint.save(tmp_path, straight, info())), CPU, None)
    for number in (7, 8):
        step(straight, 1, number)
        step(again, 1, number)
    assert_same_bits(everything(straight), everything(again))


def test_moments_belong_to_their_own_parameters_by_name(saved: Path) -> None:
    state = trained()
    stored = safetensors.torch.load_file(saved / "optimizers.safetensors")
    for role in ("generator", "discriminator"):
        for name, parameter in getattr(state, role).named_parameters():
            for key, value in getattr(state, f"{role}_adam").state[parameter].items():
                assert torch.equal(stored[f"{role}.{name}.{key}"], value)
    parameters = [*state.generator.parameters(), *state.discriminator.parameters()]
    assert len(stored) == 3 * len(parameters)


def test_a_checkpoint_is_safetensors_and_json_that_other_tools_read_and_check(saved: Path) -> None:
    assert names(saved) == sorted((*FILES, "MANIFEST.json"))
    manifest = json.loads((saved / "MANIFEST.json").read_text())
    assert sorted(manifest["files"]) == sorted(FILES)
    for name, entry in manifest["files"].items():
        content = (saved / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    with safe_open(saved / "average.safetensors", "pt") as file:
        assert set(file.keys()) == set(trained().average.state_dict())
    described = json.loads((saved / "state.json").read_text())
    assert (described["images_seen"], described["resolution"], described["phase"]) == (104, 8, "fade")
    assert described["skipped"] == [1, 0]


def test_channels_last_weights_and_moments_survive_bit_by_bit(tmp_path: Path) -> None:
    run = from_dict({**vars(RUN), "data": vars(RUN.data), "network": vars(RUN.network), "ray": vars(RUN.ray),
                     "training": {"channels_last": True}, "stages": [vars(stage) for stage in RUN.stages],
                     "checkpoints": vars(RUN.checkpoints), "evaluation": vars(RUN.evaluation)})
    state = initial_state(run, 1, None, CPU, None)
    for number in range(2):
        step(state, 1, number)
    again = initial_state(run, 1, str(checkpoint.save(tmp_path, state, info())), CPU, None)
    assert_same_bits(everything(state), everything(again))
    weight, moment = next((p, again.generator_adam.state[p]["exp_avg"]) for p in again.generator.parameters()
                          if p.dim() == 4 and p.shape[1] > 1 and p.shape[2] > 1)
    assert moment.stride() == weight.stride()


# ---- What is never committed


def spoil_weight(state: TrainState) -> str:
    with torch.no_grad():
        next(state.generator.parameters()).view(-1)[3] = torch.nan
    return "generator/"


def spoil_average(state: TrainState) -> str:
    with torch.no_grad():
        list(state.average.parameters())[-1].view(-1)[0] = -torch.inf
    return "average/"


def spoil_moment(state: TrainState) -> str:
    parameter = list(state.discriminator.parameters())[2]
    state.discriminator_adam.state[parameter]["exp_avg_sq"].view(-1)[0] = torch.inf
    return "optimizers/discriminator."


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_average, spoil_moment])
def test_a_tensor_that_is_not_finite_is_never_committed(spoil: Callable[[TrainState], str], tmp_path: Path) -> None:
    state = trained()
    where = spoil(state)
    with pytest.raises(EnvironmentFault, match="not finite") as caught:
        checkpoint.save(tmp_path, state, info())
    assert f"1 tensors are not finite, first {where}" in str(caught.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize("nth", range(7))
def test_a_full_disk_at_any_write_leaves_the_old_checkpoint_and_no_new_name(
        nth: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = trained()
    old = checkpoint.save(tmp_path, state, info())
    before = checkpoint.read(old)
    step(state, 1, 9)
    calls, sync = iter(range(100)), os.fsync

    def full(descriptor: int) -> None:
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match="No space left") as caught:
        checkpoint.save(tmp_path, state, info())
    needed = sum(len(content) for content in before.values())
    assert f"It needs {needed:,} bytes, " in str(caught.value)  # the new one is as long as the old
    assert " are free." in str(caught.value)
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == [old.name]
    assert checkpoint.read(old) == before
    assert checkpoint.save(tmp_path, state, info()).name == "r0008-fade-000000112"  # once there is room again


@pytest.mark.fault
def test_a_disk_that_is_really_full_leaves_the_old_checkpoint_and_no_new_name(tmp_path: Path) -> None:
    state = trained()
    size = sum(f.stat().st_size for f in checkpoint.save(tmp_path / "sized", state, info()).iterdir())
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={int(size * 1.7)}", "tmpfs", disk],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        folder = disk / "checkpoints"
        old = checkpoint.save(folder, state, info())
        step(state, 1, 9)
        with pytest.raises(EnvironmentFault, match=r"No space left on device\. It needs [\d,]+ bytes, [\d,]+ are free"):
            checkpoint.save(folder, state, info())
        assert names(folder) == [old.name]
        assert set(checkpoint.read(old)) == set(FILES)
        again = initial_state(RUN, 1, str(old), CPU, None)
        assert again.images_seen == 104
        shutil.rmtree(old)
        assert set(checkpoint.read(checkpoint.save(folder, state, info()))) == set(FILES)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_kill_at_any_moment_leaves_a_folder_that_is_none_or_whole(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks at the disk before every write, sync and rename, as a reader would after a kill right there."""
    state, seen, synced = trained(), [], []
    old = checkpoint.save(tmp_path, state, info())
    step(state, 1, 9)
    sync, rename = os.fsync, Path.rename

    def look() -> None:
        found, damaged = checkpoint.find(tmp_path)
        assert not damaged
        for one in found:
            checkpoint.read(one.path)
        seen.append([one.images_seen for one in found])

    def watched_sync(descriptor: int) -> None:
        look()
        synced.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        sync(descriptor)

    def watched_rename(path: Path, target: Path) -> Path:
        look()
        synced.append("rename")
        return rename(path, target)

    monkeypatch.setattr(os, "fsync", watched_sync)
    monkeypatch.setattr(Path, "rename", watched_rename)
    checkpoint.save(tmp_path, state, info())
    assert seen == [[104]] * 8 + [[104, 112]]
    assert set(synced[:5]) == set(FILES)
    assert synced[5:] == ["MANIFEST.json", synced[6], "rename", tmp_path.name]
    assert synced[6].startswith(".partial-")
    assert old.is_dir()


# ---- What is never read


def test_an_untouched_checkpoint_reads_as_it_lies(saved: Path) -> None:
    assert checkpoint.read(saved) == {name: (saved / name).read_bytes() for name in FILES}


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("harm", ["first bit", "last bit", "cut", "longer", "gone", "link", "folder"])
def test_a_harmed_file_is_refused_by_name(copy: Path, name: str, harm: str) -> None:
    file, elsewhere = copy / name, copy.parent / "elsewhere"
    if harm.endswith("bit"):
        flip(file, 0 if harm == "first bit" else -1)
    elif harm == "cut":
        os.truncate(file, file.stat().st_size - 1)
    elif harm == "longer":
        file.write_bytes(file.read_bytes() + b"\0")
    else:
        file.rename(elsewhere)  # a link to the very same bytes is refused too: they may change later
        if harm == "link":
            file.symlink_to(elsewhere)
        elif harm == "folder":
            file.mkdir()
    with pytest.raises(checkpoint.Damaged) as caught:
        checkpoint.read(copy)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_in_the_manifest_is_refused_by_name(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(checkpoint.Damaged, match=r"pytorch_model\.bin is not in the manifest"):
        checkpoint.read(copy)


def manifest_with(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    change(manifest)
    (copy / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(("change", "said"), [
    (lambda m: m["files"]["state.json"].update(sha256="0" * 64), "state.json does not match"),
    (lambda m: m["files"]["state.json"].update(bytes=1), "state.json has"),
    (lambda m: m["files"].pop("average.safetensors"), "average.safetensors is not in the manifest"),
    (lambda m: m["files"].update({"../../outside": {"bytes": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}}),
     "names a file outside the checkpoint: '../../outside'"),
    (lambda m: m["files"].update({"/etc/hostname": {"bytes": 6, "sha256": "0"}}), "outside the checkpoint"),
    (lambda m: m["files"].update({"..": {"bytes": 6, "sha256": "0"}}), "missing or no plain file"),
    (lambda m: m["files"].update({"more": {"bytes": 0, "sha256": "0"}}), "more is missing"),
    (lambda m: m["files"].update({"state.json": {"bytes": 6}}), "MANIFEST.json cannot be read"),
    (lambda m: m.update(files=[]), "MANIFEST.json cannot be read"),
    (lambda m: m.update(schema=2), "has schema 2, this gradine reads 1"),
    (lambda m: m.clear(), "MANIFEST.json cannot be read"),
])
def test_an_edited_manifest_is_refused(copy: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    (copy.parent.parent / "outside").write_bytes(b"secret")
    manifest_with(copy, change)
    with pytest.raises(checkpoint.Damaged) as caught:
        checkpoint.read(copy)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\0\0", None])
def test_a_manifest_that_is_none_is_refused(copy: Path, content: bytes | None) -> None:
    if content is None:
        (copy / "MANIFEST.json").unlink()
    else:
        (copy / "MANIFEST.json").write_bytes(content)
    for reader in (checkpoint.read, checkpoint.describe):
        with pytest.raises(checkpoint.Damaged, match=r"MANIFEST\.json"):
            reader(copy)
    assert checkpoint.find(copy.parent)[0] == []


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("zipped", [False, True], ids=["pickle", "torch.save"])
@pytest.mark.parametrize(("name", "load"), [
    *((name, checkpoint.restore) for name in FILES[:4]), *((name, checkpoint.grow) for name in FILES[:3])])
def test_a_pickle_in_the_place_of_weights_never_runs(
        copy: Path, tmp_path: Path, name: str, load: Callable[..., None], zipped: bool) -> None:
    canary = tmp_path / "canary"
    if zipped:
        torch.save({"weight": Bomb(canary)}, copy / name)
    else:
        (copy / name).write_bytes(pickle.dumps(Bomb(canary)))
    seal(copy)
    files = checkpoint.read(copy)  # the manifest is right: whoever wrote it meant it
    with pytest.raises(checkpoint.Damaged, match=name):
        load(initial_state(RUN, 1, None, CPU, None), files)
    assert not canary.exists()
    pickle.loads(pickle.dumps(Bomb(canary)))
    assert canary.exists()  # the bomb works


# ---- Which checkpoints there are


def test_found_checkpoints_come_by_images_seen_and_say_what_they_are_of(tmp_path: Path) -> None:
    small(tmp_path, 300, resolution=16)
    small(tmp_path, 80, stage_end=True, resolution=4)
    for images, resolution in ((160, 8), (10**9, 16), (10**9 - 8, 16)):
        small(tmp_path, images, resolution=resolution)
    (tmp_path / "notes").mkdir()
    found, damaged = checkpoint.find(tmp_path)
    assert damaged == []
    assert [(c.images_seen, c.resolution, c.stage_end, c.phase, c.name) for c in found] == [
        (80, 4, True, "hold", "r0004-hold-000000080"), (160, 8, False, "hold", "r0008-hold-000000160"),
        (300, 16, False, "hold", "r0016-hold-000000300"), (10**9 - 8, 16, False, "hold", "r0016-hold-999999992"),
        (10**9, 16, False, "hold", "r0016-hold-1000000000")]
    assert checkpoint.find(tmp_path / "nowhere") == ([], [])


def test_of_a_valid_older_and_a_damaged_newest_one_the_older_is_found_or_read(tmp_path: Path) -> None:
    older, newest = small(tmp_path, 40), small(tmp_path, 80)
    flip(newest / "weights", 0)  # not looked at by `find`, but by `read`
    assert [c.images_seen for c in checkpoint.find(tmp_path)[0]] == [40, 80]
    with pytest.raises(checkpoint.Damaged, match="weights does not match"):
        checkpoint.read(newest)
    flip(newest / "state.json", 5)
    found, damaged = checkpoint.find(tmp_path)
    assert [c.path for c in found] == [str(older)]
    assert len(damaged) == 1
    assert str(newest / "state.json") in damaged[0]
    assert checkpoint.read(older)["weights"] == b"w"


def test_a_damaged_checkpoint_is_moved_aside_by_the_valid_one_that_takes_its_name_and_never_counts_again(
        tmp_path: Path) -> None:
    for _ in range(3):
        flip(small(tmp_path, 80) / "weights", 0)
    valid = small(tmp_path, 80)
    assert names(tmp_path) == [valid.name, *(f"{valid.name}.damaged-{n}" for n in range(3))]
    assert checkpoint.read(valid)["weights"] == b"w"
    assert [c.path for c in checkpoint.find(tmp_path)[0]] == [str(valid)]
    assert checkpoint.retire(tmp_path, 1, now=10**9) == []
    assert valid.is_dir()


def test_retiring_keeps_the_newest_and_every_stages_end(tmp_path: Path) -> None:
    for images, stage_end in ((40, False), (80, True), (120, False), (160, False), (200, False), (240, True)):
        small(tmp_path, images, stage_end)
    assert checkpoint.retire(tmp_path, 2, now=10**9) == ["r0008-hold-000000040", "r0008-hold-000000120"]
    assert [c.images_seen for c in checkpoint.find(tmp_path)[0]] == [80, 160, 200, 240]
    assert checkpoint.retire(tmp_path, 2, now=10**9) == []
    assert checkpoint.retire(tmp_path, 1, now=10**9) == ["r0008-hold-000000160"]
    assert names(tmp_path) == [f"r0008-hold-{n:09d}" for n in (80, 200, 240)]


def test_a_retirement_cut_short_leaves_an_orphan_and_no_half_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        (path / "MANIFEST.json").unlink()
        raise KeyboardInterrupt

    small(tmp_path, 40)
    small(tmp_path, 80)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.retire(tmp_path, 1, now=10**9)
    found, damaged = checkpoint.find(tmp_path)
    assert [c.images_seen for c in found] == [80]
    assert damaged == []
    assert len(checkpoint.remove_orphans(tmp_path)) == 1
    assert names(tmp_path) == ["r0008-hold-000000080"]


def test_orphans_of_a_killed_save_are_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = small(tmp_path, 80)
    orphan = tmp_path / f".partial-{kept.name}-4711"
    shutil.copytree(kept, orphan)
    assert [c.path for c in checkpoint.find(tmp_path)[0]] == [str(kept)]
    assert checkpoint.remove_orphans(tmp_path) == [orphan.name]
    assert names(tmp_path) == [kept.name]
    assert checkpoint.remove_orphans(tmp_path / "nowhere") == []


# ---- Growing


def test_growing_keeps_shared_layers_exactly_and_leaves_new_ones_fresh_in_the_average_too(saved: Path) -> None:
    older, fresh = trained(), initial_state(RUN, 2, None, CPU, None)
    grown = initial_state(RUN, 2, str(saved), CPU, None)
    for role in ("generator", "discriminator", "average"):
        was, new, now = (getattr(state, role).state_dict() for state in (older, fresh, grown))
        assert now.keys() == new.keys()
        assert was.keys() & now.keys()
        assert now.keys() - was.keys()
        for name, tensor in now.items():
            assert torch.equal(tensor, was[name] if name in was else new[name]), f"{role}.{name}"
    shared = older.generator.state_dict().keys() & grown.generator.state_dict().keys()
    assert any(not torch.equal(grown.average.state_dict()[n], grown.generator.state_dict()[n]) for n in shared)
    assert not grown.generator_adam.state
    assert not grown.discriminator_adam.state
    assert (grown.images_seen, grown.skipped.tolist()) == (240, [1, 0])


def test_a_new_layer_starts_as_the_seed_has_it_and_as_another_runs_weights_have_it(saved: Path, tmp_path: Path) -> None:
    other = trained(2)
    initial = checkpoint.save(tmp_path, other, info(2))
    grown = initial_state(RUN, 2, str(saved), CPU, str(initial))
    older = trained()
    for role in ("generator", "discriminator", "average"):
        was, lent, now = (getattr(state, role).state_dict() for state in (older, other, grown))
        for name, tensor in now.items():
            assert torch.equal(tensor, was[name] if name in was else lent[name]), f"{role}.{name}"
    assert grown.images_seen == 240


@pytest.mark.parametrize("network", [{"latent_size": 4}, {"fmap_max": 4}, {"fmap_base": 16}])
def test_weights_of_another_shape_are_refused_in_one_line(saved: Path, network: dict[str, int]) -> None:
    state = initial_state(run_of(**network), 2, None, CPU, None)
    with pytest.raises(UserError) as caught:
        checkpoint.grow(state, checkpoint.read(saved))
    assert "\n" not in str(caught.value)
    for part in ("in the starting weights", " here. Use the same network settings"):
        assert part in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1])  # at 4 px no layer of the same name has another shape
def test_another_runs_weights_of_other_images_are_refused_in_one_line_though_no_layer_tells(
        stage: int, tmp_path: Path) -> None:
    rgb = str(checkpoint.save(tmp_path, trained(2), info(2)))
    with pytest.raises(UserError) as caught:
        initial_state(run_of(channels=1), stage, None, CPU, rgb)
    assert str(caught.value) == ("init_from: the starting weights make images of 3 channels, this run has "
                                 "data.channels=1. Start from a run with the same, or without init_from.")
    initial_state(RUN, stage, None, CPU, rgb)


def test_a_gray_state_is_saved_restored_and_grown_like_any(tmp_path: Path) -> None:
    gray = run_of(channels=1)
    state = initial_state(gray, 1, None, CPU, None)
    path = str(checkpoint.save(tmp_path, state, info()))
    assert_same_bits(everything(state), everything(initial_state(gray, 1, path, CPU, None)))
    grown = initial_state(gray, 2, path, CPU, path)
    assert torch.equal(grown.generator.to_rgb["8"].weight, state.generator.to_rgb["8"].weight)
    assert [len(layer.bias) for layer in grown.generator.to_rgb.values()] == [1, 1]


def test_a_fresh_adam_takes_up_the_moments_and_the_step_it_was_saved_with(saved: Path) -> None:
    state = initial_state(RUN, 1, str(saved), CPU, None)
    steps = {float(moments["step"]) for moments in state.generator_adam.state.values()}
    assert steps == {3.0}
    assert {float(m["step"]) for m in state.discriminator_adam.state.values()} == {2.0}  # one update was masked
    assert not new_adam(state.generator, RUN).state


def test_retention_keeps_what_was_just_written_though_later_damaged_ones_lie_beside_it(tmp_path: Path) -> None:
    """A resume that passed over damaged later checkpoints saves at fewer images than they claim."""
    def made(seen: int) -> None:
        state = {"schema": 1, "resolution": 8, "phase": "hold", "images_seen": seen, "stage_end": False}
        checkpoint.commit(tmp_path, tmp_path / f"r0008-hold-{seen:09d}", {"state.json": json.dumps(state).encode()})

    for seen in (5000, 6000, 1000):
        made(seen)
    assert checkpoint.retire(tmp_path, 1, now=1000) == []
    made(2000)
    assert checkpoint.retire(tmp_path, 1, now=2000) == ["r0008-hold-000001000"]
    assert (tmp_path / "r0008-hold-000002000").is_dir()
