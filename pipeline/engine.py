"""Snakemake's side of the graph: a run takes the lock and makes file times right, a look only sees them right."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dvc.exceptions import DvcException
from dvc.repo import Repo
from filelock import FileLock, Timeout

from pipeline import graph
from pipeline.runtime.job_lines import JobLines
from refinenet.errors import UserError

_T = TypeVar("_T")

LOCK = Path(".snakemake/refinenet.lock")


class _Repo(Repo):  # type: ignore[misc]
    """DVC's repository, which makes no .dvc/tmp where there is none: only a run does, a look may not."""

    @cached_property
    def tmp_dir(self) -> str:
        own = Path(self.local_dvc_dir, "tmp")
        if own.is_dir():
            return str(own)
        self._scratch = tempfile.TemporaryDirectory(prefix="refinenet-")
        self._ignore = lambda: None  # or DVC would name it in .gitignore
        return self._scratch.name


class Engine:
    """DVC's repository and its stages, for one process of Snakemake.

    Args:
        workflow: snakemake.workflow.Workflow, whose Snakefile is being parsed.

    Exits with one line where the graph cannot be loaded.
    """

    def __init__(self, workflow: Any) -> None:
        graph.register_engine()
        _name_the_user()
        _put_this_python_first()
        self.workflow = workflow
        self.repo, self.stages = _in_one_line(_load)
        if workflow.is_main_process:
            _without_log(workflow)
            self._prepare_dag, workflow._prepare_dag = workflow._prepare_dag, self._prepare

    def _prepare(self, **options: Any) -> None:
        """Do what comes before Snakemake's decision what to run; takes the place of Workflow._prepare_dag.

        All options but those that list rules come here, and only now it is known which are looks.
        """
        if self.workflow.executor_plugin is not None and not self.workflow.dryrun:
            _in_one_line(self._before_a_run)
            self.workflow.logger_manager.setup_logfile()
            self._prepare_dag(**options)
            self._in_lines()
            return
        with _persistence_that_only_reads(self.workflow):
            self._prepare_dag(**options)
        _in_one_line(lambda: graph.overlay(self.repo, self.stages, self.workflow.iocache))

    def _before_a_run(self) -> None:
        LOCK.parent.mkdir(exist_ok=True)
        # Of this process, so that a killed one leaves nothing behind that would have to be unlocked.
        self.only_one = FileLock(LOCK)
        try:
            self.only_one.acquire(timeout=0)
        except Timeout:
            raise UserError("another snakemake is at work in this folder; wait for it, then again") from None
        if not Path(".dvc/tmp").is_dir():
            self.repo.close()
            self.repo = Repo(".")
        graph.sync_mtimes(self.repo, self.stages)

    def _in_lines(self) -> None:
        """Have each job told in one line, on the terminal; Snakemake's log has all it says."""
        from snakemake.logging import logger

        for handler in list(logger.handlers):
            if handler.name == "DefaultStreamHandler" and not self.workflow.output_settings.verbose:
                logger.removeHandler(handler)
                logger.addHandler(JobLines(handler, self._commands))

    def _commands(self) -> dict[str, str]:
        needed = {job.rule.name for job in self.workflow.dag.needrun_jobs()}
        return {stage.rule: stage.command for stage in self.stages if stage.rule in needed}

    def on_start(self) -> None:
        """Look at the machine before the first job."""
        # `jobs` is for executors that hand jobs to other machines.
        elsewhere = self.workflow.resource_settings.nodes is not None
        _in_one_line(lambda: graph.check_machine(self.stages, self._commands(), elsewhere))

    def on_end(self) -> None:
        """Tell DVC what was made, also after a failed job."""
        _in_one_line(lambda: graph.commit(self.repo, self.stages))


def _load() -> tuple[Repo, list[graph.Stage]]:
    from dvc.exceptions import NotDvcRepoError
    from dvc.scm import NoSCMError, SCMError

    if signs := sorted({"{", "}"} & set(str(Path.cwd()))):
        raise UserError(f"{Path.cwd()}: DVC cannot work in a folder with {' or '.join(signs)} in its path; rename it")
    try:
        repo = _Repo(".")
        return repo, graph.stages(repo)
    except NotDvcRepoError:
        raise UserError(
            ".dvc: missing or without its config; `git checkout .dvc` restores it, and a copy of the folder must "
            "include the files whose names begin with a dot"
        ) from None
    except (SCMError, NoSCMError) as error:
        if Path(".git").exists():
            raise
        raise UserError(
            ".git: missing, as in a ZIP download; `git clone` the repository instead, or tell DVC that there is none: "
            "`dvc config --local core.no_scm true`"
        ) from error


def _in_one_line(action: Callable[[], _T]) -> _T:
    """Run `action`; exit with one line for what the user can mend, and for whatever DVC raises."""
    try:
        return action()
    except UserError as error:
        _exit(str(error))
    except DvcException as error:
        _exit(_all_words(error))
    except OSError as error:
        _exit(f"{error.filename or 'disk'}: {error.strerror or error}")
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        if not any("/dvc" in frame.filename for frame in frames):
            raise
        _exit(f"DVC cannot load the graph of dvc.yaml: {type(error).__name__}: {_all_words(error)}")


def _all_words(error: BaseException | None) -> str:
    """Return the messages of an error and of its causes, in one line."""
    words: list[str] = []
    while error is not None:
        if (text := " ".join(str(error).split())) and text not in words:
            words.append(text)
        error = error.__cause__
    return "; ".join(words)


def _exit(line: str) -> NoReturn:
    sys.exit(f"error: {line}")


def _name_the_user() -> None:
    """Give this process a user name where its number has none (`docker run --user 12345`): both engines ask for it."""
    import getpass

    try:
        getpass.getuser()
    except (KeyError, OSError):
        os.environ["USER"] = str(os.getuid())


def _put_this_python_first() -> None:
    """Have the stages' `python` be this one: started as .venv/bin/snakemake, the PATH has another one or none."""
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _without_log(workflow: Any) -> None:
    """Take away the log that Snakemake has begun before it knows whether this is a run."""
    from snakemake.logging import logger

    for handler, file in list(workflow.logger_manager.logfile_handlers.items()):
        logger.removeHandler(handler)
        handler.close()
        del workflow.logger_manager.logfile_handlers[handler]
        with contextlib.suppress(OSError):
            Path(file).unlink()
            for folder in list(Path(file).parents)[:2]:  # .snakemake/log and .snakemake, if it has made them
                folder.rmdir()


@contextlib.contextmanager
def _persistence_that_only_reads(workflow: Any) -> Any:
    """Have Snakemake make its folders elsewhere, with those in it that record earlier runs, if there are any."""
    from snakemake import workflow as module

    scratch = Path(workflow.snakemake_tmp_dir, "persistence")
    scratch.mkdir()
    for name in ("metadata", "incomplete"):
        if (there := Path(".snakemake", name).absolute()).is_dir():
            (scratch / name).symlink_to(there)
    original = module.FilePersistence
    module.FilePersistence = lambda **options: original(**{**options, "path": scratch})
    try:
        yield
    finally:
        module.FilePersistence = original
