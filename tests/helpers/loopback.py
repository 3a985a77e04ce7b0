"""Remotes for `dvc push` and `dvc pull` on this machine: a folder, an SSH server, one of S3; and a bad line."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest


@dataclass(frozen=True)
class Remote:
    """Where to push, what DVC must be told for it, and the way to its objects behind DVC's back."""

    url: str
    options: dict[str, str]
    environment: dict[str, str]
    line: Line | None
    read: Callable[[str], bytes]  # path below `url` -> content
    write: Callable[[str, bytes], object]


class Line:
    """A TCP line to a port of this machine that goes dead, with all its connections, once it has carried enough."""

    def __init__(self, port: int) -> None:
        self._to = port
        self._left: int | None = None
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def cut_after(self, count: int | None) -> None:
        """Go dead after `count` more bytes from the server; None: work (again)."""
        self._left = count

    @property
    def dead(self) -> bool:
        return self._left is not None and self._left <= 0

    def _accept(self) -> None:
        while True:
            here, _ = self._listener.accept()
            if self.dead:
                here.close()
                continue
            there = socket.create_connection(("127.0.0.1", self._to))
            self._open += [here, there]
            for one, other, counted in ((here, there, False), (there, here, True)):
                threading.Thread(target=self._carry, args=(one, other, counted), daemon=True).start()

    def _carry(self, one: socket.socket, other: socket.socket, counted: bool) -> None:
        try:
            while data := one.recv(16384):
                if counted and self._left is not None:
                    self._left -= len(data)
                if self.dead:
                    break
                other.sendall(data)
        except OSError:
            pass
        for end in self._open if self.dead else (one, other):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue


@contextmanager
def folder(where: Path) -> Iterator[Remote]:
    """The simplest: a folder."""

    def write(path: str, content: bytes) -> None:
        (where / path).unlink(missing_ok=True)  # write-protected by DVC, or removed, once it found it broken
        (where / path).write_bytes(content)

    where.mkdir()
    yield Remote(str(where), {}, {}, None, lambda path: (where / path).read_bytes(), write)


@contextmanager
def ssh(where: Path) -> Iterator[Remote]:
    """OpenSSH's server as this user, with keys of its own; skips where it or dvc-ssh is not installed."""
    server = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if not server or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd (Debian: apt install openssh-server)")
    if importlib.util.find_spec("dvc_ssh") is None:
        pytest.skip("no dvc-ssh (extra `remotes`)")
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(parents=True, exist_ok=True)  # sshd wants it of root; a container without boot lacks it
    home = where / "home"
    (home / ".ssh").mkdir(parents=True)
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", where / key], check=True)
    port = free_port()
    line = Line(port)
    (home / ".ssh" / "known_hosts").write_text(f"[127.0.0.1]:{line.port} {(where / 'host.pub').read_text()}")
    config = {"ListenAddress": f"127.0.0.1:{port}", "HostKey": where / "host", "PidFile": "none", "UsePAM": "no"}
    config |= {"AuthorizedKeysFile": where / "user.pub", "StrictModes": "no", "Subsystem": "sftp internal-sftp"}
    (where / "sshd_config").write_text("".join(f"{key} {value}\n" for key, value in config.items()))
    process = subprocess.Popen([server, "-D", "-e", "-f", where / "sshd_config"], stderr=subprocess.DEVNULL)
    try:
        wait_for(port, process)
        with folder(where / "store") as store:
            options = {"keyfile": str(where / "user")}
            url = f"ssh://{account()}@127.0.0.1:{line.port}{store.url}"
            yield Remote(url, options, {"HOME": str(home)}, line, store.read, store.write)
    finally:
        process.kill()
        process.wait()


@contextmanager
def s3(where: Path) -> Iterator[Remote]:
    """Moto's server of S3, in this process; skips where it or dvc-s3 is not installed."""
    if importlib.util.find_spec("dvc_s3") is None:
        pytest.skip("no dvc-s3 (extra `remotes`)")
    if importlib.util.find_spec("moto") is None:
        pytest.skip("no moto[server]")
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        port = server.get_host_and_port()[1]
        line = Line(port)
        secrets = {"access_key_id": "nobody", "secret_access_key": "nothing"}
        keys = {f"aws_{key}": value for key, value in secrets.items()}
        client = boto3.client("s3", endpoint_url=f"http://127.0.0.1:{port}", region_name="us-east-1", **keys)
        client.create_bucket(Bucket="lab")
        yield Remote(
            "s3://lab/refinenet",
            {"endpointurl": f"http://127.0.0.1:{line.port}", **secrets},
            {"HOME": str(where), "AWS_EC2_METADATA_DISABLED": "true"},
            line,
            lambda path: client.get_object(Bucket="lab", Key=f"refinenet/{path}")["Body"].read(),
            lambda path, content: client.put_object(Bucket="lab", Key=f"refinenet/{path}", Body=content),
        )
    finally:
        server.stop()


def account() -> str:
    """The name of the user that runs this."""
    import pwd

    return pwd.getpwuid(os.getuid()).pw_name


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes]) -> None:
    """Until the process listens on the port."""
    while True:
        assert process.poll() is None, f"the server has ended with {process.returncode}"
        try:
            socket.create_connection(("127.0.0.1", port)).close()
        except ConnectionRefusedError:
            time.sleep(0.02)
        else:
            return
