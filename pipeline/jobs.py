"""Runs as jobs of a Ray cluster: submitted with the code of this very installation, listed, followed, stopped.

Jobs go through the head node's dashboard (HTTP). What travels is a folder of under 5 MB, gradine itself and the user's
own configuration: nothing is installed on a node, its image has what gradine depends on.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import logging
import math
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import traceback
import zoneinfo
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import gradine
from gradine.configs.schema import (
    RECIPES,
    EnvironmentFault,
    Run,
    UserError,
    as_dict,
    find_recipe,
    flatten,
    load,
    redacted,
    require,
)
from gradine.pipeline.cluster import refuse_silence, take_token

SERVER = "http://127.0.0.1:8265"
NAME = "gradine_run"  # the key of a job's metadata that holds its run's name
TRAVELS = {".py", ".typed", ".yaml", ".md", ".zip", ".jinja"}
LIMIT = 5_000_000  # bytes that a job may bring along
FULL = {errno.ENOSPC, errno.EDQUOT}
SECONDS_TO_STOP = 30  # beyond ray.grace_s, until Ray kills a job that was asked to stop: ending Ray, a last report
SECONDS_TO_ACCEPT = 60.0  # a head that was just started answers before it can take jobs
SECONDS_LOST = 120.0  # without an answer, until a job is no longer followed
POLL_S = 1.0


def submit(config: str, settings: list[str], options: list[str], address: str, detach: bool) -> int:
    """`gradine run CONFIG SETTINGS OPTIONS` as a job, followed to its end unless `detach`. -> its own exit code"""
    run = load(config, settings)
    refuse_relative(relative_paths(run))
    refuse_secrets(run, settings)
    with ExitStack() as until_sent:
        folder = until_sent.enter_context(tempfile.TemporaryDirectory(prefix="gradine-"))
        command = ["python", "-m", "gradine.pipeline", "run", packed(find_recipe(config), Path(folder)), *settings]
        with asking(address) as client:
            job = accepted(client, run, shlex.join([*command, *options]), folder, "--until" in options)
            until_sent.close()
            where = f" --address {shlex.quote(address)}" if address else ""
            ways = f"gradine logs {job} --follow{where}\ngradine stop {job}{where}\ngradine status{where}"
            print(f"submitted {job} to {client.get_address()}", flush=True)
            if detach:
                print(ways)
                return 0
            try:
                return outcome(asyncio.run(follow(client, job)))
            except KeyboardInterrupt:
                print(f"\n{job} goes on without this terminal:\n{ways}")
                return 130


def status(wanted: str, address: str) -> None:
    """A line for each of gradine's jobs, or for those of one run."""
    from gradine.pipeline.display import duration

    lines = [f"{'run':<16}{'job':<40}{'status':<11}{'since':<18}{'for':<14}result or last line"]
    with asking(address) as client:
        for info in jobs_of(client, wanted):
            since = time.strftime("%Y-%m-%d %H:%M", time.localtime(info.start_time / 1000))
            lasted = duration((info.end_time or time.time() * 1000) / 1000 - info.start_time / 1000)
            lines.append(f"{run_of(info):<15} {info.submission_id:<39} {info.status.value.lower():<10} {since:<17} "
                         f"{lasted:<13} {result(client, info)}")
    print("\n".join(lines) if lines[1:] else f"no job of gradine's at {client.get_address()}")


def show_log(wanted: str, keep_following: bool, address: str) -> None:
    """What the newest job of a run has printed, and with `keep_following` what it goes on to print until it ends."""
    with asking(address) as client:
        job = jobs_of(client, wanted)[-1].submission_id
        if keep_following:
            with suppress(KeyboardInterrupt):  # whoever stops looking does not stop the job
                asyncio.run(follow(client, job))
        else:
            show(client.get_job_logs(job))


def stop(wanted: str, address: str) -> None:
    """Asks the running jobs of a run, or one job, to end with a checkpoint, and waits until they have."""
    with asking(address) as client:
        found = jobs_of(client, wanted)
        running = [info for info in found if not info.status.is_terminal()]
        if not running:
            print(f"{found[-1].submission_id} runs no more: {result(client, found[-1])}")
        for info in running:
            job = info.submission_id
            before = client.get_job_logs(job)
            client.stop_job(job)
            print(f"{job} is asked to stop; what it prints:", flush=True)
            ended = asyncio.run(follow(client, job, len(before)))
            after = client.get_job_logs(job)[len(before):]
            print(f"{job}: {became(after)} ({result(client, ended)})")


