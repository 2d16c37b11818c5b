"""Claims about secrets: those of the environment and of URLs are in no file, log or message of a run."""

from __future__ import annotations

import io
import json
import os
import pickle
import secrets
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import replace
from pathlib import Path
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from gradine.configs.schema import (
    Checkpoints,
    CrashLoop,
    Data,
    EnvironmentFault,
    UserError,
    dump,
    from_dict,
    load,
    redacted,
)
from gradine.pipeline.display import Display
from gradine.pipeline.run_dir import RunDir
from gradine.pipeline.sources import locate
from tests.conftest import run_maker
from tests.object_store import web_folder

CANARY = "canary-0123456789"
SIGNED = f"https://bucket.example/sets/faces.zip?X-Amz-Date=1&X-Amz-Signature={CANARY}"
TINY = {"name": "x", "stages": [{"resolution": 4}], "data": {"source": SIGNED, "shards": "b"}}


# ---- A whole run


@pytest.mark.fault
def test_f38_canaries_in_the_environment_and_in_the_sources_url_are_in_no_file_or_output_of_a_run(
        image_folder: Path, tmp_path: Path) -> None:
    """`gradine run` with tokens in its environment on a signed URL; every byte that it and Ray leave is looked at."""
    (tmp_path / "web").mkdir()
    with zipfile.ZipFile(tmp_path / "web" / "images.zip", "w") as packed:
        for image in sorted(image_folder.rglob("*.*")):
            packed.write(image, image.relative_to(image_folder))
    run = run_maker(tmp_path / "shards", image_folder, tmp_path)(stages=1)
    (tmp_path / "c.yaml").write_text(dump(run))
    signature = secrets.token_hex(16)
    tokens = {name: secrets.token_hex(32) for name in (
        "HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "RAY_AUTH_TOKEN", "SOME_PASSWORD")}
    with web_folder(tmp_path / "web") as url, tempfile.TemporaryDirectory() as ray:  # a short path: it holds sockets
        source = f"{url}/images.zip?X-Amz-Signature={signature}"
        environment = {**os.environ, **tokens, "RAY_TMPDIR": ray, "NO_PROXY": "127.0.0.1", "RAY_AUTH_MODE": "token"}

        def gradine(*arguments: str) -> subprocess.CompletedProcess[bytes]:
            return subprocess.run([sys.executable, "-m", "gradine.pipeline", *arguments], env=environment, timeout=300,
                                  capture_output=True)

        done = gradine("run", str(tmp_path / "c.yaml"), f"data.source={source}")
        assert done.returncode == 0, done.stderr.decode()
        folder = RunDir(tmp_path / "runs" / "tiny")
        assert folder.report.is_file()
        files = {path: path.read_bytes() for top in (tmp_path, Path(ray)) for path in top.rglob("*") if path.is_file()}
        said = {"stdout": done.stdout, "stderr": done.stderr}
    for name, secret in {"X-Amz-Signature": signature, **tokens}.items():
        leaks = [str(where) for where, content in {**files, **said}.items() if secret.encode() in content]
        assert not leaks, f"{name} is in {leaks}"
    assert len(files) > 30
    kinds = {path.suffix for path in files}
    assert {".yaml", ".jsonl", ".html", ".safetensors", ".json", ".tar", ".png", ".log"} <= kinds

    # its parts are named still, and the same command goes on
    (start, *_) = [line for line in folder.lines("ledger.jsonl") if line["event"] == "start"]
    assert start["command"].endswith(f"data.source={url}/images.zip?***")
    assert load(folder.config).data.source == f"{url}/images.zip?***"
    from gradine.pipeline.driver import settle

    _, plan = settle(load(tmp_path / "c.yaml", [f"data.source={source}"]), folder)
    assert not plan.stages
    assert plan.start
    refused = gradine("run", str(folder.config), f"data.shards={tmp_path}/others", "name=other")
    assert refused.returncode == 2
    assert b"what followed the ? is kept secret" in refused.stderr
    assert b"data.source=URL" in refused.stderr


# ---- Pieces


@pytest.mark.parametrize(("text", "shown"), [
    (f"command gradine run c data.source={SIGNED} name=x",
     "command gradine run c data.source=https://bucket.example/sets/faces.zip?*** name=x"),
    (f"{SIGNED!r} is refused", "'https://bucket.example/sets/faces.zip?***' is refused"),
    (f"proxy http://me:{CANARY}@proxy:3128 and ftp+x://{CANARY}@host/a?b", "proxy http://***@proxy:3128 and "
                                                                           "ftp+x://***@host/a?***"),
    (f"https://me:p@{CANARY}@host/", "https://***@host/"),
    ("mail me@example.com; what? yes: s3://bucket/a@2x.png", "mail me@example.com; what? yes: s3://bucket/a@2x.png"),
    ("https://***@host/a?***", "https://***@host/a?***")])
def test_what_urls_keep_secret_is_struck_out_and_nothing_else(text: str, shown: str) -> None:
    assert redacted(text) == shown


@pytest.mark.parametrize(("name", "secret"), [
    ("HF_TOKEN", True), ("WANDB_API_KEY", True), ("AWS_SECRET_ACCESS_KEY", True), ("RAY_AUTH_TOKEN", True),
    ("openai_apikey", True), ("DB_PASSWORD", True), ("AWS_WEB_IDENTITY_TOKEN_FILE", False),
    ("GOOGLE_APPLICATION_CREDENTIALS", False), ("HOSTNAME", False), ("KEYBOARD", False), ("SMTP_PASS", True),
    ("GRADINE_WEBHOOK", True),
    ("AZURE_CREDENTIALS", True), ("PROXY_AUTH", True), ("BYPASS", False), ("GIT_ASKPASS", False), ("OAUTH", False)])
def test_values_of_secret_variables_are_struck_out_wherever_they_stand(
        monkeypatch: pytest.MonkeyPatch, name: str, secret: bool) -> None:
    monkeypatch.setenv(name, CANARY)
    assert redacted(f"a{CANARY}b") == ("a***b" if secret else f"a{CANARY}b")
    monkeypatch.setenv(name, "false")
    assert redacted("a false alarm") == "a false alarm"


@pytest.mark.parametrize(("value", "secret"), [
    ("postgres", False), ("passphrase", False), ("kubernetesx", False), ("correcthorse", True), ("postgres1", True),
    ("Postgres", True), ("a1b2c3d", False), ("a1b2c3d4", True), ("a b\nc\nd1", True), ("a\nb", False), ("", False)])
def test_a_plain_word_as_a_password_does_not_strike_out_the_names_of_folders(
        monkeypatch: pytest.MonkeyPatch, value: str, secret: bool) -> None:
    monkeypatch.setenv("POSTGRES_PASSWORD", value)
    assert redacted(f"/home/{value}/runs") == ("/home/***/runs" if secret else f"/home/{value}/runs")


safe = st.text("abcdefghijklmnopqrstuvwxyz0123456789-._~", min_size=1, max_size=12)


@given(st.sampled_from(["http", "https", "s3", "ftp"]), safe, safe, safe,
       st.lists(st.tuples(safe, st.text(min_size=1, max_size=12)), min_size=1, max_size=4),
       st.sampled_from([" ", "'", '"', "\n", ""]))
def test_no_user_password_or_query_of_any_url_is_left(scheme: str, user: str, password: str, host: str,
                                                      query: list[tuple[str, str]], after: str) -> None:
    pairs = "&".join(f"{key}={quote(value)}" for key, value in query)
    text = redacted(f"cannot read {scheme}://{user}:{password}@{host}/a/b.zip?{pairs}{after}")
    assert text == f"cannot read {scheme}://***@{host}/a/b.zip?***{after}"


@pytest.mark.parametrize("kind", [UserError, EnvironmentFault, CrashLoop])
def test_no_error_tells_a_secret_even_after_a_journey_between_processes(
        kind: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "another-canary")
    error = kind(f"{SIGNED} and another-canary", 7)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert type(each) is kind
        assert each.args == ("https://bucket.example/sets/faces.zip?*** and ***", 7)
    assert str(kind("plain")) == "plain"


def test_the_ledger_keeps_no_secret_at_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "another-canary")
    folder = RunDir(tmp_path)
    folder.record("retry", reason=f"no {SIGNED}", more={"list": [SIGNED, ("another-canary", 1.5, None)]})
    content = (tmp_path / "ledger.jsonl").read_text()
    assert "canary" not in content
    (line,) = folder.lines("ledger.jsonl")
    assert line["more"] == {"list": ["https://bucket.example/sets/faces.zip?***", ["***", 1.5, None]]}
    assert json.loads(content)["event"] == "retry"


def test_config_yaml_keeps_no_signature_and_reads_back_equal_but_for_it() -> None:
    run = from_dict(TINY)
    assert CANARY not in dump(run)
    again = load_text(dump(run))
    assert replace(again, data=replace(again.data, source=SIGNED)) == run
    assert load_text(dump(again)) == again
    plain = from_dict({**TINY, "data": {"source": "/a?b", "shards": "b"}})
    assert load_text(dump(plain)) == plain


def load_text(text: str):
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(text)
        file.flush()
        return load(file.name)


def test_a_source_whose_signature_was_not_written_down_is_asked_for() -> None:
    with pytest.raises(UserError, match=r"faces\.zip\?\*\*\*'.*kept secret.*whole URL again, as data\.source=URL"):
        locate(load_text(dump(from_dict(TINY))).data.source)
    assert locate(SIGNED) == SIGNED


def test_what_the_display_says_holds_no_secret() -> None:
    out = io.StringIO()
    Display(from_dict(TINY), Console(file=out, soft_wrap=True)).say(f"shards: its source {SIGNED} is not here")
    assert out.getvalue() == "shards: its source https://bucket.example/sets/faces.zip?*** is not here\n"


@pytest.mark.parametrize("location", [f"s3://key:{CANARY}@bucket/x", f"http://{CANARY}@host?a", f"s3://a/b?k={CANARY}"])
def test_logins_and_queries_are_refused_where_they_would_be_written_down(location: str) -> None:
    for make in (lambda: Data(source="a", shards=location), lambda: Checkpoints(location=location)):
        with pytest.raises(UserError, match=r"user and password|has a query") as caught:
            make()
        assert CANARY not in str(caught.value)
    if "@" in location:
        with pytest.raises(UserError, match=r"data\.source holds a user and password.*netrc") as caught:
            Data(source=location, shards="a")
        assert CANARY not in str(caught.value)


def test_a_malformed_override_is_told_without_its_secret() -> None:
    for text in (SIGNED.replace("=", ""), f"data.source=[{SIGNED}"):
        with pytest.raises(UserError, match="override") as caught:
            load("demo", [text])
        assert CANARY not in str(caught.value)
