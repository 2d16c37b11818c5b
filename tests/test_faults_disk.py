"""F01, F02, F05-F07: a writer of checkpoints is killed, loses power, or meets a disk that is full, broken or closed.

strace kills or harms processes at system calls (`save_process.py`); `crash_states.py` makes what a power cut may leave.
The oracle: a checkpoint's bytes follow from its images seen (`files_of`), whatever the code under test says.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gradine.configs.schema import SaveFault
from gradine.stages import checkpoint, commits
from gradine.stages.checkpoint import FAILED_SAVES_IN_A_ROW, Saver
from gradine.stages.step import TrainState
from tests import save_process
from tests.crash_states import TRACED, Milestone, Recording, Tree, frozen, inode_of, materialise
from tests.save_process import HARMED, HARMLESS, MILESTONE, files_of
from tests.test_checkpoint import RUN, info, step, trained

pytestmark = pytest.mark.fault
Step = list[Any]
Answer = dict[str, Any]
OLD, NEW = 160, 200
FINAL, PINNED = "r0004-hold-000000080", "r0008-hold-000000120"


@pytest.fixture
def quick() -> Iterator[Path]:
    """A folder in memory where there is one: thousands of small files are synced here."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder).resolve()


class Harmed:
    """The process of `save_process.py` below strace, which does `harm` to a call that each job chooses."""

    def __init__(self, log: Path | None, *harm: str) -> None:
        options = ["-ff", "-o", str(log), "-xx", "-s", "65536", "-e", f"trace={TRACED}"] if log else ["-o", "/dev/null"]
        self.process = subprocess.Popen(
            ["strace", "-f", "-q", *options, *(f"--inject={one}" for one in harm), sys.executable, "-m",
             "tests.save_process"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            cwd=Path(__file__).parents[1], env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})

    def ask(self, location: Path, *steps: Step, reach: tuple[str, int] | None = None, without: str = "") -> Answer:
        assert self.process.stdin
        assert self.process.stdout
        job = {"location": str(location), "steps": steps, "reach": reach, "without": without}
        self.process.stdin.write(json.dumps(job) + "\n")
        answer = json.loads(self.process.stdout.readline())
        assert "failed" not in answer, answer
        return dict(answer)


@contextmanager
def harmed(*harm: str, log: Path | None = None) -> Iterator[Harmed]:
    if not shutil.which("strace") or subprocess.run(
            ["strace", "-o", "/dev/null", "--inject=fsync:error=EIO", "true"], capture_output=True).returncode:
        pytest.skip("needs strace and the right to trace")
    started = Harmed(log, *harm)
    try:
        yield started
    finally:
        for pipe in (started.process.stdin, started.process.stdout):
            assert pipe
            pipe.close()
        assert started.process.wait(60) == 0


KILL = tuple(f"?{name}:signal=KILL:when={HARMED[name]}" for name in HARMLESS)


# What there may be


def assert_whole(path: str | Path) -> None:
    """Its bytes are those that follow from the images seen its name says."""
    resolution, images = re.match(r"r(\d{4})-hold-(\d{9})", Path(path).name).groups()  # type: ignore[union-attr]
    there = {file.name: file.read_bytes() for file in Path(path).iterdir() if file.name != commits.MANIFEST}
    assert there == files_of(int(images), stage_end=int(images) == 80, resolution=int(resolution)), path


def newest(location: Path) -> int | None:
    """Images seen by the newest valid checkpoint, compared to the bit."""
    found, passed = commits.find(location)
    assert not passed, "half a checkpoint lies under a final name"
    chosen, damaged = commits.newest_valid(found)
    assert not damaged
    for one in found:
        assert_whole(one.path)
    return chosen[0].images_seen if chosen else None


def assert_next_start_cleans_up(location: Path) -> None:
    """No hand cleaning: a start as any other, and only checkpoints and terms are left, the same as before."""
    before = newest(location)
    term = save_process.begin(location)
    commits.remove_orphans(location)
    assert newest(location) == before
    assert term.starts[term.number] == (before or 0)
    names = [path.name for path in location.iterdir()]
    assert [name for name in names if not re.fullmatch(r"r\d{4}-hold-\d{9}(-t\d+)?|term-\d{6}\.json", name)] == []


