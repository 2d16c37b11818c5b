"""Faults inside the loop of a stage, without Ray: whatever kills, stops or poisons it, the bits are those of the run
that never failed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from gradine.configs.schema import Run, SaveFault, dump
from gradine.stages import checkpoint, loop
from gradine.stages.data import Images
from gradine.stages.memory import smaller_micro_batch

SERVER = Path(__file__).with_name("faulty_stage.py")


class Forks:
    """Starts ranks at once, as children of a process that has imported what they need."""

    def __init__(self) -> None:
        self.server = subprocess.Popen([sys.executable, "-W", "error::UserWarning", str(SERVER)], text=True,
                                       stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                       env={**os.environ, "OMP_NUM_THREADS": "1"})

    def ask(self, **request: Any) -> list[Any]:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return json.loads(self.server.stdout.readline())

    def run(self, run: Run, folder: Path, faults: list[dict[str, Any]] | None = None, timeout_s: float = 120.0,
            **more: Any) -> Attempt:
        """All ranks of `run` in `folder` from its newest checkpoint on, until each has ended."""
        workers = run.stages[0].workers
        folder.mkdir(parents=True, exist_ok=True)
        number = len(list(folder.glob("config-*")))
        config = folder / f"config-{number}.yaml"
        config.write_text(dump(run))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        before = checkpoints(folder)
        pids = self.ask(start={"config": str(config), "folder": str(folder), "workers": workers, "port": port,
                               "attempt": number, "faults": faults or [], **more})
        return Attempt(folder, number, self.ask(wait=pids, timeout_s=timeout_s), before)

    def close(self) -> None:
        assert self.server.stdin
        assert self.server.stdout
        self.server.stdin.close()
        self.server.wait(30)
        self.server.stdout.close()


@dataclass
class Attempt:
    """One start of all ranks, after they ended."""

    folder: Path
    number: int
    codes: list[int | None]  # by rank: negative for a signal, None: had to be killed
    before: set[str]  # names of the checkpoints it found

    def lines(self, kind: str, rank: int = 0) -> list[dict[str, Any]]:
        text = (self.folder / f"{kind}-{self.number}-{rank}.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.lines("events") if event["event"] == kind]

    def said(self, rank: int) -> str:
        return (self.folder / f"error-{self.number}-{rank}").read_text()

    def error(self, rank: int) -> str:
        return self.said(rank).strip().splitlines()[-1]

    def new(self) -> set[str]:
        return checkpoints(self.folder) - self.before


def digest(tensors: list[torch.Tensor]) -> str:
    """As the ranks name an image they were shown."""
    joined = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        joined.update(tensor.contiguous().numpy().tobytes())
    return joined.hexdigest()


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob("r*")}


# What was shown and what came of it ----------------------------------------------------------------------------------


def steps(attempts: list[Attempt], workers: int) -> dict[int, tuple[list[list[str]], dict[str, str]]]:
    """By images seen: the shares of all ranks in their order, as digests of images, and digests of the state.

    A step made again, and the same step on another rank, must have left the same state; and shown the same.
    """
    lines: dict[int, list[list[dict[str, Any]]]] = {}
    for attempt in attempts:
        for rank in range(workers):
            for line in attempt.lines("steps", rank):
                lines.setdefault(line["at"], [[] for _ in range(workers)])[rank].append(line)
    found = {}
    for at, of_ranks in sorted(lines.items()):
        states = [line["state"] for of_rank in of_ranks for line in of_rank]
        assert all(state == states[0] for state in states), f"the step at {at} left different states"
        assert all(line["shown"] == of_rank[0]["shown"] for of_rank in of_ranks for line in of_rank), at
        if [] in of_ranks:  # a rank was killed before it wrote its line
            continue
        found[at] = [share for of_rank in of_ranks for share in of_rank[-1]["shown"]], states[0]
    return found


def groups(shares: list[list[str]], groups_per_share: int = 1) -> list[list[str]]:
    """The stddev groups of a step, by hand: a share of n groups has one row of each, n times one after another."""
    return [share[group::groups_per_share] for share in shares for group in range(groups_per_share)]


def assert_each_image_once_an_epoch(run: Run, shown: dict[int, list[list[str]]], epochs: int) -> None:
    """Shares are single groups: row n of a batch of M groups is member n // M of group n mod M."""
    names = {}
    for resolution in (4, 8):
        images = Images(run.data, resolution)
        own = {digest([torch.from_numpy(pixels)]): number for number, pixels in enumerate(images.pixels(np.arange(48)))}
        images.close()
        assert len(own) == 48
        names.update(own)
    sequence = []
    for at, shares in shown.items():
        assert at == len(sequence), "a step is missing"
        sequence += [names[share[member]] for member in range(4) for share in shares]
    assert len(sequence) // 48 == epochs
    orders = [tuple(sequence[epoch * 48:epoch * 48 + 48]) for epoch in range(epochs)]
    assert all(sorted(order) == list(range(48)) for order in orders)
    assert len(set(orders)) == epochs
    assert len(set(sequence[epochs * 48:])) == len(sequence[epochs * 48:])


