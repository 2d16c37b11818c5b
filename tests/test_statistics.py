"""Claims about statistics of reals that are kept on a node: never computed twice, never believed when damaged."""

import errno
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from gradine.stages import statistics
from gradine.stages.statistics import Remembered

FACTS = {"data": "ab12", "resolution": 32, "seed": 0, "count": 500, "features": "cd34"}
ENOUGH = 10**9


class Counted:
    """What to compute, and how often it was."""

    def __init__(self, **made: Tensor) -> None:
        self.made = made or {"mean": torch.arange(3.0, dtype=torch.float64), "count": torch.tensor(500)}
        self.times = 0

    def __call__(self) -> dict[str, Tensor]:
        self.times += 1
        return self.made


def only_file(folder: Path) -> Path:
    found, = folder.glob("*.safetensors")
    return found


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == value.dtype and torch.equal(found[name], value) for name, value in expected.items())


def test_what_is_kept_is_computed_once_and_comes_back_to_the_last_bit(tmp_path):
    compute = Counted(moments=torch.randn(5, 3, dtype=torch.float64).T, side=torch.tensor(32),
                      features=torch.randn(4, 2), none=torch.zeros(0, 7), view=torch.arange(9.0)[::2])
    for _ in range(3):
        remembered = Remembered(tmp_path / "statistics", FACTS, ENOUGH)
        assert same(remembered("fd", compute), compute.made)
        assert remembered.notes == []
    assert compute.times == 1


def test_facts_and_names_that_differ_never_meet(tmp_path):
    facts = [FACTS, *({**FACTS, key: value} for key, value in (
        ("data", "ab13"), ("resolution", 64), ("seed", 1), ("count", 501), ("count", 500.0), ("features", "cd34 "),
        ("features", None), ("more", 1), ("data", 'ab12", "seed": 1')))]
    for index, each in enumerate(facts):
        for name in ("fd", "kid"):
            Remembered(tmp_path, each, ENOUGH)(name, Counted(value=torch.tensor([index, len(name)])))
    for index, each in enumerate(facts):
        for name in ("fd", "kid"):
            again = Counted()
            found = Remembered(tmp_path, dict(reversed(each.items())), ENOUGH)(name, again)
            assert found["value"].tolist() == [index, len(name)]
            assert again.times == 0


def test_another_schema_computes_anew(tmp_path, monkeypatch):
    compute = Counted()
    Remembered(tmp_path, FACTS, ENOUGH)("fd", compute)
    monkeypatch.setattr(statistics, "SCHEMA", statistics.SCHEMA + 1)
    Remembered(tmp_path, FACTS, ENOUGH)("fd", compute)
    assert compute.times == 2


def used_despite(tmp_path: Path, content: bytes) -> bool:
    """Whether a file of this content is used; else it must be noted, computed anew and replaced by a whole one."""
    path, compute = only_file(tmp_path), Counted()
    path.write_bytes(content)
    remembered = Remembered(tmp_path, FACTS, ENOUGH)
    assert same(remembered("fd", compute), compute.made)
    if not compute.times:
        return True
    assert str(path) in remembered.notes[0]
    assert same(Remembered(tmp_path, FACTS, ENOUGH)("fd", compute), compute.made)
    assert compute.times == 1
    return False


@pytest.fixture
def whole(tmp_path, monkeypatch) -> bytes:
    monkeypatch.setattr("os.fsync", lambda _: None)  # a thousand of them take long
    Remembered(tmp_path, FACTS, ENOUGH)("fd", Counted())
    return only_file(tmp_path).read_bytes()


def test_a_file_with_any_byte_changed_is_never_used(tmp_path, whole):
    assert used_despite(tmp_path, whole)
    for place in range(len(whole)):
        for change in (1 << place % 8, 0xFF):
            flipped = bytearray(whole)
            flipped[place] ^= change
            assert not used_despite(tmp_path, bytes(flipped)), f"byte {place} of {len(whole)}"


def test_a_file_cut_short_or_with_more_at_its_end_is_never_used(tmp_path, whole):
    for length in range(len(whole)):
        assert not used_despite(tmp_path, whole[:length])
    assert not used_despite(tmp_path, whole + b"\0")
    assert not used_despite(tmp_path, bytes(len(whole)))