def became(log: str) -> str:
    """What came of a stop, from the lines a run printed after it."""
    if saved := re.findall(r"stopped at ([\d,]+) images", log):
        return f"stopped with a checkpoint at {saved[-1]} images; submitted again it goes on from there"
    if "stopped by SIG" in log:
        return "stopped without a new checkpoint; submitted again it goes on from the last one"
    return "ended without its last words; submitted again it goes on from the last checkpoint"


# What is sent -------------------------------------------------------------------------------------------------------


def relative_paths(run: Run) -> dict[str, str]:
    """The settings whose paths hold only in the folder where they were written down."""
    paths = {"runs": run.runs, "data.source": run.data.source, "data.shards": run.data.shards,
             "data.cache_dir": run.data.cache_dir, "checkpoints.location": run.checkpoints.location,
             "init_from": run.init_from, "evaluation.held_out": run.evaluation.held_out,
             "evaluation.inception": run.evaluation.inception}
    return {key: path for key, path in paths.items() if path and not re.match(r"[/~]|bundled:|\w[\w+.-]*://", path)}


def refuse_relative(paths: dict[str, str]) -> None:
    given = ", ".join(f"{key}={path!r}" for key, path in paths.items())
    instead = " ".join(f"{key}=/shared/{Path(path).as_posix().lstrip('./')}" for key, path in paths.items())
    require(not paths, f"{given}: relative, and a job's working folder is deleted when it ends. Use paths of a disk "
                       f"that all nodes share, e.g. {instead} (data and checkpoints may be s3:// or gs:// too).")


def refuse_secrets(run: Run, settings: list[str]) -> None:
    """UserError for what redacted() would strike out: whoever sees the dashboard would see it."""
    values = {**flatten(as_dict(run)), **{text.partition("=")[0]: text for text in settings}}
    for key, value in values.items():
        require(not isinstance(value, str) or redacted(value) == value,
                f"{key} holds a secret (the value of a secret variable, or a URL's query), which the cluster would "
                "store and show. Set it in the environment of the nodes, and name an address that needs none here.")


def pack(config: Path, folder: Path) -> str:
    """Copies what the nodes need into `folder`. -> the configuration as `gradine run` finds it there"""
    source = Path(gradine.__file__).parent
    shutil.copytree(source, folder / "gradine", ignore=_what_stays)  # links are followed: real files travel
    if config.resolve().is_relative_to(RECIPES.resolve()):
        name = config.resolve().relative_to(RECIPES.resolve()).with_suffix("").as_posix()
    else:  # the user's own
        name = f"config/{config.name}"
        (folder / "config").mkdir()
        shutil.copyfile(config, folder / name)
    sizes = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    biggest = max(sizes, key=lambda path: sizes[path])
    require(sum(sizes.values()) < LIMIT,
            f"a job would bring along {sum(sizes.values()) / 1e6:.1f} MB, more than {LIMIT / 1e6:g}; the biggest file "
            f"is {biggest.relative_to(folder)}. Move what is not gradine's out of {source}.")
    return name


def packed(config: Path, folder: Path) -> str:
    """As `pack`; what this machine's disk refuses is told of it, not of the cluster."""
    try:
        return pack(config, folder)
    except OSError as error:
        why = error.args[0][0][2] if isinstance(error, shutil.Error) else error  # of what may be many files, the first
        raise EnvironmentFault(f"a job's files could not be copied to {folder} on this machine: {why}. Make room "
                               "there, or set TMPDIR to a folder that has some.") from error


def _what_stays(folder: str, names: list[str]) -> list[str]:
    """Of a folder of gradine: everything but packages and the kinds of files that belong to one."""
    def travels(path: Path) -> bool:
        is_package = path.name == "lectures" or (path / "__init__.py").is_file()  # which are recipes alone
        return is_package if path.is_dir() else path.suffix in TRAVELS
    return [name for name in names if not travels(Path(folder) / name)]


