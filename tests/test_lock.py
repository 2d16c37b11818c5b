"""Claims about who may write: one process, whether its disk is this machine's, many machines' or an object store."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO

import pytest

from gradine.configs.schema import UserError
from gradine.pipeline import lock
from tests.object_store import BUCKET, aws, moto

__all__ = ["moto"]

# ---- Two processes and more

HOLD = """
import sys, time
from pathlib import Path
from gradine.configs.schema import UserError
from gradine.pipeline import lock
place, disk, lease_s, take_over = sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4:] == ["--take-over"]
here = lock.process()
for name in ("host", "boot", "pid_namespace"):
    if sys.argv[4:] == ["--another-" + name]:
        lock.process = lambda name=name: {**here, name: "another"}
try:
    with (lock.lease(place, take_over, lease_s, lease_s / 8) if disk == "lease" else
          lock.held(Path(place), take_over, disk, lease_s, lease_s / 8)) as held:
        print("held", flush=True)
        for asked in sys.stdin:
            print(held.lost, flush=True)
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


class Process:
    """A process that wants a lock; `said` is the next line it says."""

    def __init__(self, place: object, disk: str, lease_s: float = 60.0, *more: str) -> None:
        self.of = subprocess.Popen([sys.executable, "-c", HOLD, str(place), disk, str(lease_s), *more], text=True,
                                   stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.pid = self.of.pid

    def said(self) -> str:
        return pipe(self.of.stdout).readline().strip()

    def lost(self) -> str:
        pipe(self.of.stdin).write("?\n")
        pipe(self.of.stdin).flush()
        return self.said()

    def kill(self) -> None:
        self.of.kill()
        self.of.wait()

    def end(self) -> None:
        self.kill()
        pipe(self.of.stdout).close()
        with suppress(BrokenPipeError):
            pipe(self.of.stdin).close()

    def leave(self) -> int:
        pipe(self.of.stdin).close()
        return self.of.wait(30)


def pipe(stream: IO[str] | None) -> IO[str]:
    assert stream
    return stream


@contextmanager
def processes(*arguments: tuple) -> Iterator[list[Process]]:
    """They run at once; whatever is left of them is ended."""
    with ExitStack() as ended:
        started = []
        for each in arguments:
            started.append(Process(*each))
            ended.callback(started[-1].end)
        yield started


def refusal(place: object, disk: str, lease_s: float = 60.0, take_over: bool = False) -> str:
    with pytest.raises(UserError) as caught, (
            lock.lease(str(place), take_over, lease_s) if disk == "lease" else
            lock.held(Path(str(place)), take_over, disk, lease_s)):
        pass
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize("disk", ["local", "shared", "unknown", "lease"])
def test_f08_a_second_process_is_refused_within_seconds_naming_pid_host_and_start_and_the_way_out(
        tmp_path: Path, disk: str) -> None:
    """A second process on one run folder: flock, lease, both; and on a folder of checkpoints."""
    with processes((tmp_path, disk)) as (first,):
        assert first.said() == "held"
        began = time.monotonic()
        said = refusal(tmp_path, disk)
        assert time.monotonic() - began < 5
        for part in (f"in use by pid {first.pid} on {socket.gethostname()} since {time.strftime('%Y-%m-')}",
                     "Wait for it, stop it", "another name="):
            assert part in said
        assert ("--take-over" in said) == (disk == "shared")
        with processes((tmp_path, disk)) as (second,):
            assert f"pid {first.pid} on" in second.said()
            assert second.of.wait(30) == 2
        assert first.lost() == "None"
        assert first.leave() == 0
    with processes((tmp_path, disk)) as (third,):  # what its holder left is free at once
        assert third.said() == "held"


@pytest.mark.fault
def test_f08_the_command_itself_exits_with_2_where_another_process_trains(tmp_path: Path) -> None:
    """`gradine train` on a run folder whose lock a live process holds."""
    (tmp_path / "c.yaml").write_text(f"name: x\nruns: {tmp_path}/runs\nstages: [{{resolution: 4}}]\n"
                                     "data: {source: a, shards: b}\n")
    with processes((tmp_path / "runs" / "x", "local")) as (first,):
        assert first.said() == "held"
        for option, way_out in (([], "another name="), (["--take-over"], f"end pid {first.pid} on this host")):
            second = subprocess.run([sys.executable, "-m", "gradine.pipeline", "train", str(tmp_path / "c.yaml"),
                                     *option], capture_output=True, text=True, timeout=120)
            assert second.returncode == 2, second.stderr
            assert f"in use by pid {first.pid} on {socket.gethostname()} since " in second.stderr
            assert way_out in second.stderr
            assert second.stderr.count("\n") == 1
        assert first.lost() == "None"


@pytest.mark.fault
def test_f08_a_killed_holders_flock_is_free_at_once(tmp_path: Path) -> None:
    """SIGKILL to the holder on a local disk."""
    with processes((tmp_path, "local")) as (first,):
        assert first.said() == "held"
        first.kill()
    with lock.held(tmp_path, disk="local") as held:
        assert f"pid {os.getpid()} on " in (tmp_path / "lock").read_text()
        assert held.lost is None


@pytest.mark.fault
def test_f08_a_killed_holders_local_place_of_checkpoints_is_free_at_once(tmp_path: Path) -> None:
    """SIGKILL to the holder of a checkpoints.location on a local disk, seen from another pid namespace."""
    with processes((tmp_path, "lease", 60.0, "--another-pid_namespace")) as (first,):
        assert first.said() == "held"
        first.kill()
    with lock.lease(str(tmp_path), disk="local") as held:
        assert held.lost is None


@pytest.mark.fault
@pytest.mark.parametrize("disk", ["shared", "unknown"])
def test_f08_a_killed_holders_lease_is_free_at_once_on_its_own_machine(tmp_path: Path, disk: str) -> None:
    """SIGKILL to the holder of a lease of 60 s, then the same command on the same machine."""
    with processes((tmp_path, disk)) as (first,):
        assert first.said() == "held"
        first.kill()
    with processes((tmp_path, disk)) as (second,):
        assert second.said() == "held"
        assert second.lost() == "None"


@pytest.mark.fault
@pytest.mark.parametrize("name", ["host", "boot", "pid_namespace"])
def test_f08_a_holder_whose_pid_means_nothing_here_is_not_taken_for_dead(tmp_path: Path, name: str) -> None:
    """SIGKILL to the holder of a lease that said it runs on another machine, boot or in another container."""
    with processes((tmp_path, "shared", 60.0, f"--another-{name}")) as (first,):
        assert first.said() == "held"
        first.kill()
    assert f"in use by pid {first.pid} on " in refusal(tmp_path, "shared")


@pytest.mark.fault
@pytest.mark.parametrize("disk", ["shared", "unknown"])
def test_f08_a_killed_holders_lease_is_free_when_it_has_expired_and_not_before(tmp_path: Path, disk: str) -> None:
    """SIGKILL to the holder of a lease on another machine, whose 60 s are made 2."""
    with processes((tmp_path, disk, 2.0, "--another-host")) as (first,):
        assert first.said() == "held"
        limit, taken = time.monotonic() + 60, (tmp_path / "lease" / "000001").stat().st_mtime
        while (tmp_path / "lease" / "000001").stat().st_mtime < taken + 0.4:  # it is renewed every quarter of a second
            assert time.monotonic() < limit
            time.sleep(0.02)
        first.kill()
        last = (tmp_path / "lease" / "000001").stat().st_mtime
        assert f"pid {first.pid} on " in refusal(tmp_path, disk)
        while True:
            try:
                with lock.held(tmp_path, disk=disk, lease_s=2.0):
                    break
            except UserError:
                assert time.monotonic() < limit
                time.sleep(0.1)
        assert (tmp_path / "lease" / "000002").stat().st_mtime > last + 2.0
        with lock.held(tmp_path, disk=disk):
            pass


@pytest.mark.fault
@pytest.mark.parametrize("take_over", [True, False])
def test_f08_a_stopped_holder_that_wakes_after_the_take_over_notices_and_leaves_the_lease_alone(
        tmp_path: Path, take_over: bool) -> None:
    """SIGSTOP to the holder of a lease, a take-over asked for or after it expired, SIGCONT."""
    with processes((tmp_path, "shared", 2.0)) as (first,):
        assert first.said() == "held"
        first.of.send_signal(signal.SIGSTOP)
        if not take_over:
            time.sleep(2.2)
        with processes((tmp_path, "shared", 2.0, *["--take-over"] * take_over)) as (second,):
            assert second.said() == "held"
            first.of.send_signal(signal.SIGCONT)
            limit = time.monotonic() + 60
            while "taken over" not in (said := first.lost()):
                assert time.monotonic() < limit
                time.sleep(0.05)
            assert f"was taken over by pid {second.pid} on " in said
            assert first.leave() == 0
            time.sleep(0.5)
            assert second.lost() == "None"
            assert f"pid {second.pid} on " in refusal(tmp_path, "shared")


@pytest.mark.fault
def test_f08_a_holder_stopped_for_longer_than_its_lease_notices_at_its_first_look(tmp_path: Path) -> None:
    """A holder whose renewing thread has not woken yet."""
    with lock.held(tmp_path, disk="shared", lease_s=0.3, renew_s=1000) as first:
        time.sleep(0.5)
        with lock.held(tmp_path, disk="shared", lease_s=0.3) as second:
            assert f"taken over by pid {os.getpid()} " in str(first.lost)
            assert second.lost is None


@pytest.mark.fault
@pytest.mark.parametrize("left_by_a_kill", [b'{"holder": "pid 1 on gone since ever"}', b"", b'{"hol'])
def test_f08_of_eight_processes_that_take_an_expired_lease_at_once_one_wins(
        tmp_path: Path, left_by_a_kill: bytes) -> None:
    """Eight processes at the moment a lease is free, the file of its dead holder whole, empty or torn."""
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000007").write_bytes(left_by_a_kill)
    os.utime(tmp_path / "lease" / "000007", (1, 1))
    (tmp_path / "lease" / "000007.1-1.partial").touch()
    with processes(*[(tmp_path, "shared")] * 8) as all_of_them:
        said = [each.said() for each in all_of_them]
        (winner,) = [each for each, line in zip(all_of_them, said, strict=True) if line == "held"]
        for each, line in zip(all_of_them, said, strict=True):
            if each is not winner:
                assert "in use by " in line
                assert each.of.wait(30) == 2
        assert winner.lost() == "None"
        assert [path.name for path in (tmp_path / "lease").iterdir()] == ["000008"]


# ---- The lease, without waiting


def lease_of(tmp_path: Path, process: object) -> None:
    """A lease renewed just now."""
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000001").write_text(json.dumps({"holder": "pid 5 on there", "process": process}))


def test_a_pid_that_is_another_processs_now_does_not_keep_a_lease(tmp_path: Path) -> None:
    """Such as 1, in a container started anew."""
    lease_of(tmp_path, {**lock.process(), "started": 0})
    with lock.held(tmp_path, disk="shared"):
        pass


@pytest.mark.parametrize("process", [{}, None, "?", {"pid": 1}, {**lock.process(), "pid": "1"},
                                     {**lock.process(), "pid": 1 << 80}, lock.process()])
def test_a_lease_that_does_not_tell_a_dead_process_is_live(tmp_path: Path, process: object) -> None:
    lease_of(tmp_path, process)
    assert "in use by pid 5 on there" in refusal(tmp_path, "shared")


@pytest.mark.parametrize("disk", ["local", "shared", "unknown"])
def test_a_run_folder_may_be_the_place_of_its_checkpoints_too(tmp_path: Path, disk: str) -> None:
    with lock.held(tmp_path, disk=disk) as folder, lock.lease(str(tmp_path), disk=disk) as place:
        assert (folder.lost, place.lost) == (None, None)


def test_folders_made_for_a_lock_outlive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced, fsync = set(), os.fsync

    def note(file: int) -> None:
        synced.add(Path(f"/proc/self/fd/{file}").readlink())
        fsync(file)

    monkeypatch.setattr(os, "fsync", note)
    with lock.held(tmp_path / "runs" / "x", disk="shared"):
        assert {tmp_path, tmp_path / "runs", tmp_path / "runs" / "x"} <= synced


def test_a_lease_written_in_the_future_is_live(tmp_path: Path) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000001").write_text('{"holder": "pid 5 on there since then"}')
    os.utime(tmp_path / "lease" / "000001", (time.time() + 9e6,) * 2)
    assert "in use by pid 5 on there since then" in refusal(tmp_path, "shared")
    with lock.held(tmp_path, take_over=True, disk="shared") as held:
        assert held.lost is None


@pytest.mark.parametrize(("age_s", "free"), [(10, False), (58, False), (62, True)])
def test_a_lease_lives_for_a_minute_by_the_clock_of_its_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             age_s: float, free: bool) -> None:
    (tmp_path / "lease").mkdir()
    (tmp_path / "lease" / "000001").write_text("{}")
    os.utime(tmp_path / "lease" / "000001", (time.time() - age_s,) * 2)
    monkeypatch.setattr(time, "time", lambda: 1e12)  # this machine's clock is wrong
    if free:
        with lock.held(tmp_path, disk="shared"):
            pass
    else:
        assert "in use by another process" in refusal(tmp_path, "shared")