def lived_in(folder: Path) -> Path:
    """Checkpoints of a run that was killed while it deleted."""
    location = folder / "checkpoints"
    save_process.begin(location)
    for images in (100, 120, 140, OLD):
        save_process.commit(location, images)
    save_process.commit(location, 80, stage_end=True, resolution=4)
    orphan = location / ".partial-r0008-hold-000000090-retired"
    orphan.mkdir()
    shutil.copy(location / "r0008-hold-000000100" / "state.json", orphan)
    return location


def assert_nothing_is_lost(location: Path) -> None:
    """What every clean-up leaves at every instant."""
    assert newest(location) == OLD
    names = {one.name for one in commits.find(location)[0]}
    assert {FINAL, PINNED, f"r0008-hold-{OLD:09d}"} <= names


SAVE: list[Step] = [["commit", NEW]]
CLEAN_UP: list[Step] = [["retire", 1, OLD, [PINNED]], ["orphans"]]
TERM: list[Step] = [["begin"]]


# What a process does


def recorded(folder: Path, prepared: Callable[[Path], Path], steps: list[Step], without: str = "") -> Recording:
    """The steps' changes of `folder`/source, by strace; as it was before, it lies in `folder`/before."""
    source = folder / "source"
    source.mkdir(parents=True)
    location = prepared(source)
    shutil.copytree(source, folder / "before")
    recording = Recording(source, inode_of(source), MILESTONE)
    with harmed(log=folder / "log") as process:
        answer = process.ask(location, *steps, without=without)
    assert set(answer["outcomes"]) == {"done"}
    recording.add((folder / f"log.{answer['pid']}").read_text())
    assert {name for name, _ in recording.calls} <= set(HARMLESS)
    return recording


@contextmanager
def copied(folder: Path, location: Path) -> Iterator[Path]:
    """`location`, which lies in `folder`/source, as it was before the recording."""
    shutil.copytree(folder / "before", folder / "copy")
    yield folder / "copy" / location.relative_to(folder / "source")
    shutil.rmtree(folder / "copy")


# F01 and F07: killed


def kill_everywhere(folder: Path, prepared: Callable[[Path], Path], steps: list[Step],
                    check: Callable[[Path, bool], None]) -> Counter[str]:
    """Kills the steps before each call that changes the disk, and checks what is left. -> calls by name"""
    locations: list[Path] = []
    recording = recorded(folder, lambda source: locations.append(prepared(source)) or locations[0], steps)
    with harmed(*KILL) as process:
        for call in recording.calls:
            with copied(folder, locations[0]) as location:
                assert process.ask(location, *steps, reach=call)["killed"]
                check(location, False)
                assert_next_start_cleans_up(location)
    check(locations[0], True)
    assert_next_start_cleans_up(locations[0])
    tried = Counter(name for name, _ in recording.calls)
    print(f"killed at {tried.total()} system calls: {dict(tried)}")
    return tried


def test_f01_a_save_killed_at_any_call_leaves_the_old_or_the_new_checkpoint_and_the_next_start_cleans_up(
        quick: Path) -> None:
    """SIGKILL at every system call of a save that may change the disk"""
    def check(location: Path, done: bool) -> None:
        assert newest(location) in ((NEW,) if done else (OLD, NEW))
        assert_whole(location / f"r0008-hold-{OLD:09d}")

    tried = kill_everywhere(quick, lived_in, SAVE, check)
    assert tried == {"mkdir": 1, "openat": 6, "write": 6, "fsync": 6 + 2, "rename": 1}


def test_f01_the_first_term_and_save_of_a_run_killed_at_any_call_leave_none_or_the_new_checkpoint(quick: Path) -> None:
    """SIGKILL at every system call of a run's first start and save"""
    def check(location: Path, done: bool) -> None:
        assert newest(location) in ((NEW,) if done else (None, NEW))

    tried = kill_everywhere(quick, lambda folder: folder / "runs" / "tiny" / "checkpoints", [["begin"], *SAVE], check)
    assert tried.total() >= 32
    assert tried["mkdir"] == 4
    assert tried["link"] == 1