def assert_same_bits(ours: Path, theirs: Path, exactly: bool = True, ignore: tuple[str, ...] = ()) -> None:
    """All tensors of all checkpoints equal to the byte, and clock, phase and counts. Not exactly: ours may be more."""
    names = checkpoints(theirs)
    assert names
    assert checkpoints(ours) == names if exactly else checkpoints(ours) >= names
    for name in names:
        a, b = ours / "checkpoints" / name, theirs / "checkpoints" / name
        for part in ("generator", "discriminator", "average", "optimizers"):
            assert (a / f"{part}.safetensors").read_bytes() == (b / f"{part}.safetensors").read_bytes(), (name, part)
        states = [json.loads((folder / "state.json").read_text()) for folder in (a, b)]
        for key in {"images_seen", "phase", "resolution", "stage_end", "masked", "skipped", "data"} - set(ignore):
            assert states[0][key] == states[1][key], (name, key)


def assert_all_finite(folder: Path) -> None:
    assert checkpoints(folder)
    for path in (folder / "checkpoints").glob("r*/*.safetensors"):
        assert all(bool(tensor.isfinite().all()) for tensor in safetensors.torch.load_file(path).values()), path


# 200 steps of 8: 50 at 4 px, 80 fading to 8 px, 70 held there
LONG = {"stages.0.hold_images": 400, "stages.1.fade_images": 640, "stages.1.hold_images": 560,
        "stages.*.micro_batch": 4, "tick_images": 8, "checkpoints.every_images": 200}
# 30 steps of 8: 10 of each
SHORT = {"stages.*.micro_batch": 4, "tick_images": 8, "stages.*.workers": 2, "checkpoints.background": False}
PHASES = (("r0004-hold", 0, 400), ("r0008-fade", 400, 1040), ("r0008-hold", 1040, 1600))  # of LONG


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    forks = Forks()
    yield forks
    forks.close()


@pytest.fixture(scope="module")
def unbroken(forks: Forks, module_run: Callable[..., Run], tmp_path_factory: pytest.TempPathFactory) -> Attempt:
    """LONG by one worker: two are bit-equal to it, so it stands for both."""
    attempt = forks.run(module_run(LONG), tmp_path_factory.mktemp("unbroken") / "run", timeout_s=300)
    assert attempt.codes == [0], attempt.said(0)
    assert len(attempt.lines("steps")) == 200
    return attempt


# F13: killed ---------------------------------------------------------------------------------------------------------


def twenty_kills(workers: int) -> list[dict[str, Any]]:
    """13 in steps (five of them anywhere), 5 inside saves, 1 between the stages, 1 while a stage is set up."""
    dice = random.Random(workers)
    places = ["begin", "before", "middle", "average", "after", "tick"]
    saves = dice.sample([200, 600, 800, 1000, 1200, 1400, 1600], 5)  # 400 is written before the kill between stages
    free = [at for at in range(16, 1440, 8) if all(not save - 40 <= at < save for save in saves)]
    kills = [{"at": at, "place": dice.choice(places), "rank": dice.randrange(workers)} for at in dice.sample(free, 13)]
    for kill in dice.sample(kills, 5):
        kill |= {"place": "begin", "delay_s": dice.uniform(0.0005, 0.005)}
    kills += [{"at": save, "place": "save", "sync": dice.randint(1, 8)} for save in saves]
    kills.append({"at": 392, "place": "between", "rank": workers - 1})
    kills.sort(key=lambda kill: kill["at"] - (kill["place"] == "save"))
    kills.insert(0, {"at": -1, "place": "setup", "rank": workers - 1})
    return [{"do": "kill", "rank": 0, **kill} for kill in kills]