def test_who_is_taken_over_alive_hears_of_it_and_its_release_frees_nothing(tmp_path: Path) -> None:
    with lock.held(tmp_path, disk="shared", renew_s=0.02) as first, ExitStack() as second:
        now = second.enter_context(lock.held(tmp_path, take_over=True, disk="shared"))
        limit = time.monotonic() + 60
        while not first.lost:
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert now.lost is None
        kept = json.loads((tmp_path / "lease" / "000002").read_bytes())
        assert kept["holder"].startswith(f"pid {os.getpid()} on {socket.gethostname()} since ")
        assert "released" not in kept
        assert not (tmp_path / "lease" / "000001").exists()


def test_a_lease_whose_file_another_process_wrote_is_lost(tmp_path: Path) -> None:
    """Where a server ignores If-None-Match two may create it, and the later content stays."""
    with lock.held(tmp_path, disk="shared", renew_s=0.02) as held:
        lease = tmp_path / "lease" / "000001"
        lease.with_suffix(".new").write_text('{"holder": "pid 5 on there since then", "token": "other"}')
        lease.with_suffix(".new").rename(lease)
        limit = time.monotonic() + 60
        while not held.lost:
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert "taken over by pid 5 on there since then" in held.lost
    assert "other" in lease.read_text()


