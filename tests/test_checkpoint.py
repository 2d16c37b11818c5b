"""Claims about checkpoints: bit-exact, whole or absent, verified before use, never unpickled."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open

from gradine.configs.schema import Run, UserError, from_dict
from gradine.stages import checkpoint, commits, growth
from gradine.stages.loop import initial_state
from gradine.stages.step import Rules, Share, TrainState, new_optimizer, train_step
from gradine.stages.watch import NonFinite
from tests import save_process

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
    return {"resolution": RUN.stages[stage].resolution, "phase": "fade", "stage_end": False, "skipped": ()}


def save(folder: Path, state: TrainState, stage: int = 1) -> Path:
    return Path(checkpoint.save(folder, state, info(stage)))


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """Every number of a state under a name, read from the networks and optimizers themselves."""
    found = {"masked": state.masked, "images_seen": torch.tensor(state.images_seen)}
    for role in ("generator", "discriminator", "average"):
        found |= {f"{role}.{name}": tensor for name, tensor in getattr(state, role).state_dict().items()}
    for role in ("generator", "discriminator"):
        for number, moments in getattr(state, f"{role}_optimizer").state_dict()["state"].items():
            found |= {f"{role}_optimizer.{number}.{key}": value for key, value in moments.items()}
    return found


def assert_same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("saved"), trained())


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
    return Path(save_process.commit(folder, images, stage_end, resolution))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---- Save and restore


@pytest.mark.parametrize("steps", [0, 3])
def test_restoring_a_saved_state_gives_every_bit_back(tmp_path: Path, steps: int) -> None:
    state = trained(steps=steps)
    path = save(tmp_path, state)
    assert path.name == f"r0008-fade-{80 + 8 * steps:09d}"
    again = initial_state(RUN, 1, str(path), CPU, None)
    assert_same_bits(everything(state), everything(again))
    if steps:
        assert state.masked.tolist() == [1, 0]
        kinds = {name.rsplit(".", 1)[1] for name in everything(again) if "_optimizer" in name}
        assert kinds == {"step", "exp_avg", "exp_avg_sq"}
        assert again.images_seen == 104


def test_training_goes_on_from_a_restored_state_as_if_never_stopped(tmp_path: Path) -> None:
    straight = trained()
    again = initial_state(RUN, 1, str(save(tmp_path, straight)), CPU, None)
    for number in (7, 8):
        step(straight, 1, number)
        step(again, 1, number)
    assert_same_bits(everything(straight), everything(again))


def test_moments_belong_to_their_own_parameters_by_name(saved: Path) -> None:
    state = trained()
    stored = safetensors.torch.load_file(saved / "optimizers.safetensors")
    for role in ("generator", "discriminator"):
        for name, parameter in getattr(state, role).named_parameters():
            for key, value in getattr(state, f"{role}_optimizer").state[parameter].items():
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
    assert described["masked"] == [1, 0]


def test_channels_last_weights_and_moments_survive_bit_by_bit(tmp_path: Path) -> None:
    run = from_dict({**vars(RUN), "data": vars(RUN.data), "network": vars(RUN.network), "ray": vars(RUN.ray),
                     "training": {"channels_last": True}, "stages": [vars(stage) for stage in RUN.stages],
                     "checkpoints": vars(RUN.checkpoints), "evaluation": vars(RUN.evaluation)})
    state = initial_state(run, 1, None, CPU, None)
    for number in range(2):
        step(state, 1, number)
    again = initial_state(run, 1, str(save(tmp_path, state)), CPU, None)
    assert_same_bits(everything(state), everything(again))
    weight, moment = next((p, again.generator_optimizer.state[p]["exp_avg"]) for p in again.generator.parameters()
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
    state.discriminator_optimizer.state[parameter]["exp_avg_sq"].view(-1)[0] = torch.inf
    return "optimizers/discriminator."


@pytest.mark.parametrize("spoil", [spoil_weight, spoil_average, spoil_moment])
def test_a_tensor_that_is_not_finite_is_never_committed(spoil: Callable[[TrainState], str], tmp_path: Path) -> None:
    state = trained()
    where = spoil(state)
    with pytest.raises(NonFinite, match="not finite") as caught:
        save(tmp_path, state)
    assert f"1 tensors are not finite, first {where}" in str(caught.value)
    assert caught.value.images_seen == 104
    assert names(tmp_path) == []


# ---- What is never read


def test_an_untouched_checkpoint_reads_as_it_lies(saved: Path) -> None:
    assert commits.read(saved) == {name: (saved / name).read_bytes() for name in FILES}


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
    with pytest.raises(commits.Damaged) as caught:
        commits.read(copy)
    assert str(file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_in_the_manifest_is_refused_by_name(copy: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(commits.Damaged, match=r"pytorch_model\.bin is not in the manifest"):
        commits.read(copy)


def manifest_with(copy: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    manifest = json.loads((copy / "MANIFEST.json").read_text())
    del manifest["sha256"]
    change(manifest)
    (copy / "MANIFEST.json").write_bytes(commits.sealed(manifest))


@pytest.mark.parametrize(("change", "said"), [
    (lambda m: m["files"]["state.json"].update(sha256="0" * 64), "state.json does not match"),
    (lambda m: m["files"]["state.json"].update(bytes=1), "state.json has"),
    (lambda m: m["files"].pop("average.safetensors"), "lists other files than a checkpoint has: 'average.safetensors'"),
    (lambda m: m["files"].update({"more": {"bytes": 0, "sha256": "0"}}), "lists other files than a checkpoint has"),
    (lambda m: m["files"].update({"state.json": {"bytes": 6}}), "MANIFEST.json cannot be read: it has no 'sha256'"),
    (lambda m: m.update(files=[]), "MANIFEST.json cannot be read"),
    (lambda m: m.clear(), "MANIFEST.json cannot be read"),
])
def test_a_manifest_that_says_other_things_than_there_are_is_refused(
        copy: Path, change: Callable[[dict[str, Any]], Any], said: str) -> None:
    manifest_with(copy, change)
    with pytest.raises(commits.Damaged) as caught:
        commits.read(copy)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_a_newer_schema_stops_the_reader_instead_of_being_passed_over(copy: Path) -> None:
    manifest_with(copy, lambda m: m.update(schema=commits.SCHEMA + 1))
    for ask in (commits.read, commits.describe, lambda path: commits.find(path.parent)):
        with pytest.raises(UserError, match=f"{copy.name} has schema 3: a newer gradine wrote it, this one reads up to "
                                            "2. Install the newer one, or move the checkpoint out of the folder."):
            ask(copy)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"\xff\xfe\0\0", None])
def test_a_manifest_that_is_none_is_refused(copy: Path, content: bytes | None) -> None:
    if content is None:
        (copy / "MANIFEST.json").unlink()
    else:
        (copy / "MANIFEST.json").write_bytes(content)
    for reader in (commits.read, commits.describe):
        with pytest.raises(commits.Damaged, match=r"MANIFEST\.json"):
            reader(copy)
    assert commits.find(copy.parent)[0] == []


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
    files = commits.read(copy)  # the manifest is right: whoever wrote it meant it
    with pytest.raises(commits.Damaged, match=name):
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
    found, damaged = commits.find(tmp_path)
    assert damaged == []
    assert [(c.images_seen, c.resolution, c.stage_end, c.phase, c.name) for c in found] == [
        (80, 4, True, "hold", "r0004-hold-000000080"), (160, 8, False, "hold", "r0008-hold-000000160"),
        (300, 16, False, "hold", "r0016-hold-000000300"), (10**9 - 8, 16, False, "hold", "r0016-hold-999999992"),
        (10**9, 16, False, "hold", "r0016-hold-1000000000")]
    assert commits.find(tmp_path / "nowhere") == ([], [])


def test_of_a_valid_older_and_a_damaged_newest_one_the_older_is_found_or_read(tmp_path: Path) -> None:
    older, newest = small(tmp_path, 40), small(tmp_path, 80)
    flip(newest / "average.safetensors", 9)  # not looked at by `find`, but by `read`
    assert [c.images_seen for c in commits.find(tmp_path)[0]] == [40, 80]
    with pytest.raises(commits.Damaged, match="average.safetensors does not match"):
        commits.read(newest)
    flip(newest / "state.json", 5)
    found, damaged = commits.find(tmp_path)
    assert [c.path for c in found] == [str(older)]
    assert len(damaged) == 1
    assert str(newest / "state.json") in damaged[0]
    assert set(commits.read(older)) == set(FILES)


def test_nothing_takes_the_place_of_a_checkpoint_not_even_of_a_damaged_one(tmp_path: Path) -> None:
    for _ in range(3):
        flip(small(tmp_path, 80) / "average.safetensors", 9)
    valid = small(tmp_path, 80)
    name = "r0008-hold-000000080"
    assert names(tmp_path) == [name, f"{name}-t0", f"{name}-t0-2", f"{name}-t0-3"]
    assert valid.name == f"{name}-t0-3"
    newest, damaged = commits.newest_valid(commits.find(tmp_path)[0])
    assert newest
    assert newest[0].path == str(valid)
    assert damaged == []  # the newest of the same images seen is the last one
    assert commits.retire(tmp_path, 1, now=10**9) == [name, f"{name}-t0", f"{name}-t0-2"]


def test_retiring_keeps_the_newest_and_every_stages_end(tmp_path: Path) -> None:
    for images, stage_end in ((40, False), (80, True), (120, False), (160, False), (200, False), (240, True)):
        small(tmp_path, images, stage_end)
    assert commits.retire(tmp_path, 2, now=10**9) == ["r0008-hold-000000040", "r0008-hold-000000120"]
    assert [c.images_seen for c in commits.find(tmp_path)[0]] == [80, 160, 200, 240]
    assert commits.retire(tmp_path, 2, now=10**9) == []
    assert commits.retire(tmp_path, 1, now=10**9) == ["r0008-hold-000000160"]
    assert names(tmp_path) == [f"r0008-hold-{n:09d}" for n in (80, 200, 240)]


def test_retiring_does_not_read_again_what_it_is_told_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, asked, read = [str(small(tmp_path, images)) for images in (40, 80, 120)], [], commits.read
    monkeypatch.setattr(commits, "read", lambda path: asked.append(path) or read(path))
    valid: set[str] = set()
    assert commits.retire(tmp_path, 2, now=10**9, valid=valid) == ["r0008-hold-000000040"]
    assert (asked, valid) == ([paths[2], paths[1]], set(paths[1:]))
    assert commits.retire(tmp_path, 2, now=10**9, valid=valid) == []
    assert len(asked) == 2
    assert commits.retire(tmp_path, 1, now=10**9, valid=valid) == ["r0008-hold-000000080"]
    assert valid == {paths[2]}  # another may get the name of one that is deleted
    flip(small(tmp_path, 160) / "average.safetensors", 9)
    assert commits.retire(tmp_path, 1, now=10**9, valid=valid) == []
    assert valid == {paths[2]}


def test_a_retirement_cut_short_leaves_an_orphan_and_no_half_checkpoint(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(path: Path) -> None:
        (path / commits.MANIFEST).unlink()
        raise KeyboardInterrupt

    small(tmp_path, 40)
    small(tmp_path, 80)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            commits.retire(tmp_path, 1, now=10**9)
    found, damaged = commits.find(tmp_path)
    assert [c.images_seen for c in found] == [80]
    assert damaged == []
    assert len(commits.remove_orphans(tmp_path)) == 1
    assert names(tmp_path) == ["r0008-hold-000000080"]


def test_orphans_of_a_killed_save_are_removed_and_nothing_else(tmp_path: Path) -> None:
    term, kept = commits.begin_term(tmp_path, None), small(tmp_path, 80)
    orphan, half = tmp_path / f".partial-{kept.name}-4711", tmp_path / "term-000002.json.17-18.partial"
    shutil.copytree(kept, orphan)
    half.write_bytes(b"{")
    assert [c.path for c in commits.find(tmp_path)[0]] == [str(kept)]
    assert commits.terms(tmp_path) == term.starts
    assert commits.remove_orphans(tmp_path) == [orphan.name, half.name]
    assert names(tmp_path) == [kept.name, "term-000001.json"]
    assert commits.remove_orphans(tmp_path / "nowhere") == []


def test_half_written_files_of_a_run_folder_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in ("config.yaml", "config.yaml.17-18.partial", "metrics.jsonl.17-18.partial", "notes.partial.txt"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "mine.partial").mkdir()
    assert commits.remove_orphans(tmp_path) == ["config.yaml.17-18.partial", "metrics.jsonl.17-18.partial"]
    assert names(tmp_path) == ["config.yaml", "mine.partial", "notes.partial.txt"]


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
    assert not grown.generator_optimizer.state
    assert not grown.discriminator_optimizer.state
    assert (grown.images_seen, grown.masked.tolist()) == (240, [1, 0])


def test_a_new_layer_starts_as_the_seed_has_it_and_as_another_runs_weights_have_it(saved: Path, tmp_path: Path) -> None:
    other = trained(2)
    initial = save(tmp_path, other, 2)
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
        checkpoint.grow(state, commits.read(saved))
    assert "\n" not in str(caught.value)
    for part in ("in the starting weights", " here. Use the same network settings"):
        assert part in str(caught.value)


@pytest.mark.parametrize("stage", [0, 1])  # at 4 px no layer of the same name has another shape
def test_another_runs_weights_of_other_images_are_refused_in_one_line_though_no_layer_tells(
        stage: int, tmp_path: Path) -> None:
    rgb = str(save(tmp_path, trained(2), 2))
    with pytest.raises(UserError) as caught:
        initial_state(run_of(channels=1), stage, None, CPU, rgb)
    assert str(caught.value) == ("init_from: the starting weights make images of 3 channels, this run has "
                                 "data.channels=1. Start from a run with the same, or without init_from.")
    initial_state(RUN, stage, None, CPU, rgb)


def test_a_gray_state_is_saved_restored_and_grown_like_any(tmp_path: Path) -> None:
    gray = run_of(channels=1)
    state = initial_state(gray, 1, None, CPU, None)
    path = str(save(tmp_path, state))
    assert_same_bits(everything(state), everything(initial_state(gray, 1, path, CPU, None)))
    grown = initial_state(gray, 2, path, CPU, path)
    assert torch.equal(grown.generator.to_rgb["8"].weight, state.generator.to_rgb["8"].weight)
    assert [len(layer.bias) for layer in grown.generator.to_rgb.values()] == [1, 1]


def test_a_fresh_adam_takes_up_the_moments_and_the_step_it_was_saved_with(saved: Path) -> None:
    state = initial_state(RUN, 1, str(saved), CPU, None)
    steps = {float(moments["step"]) for moments in state.generator_optimizer.state.values()}
    assert steps == {3.0}
    assert {float(m["step"]) for m in state.discriminator_optimizer.state.values()} == {2.0}  # one update was masked
    assert not new_optimizer(state.generator, RUN).state


def test_retention_keeps_what_was_just_written_though_later_damaged_ones_lie_beside_it(tmp_path: Path) -> None:
    """A resume that passed over damaged later checkpoints saves at fewer images than they claim."""
    for seen in (5000, 6000, 1000):
        small(tmp_path, seen)
    assert commits.retire(tmp_path, 1, now=1000) == []
    small(tmp_path, 2000)
    assert commits.retire(tmp_path, 1, now=2000) == ["r0008-hold-000001000"]
    assert (tmp_path / "r0008-hold-000002000").is_dir()
