"""Real servers on loopback for tests of Store, and a proxy that breaks what passes through it.

Servers run in processes of their own and are ended by their pid. `aws` sets the environment that reaches one.
"""

from __future__ import annotations

import base64
import functools
import http.client
import http.server
import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

BUCKET, KEY, SECRET = "images", "access-key-0123", "s3cret-canary-4567"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def aws(monkeypatch: pytest.MonkeyPatch, endpoint: str, key: str = KEY, secret: str = SECRET) -> None:
    """The environment a user sets for a server of his own; nothing of the machine's own AWS settings is left."""
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    for name, value in {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret,
                        "AWS_EC2_METADATA_DISABLED": "true", "AWS_CONFIG_FILE": os.devnull,
                        "AWS_SHARED_CREDENTIALS_FILE": os.devnull, "NO_PROXY": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)


def make_bucket(endpoint: str, bucket: str = BUCKET) -> None:
    import boto3
    from botocore.config import Config

    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET,
                          region_name="us-east-1", config=Config(request_checksum_calculation="when_required"))
    client.create_bucket(Bucket=bucket)
    client.close()


@contextmanager
def server_process(command: list[str], port: int, log: Path, **environment: str) -> Iterator[str]:
    """The URL of a server that answers by the time it is given out."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, cwd=log.parent,
                                   env={**os.environ, **environment})
    try:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} ended with {process.returncode}: {log.read_text()[-2000:]}")
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def tool(name: str) -> str:
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed: pip install -e '.[dev]'")
    return found


@pytest.fixture(scope="session")
def juicefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of a JuiceFS gateway (MinIO's S3 layer): refuses a wrong secret, ignores If-None-Match."""
    folder, port, command = tmp_path_factory.mktemp("juicefs"), free_port(), tool("juicefs")
    meta = f"sqlite3://{folder}/meta.db"
    subprocess.run([command, "format", "--storage", "file", "--bucket", f"{folder}/blobs/", "--trash-days", "0", meta,
                    "tests"], check=True, capture_output=True, cwd=folder)
    gateway = [command, "gateway", "--multi-buckets", "--keep-etag", "--no-banner", "--no-usage-report",
               "--cache-dir", f"{folder}/cache", "--log", f"{folder}/gateway.log", meta, f"127.0.0.1:{port}"]
    with server_process(gateway, port, folder / "out.log", MINIO_ROOT_USER=KEY, MINIO_ROOT_PASSWORD=SECRET,
                        HOME=str(folder)) as endpoint:
        make_bucket(endpoint)
        yield endpoint


@pytest.fixture(scope="session")
def moto(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Endpoint of moto's server: conditional puts, in memory, any secret will do."""
    folder, port = tmp_path_factory.mktemp("moto"), free_port()
    command = [tool("moto_server"), "-H", "127.0.0.1", "-p", str(port)]
    with server_process(command, port, folder / "out.log") as endpoint:
        make_bucket(endpoint)
        yield endpoint


class _Ranged(http.server.SimpleHTTPRequestHandler):
    """The folder as a web server like nginx serves it, with ranges; `ranges` False: as Python's own does."""

    protocol_version = "HTTP/1.1"
    ranges = True

    def do_GET(self) -> None:
        path, span = Path(self.translate_path(self.path)), self.headers.get("Range", "")
        if not (self.ranges and span and path.is_file()):
            return super().do_GET()
        content = path.read_bytes()
        first, _, last = span.removeprefix("bytes=").partition("-")
        part = content[int(first):int(last or len(content)) + 1]
        self.send_response(206 if part else 416)
        self.send_header("Content-Range", f"bytes {span[6:] if part else '*'}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serve(server: http.server.ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def handle_error(self, *_: object) -> None:  # clients that hang up are what these tests are about
        pass


@contextmanager
def web_folder(folder: Path, ranges: bool = True) -> Iterator[str]:
    """URL of a folder on a plain web server with index pages."""
    handler = functools.partial(type("Handler", (_Ranged,), {"ranges": ranges}), directory=str(folder))
    with serve(_Server(("127.0.0.1", 0), handler)) as url:
        yield url


@dataclass
class Fault:
    """What the proxy does to requests: `kind` to those whose number (from 1) `hits`, and whose `only` holds.

    reset: hangs up before answering. half: the true headers, half of the body, then hangs up. lost: the server does as
    asked, the answer never comes. garbage: answers no HTTP. 503. slow: waits `seconds` first. silent: accepts and says
    nothing for `seconds`.
    """

    kind: str
    hits: Callable[[int], bool] = lambda number: True
    only: Callable[[str, str], bool] = lambda method, path: True
    seconds: float = 0.0
    requests: list[str] = field(default_factory=list)
    logins: list[tuple[str, str]] = field(default_factory=list)  # user, password
    done: int = 0


@contextmanager
def proxy(upstream: str, fault: Fault) -> Iterator[str]:
    """URL of an HTTP proxy in front of `upstream` that commits `fault`, counting its requests and what it did.

    The Host header passes unchanged, so that signed requests stay valid.
    """
    host, lock, ended = urlsplit(upstream).netloc, threading.Lock(), threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            with lock:
                wanted = fault.only(self.command, self.path)
                if wanted:
                    fault.requests.append(f"{self.command} {self.path}")
                    if (login := self.headers.get("Authorization", "")).startswith("Basic "):
                        user, _, password = base64.b64decode(login[6:]).decode().partition(":")
                        fault.logins.append((user, password))
                struck = wanted and fault.hits(len(fault.requests))
                fault.done += struck
            kind = fault.kind if struck else ""
            if kind in ("slow", "silent"):
                ended.wait(fault.seconds)
            if kind in ("reset", "silent"):
                return self.hang_up()
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if kind == "503":
                return self.answer(503, [("Retry-After", "0")], b"<Error><Code>ServiceUnavailable</Code></Error>")
            upstream_to = http.client.HTTPConnection(host, timeout=60)
            upstream_to.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in ("connection", "expect"):
                    upstream_to.putheader(name, value)
            upstream_to.endheaders(body)
            got = upstream_to.getresponse()
            content = got.read()
            upstream_to.close()
            if kind == "lost":
                return self.hang_up()
            if kind == "garbage":
                self.close_connection = True
                self.wfile.write(b"\0\1 no HTTP at all\r\n\r\n")
                return None
            passed = [(name, value) for name, value in got.getheaders()
                      if name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server")]
            length = int(got.headers.get("Content-Length", len(content))) if self.command == "HEAD" else len(content)
            return self.answer(got.status, passed, content, length, cut=kind == "half")

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = handle_any

        def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, length: int | None = None,
                   cut: bool = False) -> None:
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(content) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content[:len(content) // 2] if cut else content)
            if cut:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

        def hang_up(self) -> None:
            self.close_connection = True
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST, not FIN
            self.connection.close()

        def log_message(self, *_: object) -> None:
            pass

    with serve(_Server(("127.0.0.1", 0), Handler)) as url:
        try:
            yield url
        finally:
            ended.set()