@pytest.mark.fault
@pytest.mark.parametrize("workers", [1, 2])
def test_f13_a_200_step_run_killed_at_20_random_points_ends_at_the_bits_of_the_unkilled_one(
        workers: int, forks: Forks, unbroken: Attempt, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGKILL of one rank 20 times: in steps, inside saves, between stages, in a setup; the others end themselves."""
    run, attempts = module_run({**LONG, "stages.*.workers": workers}), []
    for kill in twenty_kills(workers):
        attempts.append(forks.run(run, tmp_path, [kill]))
        codes = attempts[-1].codes
        assert codes[kill["rank"]] == -signal.SIGKILL, (kill, codes, attempts[-1].said(kill["rank"]))
        survivors = [code for rank, code in enumerate(codes) if rank != kill["rank"]]
        assert None not in survivors, f"a survivor of {kill} hangs"
        assert kill["at"] == 1600 or 0 not in survivors, (kill, codes)
    attempts.append(forks.run(run, tmp_path))
    assert attempts[-1].codes == [0] * workers, attempts[-1].said(0)
    print(f"{len(attempts) - 1} kills, {sum(len(a.lines('steps')) for a in attempts)} steps for 200")
    assert_same_bits(tmp_path, unbroken.folder)
    ours = steps(attempts, workers)
    assert ours == steps([unbroken], 1)
    assert_each_image_once_an_epoch(run, {at: shares for at, (shares, _) in ours.items()}, epochs=33)


# F12: other numbers of workers ---------------------------------------------------------------------------------------


@pytest.mark.fault
def test_f12_a_run_resumed_by_1_2_and_1_workers_ends_at_the_bits_of_one(forks: Forks, unbroken: Attempt,
                                                                       module_run: Callable[..., Run],
                                                                       tmp_path: Path) -> None:
    """SIGKILL twice, and each time another number of workers that goes on, their micro-batch kept."""
    found = resumed_by((1, 2, 1), (456, 1144), LONG, forks, module_run, tmp_path)
    assert_same_bits(tmp_path, unbroken.folder)
    assert found == steps([unbroken], 1)


@pytest.mark.fault
def test_f12_a_run_resumed_by_1_2_4_and_1_workers_keeps_its_batches_groups_and_order_of_images(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGKILL three times, and each time another number of workers that goes on, their micro-batch kept."""
    sizes = {"stages.*.batch_size": 16, "stages.*.micro_batch": 4, "stages.0.hold_images": 320,
             "stages.1.fade_images": 320, "stages.1.hold_images": 320, "checkpoints.every_images": 64}
    whole = forks.run(module_run(sizes), tmp_path / "whole")
    found = resumed_by((1, 2, 4, 1), (208, 480, 768), sizes, forks, module_run, tmp_path / "changing")
    shown = {at: shares for at, (shares, _) in found.items()}
    assert shown == {at: shares for at, (shares, _) in steps([whole], 1).items()}
    assert_each_image_once_an_epoch(module_run(), shown, epochs=20)
    assert checkpoints(tmp_path / "changing") == checkpoints(tmp_path / "whole")
    infos = [json.loads(p.read_text()) for p in (tmp_path / "changing/checkpoints").glob("*/state.json")]
    assert {info["workers"] for info in infos} == {1, 2, 4}


def resumed_by(workers: tuple[int, ...], kills: tuple[int, ...], changes: dict[str, Any], forks: Forks,
               module_run: Callable[..., Run], folder: Path) -> dict[int, tuple[list[list[str]], dict[str, str]]]:
    """The steps of a run that each of `workers` goes on with until one of them is killed at the next of `kills`."""
    found = {}
    for number, at in zip(workers, (*kills, None), strict=True):
        faults = [{"do": "kill", "rank": number - 1, "at": at, "place": "middle"}] if at else []
        attempt = forks.run(module_run({**changes, "stages.*.workers": number}), folder, faults)
        assert attempt.codes[-1] == (-signal.SIGKILL if at else 0), attempt.said(0)
        assert attempt.number == 0 or attempt.before, "it started over"
        found |= steps([attempt], number)
    return dict(sorted(found.items()))


@pytest.mark.fault
@pytest.mark.parametrize(("workers", "micro"), [(2, 8), (2, 4), (4, 4)])
def test_f12_other_splits_see_the_same_groups_and_compute_the_same_gradients(
        workers: int, micro: int, forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """A resume by two or four workers, or with whole shares at once, after one worker with four shares was killed."""
    sizes = {"stages.*.batch_size": 16, "stages.*.micro_batch": 4, "stages.0.hold_images": 96,
             "checkpoints.background": False}
    whole = forks.run(module_run(sizes, stages=1), tmp_path / "whole", gradients_at=48)
    forks.run(module_run(sizes, stages=1), tmp_path / "ours", [{"do": "kill", "at": 64, "place": "begin"}])
    other = forks.run(module_run({**sizes, "stages.*.workers": workers, "stages.*.micro_batch": micro}, stages=1),
                      tmp_path / "ours", gradients_at=48)
    assert whole.codes + other.codes == [0] * (1 + workers)
    ours, theirs = steps([other], workers), steps([whole], 1)
    assert list(ours) == [48, 64, 80]
    for at, (shares, _) in ours.items():
        assert groups(shares, micro // 4) == groups(theirs[at][0])
    assert_gradients_within(1e-6, other, whole)


def assert_gradients_within(bound: float, ours: Attempt, theirs: Attempt) -> None:
    a, b = (safetensors.torch.load_file(x.folder / f"gradients-{x.number}.safetensors") for x in (ours, theirs))
    assert a.keys() == b.keys()
    assert any(gradient.any() for gradient in a.values())  # not all: new layers have none where a fade begins
    for name, gradient in a.items():
        assert (gradient - b[name]).abs().max() <= bound * max(1.0, float(b[name].abs().max())), name


# F16: stopped --------------------------------------------------------------------------------------------------------


def twenty_stops() -> list[dict[str, Any]]:
    """15 in steps (five of them anywhere), at least 5 steps apart, and 5 while a save is being written."""
    dice = random.Random(16)
    places = ["begin", "before", "middle", "average", "after", "tick"]
    *saves, ends_on_a_save = dice.sample(range(200, 1600, 200), 6)
    free = [at for at in range(16, 1520, 48) if all(not -64 <= at - save <= 40 for save in (*saves, ends_on_a_save))]
    stops = [{"at": at, "place": dice.choice(places)} for at in dice.sample(free, 14)]
    for stop in dice.sample(stops, 5):
        stop |= {"place": "begin", "delay_s": dice.uniform(0.0005, 0.003)}
    stops.append({"at": ends_on_a_save - 16, "place": "before"})  # so that the ranks end where one is written anyway
    stops = [{**stop, "rank": dice.randrange(2)} for stop in stops]
    stops += [{"at": at, "place": "save", "sync": dice.randint(1, 8), "target": n % 2, "stay_s": 0.1}
              for n, at in enumerate(saves)]
    return [{"do": "term", "rank": 0, **stop} for stop in sorted(stops, key=lambda stop: stop["at"])]


def scheduled(after: int, to: int) -> set[str]:
    return {f"{name}-{at:09d}" for name, start, end in PHASES for at in range(200, 1601, 200)
            if start < at <= end and after < at <= to}


@pytest.mark.fault
def test_f16_sigterm_to_one_rank_at_20_random_times_ends_both_after_the_same_step_with_one_checkpoint(
        forks: Forks, unbroken: Attempt, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGTERM 20 times to rank 0 or 1 of 2: in steps, and while a slowed-down save is written; each time resumed."""
    run, attempts, seen = module_run({**LONG, "stages.*.workers": 2}), [], 0
    stops = twenty_stops()
    assert len(stops) == 20
    for stop in stops:
        attempt = forks.run(run, tmp_path, [stop])
        attempts.append(attempt)
        assert attempt.codes == [0, 0], (stop, attempt.said(0), attempt.said(1))
        (event,) = attempt.events("stopped")
        ended = event["images_seen"]
        assert [attempt.lines("steps", rank)[-1]["at"] + 8 for rank in (0, 1)] == [ended, ended], stop
        assert stop["at"] < ended <= stop["at"] + 24, stop
        phase = next(name for name, start, end in PHASES if start < ended <= end)
        assert attempt.new() == scheduled(seen, ended) | {f"{phase}-{ended:09d}"}, stop
        assert {Path(event["path"]).name for event in attempt.events("checkpoint")} == attempt.new()
        seen = ended
    attempts.append(forks.run(run, tmp_path))
    assert attempts[-1].codes == [0, 0]
    assert_same_bits(tmp_path, unbroken.folder, exactly=False)
    assert steps(attempts, 2) == steps([unbroken], 1)
    assert sum(len(attempt.lines("steps")) for attempt in attempts) == 200, "a step was lost and made again"


@pytest.mark.fault
@pytest.mark.parametrize(("place", "at", "ended"), [("setup", -1, 8), ("setup", -2, 88), ("after", 72, 88),
                                                    ("between", 72, 88), ("after", 232, None)])
def test_f16_sigterm_between_stages_in_a_setup_or_in_the_last_step_is_not_lost(
        place: str, at: int, ended: int | None, forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGTERM to rank 1 of 2 where no step runs, or none is left to run."""
    attempt = forks.run(module_run(SHORT), tmp_path, [{"do": "term", "rank": 1, "at": at, "place": place}],
                        listening=place == "between")  # elsewhere `run_stage` does
    assert attempt.codes == [0, 0], attempt.said(1)
    last = attempt.lines("events")[-1]
    assert last["event"] == ("stopped" if ended else "stage_end")
    assert last["images_seen"] == (ended or 240)
    assert max(int(name[-9:]) for name in checkpoints(tmp_path)) == last["images_seen"]


@pytest.mark.fault
def test_f16_a_second_sigterm_ends_the_process_at_once_and_what_was_saved_stands(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """SIGTERM to rank 0, and again while it writes the checkpoint it stops with, which would take ten minutes."""
    attempt = forks.run(module_run(SHORT), tmp_path, [
        {"do": "term", "at": 56, "place": "before"},
        {"do": "term", "at": 72, "place": "save", "sync": 3, "stay_s": 600}], timeout_s=60)
    assert attempt.codes[0] == -signal.SIGTERM
    assert attempt.codes[1] == 1, "the other rank found itself alone and said so"
    assert checkpoints(tmp_path) == {"r0004-hold-000000040"}
    again = forks.run(module_run(SHORT), tmp_path)
    assert again.codes == [0, 0]
    assert [line["at"] for line in again.lines("steps")] == list(range(40, 240, 8))


@pytest.mark.fault
def test_f16_a_second_sigterm_between_stages_ends_the_process_at_once_too(forks: Forks, module_run: Callable[..., Run],
                                                                          tmp_path: Path) -> None:
    """SIGTERM in the last step of a stage, and again before the next one, which would begin ten minutes later."""
    attempt = forks.run(module_run({**SHORT, "stages.*.workers": 1}), tmp_path, [
        {"do": "term", "at": 72, "place": "after"},
        {"do": "term", "at": 72, "place": "between", "stay_s": 600}], timeout_s=60, listening=True)
    assert attempt.codes == [-signal.SIGTERM]
    assert checkpoints(tmp_path) == {"r0004-hold-000000040", "r0004-hold-000000080"}


# F24, F25: poisoned --------------------------------------------------------------------------------------------------


@pytest.mark.fault
def test_f24_a_poisoned_gradient_on_one_rank_masks_that_update_on_all_alike(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """NaN or infinity on rank 1 of 2, one after another: in each loss, each gradient, the pixels and both latents."""
    poisons = {16: ("loss", "discriminator", "nan"), 32: ("gradient", "generator", "inf"),
               48: ("gradient", "discriminator", "-inf"), 64: ("loss", "generator", "nan"),
               96: ("reals", "discriminator", "nan"), 112: ("critic_latents", "discriminator", "nan"),
               128: ("generator_latents", "generator", "nan"), 176: ("reals", "discriminator", "inf")}
    faults = [{"do": "poison", "rank": 1, "at": at, "where": where, "net": net, "value": value}
              for at, (where, net, value) in poisons.items()]
    attempt = forks.run(module_run(SHORT), tmp_path, faults)
    assert attempt.codes == [0, 0], attempt.said(0)
    found = steps([attempt], 2)  # bit-equal on both ranks after every step
    assert list(found) == list(range(0, 240, 8))
    for at in range(8, 240, 8):
        before, after = found[at - 8][1], found[at][1]
        if at in (80, 160):  # Adam is new
            continue
        changed = {part for part in after if after[part] != before[part]}
        of_net = {"discriminator": {"discriminator", "discriminator_optimizer"},
                  "generator": {"generator", "generator_optimizer", "average"}}
        assert changed == set(after) - of_net.get(poisons.get(at, ("", "", ""))[1], set()), at
    counts = [event["masked"] for event in attempt.events("tick")]
    assert counts[-1] == [5, 3]
    by_hand = [[sum(net == of and at < 8 * n for at, (_, net, _) in poisons.items())
                for of in ("discriminator", "generator")] for n in range(1, 31)]
    assert counts == by_hand
    assert json.loads((tmp_path / "checkpoints/r0008-hold-000000240/state.json").read_text())["masked"] == [5, 3]
    assert_all_finite(tmp_path)


@pytest.mark.fault
@pytest.mark.parametrize(("where", "net", "rank"), [("weight", "discriminator", 0), ("weight", "generator", 1),
                                                    ("average", "generator", 0), ("average", "generator", 1),
                                                    ("moment", "discriminator", 1), ("moment", "generator", 0)])
def test_f24_a_state_that_is_not_finite_on_one_rank_ends_every_rank_at_the_next_tick_and_is_never_committed(
        where: str, net: str, rank: int, forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """NaN in a weight, a moment or the average of one rank of two, three steps before a tick and a save are due."""
    attempt = forks.run(module_run({**SHORT, "tick_images": 40}, stages=1), tmp_path,
                        [{"do": "poison", "rank": rank, "at": 56, "where": where, "net": net}])
    assert attempt.codes == [1, 1]
    for own in (0, 1):
        assert attempt.error(own).startswith("NonFinite: "), attempt.said(own)
        assert "at images_seen=80" in attempt.error(own)
        assert attempt.lines("steps", own)[-1]["at"] == 72
    assert checkpoints(tmp_path) == {"r0004-hold-000000040"}
    assert_all_finite(tmp_path)


@pytest.mark.fault
def test_f24_a_save_between_two_ticks_finds_a_state_that_is_not_finite_and_does_not_write_it(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """Infinity in rank 0's average, a save due long before the next tick."""
    attempt = forks.run(module_run({**SHORT, "tick_images": 400, "stages.0.hold_images": 400}, stages=1), tmp_path,
                        [{"do": "poison", "at": 56, "where": "average", "net": "generator", "value": "inf"}])
    assert attempt.codes == [1, 1]
    assert "NonFinite: 1 tensors are not finite, first average/" in attempt.error(0)
    assert checkpoints(tmp_path) == {"r0004-hold-000000040"}
    assert not list((tmp_path / "checkpoints").glob(".partial*"))
    assert attempt.lines("steps")[-1]["at"] == 72, "it went on to the next tick"


@pytest.mark.fault
def test_f24_a_run_that_leaves_the_range_of_a_non_finite_state_out_ends_as_if_its_steps_had_done_nothing(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """NaN in a weight of rank 1; a roll-back that skips its range and one more; SIGKILL inside and right after them."""
    run, ranges = module_run(SHORT), [[64, 120], [152, 176]]  # over both new Adams, and over the growth
    ours = tmp_path / "ours"
    poisoned = forks.run(run, ours, [{"do": "poison", "rank": 1, "at": 64, "where": "weight", "net": "generator"}])
    assert poisoned.error(0).startswith("NonFinite")
    assert checkpoints(ours) == {"r0004-hold-000000040"}
    mask, attempts = {"do": "poison", "at": 48, "where": "gradient"}, []  # one update: the count has to last too
    for at, told in ((96, {"skipped": ranges}), (120, {}), (168, {}), (None, {})):  # later ones: as the checkpoint says
        kill = [{"do": "kill", "rank": 0, "at": at, "place": "begin"}] if at else []
        attempts.append(forks.run(run, ours, [{**mask, "rank": 1}, *kill], **told))
        assert attempts[-1].codes[0] == (-signal.SIGKILL if at else 0), attempts[-1].said(0)
    slow = forks.run(module_run({**SHORT, "stages.*.workers": 1}), tmp_path / "slow", [mask], advance=ranges)
    assert_same_bits(ours, tmp_path / "slow", ignore=("skipped",))
    stepped = steps([*attempts], 2)
    assert list(stepped) == [at for at in range(40, 240, 8) if not any(a <= at < b for a, b in ranges)]
    theirs = steps([slow], 1)
    assert all(stepped[at] == theirs[at] for at in stepped)
    for path in (ours / "checkpoints").glob("r*/state.json"):
        info = json.loads(path.read_text())
        assert info["skipped"] == (ranges if info["images_seen"] > 40 else [])
        assert info["masked"] == ([1, 0] if info["images_seen"] > 40 else [0, 0])
    shown = {event["images_seen"] - 8 for attempt in attempts for event in attempt.events("tick")}
    assert shown == set(stepped), "a tick without figures of a step"


@pytest.mark.fault
def test_f25_20_masked_updates_in_a_row_end_every_rank_and_19_do_not(forks: Forks, module_run: Callable[..., Run],
                                                                     tmp_path: Path) -> None:
    """NaN in the generator's gradient on rank 1 of 2, for 19 steps, and for all steps from the sixth on."""
    run = module_run({**SHORT, "stages.0.hold_images": 400}, stages=1)
    poison = {"do": "poison", "rank": 1, "at": 40, "where": "gradient", "net": "generator"}
    bearable = forks.run(run, tmp_path / "bearable", [{**poison, "until": 40 + 19 * 8}])
    assert bearable.codes == [0, 0], bearable.said(0)
    assert [event["masked"] for event in bearable.events("tick")][-1] == [0, 19]
    ended = forks.run(run, tmp_path / "ended", [{**poison, "until": 400}])
    assert ended.codes == [1, 1]
    for rank in (0, 1):
        assert ended.error(rank).startswith("NonFinite: the last 20 updates of the generator were all masked")
        assert ended.lines("steps", rank)[-1]["at"] + 8 == 200
    states = [state for _, state in steps([ended], 2).values()]
    assert len({state["generator"] for state in states}) == 5
    assert len({state["discriminator"] for state in states}) == 25, "the other network trains on"
    assert_all_finite(tmp_path / "ended")


# F22: out of memory --------------------------------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize(("place", "at", "left"), [("middle", 64, 48), ("before", 112, 80), ("setup", -2, 80)])
def test_f22_memory_that_runs_out_commits_no_half_update_and_half_the_micro_batch_goes_on_with_the_same_batch(
        place: str, at: int, left: int, forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """torch.OutOfMemoryError on rank 1 of 2: between D's update and G's, before a step, at the start of a stage."""
    sizes = {**SHORT, "stages.*.batch_size": 16, "stages.*.micro_batch": 8}
    run = module_run(sizes)
    whole = forks.run(run, tmp_path / "whole", gradients_at=left)
    failed = forks.run(run, tmp_path / "ours", [{"do": "oom", "rank": 1, "at": at, "place": place}])
    assert failed.codes == [1, 1]
    stage = run.stages[1 if left == 80 else 0]
    assert f"OutOfMemory: stage {stage.resolution}px: no memory for a micro-batch of 8" in failed.error(1)
    assert max(int(name[-9:]) for name in checkpoints(tmp_path / "ours")) == left
    for name in checkpoints(tmp_path / "ours"):
        for file in (tmp_path / "whole/checkpoints" / name).glob("*.safetensors"):
            assert file.read_bytes() == (tmp_path / "ours/checkpoints" / name / file.name).read_bytes(), name
    smaller = smaller_micro_batch(stage)
    assert smaller == 4
    again = forks.run(module_run({**sizes, "stages.*.micro_batch": smaller}), tmp_path / "ours", gradients_at=left)
    assert again.codes == [0, 0], again.said(0)
    ours, theirs = steps([again], 2), steps([whole], 2)
    assert list(ours) == list(range(left, 240, 16))
    for step, (shares, _) in ours.items():
        assert groups(shares) == groups(theirs[step][0], 2)
    assert_gradients_within(1e-6, again, whole)
    infos = [json.loads(path.read_text()) for path in (tmp_path / "ours/checkpoints").glob("r*/state.json")]
    assert all(info["micro_batch"] == (8 if info["images_seen"] <= left else 4) for info in infos)


@pytest.mark.fault
def test_f22_a_real_limit_of_the_address_space_is_out_of_memory_and_a_smaller_micro_batch_fits_within_it(
        forks: Forks, module_run: Callable[..., Run], tmp_path: Path) -> None:
    """RLIMIT_AS of a rank lowered to 60 MB above what it holds, at its first step."""
    sizes = {"stages.0.resolution": 32, "network.fmap_base": 512, "network.fmap_max": 32, "stages.*.batch_size": 64,
             "stages.0.hold_images": 64}
    limit = [{"do": "limit", "at": 0, "place": "before", "room_mb": 60}]
    failed = forks.run(module_run({**sizes, "stages.*.micro_batch": 64}, stages=1), tmp_path, limit)
    assert failed.codes == [1]
    assert "OutOfMemory: stage 32px: no memory for a micro-batch of 64" in failed.error(0), failed.said(0)
    assert not checkpoints(tmp_path)
    fits = forks.run(module_run({**sizes, "stages.*.micro_batch": 4}, stages=1), tmp_path, limit)
    assert fits.codes == [0], fits.said(0)
    assert checkpoints(tmp_path) == {"r0032-hold-000000064"}


# Saving beside the training ------------------------------------------------------------------------------------------


def saved(run: Run, folder: Path) -> list[dict[str, Any]]:
    """What the first stage said of its saves, trained in this process."""
    kinds = ("checkpoint", "save_failed", "save_left_out", "stage_end")
    return [event for event in loop.run_stage(run, 0, None, folder) if event["event"] in kinds]


def test_saving_in_the_background_writes_the_bits_that_waiting_for_each_save_writes(module_run: Callable[..., Run],
                                                                                     tmp_path: Path) -> None:
    for name, background in (("background", True), ("waiting", False)):
        saved(module_run({"checkpoints.every_images": 8, "checkpoints.background": background}), tmp_path / name)
    assert len(checkpoints(tmp_path / "waiting")) == 10
    assert "r0004-hold-000000080" in checkpoints(tmp_path / "background")
    assert_same_bits(tmp_path / "waiting", tmp_path / "background", exactly=False)


class FailingDisk:
    """fsync gives EIO in the attempts to save with these numbers, counted from 1."""

    def __init__(self, attempts: Collection[int], monkeypatch: pytest.MonkeyPatch) -> None:
        self.failing, self.attempt, self.commit, self.sync = attempts, 0, checkpoint.commit, os.fsync
        monkeypatch.setattr(checkpoint, "commit", self.counted)
        monkeypatch.setattr(os, "fsync", self.fsync)

    def counted(self, *arguments: Any) -> str:
        self.attempt += 1
        return self.commit(*arguments)

    def fsync(self, descriptor: int) -> None:
        if self.attempt in self.failing:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self.sync(descriptor)


@pytest.mark.fault
@pytest.mark.parametrize(("background", "every", "attempts"), [(True, 1000, (1, 2)), (False, 40, (1, 2, 4, 5))])
def test_f06_a_save_that_fails_twice_is_told_twice_and_then_holds_the_bits_of_one_that_did_not(
        background: bool, every: int, attempts: tuple[int, ...], module_run: Callable[..., Run], tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from fsync in the first two attempts at each save of a stage."""
    run = module_run({"checkpoints.every_images": every, "checkpoints.background": background,
                      "checkpoints.retry_s": 0})
    saved(run, tmp_path / "healthy")
    (tmp_path / "failing/checkpoints").mkdir(parents=True)
    FailingDisk(attempts, monkeypatch)
    events = saved(run, tmp_path / "failing")
    each = [("save_failed", 1), ("save_failed", 2), ("checkpoint", None)]
    assert [(event["event"], event.get("failures")) for event in events[:-1]] == each * (len(attempts) // 2)
    assert "Input/output error" in events[0]["reason"]
    assert_same_bits(tmp_path / "failing", tmp_path / "healthy")


@pytest.mark.fault
@pytest.mark.parametrize("background", [True, False])
def test_f06_three_failed_saves_in_a_row_end_the_stage_and_leave_nothing_half_written(
        background: bool, module_run: Callable[..., Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EIO from every fsync; the stage's only save is the one at its end."""
    run = module_run({"checkpoints.every_images": 1000, "checkpoints.background": background, "checkpoints.retry_s": 0})
    (tmp_path / "checkpoints").mkdir(parents=True)
    FailingDisk(range(99), monkeypatch)
    events = []
    with pytest.raises(SaveFault, match="3 checkpoints in a row could not be written.*Input/output error"):
        events.extend(saved(run, tmp_path))
    assert not list((tmp_path / "checkpoints").iterdir())
    assert not [thread for thread in threading.enumerate() if thread.name in ("gradine-saver", "prefetch")]
