"""MLflow's database: where it is, that one process at a time makes or migrates it, and runs whose process is gone."""

from __future__ import annotations

import contextlib
import os
import socket
import sqlite3
from contextlib import AbstractContextManager
from pathlib import Path

from filelock import FileLock

from refinenet.atomic import atomic_file, process_start_time

MIGRATION = 300.0  # seconds to wait for another process that makes or migrates the database


def address() -> str:
    """Return the URI of MLflow's database: MLFLOW_TRACKING_URI, else mlflow.db in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or _uri(Path("mlflow.db").absolute())


def file(uri: str) -> Path | None:
    """Return the file behind an sqlite URI; None where it is a server or another database."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") and path not in {"", ":memory:"} else None


def exclusive(database: Path | None) -> AbstractContextManager[object]:
    """Return the lock beside `database` (None: none is needed) for a `with`; TimeoutError if it can't be had."""
    if not database:
        return contextlib.nullcontext()
    database.parent.mkdir(parents=True, exist_ok=True)
    lock = Path(f"{database}.lock")
    lock.touch()  # FileLock would wait in vain where there can be none
    return FileLock(lock, timeout=MIGRATION)


def check(database: Path, patience: float) -> None:
    """Raise what sqlite says of a database that nobody can write to within `patience` seconds.

    MLflow would try for 20 s where it is locked, and for 100 s where it is no database.
    """
    try:
        with contextlib.closing(sqlite3.connect(database, timeout=patience)) as probe:
            probe.execute("BEGIN IMMEDIATE")
    except sqlite3.Error as error:
        raise type(error)(f"{database}: {error}") from None


def prepare(database: Path, patience: float) -> None:
    """Make the database, or migrate one of an older MLflow, while no other process does; sqlite3.Error as of `check`.

    Four processes that open a database that is not there yet break it for good. So it is made by one, under another
    name, and appears whole; one that is migrated is kept beside as mlflow.db.<its version>.
    """
    from mlflow.store.db import utils
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    with exclusive(database):
        if not database.exists() or not database.stat().st_size:
            with atomic_file(database) as part:
                store = SqlAlchemyStore(_uri(part), (database.parent / "mlruns").as_uri())  # type: ignore[no-untyped-call]
                store.engine.dispose()
            return
        check(database, patience)
        engine = utils.create_sqlalchemy_engine(_uri(database))  # type: ignore[no-untyped-call]
        version = utils._get_schema_version(engine)  # type: ignore[no-untyped-call]
        if version != utils._get_latest_schema_revision():  # type: ignore[no-untyped-call]
            with (
                contextlib.closing(sqlite3.connect(database)) as old,
                contextlib.closing(sqlite3.connect(f"{database}.{version}")) as copy,
            ):
                old.backup(copy)
            utils._initialize_tables(engine)  # type: ignore[no-untyped-call]
        engine.dispose()
        _follow(database)


def _uri(database: Path) -> str:
    # In an URI of sqlite a "?" ends the path, and there is no way to escape it.
    return f"sqlite:///{os.path.relpath(database) if '?' in str(database) else database}"


# Where MLflow keeps the place of artifacts, as the path that the folder had then.
_PLACES = {
    "experiments": ["artifact_location"],
    "runs": ["artifact_uri"],
    "logged_models": ["artifact_location"],
    "model_versions": ["source", "storage_location"],
}


def _follow(database: Path) -> None:
    """Have artifacts follow a folder that was moved, copied or mounted elsewhere: they lie beside the database.

    Else new ones would go to the old place, and a copy would write into the original.
    """
    here = (database.parent / "mlruns").as_uri()
    with contextlib.closing(sqlite3.connect(database)) as connection, connection:
        row = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
        there, _, last = (row[0] or "").rpartition("/") if row else ("", "", "")
        if last != "0" or not there.startswith("file:") or there == here:
            return  # where it was; or in a place that somebody has chosen
        for table, columns in _PLACES.items():
            for column in columns:
                connection.execute(
                    f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?",
                    (here, len(there) + 1, len(there) + 1, f"{there}/"),
                )


def writer() -> str:
    """Name this process as no other one: host, number, start. The tag `writer` of the runs that it records."""
    return f"{socket.gethostname()} {os.getpid()} {process_start_time(os.getpid())}"


def close_killed(uri: str) -> None:
    """Mark as KILLED the runs that are RUNNING though the process of this machine that recorded them is gone."""
    import mlflow

    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient(uri)
    running = mlflow.search_runs(
        filter_string="attributes.status = 'RUNNING'", search_all_experiments=True, output_format="list"
    )
    for run in running:
        host, pid, born = (*run.data.tags.get("writer", "").split(), "", "", "")[:3]
        gone = host == socket.gethostname() and pid.isdigit() and process_start_time(int(pid)) not in (born, "?")
        # Read again: its process may have written that it ended well, and gone, since the search.
        if gone and client.get_run(run.info.run_id).info.status == "RUNNING":
            client.set_terminated(run.info.run_id, "KILLED")