def test_f01_a_term_killed_at_any_call_has_begun_or_not(quick: Path) -> None:
    """SIGKILL at every system call of a start that takes the run over"""
    def check(location: Path, done: bool) -> None:
        assert_nothing_is_lost(location)
        assert commits.terms(location) in (({1: 0, 2: OLD},) if done else ({1: 0}, {1: 0, 2: OLD}))

    tried = kill_everywhere(quick, lived_in, TERM, check)
    assert tried["link"] == tried["unlink"] == 1
    assert tried["fsync"] >= 2


def test_f07_a_clean_up_killed_at_any_call_loses_no_resume_point_no_final_and_nothing_pinned(quick: Path) -> None:
    """SIGKILL at every system call of retention and of the removal of orphans"""
    def check(location: Path, done: bool) -> None:
        assert_nothing_is_lost(location)
        if done:
            assert len(list(location.iterdir())) == 4

    tried = kill_everywhere(quick, lived_in, CLEAN_UP, check)
    assert tried["rename"] == 2  # of the checkpoints at 100 and 140 images
    assert tried["unlinkat"] >= 13


# F02: power cuts


def power_cuts(folder: Path, recording: Recording, location: Path, check: Callable[[Path, set[str]], None]) -> int:
    """Checks every state a power cut may leave, late ones first, each also after the next start. -> how many"""
    tried: set[Any] = set()
    crashed = folder / "crashed"
    for count in reversed(range(len(recording.operations) + 1)):
        done = {operation.name for operation in recording.operations[:count] if isinstance(operation, Milestone)}
        for tree in recording.states(count):
            if (state := (frozen(tree), frozenset(done))) not in tried:
                tried.add(state)
                look_at(tree, crashed, crashed / location.relative_to(recording.root), done, check)
    print(f"power cut in {len(tried)} states at {len(recording.operations) + 1} points")
    return len(tried)


