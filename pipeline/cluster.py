"""Ray: one of our own, or the cluster that is there; who may join it, and what its processes are given."""

from __future__ import annotations

import ipaddress
import math
import os
import secrets
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradine
from gradine.configs.schema import EnvironmentFault, Run, UserError, require

SECONDS_TO_CANCEL = 5.0  # a task whose node is gone gives no answer


@contextmanager
def connected(run: Run) -> Iterator[dict[str, float]]:
    """A Ray to work on: the cluster at ray.address or RAY_ADDRESS, else one of our own, ended at exit. -> resources."""
    address = run.ray.address or os.environ.get("RAY_ADDRESS", "")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "ray" in sys.modules and sys.modules["ray"].is_initialized():  # by a test, or a notebook
        yield sys.modules["ray"].cluster_resources()
        return
    refuse_open(address, run.ray.trust_network)
    if not address and "ray" not in sys.modules:  # Ray reads these when it is imported
        # A token that never touches the disk: Ray's control service listens on all interfaces.
        if os.environ.setdefault("RAY_AUTH_MODE", "token").lower() == "token":
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ.setdefault("RAY_worker_niceness", "0")
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    import ray

    if address:
        try:
            refuse_silence(address)
        except OSError as error:
            raise EnvironmentFault(f"no Ray cluster at ray.address={address!r}: {error}. "
                                   "Start one, or leave ray.address empty for a Ray of our own.") from error
        try:
            ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (OSError, RuntimeError, ValueError, ray.exceptions.AuthenticationError) as error:
            raise EnvironmentFault(f"the Ray cluster at ray.address={address!r} does not let us join: "
                                   f"{' '.join(str(error).split())[:200]}. Is that the port of its control service, "
                                   "and its token the one in RAY_AUTH_TOKEN or the file of RAY_AUTH_TOKEN_PATH?"
                                   ) from error
    else:
        cpus = max(stage.workers * stage.cpus for stage in run.stages) + run.evaluation.cpus
        try:
            ray.init(address="local", num_cpus=max(math.ceil(cpus), os.cpu_count() or 1), include_dashboard=False,
                     log_to_driver=False, configure_logging=False, object_store_memory=200 << 20)
        except (OSError, RuntimeError, ValueError) as error:
            raise EnvironmentFault(f"no Ray could be started here: {' '.join(str(error).split())[:200]}") from error
    try:
        yield ray.cluster_resources()
    finally:
        ray.shutdown()


def refuse_silence(address: str) -> None:
    """OSError if nothing answers at host:port; Ray itself would try for many minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()


def refuse_open(address: str, trusted: bool) -> None:
    """UserError for a Ray without a token that others may reach: whoever does can run anything on its nodes."""
    if address:
        host = address.removeprefix("ray://").rpartition(":")[0].strip("[]")
        require(take_token() or trusted or host == "localhost" or is_loopback(host),
                f"the Ray cluster at {address} is joined without a token, and reaches beyond this machine. Set "
                "RAY_AUTH_MODE=token and its token on all nodes and here, or ray.trust_network=true if nobody else "
                "reaches that network.")
    elif os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        require(trusted, "RAY_AUTH_MODE=disabled: the control service of a Ray started here listens on all interfaces, "
                         "for anyone. Leave RAY_AUTH_MODE unset (a token is made for this run), or set "
                         "ray.trust_network=true if nobody else reaches this network.")


def is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, which may stand for any address
        return False


def take_token() -> bool:
    """Turns Ray's token mode on where nothing is said about it and a token is there. -> whether it is on

    UserError for a token that is wanted and not there, and for a file of it that others can read.
    """
    mode, named = os.environ.get("RAY_AUTH_MODE", "").lower(), os.environ.get("RAY_AUTH_TOKEN_PATH", "")
    if mode not in ("", "token"):
        return False
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if os.environ.get("RAY_AUTH_TOKEN"):
        there = True
    elif there := file.is_file():
        rights = file.stat().st_mode & 0o777
        require(not rights & 0o077, f"{file} holds the cluster's token and has mode {rights:o}: others of this machine "
                                    f"can read it. Run: chmod 600 {file}")
    else:
        require(not mode and not named, f"token mode is on, and there is no token: RAY_AUTH_TOKEN is empty, {file} is "
                                        "no file. Put the cluster's token into one of them (a file with mode 600).")
    if there and "ray" not in sys.modules:  # Ray reads it when it is imported
        os.environ["RAY_AUTH_MODE"] = "token"
    return os.environ.get("RAY_AUTH_MODE", "").lower() == "token"


def worker_environment(threads: int) -> dict[str, Any]:
    """What a Ray process needs to import this very gradine and keep to its threads."""
    root = str(Path(gradine.__file__).absolute().parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path,
                   "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}  # what training.deterministic needs on a GPU
    # A cluster job brings its own working directory; only a Ray on this machine can use this machine's path.
    import ray

    if ray.is_initialized() and ray.get_runtime_context().runtime_env.get("working_dir"):
        del environment["PYTHONPATH"]
    return {"env_vars": environment}


def cancel(tasks: Iterable[Any]) -> None:
    """Ends tasks, and waits until they have: an answer that meets the end of Ray itself aborts this process (2.60)."""
    import ray

    refs = [*tasks]
    for ref in refs:
        ray.cancel(ref, force=True)
    if refs:
        ray.wait(refs, num_returns=len(refs), timeout=SECONDS_TO_CANCEL)


def one_line(error: Exception, stop_for: tuple[type[Exception], ...] = (UserError, EnvironmentFault)) -> str:
    """What went wrong, for the ledger. What a worker raised of `stop_for` is raised here: a retry would meet it."""
    cause = getattr(error, "cause", None) or error  # Ray wraps what a task raised, with its whole traceback as text
    if stop_for and isinstance(cause, stop_for):
        raise type(cause)(str(cause)) from error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    return f"{type(cause).__name__}: {lines[0] if lines else ''}"[:300]