class OldList(lock.Disk):
    """A shared disk that shows a list of a minute ago until something is written."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.written = False

    def highest(self) -> int:
        return super().highest() if self.written else 1

    def create(self, number: int, content: bytes) -> bool:
        self.written = True
        return super().create(number, content)


def test_who_took_a_lease_by_an_old_list_sees_the_later_one_and_leaves(tmp_path: Path) -> None:
    (tmp_path / "000004").write_text('{"holder": "pid 5 on there since then"}')
    with pytest.raises(UserError, match="in use by pid 5 on there"), lock.Lease(
            OldList(tmp_path), "x", take_over=False, lease_s=60, renew_s=15):
        pass


def test_the_age_of_a_lease_in_an_object_store_is_told_by_its_server_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Server:
        written: dict[str, float] = {"000001": 100.0}  # noqa: RUF012

        def write(self, name: str, content: bytes) -> None:
            self.written[name] = 107.5

        def modified(self, name: str) -> float:
            return self.written[name]

    place = lock.Objects("s3://bucket/run", 60)
    monkeypatch.setattr(place, "store", Server())
    assert place.age_s(1) == 7.5


def test_a_lease_that_somebody_deleted_is_written_again_by_its_holder(tmp_path: Path) -> None:
    with lock.held(tmp_path, disk="shared", renew_s=0.02) as held:
        (tmp_path / "lease" / "000001").unlink()
        limit = time.monotonic() + 60
        while not (tmp_path / "lease" / "000001").exists():
            assert time.monotonic() < limit
            time.sleep(0.01)
        assert held.lost is None


def test_a_lock_file_replaced_by_another_process_is_lost_and_a_removed_one_not_yet(tmp_path: Path) -> None:
    with lock.held(tmp_path, disk="local") as first:
        (tmp_path / "lock").unlink()
        assert first.lost is None
        with lock.held(tmp_path, disk="local") as second:
            assert f"taken over by pid {os.getpid()} " in str(first.lost)
            assert second.lost is None


@pytest.mark.fault
def test_f08_a_lease_on_a_full_disk_is_renewed_and_released_all_the_same(tmp_path: Path) -> None:
    """A tmpfs filled to its last byte and inode while its lease is held."""
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", tmp_path],
                                      capture_output=True).returncode:
        pytest.skip("needs root and the right to mount a tmpfs")
    try:
        with lock.held(tmp_path, disk="shared", renew_s=0.05) as held:
            with (tmp_path / "filler").open("wb", buffering=0) as filler, suppress(OSError):
                while filler.write(b"x" * 4096):
                    pass
            with pytest.raises(OSError, match="No space"):
                (tmp_path / "one more").write_bytes(b"x")
            lease = tmp_path / "lease" / "000001"
            os.utime(lease, (5, 5))
            limit = time.monotonic() + 60
            while lease.stat().st_mtime == 5:
                assert time.monotonic() < limit
                time.sleep(0.01)
            assert held.lost is None
        (tmp_path / "filler").unlink()
        with lock.held(tmp_path, disk="shared"):
            pass
    finally:
        subprocess.run(["umount", tmp_path], check=True)


# ---- Which of both

MOUNTS = r"""/dev/vda / ext4 rw 0 0
proc /proc proc rw 0 0
server:/a /mnt/nfs nfs4 rw,vers=4.2 0 0
tmpfs /mnt/nfs/scratch tmpfs rw 0 0
s3 /mnt/with\040space\134back fuse.s3fs rw 0 0
x /mnt/odd newfs rw 0 0
first /mnt/twice ext4 rw 0 0
second /mnt/twice lustre rw 0 0
x /mnt ext4 rw 0 0
"""


@pytest.mark.parametrize(("path", "kind"), [
    ("/", "local"), ("/mnt", "local"), ("/mnt/nfs", "shared"), ("/mnt/nfs/runs/x", "shared"), ("/mnt/nfsx/r", "local"),
    ("/mnt/nfs/scratch/x", "local"), ("/mnt/with space\\back/x", "shared"), ("/mnt/odd/x", "unknown"),
    ("/mnt/twice/x", "shared"), ("/mnt/nfs/../odd", "unknown")])
def test_the_kind_of_a_disk_is_that_of_the_longest_mount_above(path: str, kind: str) -> None:
    assert lock.disk_kind(Path(path), MOUNTS) == kind


def test_a_folder_behind_a_link_lies_on_the_disk_the_link_leads_to(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "there")
    (tmp_path / "there").mkdir()
    mounts = f"a / ext4 rw 0 0\nb {tmp_path / 'there'} cifs rw 0 0\n"
    assert lock.disk_kind(tmp_path / "link" / "run", mounts) == "shared"


def test_this_machines_own_mounts_are_understood(tmp_path: Path) -> None:
    assert lock.disk_kind(Path("/dev/shm")) == "local"
    assert lock.disk_kind(tmp_path) in ("local", "shared", "unknown")


# ---- Object stores


@pytest.mark.fault
def test_f08_a_lease_in_an_object_store_refuses_expires_and_is_taken_over(
        moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A moto server: a second process refused; the first killed, its lease freed or expired; one taken over."""
    aws(monkeypatch, moto)
    place = f"s3://{BUCKET}/{tmp_path.name}/run"
    with processes((place, "lease")) as (first,):
        assert first.said() == "held"
        first.kill()
        with lock.lease(place):  # it is of this machine
            pass
    with processes((place, "lease", 4.0, "--another-host")) as (first,):
        assert first.said() == "held"
        said = refusal(place, "lease")
        assert f"{place} (checkpoints.location) is in use by pid {first.pid} on {socket.gethostname()} since " in said
        assert "--take-over" in said
        first.kill()
        limit = time.monotonic() + 60
        while True:
            try:
                with lock.lease(place, lease_s=4.0):
                    break
            except UserError:
                assert time.monotonic() < limit
                time.sleep(0.2)
    with processes((place, "lease", 4.0)) as (first,):
        assert first.said() == "held"
        first.of.send_signal(signal.SIGSTOP)
        with lock.lease(place, take_over=True, lease_s=4.0) as second:
            first.of.send_signal(signal.SIGCONT)
            limit = time.monotonic() + 60
            while f"taken over by pid {os.getpid()} " not in first.lost():
                assert time.monotonic() < limit
                time.sleep(0.05)
            assert first.leave() == 0
            assert second.lost is None


@pytest.mark.fault
def test_f08_of_four_processes_that_take_a_lease_in_an_object_store_at_once_one_wins(
        moto: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four processes at once on a prefix of a moto server."""
    aws(monkeypatch, moto)
    with processes(*[(f"s3://{BUCKET}/{tmp_path.name}/run", "lease")] * 4) as all_of_them:
        said = sorted(each.said() for each in all_of_them)
    assert said.count("held") == 1
    assert all("in use by pid" in line for line in said if line != "held")