def look_at(tree: Tree, folder: Path, location: Path, done: set[str], check: Callable[[Path, set[str]], None]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    materialise(tree, folder)
    check(location, done)
    assert_next_start_cleans_up(location)


def old_or_new(location: Path, done: set[str]) -> None:
    assert newest(location) in ((NEW,) if "commit" in done else (OLD, NEW))


def none_or_new(location: Path, done: set[str]) -> None:
    assert newest(location) in ((NEW,) if "commit" in done else (None, NEW))
    if "begin" in done:
        assert commits.terms(location)[1] == 0


def fresh(folder: Path) -> Path:
    return folder / "runs" / "tiny" / "checkpoints"


def bare(folder: Path) -> Path:
    """One checkpoint and no orphans, which make more states of the same kind."""
    location = folder / "checkpoints"
    save_process.begin(location)
    save_process.commit(location, OLD)
    return location


def test_f02_a_power_cut_at_any_point_of_a_save_leaves_the_old_or_the_new_checkpoint(quick: Path) -> None:
    """every state a power cut may leave during and after a save"""
    recording = recorded(quick, bare, SAVE)
    assert power_cuts(quick, recording, recording.root / "checkpoints", old_or_new) >= 200


def test_f02_a_power_cut_at_any_point_of_a_runs_first_save_leaves_none_or_the_new_checkpoint(quick: Path) -> None:
    """every state a power cut may leave during and after a run's first start and save"""
    recording = recorded(quick, fresh, [["begin"], *SAVE])
    assert power_cuts(quick, recording, fresh(recording.root), none_or_new) >= 200


def test_f02_a_folder_whose_maker_was_killed_before_it_was_durable_is_made_durable_by_the_next_start(
        quick: Path) -> None:
    """a kill after the folder was made, then power cuts around the next start and save"""
    recording = recorded(quick, lambda folder: folder / "checkpoints", [["mkdir"], ["begin"], *SAVE])
    assert power_cuts(quick, recording, recording.root / "checkpoints", none_or_new) >= 200


def test_f02_a_start_makes_durable_the_run_folder_that_another_made(
        quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """folders of a run made by a process that was killed before it synced the one above"""
    location, synced, sync = fresh(quick), set(), os.fsync
    location.mkdir(parents=True)

    def watched(descriptor: int) -> None:
        synced.add(Path(f"/proc/self/fd/{descriptor}").readlink())
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    commits.begin_term(location, None)
    assert synced >= {location, location.parent, location.parents[1]}


def test_f02_a_term_that_has_begun_is_never_lost(quick: Path) -> None:
    """every state a power cut may leave while a start takes the run over"""
    def check(location: Path, done: set[str]) -> None:
        assert newest(location) == OLD
        known = commits.terms(location)
        assert commits._term_numbers(location) == sorted(known), "half a term"
        assert known[1] == 0
        assert "begin" not in done or known[2] == OLD

    recording = recorded(quick, bare, TERM)
    assert power_cuts(quick, recording, recording.root / "checkpoints", check) >= 5


def test_f02_a_power_cut_at_any_point_of_a_clean_up_loses_no_resume_point_no_final_and_nothing_pinned(
        quick: Path) -> None:
    """every state a power cut may leave while old checkpoints and orphans are deleted"""
    recording = recorded(quick, lived_in, CLEAN_UP)
    location = recording.root / "checkpoints"
    assert power_cuts(quick, recording, location, lambda location, _: assert_nothing_is_lost(location)) >= 200


@pytest.mark.parametrize(("without", "steps"), [
    ("file sync", SAVE), ("sync of the new folder", SAVE), ("sync of the folder above", SAVE),
    ("any folder sync", SAVE), ("manifest", SAVE), ("the old one until the new is durable", SAVE),
    ("rename before deleting", CLEAN_UP), ("any folder sync", CLEAN_UP), ("sync of a term's file", TERM),
    ("sync of a term's folder", TERM)], ids=lambda value: value if isinstance(value, str) else value[0][0])
def test_f02_a_writer_without_one_of_its_precautions_is_caught(quick: Path, without: str, steps: list[Step]) -> None:
    """the same for writers that forget a sync, the manifest, the order, or the rename before a deletion"""
    def check(location: Path, done: set[str]) -> None:
        if steps == SAVE:
            old_or_new(location, done)
        elif steps == CLEAN_UP:
            assert_nothing_is_lost(location)
        else:
            assert "begin" not in done or commits.terms(location).get(2) == OLD

    recording = recorded(quick, lived_in if steps == CLEAN_UP else bare, steps, without)
    with pytest.raises(AssertionError):
        power_cuts(quick, recording, recording.root / "checkpoints", check)


# F05 and F06: harmed


def harm_everywhere(folder: Path, error: str, names: set[str]) -> int:
    """Lets one call after another of a save fail; then all is as before, and the next try succeeds. -> how many"""
    locations: list[Path] = []
    recording = recorded(folder, lambda source: locations.append(lived_in(source)) or locations[0], SAVE)
    calls = [call for call in recording.calls if call[0] in names]
    before = {path.name for path in (folder / "before" / "checkpoints").iterdir()}
    with harmed(*(f"{name}:error={error}:when={HARMED[name]}" for name in names), log=folder / "harmed") as process:
        for call in calls:
            with copied(folder, locations[0]) as location:
                assert process.ask(location, *SAVE, reach=call)["outcomes"] == [error]
                assert newest(location) == OLD
                assert {path.name for path in location.iterdir()} == before  # nothing deleted, and no leftover
                twice = process.ask(location, *SAVE, *SAVE, reach=call)
                assert twice["outcomes"] == [error, "done"]
                assert newest(location) == NEW
                assert {path.name for path in location.iterdir()} - before == {f"r0008-hold-{NEW:09d}"}
    print(f"{error} at {len(calls)} system calls")
    return len(calls)


def test_f05_no_space_at_any_call_of_a_save_changes_nothing_and_the_next_try_succeeds(quick: Path) -> None:
    """ENOSPC at every system call of a save that takes space"""
    assert harm_everywhere(quick, "ENOSPC", {"mkdir", "openat", "write", "fsync", "rename"}) == 22


@pytest.mark.parametrize("error", ["EIO", "EDQUOT"])
def test_f06_an_error_at_any_call_of_a_save_changes_nothing_and_the_next_try_succeeds(quick: Path, error: str) -> None:
    """EIO and EDQUOT at every system call of a save that may meet them"""
    assert harm_everywhere(quick, error, {"mkdir", "openat", "write", "fsync", "rename"}) == 22


def test_f06_after_a_failed_sync_every_file_is_written_anew(quick: Path) -> None:
    """EIO at each fsync of a save: the kernel may have dropped what it could not write, and say so once"""
    locations: list[Path] = []
    recording = recorded(quick, lambda source: locations.append(bare(source)) or locations[0], SAVE)
    syncs, pids = [call for call in recording.calls if call[0] == "fsync"], []
    with harmed(f"fsync:error=EIO:when={HARMED['fsync']}", log=quick / "harmed") as process:
        for call in syncs:
            with copied(quick, locations[0]) as location:
                pids.append(process.ask(location, *SAVE, *SAVE, reach=call)["pid"])
    for pid in pids:
        before, after = (quick / f"harmed.{pid}").read_text().split("(INJECTED)")
        assert after.count("O_CREAT|O_EXCL") == len(files_of(NEW)) + 1
    assert len(pids) == 8


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    disk = folder / "disk"
    disk.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", disk],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        yield disk
    finally:
        subprocess.run(["umount", disk], check=True)


@contextmanager
def saver(location: Path, retry_s: float) -> Iterator[Saver]:
    checkpoints = dataclasses.replace(RUN.checkpoints, retry_s=retry_s)
    started = Saver(dataclasses.replace(RUN, checkpoints=checkpoints), str(location), commits.Term())
    try:
        yield started
    finally:
        started.close()


def events_until(saver: Saver, kind: str) -> list[dict[str, Any]]:
    """All that happens up to the first event of a kind."""
    events: list[dict[str, Any]] = []
    deadline = time.monotonic() + 60
    while kind not in [event["event"] for event in events]:
        assert time.monotonic() < deadline, events
        events += saver.events()
        time.sleep(0.005)
    return events


def fill(disk: Path, but: int) -> Path:
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(bytes(1 << 12)):
            pass
    os.truncate(ballast, ballast.stat().st_size - but)
    return ballast


def test_f05_a_save_on_a_full_disk_is_told_with_the_bytes_tried_again_and_succeeds_when_there_is_space(
        tmp_path: Path) -> None:
    """a disk that is really full, and then is not"""
    state = trained()
    size = sum(file.stat().st_size for file in Path(checkpoint.save(tmp_path / "sized", state, info())).iterdir())
    with small_disk(tmp_path, 4 * size + (1 << 16)) as disk, saver(disk / "checkpoints", retry_s=3600) as saving:
        saving.save(state, info())
        (first,) = events_until(saving, "checkpoint")
        before = commits.read(first["path"])
        ballast = fill(disk, but=size // 2)
        step(state, 1, 9)
        saving.save(state, info())
        (failed,) = events_until(saving, "save_failed")
        free, tensors = shutil.disk_usage(disk).free, checkpoint.tensors_of(state)
        needed = sum(tensor.numel() * tensor.element_size() for part in tensors.values() for tensor in part.values())
        assert failed == {"event": "save_failed", "images_seen": 112, "resolution": 8, "phase": "fade", "failures": 1,
                          "reason": f"No space left on device; it needs {needed:,} bytes, {free:,} are free"}
        assert [path.name for path in (disk / "checkpoints").iterdir()] == [Path(first["path"]).name]
        assert commits.read(first["path"]) == before
        ballast.unlink()
        saving.wait(hurry=True)
        (second,) = saving.events()
        assert (second["event"], second["images_seen"]) == ("checkpoint", 112)
        assert commits.read(second["path"])
        assert saving.failures == 0


def assert_three_failures_end_it(saving: Saver, location: Path, state: TrainState, said: str) -> None:
    """Each is told as failed, none as a checkpoint; then comes the fault with its own exit code."""
    (first,) = commits.find(location)[0]
    before = commits.read(first.path)
    step(state, 1, 9)
    saving.save(state, info())
    saving.wait()
    happened = saving.events()
    events = list(itertools.islice(happened, FAILED_SAVES_IN_A_ROW))
    with pytest.raises(SaveFault, match=said) as caught:
        next(happened)
    assert [(event["event"], event["failures"]) for event in events] == [("save_failed", n + 1) for n in range(3)]
    assert all(said in event["reason"] for event in events)
    assert caught.value.exit_code == 4
    assert "\n" not in str(caught.value)
    assert str(location) in str(caught.value)
    assert [path.name for path in location.iterdir()] == [first.name]
    assert commits.read(first.path) == before


def test_f05_three_saves_in_a_row_on_a_full_disk_end_the_run_with_the_old_checkpoint_intact(tmp_path: Path) -> None:
    """a disk that stays full"""
    state = trained()
    with small_disk(tmp_path, 1 << 20) as disk, saver(disk / "checkpoints", retry_s=0) as saving:
        saving.save(state, info())
        events_until(saving, "checkpoint")
        fill(disk, but=1 << 12)
        assert_three_failures_end_it(saving, disk / "checkpoints", state, "No space left on device; it needs ")


def test_f06_three_saves_in_a_row_on_a_disk_turned_read_only_end_the_run(tmp_path: Path) -> None:
    """a disk mounted read-only under the run"""
    state = trained()
    with small_disk(tmp_path, 1 << 20) as disk, saver(disk / "checkpoints", retry_s=0) as saving:
        saving.save(state, info())
        events_until(saving, "checkpoint")
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        assert_three_failures_end_it(saving, disk / "checkpoints", state, "Read-only file system")


def test_f06_three_saves_in_a_row_into_a_folder_without_permission_end_the_run(quick: Path) -> None:
    """a folder that the run's user may read and not write"""
    state, user = trained(), os.geteuid()
    location = quick / "checkpoints"
    with saver(location, retry_s=0) as saving:
        saving.save(state, info())
        events_until(saving, "checkpoint")
        quick.chmod(0o755)
        location.chmod(0o555)
        try:
            if user == 0:
                os.seteuid(65534)  # root may write anywhere
            assert_three_failures_end_it(saving, location, state, "Permission denied")
        finally:
            os.seteuid(user)


def test_f06_a_save_for_which_there_is_no_memory_is_told_and_tried_again(
        quick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """MemoryError in the saver's thread, once; then three times in a row"""
    errors, commit = [MemoryError()], commits.commit

    def short_of_memory(*arguments: Any) -> str:
        if errors:
            raise errors.pop()
        return commit(*arguments)

    monkeypatch.setattr(checkpoint, "commit", short_of_memory)
    state = trained()
    with saver(quick / "checkpoints", retry_s=0) as saving:
        saving.save(state, info())
        failed, _ = events_until(saving, "checkpoint")
        assert (failed["event"], failed["reason"]) == ("save_failed", "no memory for a file's bytes")
        errors += [MemoryError() for _ in range(FAILED_SAVES_IN_A_ROW)]
        assert_three_failures_end_it(saving, quick / "checkpoints", state, "no memory for a file's bytes")


# F07: histories


@dataclass
class Written:
    """A checkpoint as the model of `test_f07_in_any_history...` knows it."""

    images: int
    stage_end: bool
    term: int
    weights_whole: bool = True
    state_whole: bool = True


@dataclass
class History:
    """A run's folder and, slow and plain, what should be in it."""

    location: Path
    starts: dict[int, int] = field(default_factory=dict)  # by term
    written: dict[str, Written] = field(default_factory=dict)

    def counting(self) -> list[str]:
        def ended(one: Written) -> bool:
            return any(number > one.term and start < one.images for number, start in self.starts.items())

        names = [name for name, one in self.written.items() if one.state_whole and not ended(one)]
        return sorted(names, key=lambda name: (self.written[name].images, self.written[name].term, name))

    def newest(self) -> str | None:
        whole = [name for name in self.counting() if self.written[name].weights_whole]
        return whole[-1] if whole else None

    def begin(self, choice: int) -> None:
        there = [name for name in self.counting() if self.written[name].weights_whole]
        name = there[choice % len(there)] if there else None
        start = commits.describe(self.location / name) if name else None
        self.starts[len(self.starts) + 1] = self.written[name].images if name else 0
        assert commits.begin_term(self.location, start).starts == self.starts

    def commit(self, later: int, stage_end: bool, late: int) -> None:
        """By the holder or, if `late`, by one that was fenced after it had looked whether it was."""
        number = max(1, len(self.starts) - late)
        images = self.starts[number] + later
        term = commits.Term(number, {n: start for n, start in self.starts.items() if n <= number})
        with pytest.MonkeyPatch.context() as patch:
            if number < len(self.starts):
                with pytest.raises(commits.Fenced):
                    save_process.commit(self.location, images, stage_end, term=term)
                patch.setattr(commits, "refuse_if_fenced", lambda location, term: None)
            name = Path(save_process.commit(self.location, images, stage_end, term=term)).name
        assert name not in self.written
        self.written[name] = Written(images, stage_end, number)

    def damage(self, choice: int, state: bool) -> None:
        if not self.written:
            return
        name = sorted(self.written)[choice % len(self.written)]
        path = self.location / name / ("state.json" if state else "average.safetensors")
        content = bytearray(path.read_bytes())
        content[-2] ^= 1
        path.write_bytes(content)
        one = self.written[name]
        one.weights_whole, one.state_whole = one.weights_whole ^ (not state), one.state_whole ^ state

    def retire(self, keep: int, now: int, pins: list[int]) -> None:
        pinned = {sorted(self.written)[pin % len(self.written)] for pin in pins if self.written}
        candidates = [name for name in self.counting() if name not in pinned and not self.written[name].stage_end
                      and self.written[name].images <= now]
        doomed = [name for number, name in enumerate(candidates)
                  if sum(self.written[later].weights_whole for later in candidates[number + 1:]) >= keep]
        before = self.newest()
        assert commits.retire(self.location, keep, now, pinned) == doomed
        for name in doomed:
            del self.written[name]
        assert self.newest() == before

    def assert_agrees(self) -> None:
        found, _ = commits.find(self.location)
        assert [one.name for one in found] == self.counting()
        chosen, _ = commits.newest_valid(found)
        assert (chosen[0].name if chosen else None) == self.newest()
        if chosen:
            assert chosen[1] == files_of(chosen[0].images_seen, chosen[0].stage_end)
        assert {path.name for path in self.location.glob("[!t]*")} == set(self.written)


STEP = st.one_of(
    st.tuples(st.just("begin"), st.integers(0, 9)),
    st.tuples(st.just("commit"), st.integers(1, 9), st.booleans(), st.sampled_from([0, 0, 0, 1, 2])),
    *[st.tuples(st.just("commit"), st.integers(1, 9), st.just(False), st.just(0))] * 2,
    st.tuples(st.just("damage"), st.integers(0, 9), st.booleans()),
    st.tuples(st.just("retire"), st.integers(1, 3), st.integers(1, 30), st.lists(st.integers(0, 9), max_size=2)))


def test_f07_in_any_history_what_counts_is_newest_and_is_deleted_is_what_a_slow_plain_model_says() -> None:
    """random histories of saves, takeovers, late saves of fenced holders, damage and retention"""
    steps = 0

    @settings(max_examples=120, deadline=None, database=None, derandomize=True,
              suppress_health_check=[HealthCheck.too_slow])
    @given(st.lists(STEP, min_size=4, max_size=16))
    @example([("commit", 1, False, 0), ("commit", 2, False, 0), ("damage", 1, False), ("retire", 1, 30, [])])
    @example([("commit", 3, False, 0), ("begin", 0), ("begin", 1), ("commit", 5, False, 2), ("retire", 1, 30, [])])
    def agree(history: list[tuple[Any, ...]]) -> None:
        nonlocal steps
        memory = Path("/dev/shm")
        with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
            model = History(Path(folder))
            model.begin(0)
            for name, *arguments in history:
                getattr(model, name)(*arguments)
                model.assert_agrees()
                steps += 1

    agree()
    print(f"{steps} steps of random histories")
    assert steps >= 500
