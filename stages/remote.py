"""What Store asks of a network, as coroutines of one try each, and what the errors of these mean."""

from __future__ import annotations

import errno
import os
import re
from base64 import b64encode
from html import unescape
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from gradine.configs.schema import UserError

BLOCK = 8 << 20  # bytes asked for at once, and of a part of an upload: what one more try repeats
SILENCE_S = 20.0  # without a byte, then a connection counts as broken
SLOWEST = 256 << 10  # bytes a second that an attempt is given time for
EXTRA = {"s3": "s3", "gs": "gs", "http": "http", "https": "http"}
WAY_OUT = {"s3": "Check the bucket's name, set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY (or AWS_PROFILE) to a key "
                 "that may do this, and AWS_ENDPOINT_URL if the server is not Amazon's.",
           "gs": "Check the bucket's name and set GOOGLE_APPLICATION_CREDENTIALS to the file of an account that may.",
           "http": "Give a URL that a browser opens; a user and password go into ~/.netrc."}
PASSING = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch", "NoSuchUpload"}  # codes of 4xx
UNUSABLE = {"NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "ParamValidationError", "InvalidURL",
            "InvalidRegionError", "UnauthorizedSSOTokenError", "ClientConnectorCertificateError"}
NETWORK = {"aiobotocore", "aiohttp", "botocore", "gcsfs", "google", "requests", "urllib3"}


class Passing(Exception):
    """What the network did wrong this time, in one line."""


def judged(error: Exception, what: str, scheme: str, limit: float) -> Exception:
    """What `error` means: wrong input, no such file, or one that passes. Other errors are bugs and stay."""
    cause = next((e for e in (error, error.__cause__) if e and _answer(e)[0]), error)
    status, code = _answer(cause)
    if isinstance(error, UserError):
        return error
    if isinstance(error, FileExistsError) or status == 412:
        return FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), what)
    if code != "NoSuchBucket" and code not in PASSING and (
            status == 404 or (not status and isinstance(error, FileNotFoundError))):
        return FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), what)
    said = _said(cause, limit)
    refused = 300 <= status < 500 and status not in (408, 409, 425, 429) and code not in PASSING
    if refused or type(cause).__name__ in UNUSABLE or type(cause) is ValueError or said.startswith("Forbidden"):
        return UserError(f"{what} is refused: {said.rstrip('.')}. {WAY_OUT[EXTRA[scheme]]}")
    local = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if not local and (isinstance(cause, OSError) or _package(cause) in NETWORK):
        return Passing(said)
    return error


def _answer(error: BaseException) -> tuple[int, str]:
    """HTTP status and error code in what botocore, aiohttp or gcsfs raised; (0, "") if no server answered."""
    response = getattr(error, "response", None)
    if type(error.__cause__).__module__ == "aiohttp.http_exceptions":  # what came was no HTTP; its 400 is aiohttp's own
        return 0, ""
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0), response.get("Error", {}).get("Code", "")
    status = str(getattr(error, {"aiohttp": "status", "gcsfs": "code"}.get(_package(error), ""), ""))
    return int(status) if status.isdigit() else 0, ""


def _package(error: BaseException) -> str:
    return type(error).__module__.partition(".")[0]


def _said(error: BaseException, limit: float) -> str:
    """One line, without what follows `?` or stands before `@` in a URL."""
    if isinstance(error, TimeoutError) and not str(error):
        return f"no answer within {limit:.0f} s"
    if type(error).__name__ == "ClientResponseError":
        return f"{getattr(error, 'status', '')} {getattr(error, 'message', '')}"
    text = re.sub(r"//[^/\s]*@", "//", " ".join(str(error).split())) or type(error).__name__
    return re.sub(r"\?[^\s'\"]*", "", text)[:400]


def _check(came: int, announced: int) -> None:
    if came != announced:
        raise OSError(f"{came} of {announced} bytes came")


CLIENTS: dict[tuple[Any, ...], Any] = {}  # by scheme, process (none outlives a fork) and what the environment says