def accepted(client: Any, run: Run, command: str, folder: str, by_the_clock: bool) -> str:
    """Submits; again for a while where the head takes no jobs yet, or one was submitted in this very second. -> id"""
    # Ray kills a job 3 s after asking it to stop, unless this is set
    environment = {"RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(run.ray.grace_s) + SECONDS_TO_STOP)}
    if by_the_clock:  # the submitter's, not the node's: containers keep UTC
        environment["TZ"] = clock()
    until = time.monotonic() + SECONDS_TO_ACCEPT
    while True:
        job = f"gradine-{re.sub(r'[^A-Za-z0-9_.-]+', '-', run.name)}-{time.strftime('%Y%m%d-%H%M%S')}"
        try:
            return str(client.submit_job(
                entrypoint=command, submission_id=job, metadata={NAME: run.name, "gradine": gradine.__version__},
                runtime_env={"working_dir": folder, "env_vars": environment}))
        except RuntimeError as error:
            if time.monotonic() > until or not re.search("No available agent|already exists", str(error)):
                raise
        time.sleep(1.0)


def clock() -> str:
    """This process's local time as a TZ that holds on every node, in the night of a clock change, too.

    A name such as Europe/Berlin means UTC, without a word, where a node has no zone database: its rule is sent instead,
    which is the last line of its file (RFC 9636, section 3.3).
    """
    name = os.environ.get("TZ", "").lstrip(":")
    for file in [Path(folder, name) for folder in zoneinfo.TZPATH] if name else [Path("/etc/localtime")]:
        with suppress(OSError):
            if rule := file.read_bytes().removesuffix(b"\n").rpartition(b"\n")[2].decode("ascii", "ignore"):
                return rule
    zone = time.strftime("%z")
    return name or f"<{zone}>{'-' if zone[0] == '+' else '+'}{zone[1:3]}:{zone[3:]}"


# What is heard ------------------------------------------------------------------------------------------------------


@contextmanager
def asking(address: str) -> Iterator[Any]:
    """A client of the job server at --address, else where the environment says, else on this machine."""
    if importlib.util.find_spec("aiohttp") is None or importlib.util.find_spec("pydantic") is None:
        raise UserError("Ray's job client is not installed here. Run: pip install 'gradine[cluster]'")
    url = job_server(address)
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):  # with Ray's client they would overrule --address
        os.environ.pop(name, None)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    has_token = take_token()
    try:
        refuse_silence(urlsplit(url).netloc)
        from ray.exceptions import AuthenticationError
        from ray.job_submission import JobSubmissionClient
    except OSError as error:
        raise EnvironmentFault(_silent(url, error)) from error
    logging.disable(logging.INFO)  # of each upload and each connection that ends
    try:
        yield JobSubmissionClient(url)
    except AuthenticationError as error:
        reason = "refuses this token" if has_token else "wants a token"
        raise UserError(f"the cluster at {url} {reason}. Put its token into RAY_AUTH_TOKEN, or into a file that "
                        "RAY_AUTH_TOKEN_PATH names (default ~/.ray/auth_token, mode 600).") from error
    except (UserError, EnvironmentFault):
        raise
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        if not _by_the_client(error) or getattr(error, "errno", None) in FULL:  # it packs here
            raise
        if not isinstance(error, RuntimeError):
            raise EnvironmentFault(_silent(url, error)) from error
        # the dashboard's answer is an error, with a traceback from there
        said = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise EnvironmentFault(f"the Ray dashboard at {url} failed: {' ... '.join({said[0]: 0, said[-1]: 0})[:300]}. "
                               "Its reasons are in dashboard_JobHead.log on the head node.") from error


def _by_the_client(error: Exception) -> bool:
    """Whether it came out of Ray's client: an error of our own says nothing of a dashboard."""
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__", "").startswith("ray.") for frame, _ in frames)


def _silent(url: str, error: Exception) -> str:
    return (f"no answer from a Ray dashboard at {url}: {' '.join(str(error).split())[:200]}. Is the cluster up, is "
            "that address right (--address or RAY_API_SERVER_ADDRESS), is a tunnel open to it?")


def job_server(address: str) -> str:
    """http://host:port of the dashboard; UserError for what is no such address."""
    cluster = os.environ.get("RAY_ADDRESS", "")  # more often host:port of the control service, which takes no jobs
    url = address or os.environ.get("RAY_API_SERVER_ADDRESS") or (cluster if cluster.startswith("http") else SERVER)
    url = (url if "://" in url else f"http://{url}").rstrip("/")
    try:
        parts = urlsplit(url)
        usual, port = {"http": 80, "https": 443}.get(parts.scheme), parts.port
    except ValueError:
        usual = None
    require(usual is not None and bool(parts.hostname) and "@" not in parts.netloc,
            f"--address={url!r} is not the address of a Ray dashboard. Use one such as {SERVER}.")
    return f"{parts.scheme}://{parts.netloc}{'' if port else f':{usual}'}{parts.path}"