def test_files_of_others_under_this_name_are_never_used(tmp_path, whole):
    Remembered(tmp_path / "others", {**FACTS, "seed": 7}, ENOUGH)("fd", Counted(mean=torch.zeros(3)))
    for foreign in (only_file(tmp_path / "others").read_bytes(), safetensors.torch.save(Counted().made),
                    safetensors.torch.save(Counted().made, {"facts": json.dumps(FACTS), "sha256": "0" * 64}),
                    b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.", b""):
        assert not used_despite(tmp_path, foreign)


def test_a_folder_in_place_of_the_file_is_noted_and_done_without(tmp_path, whole):
    path = only_file(tmp_path)
    path.unlink()
    path.mkdir()
    remembered, compute = Remembered(tmp_path, FACTS, ENOUGH), Counted()
    assert same(remembered("fd", compute), compute.made)
    assert "unreadable" in remembered.notes[0]
    assert "not kept" in remembered.notes[1]


COMPUTING = """
import sys, time, torch
from pathlib import Path
from gradine.stages.statistics import Remembered

def compute():
    print("computing", flush=True)
    time.sleep(1)
    return {"value": torch.tensor([3.0])}

Remembered(Path(sys.argv[1]), {"data": "x"}, 10**9)("fd", compute)
"""


@pytest.mark.parametrize("dies", [False, True])
def test_while_another_process_computes_one_waits_for_the_result_and_computes_only_if_it_dies(tmp_path, dies):
    command = [sys.executable, "-c", COMPUTING, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "computing\n"
        if dies:
            other.kill()
        compute = Counted(value=torch.tensor([3.0]))
        assert Remembered(tmp_path, {"data": "x"}, ENOUGH)("fd", compute)["value"].tolist() == [3.0]
        assert compute.times == dies


def test_one_that_fails_to_compute_leaves_the_next_to_do_it(tmp_path):
    def broken():
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        Remembered(tmp_path, FACTS, ENOUGH)("fd", broken)
    compute = Counted()
    Remembered(tmp_path, FACTS, ENOUGH)("fd", compute)
    assert compute.times == 1


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_a_disk_that_takes_nothing_costs_time_only(tmp_path, monkeypatch, code):
    def refuse(path, content):
        raise OSError(code, "it would not")

    monkeypatch.setattr(statistics, "write_atomic", refuse)
    compute = Counted()
    for times in (1, 2):
        remembered = Remembered(tmp_path, FACTS, ENOUGH)
        assert same(remembered("fd", compute), compute.made)
        assert compute.times == times
        assert len(remembered.notes) == 1
        assert "not kept" in remembered.notes[0]


def test_a_folder_that_cannot_be_made_costs_time_only_and_what_it_holds_is_read_without_a_lock(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    compute = Counted()
    remembered = Remembered(tmp_path / "file" / "statistics", FACTS, ENOUGH)
    assert same(remembered("fd", compute), compute.made)
    assert len(remembered.notes) == 1

    Remembered(tmp_path, FACTS, ENOUGH)("fd", compute)
    monkeypatch.setattr("fcntl.flock", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOLCK, "no locks")))
    assert same(Remembered(tmp_path, FACTS, ENOUGH)("fd", compute), compute.made)
    assert compute.times == 2


def test_the_budget_holds_for_the_folder_and_those_used_longest_ago_go(tmp_path):
    of_kilobytes = [Counted(value=torch.full((250,), float(n))) for n in range(4)]  # 1,000 bytes and a header
    budget = 3 * 1500

    def remember(n: int) -> None:
        Remembered(tmp_path, {"n": n}, budget)("fd", of_kilobytes[n])
        time.sleep(0.02)  # files' times have to differ

    for n in (0, 1, 2, 0, 3):  # 1 was used longest ago when 3 came
        remember(n)
        assert sum(path.stat().st_size for path in tmp_path.glob("*.safetensors")) <= budget
    for n in (0, 2, 3, 1):
        remember(n)
    assert [one.times for one in of_kilobytes] == [1, 2, 1, 1]


def test_what_is_larger_than_the_whole_budget_is_not_kept_and_removes_nothing(tmp_path):
    small, large = Counted(), Counted(value=torch.zeros(1000))
    Remembered(tmp_path, {"n": 0}, 2000)("fd", small)
    remembered = Remembered(tmp_path, {"n": 1}, 2000)
    assert same(remembered("fd", large), large.made)
    assert "more than the 2,000 of the cache. Raise data.cache_gb" in remembered.notes[0]
    Remembered(tmp_path, {"n": 0}, 2000)("fd", small)
    assert small.times == 1