class Objects:
    """s3:// through s3fs, gs:// through gcsfs. Requests repeat at most twice in there: the deadline is Store's."""

    def __init__(self, location: str) -> None:
        import fsspec

        self.prefix = location.rstrip("/").partition("://")[2]
        self.s3 = location.lower().startswith("s3:")
        unchecked = dict.fromkeys(("request_checksum_calculation", "response_checksum_validation"), "when_required")
        options = {"max_concurrency": 1, "config_kwargs": {  # other servers than Amazon's do not know its checksums
            "connect_timeout": 10, "read_timeout": SILENCE_S, "retries": {"mode": "standard", "total_max_attempts": 3},
            **unchecked}} if self.s3 else {}
        kind = "s3" if self.s3 else "gs"
        key = kind, os.getpid(), tuple(sorted(item for item in os.environ.items() if item[0].startswith("AWS_")))
        if key not in CLIENTS:  # a client costs 0.2 s of CPU, and each checkpoint is a location
            CLIENTS[key] = fsspec.filesystem(kind, skip_instance_cache=True, use_listings_cache=False, **options)
            CLIENTS[key].retries = 1
        self.fs = CLIENTS[key]

    async def list(self) -> list[tuple[str, int]]:
        found = await self.fs._find(self.prefix, detail=True)
        return [(path[len(self.prefix) + 1:], about["size"]) for path, about in found.items()
                if path.startswith(f"{self.prefix}/") and about["type"] == "file" and not path.endswith("/")]

    async def head(self, name: str) -> tuple[int, bool]:
        """(bytes, whether ranges of it can be read)"""
        about = await self.fs._info(f"{self.prefix}/{name}")
        if about["type"] != "file":
            raise FileNotFoundError(name)
        return about["size"], True

    async def modified(self, name: str) -> float:
        about = await self.fs._info(f"{self.prefix}/{name}")
        return (about["LastModified"] if self.s3 else about["mtime"]).timestamp()

    async def read(self, name: str) -> bytes:
        return await self.fs._cat_file(f"{self.prefix}/{name}")

    async def range(self, name: str, start: int, stop: int) -> bytes:
        content = await self.fs._cat_file(f"{self.prefix}/{name}", start=start, end=stop)
        _check(len(content), stop - start)
        return content

    async def pipe(self, name: str, content: bytes, writer: str = "") -> None:
        """Writes; with the name of a `writer`, which is kept beside the content, only what does not exist yet."""
        kept = {"Metadata" if self.s3 else "metadata": {"writer": writer}, "mode": "create"} if writer else {}
        await self.fs._pipe_file(f"{self.prefix}/{name}", content, chunksize=BLOCK, **kept)

    async def writer(self, name: str) -> str | None:
        try:
            return await self.fs._getxattr(f"{self.prefix}/{name}", "writer")
        except KeyError:
            return None

    async def remove(self, name: str) -> None:
        await self.fs._rm_file(f"{self.prefix}/{name}")

    async def put(self, local: Path, name: str) -> None:
        part = max(BLOCK, local.stat().st_size // 9_000 + 1)  # S3 takes 10,000 parts
        await self.fs._put_file(str(local), f"{self.prefix}/{name}", chunksize=part)


class Web:
    """http(s):// through the session that fsspec keeps. The query of the location is that of every request."""

    def __init__(self, location: str) -> None:
        import aiohttp
        import fsspec

        parts = urlsplit(location)
        self.base = urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2],
                                quote(parts.path.rstrip("/") + "/", "/%:@!$&'()*+,;=~"), "", ""))
        self.query = f"?{parts.query}" if parts.query else ""
        login = f"{unquote(parts.username or '')}:{unquote(parts.password or '')}".encode()
        self.login = {"Authorization": f"Basic {b64encode(login).decode()}"} if parts.username else {}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=SILENCE_S)
        client = {"timeout": timeout, "trust_env": True, "auto_decompress": False,
                  "headers": {"Accept-Encoding": "identity"}}
        self.fs = fsspec.filesystem("http", skip_instance_cache=True, use_listings_cache=False, client_kwargs=client)

    def _get(self, name: str, span: str = "") -> Any:
        from yarl import URL

        session = self.fs._session
        return session.get(URL(self.base + quote(name) + self.query, encoded=True),
                           headers={**self.login, **({"Range": span} if span else {})})

    async def links(self, folder: str) -> list[str]:
        """What the page of a folder links to below it, by path below the location; folders end in a slash."""
        await self.fs.set_session()
        async with self._get(folder) as answer:
            if answer.status == 404 or (answer.ok and answer.content_type != "text/html"):
                raise UserError(f"{self.base}{folder} has no index page ({answer.status} {answer.content_type}). "
                                "Give the URL of a folder whose page links to its files.")
            answer.raise_for_status()
            text, here = (await _body(answer)).decode(errors="replace"), self.base + quote(folder)
        hrefs = re.findall(r"""<a\s[^>]*?href\s*=\s*["']([^"']+)["']""", text, re.IGNORECASE)
        links = {urljoin(here, unescape(href.strip())).partition("#")[0] for href in hrefs}  # ?...: other orders of it
        return [unquote(link[len(self.base):]) for link in links
                if link.startswith(here) and link != here and "?" not in link]

    async def head(self, name: str) -> tuple[int, bool]:
        """(bytes or -1, whether ranges of it can be read), by asking for the first byte: many servers refuse HEAD."""
        await self.fs.set_session()
        async with self._get(name, "bytes=0-0") as answer:
            if answer.status == 416:  # there is no first byte
                return 0, False
            answer.raise_for_status()
            if answer.url.path.endswith("/"):  # redirected to a folder's page
                raise FileNotFoundError(name)
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if answer.status == 206 and total.isdigit():
                return int(total), True
            return int(answer.headers.get("Content-Length", -1)) if answer.status == 200 else -1, False

    async def read(self, name: str) -> bytes:
        await self.fs.set_session()
        async with self._get(name) as answer:
            answer.raise_for_status()
            return await _body(answer)

    async def range(self, name: str, start: int, stop: int) -> bytes:
        await self.fs.set_session()
        async with self._get(name, f"bytes={start}-{stop - 1}") as answer:
            answer.raise_for_status()
            if answer.status != 206:
                raise OSError("the server served ranges before and does not now")
            content = await _body(answer)
        _check(len(content), stop - start)
        return content

    async def stream(self, name: str, file: BinaryIO) -> None:
        await self.fs.set_session()
        file.seek(0)
        file.truncate()
        async with self._get(name) as answer:
            answer.raise_for_status()
            async for chunk in answer.content.iter_chunked(1 << 20):
                file.write(chunk)
            _check(file.tell(), int(answer.headers.get("Content-Length", file.tell())))


async def _body(answer: Any) -> bytes:
    content = await answer.read()
    _check(len(content), int(answer.headers.get("Content-Length", len(content))))
    return content