def jobs_of(client: Any, wanted: str = "") -> list[Any]:
    """gradine's jobs, oldest first; those of a run or with an id. UserError if there is none. Never another's job."""
    ours = sorted((info for info in client.list_jobs() if info.submission_id and run_of(info)),
                  key=lambda info: info.start_time)
    found = [info for info in ours if wanted in ("", info.submission_id, run_of(info))]
    if wanted and not found:
        there = ", ".join(sorted({run_of(info) for info in ours}))
        raise UserError(f"no job of a run {wanted!r}, and none with that id, at {client.get_address()}. "
                        + (f"There are jobs of: {there}." if there else "There is no job of gradine's at all."))
    return found


def run_of(info: Any) -> str:
    """The name of a job's run; `-` for one submitted without gradine's help; "" for what is not gradine's."""
    of_ours = re.search(r"(-m gradine\.pipeline|gradine) (run|train) ", info.entrypoint)
    return str((info.metadata or {}).get(NAME) or ("-" if of_ours else ""))


def result(client: Any, info: Any) -> str:
    """What a person wants to know of a job: how it ended, else the last that it said."""
    if info.status.value == "STOPPED":
        return "exit 143"
    said = info.message if info.status.is_terminal() else client.get_job_logs(info.submission_id)
    last = ([line for line in (said or "").splitlines() if line.strip()] or [""])[-1].strip()[:120]
    if info.status.value == "SUCCEEDED":
        return "exit 0"
    return f"exit {exit_code(info)}: {last}" if info.status.is_terminal() else last


def exit_code(info: Any) -> int:
    """A run's own code; 143 if it was stopped; 3 if it could not start, or its node died."""
    if info.status.value == "STOPPED":
        return 143
    code = info.driver_exit_code
    if code is None:
        return 0 if info.status.value == "SUCCEEDED" else EnvironmentFault.exit_code
    return int(code if code >= 0 else 128 - code)  # as a shell tells of a signal


def outcome(info: Any) -> int:
    """Says how a job that was followed has ended. -> its exit code"""
    code = exit_code(info)
    if info.driver_exit_code is None and code == EnvironmentFault.exit_code:
        why = " ".join((info.message or "").split())[:300]
        print(f"gradine: {info.submission_id} could not run to its end: {redacted(why)}", file=sys.stderr)
    else:
        print(f"{info.submission_id} {info.status.value.lower()}, exit {code}")
    return code


async def follow(client: Any, job: str, shown: int = 0) -> Any:
    """Prints the job's log from character `shown` on, as it grows. -> the job's state once it has ended

    Ray's own tail ends some 5 s after the job; the end is asked for beside it, and what the tail lacks is fetched.
    """
    from aiohttp import ClientError

    async def tail() -> None:
        nonlocal shown
        while True:  # a connection that broke begins again with the first line; one that ended has told all
            passed = 0
            with suppress(OSError, RuntimeError, ClientError):
                async for text in client.tail_job_logs(job):
                    new = text[max(0, shown - passed):]
                    passed += len(text)
                    shown = max(shown, passed)
                    show(new)
                return
            await asyncio.sleep(POLL_S)

    tailing = asyncio.create_task(tail())
    try:
        info = await ended(client, job)
    finally:
        tailing.cancel()
        await asyncio.gather(tailing, return_exceptions=True)
    with suppress(OSError, RuntimeError):  # its node may be gone
        show(client.get_job_logs(job)[shown:])
    return info


async def ended(client: Any, job: str) -> Any:
    heard = time.monotonic()
    while True:
        try:
            info = await asyncio.to_thread(client.get_job_info, job)
            heard = time.monotonic()
            if info.status.is_terminal():
                return info
        except (OSError, RuntimeError) as error:
            if time.monotonic() - heard > SECONDS_LOST:
                raise EnvironmentFault(f"{client.get_address()} has told nothing of {job} for {SECONDS_LOST:g} s: "
                                       f"{str(error)[:200]}. It may still run: gradine status.") from error
        await asyncio.sleep(POLL_S)


def show(text: str) -> None:
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:  # whoever read this has gone, as `| head` does: like Ctrl-C
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise KeyboardInterrupt from None
