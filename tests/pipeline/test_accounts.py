"""Cityscapes' login, at a local server that does as the real one: a cookie, and a page for a wrong password."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from http_server import DATA, MD5, Handler, Server, serve

from pipeline import download
from pipeline.config.schema import Source
from pipeline.fetch import http, login, sources
from refinenet.errors import UserError

SECRET = "s3cret&+ word"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A site that gives its file to who is logged in and leads all others to a page."""

    def answer(handler: Handler, n: int) -> None:
        if handler.path == "/login" and handler.command == "POST":
            form = parse_qs(handler.rfile.read(int(handler.headers["Content-Length"])).decode())
            if form == {"username": ["me"], "password": [SECRET], "submit": ["Login"]}:
                assert "visitor" in handler.headers["Cookie"], "the form's page comes first"
                return handler.fail(302, Location="/", Set_Cookie="member=1")
            return handler.send(b"<html>Wrong", Content_Type="text/html")
        if handler.path == "/login":
            return handler.send(b"<html>Log in", Content_Type="text/html", Set_Cookie="visitor=1")
        if "member" in handler.headers.get("Cookie", ""):
            return handler.send(keep=100_000 if handler.start() == 0 else None)
        return handler.fail(302, Location="/login")

    for variable in login.variables("cityscapes"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "share"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    with serve() as server:
        monkeypatch.setattr(login, "HOSTS", {"cityscapes": server.host})
        server.answer = answer
        yield server


def source(site: Server, **more: str) -> Source:
    return Source(f"http://{site.host}/file-handling/?packageID=3", md5=MD5, login="cityscapes", **more)  # type: ignore[arg-type]


def test_logs_in_and_resumes(site: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", SECRET)
    sources.fetch(source(site), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == DATA
    assert site.requests[-1]["Range"].startswith("bytes=")


def test_what_the_official_tool_has_stored(site: Server, tmp_path: Path) -> None:
    from cityscapesscripts.download import downloader

    stored = Path(downloader.appdirs.user_data_dir("cityscapesscripts", "cityscapes")) / "credentials.json"
    assert tmp_path in stored.parents
    stored.parent.mkdir(parents=True)
    stored.write_text(json.dumps({"username": "me", "password": SECRET}))
    sources.fetch(source(site), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == DATA
    stored.write_text("{}")
    with pytest.raises(UserError, match=r"credentials\.json: not as csDownload writes it"):
        sources.fetch(source(site), tmp_path / "y.zip")


@pytest.mark.parametrize("password", [None, "wrong-" + SECRET])
def test_without_a_right_password_one_line_says_what_to_do(
    site: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, password: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if password is not None:
        monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
        monkeypatch.setenv("CITYSCAPES_PASSWORD", password)
    page = "https://www.cityscapes-dataset.com/downloads/"
    told = {"url": source(site).url, "md5": MD5, "login": "cityscapes", "page": page}
    settings = {"download": {"cityscapes": {"archives": {"a.zip": told, "b.zip": told}}}}
    Path("settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError) as caught:
        download.run("cityscapes")
    line = str(caught.value)
    assert "\n" not in line
    assert SECRET not in line
    assert ("needs an account" if password is None else "does not accept this name and password") in line
    assert line.endswith(
        f"By hand: take a.zip (md5 {MD5}) and b.zip (md5 {MD5}) from {page} and put them into "
        "data/incoming/cityscapes/; or set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, "
        "or run `csDownload -d data/incoming/cityscapes a.zip b.zip`"
    )
    assert Path("data/incoming/cityscapes").is_dir()


def test_the_password_goes_nowhere_else(site: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", SECRET)
    monkeypatch.setattr(login, "HOSTS", {"cityscapes": "www.cityscapes-dataset.com"})
    with pytest.raises(UserError, match="web page"):
        sources.fetch(source(site), tmp_path / "x.zip")
    assert [headers for headers in site.requests if "Content-Length" in headers] == []
    # Its own site, but in the clear.
    with pytest.raises(UserError, match="over https:// only"):
        sources.fetch(Source("http://www.cityscapes-dataset.com/x", login="cityscapes"), tmp_path / "x.zip")
