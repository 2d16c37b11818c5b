"""GRADINE_WEBHOOK: a URL that is told how a session ended, as JSON. The URL is a secret: no message names it."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from http.client import HTTPException
from typing import Any

from gradine.pipeline.run_dir import without_secrets

VARIABLE = "GRADINE_WEBHOOK"
TRIES, ANSWER_S, PAUSE_S = 3, 10.0, 1.0
WITHIN_S = TRIES * ANSWER_S + (TRIES - 1) * PAUSE_S  # whatever a name server or a dripping answer takes
IN_HASTE_S = 6.0  # of the 10 s in which a session that was asked to stop ends; the rest is Ray's and a lease's end


def post(message: dict[str, Any], tell: Callable[[str], object], in_haste: bool = False) -> None:
    """Posts `message` if a webhook is set. What goes wrong is one line to `tell`; WITHIN_S or IN_HASTE_S at most."""
    url, trouble = os.environ.get(VARIABLE, ""), []
    if not url:
        return
    if not url.lower().startswith(("http://", "https://")):
        tell(f"{VARIABLE} is no http:// or https:// URL: the end of this session was not posted")
        return

    def attempt() -> None:
        trouble.append(_trouble(url, json.dumps(without_secrets(message)).encode()))

    # A thread, since a limit on the whole is none of urllib's; as a daemon it holds up no exit.
    thread = threading.Thread(target=attempt, name="webhook", daemon=True)
    thread.start()
    limit = IN_HASTE_S if in_haste else WITHIN_S
    thread.join(limit)
    if reason := trouble[0] if trouble else f"no answer within {limit:.0f} s":
        tell(f"the end of this session could not be posted to {VARIABLE}: {reason}")


def _trouble(url: str, body: bytes) -> str:
    """Why the post failed each time, without the URL; "" if it did not."""
    from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

    attempts = Retrying(stop=stop_after_attempt(TRIES), wait=wait_fixed(PAUSE_S),
                        retry=retry_if_exception_type((OSError, HTTPException)))
    try:
        attempts(_post_once, url, body)
    except RetryError as given_up:
        return _why(given_up.last_attempt.exception())
    except Exception as error:  # a URL that urllib cannot read, which the text of its error holds
        return type(error).__name__
    return ""


def _post_once(url: str, body: bytes) -> None:
    from urllib.error import HTTPError
    from urllib.request import HTTPRedirectHandler, Request, build_opener

    class AsItStands(HTTPRedirectHandler):  # urllib follows a redirect without the body
        def redirect_request(self, *_: Any) -> None:
            return None

    request = Request(url, body, {"Content-Type": "application/json", "User-Agent": "gradine"})
    try:
        build_opener(AsItStands()).open(request, timeout=ANSWER_S).close()
    except HTTPError as answer:
        answer.close()
        raise


def _why(error: BaseException | None) -> str:
    from urllib.error import HTTPError

    if isinstance(error, HTTPError):
        return f"HTTP {error.code}"
    cause = getattr(error, "reason", None) or error  # urllib wraps what a socket raised
    words = "timed out" if isinstance(cause, TimeoutError) else getattr(cause, "strerror", None)
    return f"{type(cause).__name__}{f': {words}' if words else ''}"
