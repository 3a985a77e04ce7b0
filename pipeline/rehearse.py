"""Drive the whole graph of a profile in a scratch folder, two steps a phase, before anybody pays for the real run.

    make rehearsal                                     the profile of params.yaml, as it is
    refinenet rehearse --profile paper --device cpu
    refinenet rehearse --forecast --gpus 4             what the last rehearsal's rates make of the full run

Every training runs with its network, recipe, phases, precision and device, one of them killed and resumed; every
evaluation with all its protocols; then tables, report, trials of the submissions, an export, a prediction and its
serving. The project's outputs, dvc.lock, MLflow and checkpoints are not touched. Archives that are on this machine are
used where they lie, others are drawn in images of the true size. A failure does not stop it: what depends on it is
skipped, all else goes on. Exit code 1 if anything failed.
"""

from __future__ import annotations

import copy
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml

from pipeline import cost, datasets, preflight
from pipeline.config.profiles import PARAMS, PROFILES, read_params, read_profile, read_yaml
from pipeline.config.resolve import SETTINGS, data_of, resolve
from pipeline.config.schema import Params
from pipeline.fetch import checksums, local
from pipeline.runtime.cli import EXIT_TRY_AGAIN, attach, command_parser, run_cli, user_path
from pipeline.submit import default_experiment
from pipeline.test_servers.formats import SERVERS
from pipeline.tracking import KEPT
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

FOLDER = Path("rehearsal")
RATES = "rates.json"
CODE = Path(__file__).resolve().parents[1]
THIN = {"stem": 8, "width": 8, "coarse_width": 16}  # a network of few channels, for --thin

# The settings that a rehearsal changes, by their place in settings.json, and why; all others are the profile's.
CHANGED = {
    "download.*.archives": "those that are not on this machine are drawn instead; file:// addresses become absolute",
    "download.*.rendered": "the same",
    "download.*.mirror": "the project's own archives are a mirror of the scratch folder",
    "download.*.own": "a relative path to a user's folders is made absolute",
    "prepare.*.own": "the same",
    "prepare.*.limit": "a few images of each split",
    "prepare.*.official_counts": "drawn archives hold a few images",
    "weights.*.source": "weights that would be downloaded are drawn, unless the project has them already",
    "train.*.source": "the same",
    "train.*.phases": "their lengths; the parts and the learning rates stay",
    "train.*.recipe.steps": "the length",
    "train.*.recipe.log_every": "each step is timed",
    "train.*.recipe.hold_out": "a few images are too few to hold some out",
    "train.*.device": "--device",
    "evaluate.*.device": "--device",
    "train.*.threads": "no more than this machine has cores for each job: more of them wait for each other",
    "evaluate.*.threads": "the same",
    "train.*.network": "--thin: stem, width, coarse_width",
    "weights.*.stem": "--thin",
    "tables.*.comparable": "scores of two steps stand against nothing",
}

_SERVE = """\
import sys
import mlflow, pandas
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[1]}@best")
with open(sys.argv[2], "rb") as file:
    answer = model.predict(pandas.DataFrame({"image": [file.read()]}))
assert answer["label"][0].startswith(b"\\x89PNG"), answer
"""


@dataclass(frozen=True)
class Options:
    """What the command was asked for; `steps` of each phase, `images` of each split."""

    profile: str
    device: str | None = None
    steps: int = 2
    images: int = 2
    thin: bool = False
    jobs: int = 1


@dataclass(frozen=True)
class Job:
    """A stage or a command: what it is called, its command line, and the jobs whose results it needs."""

    name: str
    command: Sequence[str]
    needs: tuple[str, ...] = ()
    kill: bool = False  # this training is stopped by SIGTERM, goes on, is killed, and goes on


@dataclass
class Result:
    """How a job ended. `error`: one line, None where it is well; `rate`: images a second; memory in bytes."""

    name: str
    seconds: float
    error: str | None = None
    skipped: bool = False
    rate: float | None = None
    step: float | None = None
    host: float = 0.0
    device: float | None = None
    notes: list[str] = field(default_factory=list)

    def line(self) -> str:
        """Return the job's line of the table."""
        if self.error is not None:
            return f"{self.name:34} {'skipped' if self.skipped else 'FAILED':8} {self.error}"
        told = [f"{self.seconds:7.1f} s"]
        told += [f"{self.step:.3g} s a step"] if self.step else []
        told += [f"{self.rate:.3g} images/s"] if self.rate else []
        told += [f"host {self.host / 1e9:.1f} GB"] if self.host else []
        told += [f"device {self.device / 1e9:.1f} GB"] if self.device else []
        return f"{self.name:34} {'ok':8} {', '.join(told + self.notes)}"


def settings_of(real: Mapping[str, Mapping[str, Any]], options: Options) -> dict[str, dict[str, Any]]:
    """Return the settings of the rehearsal: those of the profile, `real`, but for what CHANGED lists."""
    made = copy.deepcopy({stage: dict(entries) for stage, entries in real.items()})
    for data, download in made["download"].items():
        prepare = made["prepare"][data]
        prepare["limit"] = options.images
        if download["own"]:
            for key in ("images", "masks", "train", "val"):
                path = local.folder(download["own"][key]) if download["own"][key] else None
                download["own"][key] = str(path.absolute()) if path else download["own"][key]
            prepare["own"] = download["own"]
        elif download["archives"] and all(
            source["optional"] or preflight.here(data, file, source, download["mirror"])
            for file, source in download["archives"].items()
        ):
            folders = [entry for entry in map(local.folder, download["mirror"]) if entry is not None]
            mine = (checksums.STORE, local.INCOMING, *folders)
            download["mirror"] = [str(folder.absolute()) for folder in mine if folder.is_dir()]
            download["archives"] = {file: _absolute(source) for file, source in download["archives"].items()}
        elif not download["own"]:
            height, width = datasets.load(data).TYPICAL_SIZE
            count = max(2, options.images)
            size = {"height": height, "width": width} if download["archives"] else download["rendered"]
            drawn = {"train": count, "val": count, "seed": 0, **size}
            download |= {"archives": {}, "rendered": drawn if download["archives"] else download["rendered"]}
            download["mirror"] = []
            prepare["official_counts"] = False
    for weights in made["weights"].values():
        if not (weights["source"] or {}).get("package"):
            weights["source"] = None
        if options.thin:
            weights |= {"stem": THIN["stem"], "source": None}
    for name, training in made["train"].items():
        each = phase_steps(name, real, options)
        for phase in training["phases"]:
            phase["steps"] = each
        steps = each * max(1, len(training["phases"]))
        training["recipe"] |= {"steps": steps, "log_every": 1, "hold_out": 0.0}
        training["source"] = None
        if options.thin:
            training["network"] |= THIN
    for profile in made["tables"].values():
        profile["comparable"] = False
    for stage in ("train", "evaluate"):
        for entry in made[stage].values():
            entry["device"] = options.device or entry["device"]
            entry["threads"] = min(entry["threads"], max(1, (os.cpu_count() or 1) // options.jobs))
    return made


def _absolute(source: Mapping[str, Any]) -> dict[str, Any]:
    """Return a source whose file:// addresses lead to the same files from another folder."""

    def moved(url: str) -> str:
        path = local.folder(url) if url.startswith("file://") else None
        return f"file://{quote(str(path.absolute()))}" if path is not None else url

    return {**source, "url": moved(source["url"]), "mirrors": [moved(url) for url in source["mirrors"]]}


def killed(settings: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the training that is stopped, killed, and started again: the first that trains."""
    trains = (name for name, one in settings["train"].items() if one["target"] == "models" or one["phases"])
    return next(trains, None)


def phase_steps(name: str, settings: Mapping[str, Mapping[str, Any]], options: Options) -> int:
    """Return the steps of each phase; of the training that is killed two more: what it did before is not timed."""
    return options.steps + 2 * (name == killed(settings))


def jobs(params: Params, settings: Mapping[str, Mapping[str, Any]]) -> Iterator[Job]:
    """Yield what is to be done, each after what it needs."""

    def stage(name: str, *needs: str, kill: bool = False) -> Job:
        kind, _, what = name.partition(" ")
        return Job(name, [sys.executable, "-m", f"pipeline.{kind}", what], needs, kill)

    for data in settings["download"]:
        yield stage(f"download {data}")
        yield stage(f"prepare {data}", f"download {data}")
    for backbone in settings["weights"]:
        yield stage(f"weights {backbone}")
    for name, training in settings["train"].items():
        start = training["start"]
        first = f"train {start}" if start in settings["train"] else f"weights {start}"
        prepared = (f"prepare {part}" for part in sorted(data_of(training)))
        yield stage(f"train {name}", first, *prepared, kill=name == killed(settings))
        if name in settings["evaluate"]:
            yield stage(f"evaluate {name}", f"train {name}")
    # An alternative row of a table may name any experiment: a table waits for all evaluations.
    everything = tuple(f"evaluate {name}" for name in settings["evaluate"])
    for table in (*params.tables, *params.own, *params.further):
        needs = everything if table in params.tables else _on(table, settings)
        yield stage(f"tabulate {table}", *needs)
    yield Job("report", [sys.executable, "-m", "pipeline.report"], tuple(f"tabulate {name}" for name in params.tables))
    for data in (*params.own, *params.further):
        yield stage(f"report {data}", f"tabulate {data}")
    for server in SERVERS.values():
        name = default_experiment(server.data)
        if name in settings["evaluate"]:
            command = [sys.executable, "-m", "pipeline.submit", server.data, "--partial", "--experiment", name]
            yield Job(f"submit {server.data}", command, (f"train {name}", f"evaluate {name}"))
    if settings["evaluate"]:
        name = next(iter(settings["evaluate"]))
        model, photo = f"models/{name}.safetensors", "photo.png"
        data = settings["evaluate"][name]["data"]
        device = ["--device", settings["evaluate"][name]["device"]]
        export = [sys.executable, "-m", "pipeline.export", model, "--to", f"{name}.onnx"]
        yield Job(f"export {name}", export, (f"train {name}",))
        predict = [sys.executable, "-m", "pipeline.predict", photo, "--model", model, *device]
        yield Job(f"predict {name}", predict, (f"train {name}", f"prepare {data}"))
        yield Job(f"serve {name}", [sys.executable, "-c", _SERVE, name, photo], (f"evaluate {name}", f"predict {name}"))


def _on(data: str, settings: Mapping[str, Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(f"evaluate {name}" for name, entry in settings["evaluate"].items() if entry["data"] == data)


def log_of(folder: Path, job: str) -> Path:
    """Return the file for what a job says."""
    return folder / "logs" / f"{job.replace(' ', '-').replace('/', '_')}.log"


class Rehearsal:
    """A scratch folder with the profile's settings, and its jobs."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder, self.options = folder.absolute(), options
        params = read_yaml(PARAMS)
        values = {**params, "profile": options.profile}
        if self.folder.exists():
            shutil.rmtree(self.folder)
        self.folder.mkdir(parents=True)
        (self.folder / ".gitignore").write_text("*\n", encoding="utf-8")
        (self.folder / PARAMS).write_text(yaml.safe_dump(values, sort_keys=False), encoding="utf-8")
        shutil.copytree(PROFILES, self.folder / PROFILES)
        self.params = replace(read_params(), profile=options.profile)
        self.real = _resolved(self.folder)
        self.settings = settings_of(self.real, options)
        text = json.dumps(self.settings, indent=1, sort_keys=True, ensure_ascii=False)
        (self.folder / SETTINGS).write_text(f"{text}\n", encoding="utf-8")
        (self.folder / "logs").mkdir()
        for backbone, weights in self.settings["weights"].items():
            file = Path("weights", f"{backbone}.safetensors")
            same = params["profile"] == options.profile and not options.thin and weights["source"] is None
            if same and file.is_file() and self.real["weights"][backbone]["source"] is not None:
                (self.folder / "weights").mkdir(exist_ok=True)
                shutil.copyfile(file, self.folder / file)
        self.results: dict[str, Result] = {}

    def environment(self, spool: Path) -> dict[str, str]:
        """Return a job's environment: the project's code, nothing that leads out of the scratch folder."""
        variables = {k: v for k, v in os.environ.items() if not k.startswith(("DVC_", "MLFLOW_", "PIPELINE_"))}
        variables |= {"PYTHONPATH": os.pathsep.join([str(CODE), variables.get("PYTHONPATH", "")]), KEPT: str(spool)}
        variables |= {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"}
        device = self.options.device
        return variables | ({"MLFLOW_PYFUNC_INFERENCE_CONFIG": json.dumps({"device": device})} if device else {})

    def run(self, say: Callable[[str], None]) -> list[Result]:
        """Run all jobs, `options.jobs` at a time; `say` gets a line for each."""
        waiting = list(jobs(self.params, self.settings))
        count, running = len(waiting), dict[Future[Result], Job]()
        with ThreadPoolExecutor(self.options.jobs) as pool:
            while waiting or running:
                for job in [job for job in waiting if all(need in self.results for need in job.needs)]:
                    waiting.remove(job)
                    bad = [need for need in job.needs if self.results[need].error is not None]
                    if bad:
                        self._done(Result(job.name, 0.0, f"needs {bad[0]}", skipped=True), count, say)
                        break  # others may wait for this one
                    running[pool.submit(self.one, job)] = job
                else:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        del running[future]
                        self._done(future.result(), count, say)
        return list(self.results.values())

    def _done(self, result: Result, count: int, say: Callable[[str], None]) -> None:
        self.results[result.name] = result
        say(f"[{len(self.results):3}/{count}] {result.line()}")

    def one(self, job: Job) -> Result:
        """Run one job and measure it."""
        if job.name.startswith("weights ") and (self.folder / f"weights/{job.command[-1]}.safetensors").is_file():
            return Result(job.name, 0.0, notes=["the project's"])
        if job.name.startswith("serve ") and importlib.util.find_spec("mlflow") is None:
            return Result(job.name, 0.0, "mlflow is not installed", skipped=True)
        if job.name.startswith("predict "):
            self._photo(job.name.partition(" ")[2])
        begin = time.perf_counter()
        log = log_of(self.folder, job.name)
        spool = log.with_suffix(".jsonl")
        result = Result(job.name, 0.0)
        if job.kill and (problem := self._kill(job, log)):
            result.error = problem
        code, peak = self._process(job, log, spool)
        if job.kill and not code:
            steps = [call["step"] for call in _logged(spool) if "loss" in call["values"]]
            result.notes.append("stopped, killed and resumed")
            if steps[:1] == [1]:
                result.error = "stopped after a step and started again, it began anew instead of going on"
        result.seconds, result.host = time.perf_counter() - begin, peak
        if code:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
            result.error = lines[-1].removeprefix("error: ") if lines else f"exit code {code}"
        elif spool.is_file() and result.error is None:
            self._measure(job, spool, result)
        # Gigabytes that nobody needs any more.
        if job.name.startswith("train "):
            shutil.rmtree(self.folder / "checkpoints" / job.command[-1], ignore_errors=True)
        return result

    def _kill(self, job: Job, log: Path) -> str | None:
        """Stop a training after a step, then start and kill it; return what was wrong with how it ended."""
        for how, expected in ((signal.SIGTERM, EXIT_TRY_AGAIN), (signal.SIGKILL, -signal.SIGKILL)):
            code, _ = self._process(job, log, log.with_suffix(f".{how.name.lower()}.jsonl"), how)
            if code != expected:
                return f"after {how.name} it ended with {code}, expected {int(expected)}"
        return None

    def _process(self, job: Job, log: Path, spool: Path, how: signal.Signals | None = None) -> tuple[int, float]:
        """Run a job's process; return its exit code (negative: killed by this signal) and peak memory in bytes.

        `how`: this signal ends it once it has told of a step.
        """
        with log.open("ab") as file:
            process = subprocess.Popen(
                job.command,
                cwd=self.folder,
                env=self.environment(spool),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        while how is not None and os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            if any("loss" in call["values"] for call in _logged(spool)):
                process.send_signal(how)
                break
            time.sleep(0.02)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        return process.returncode, usage.ru_maxrss * 1024.0

    def _photo(self, name: str) -> None:
        """Write an image of the evaluation's data as a file, to predict on."""
        from PIL import Image

        from refinenet.data.split import Split

        wanted = self.settings["evaluate"][name]
        split = self.folder / "data" / wanted["data"] / f"{wanted['split']}.arrow"
        Image.fromarray(Split(split)[0].image).save(self.folder / "photo.png")

    def _measure(self, job: Job, spool: Path, result: Result) -> None:
        """Take rates and memory from what a stage has told its tracker."""
        calls = _logged(spool)
        memory = [call["values"]["memory_bytes"] for call in calls if "memory_bytes" in call["values"]]
        kind, _, name = job.name.partition(" ")
        cuda = self.settings.get(kind, {}).get(name, {}).get("device", "cpu").startswith("cuda")
        result.device = max(memory) if memory and cuda else None
        if kind == "train":
            steps = [(call["step"], call["time"]) for call in calls if "loss" in call["values"]]
            each = phase_steps(name, self.settings, self.options)
            # Within a phase: its first step comes after the data is opened and, on a GPU, kernels are chosen.
            times = [
                (later - earlier) / 1000
                for (_, earlier), (step, later) in itertools.pairwise(steps)
                if (step - 1) % each
            ]
            if times:
                result.step = sum(times) / len(times)
                result.rate = self.settings["train"][name]["recipe"]["batch_size"] / max(result.step, 1e-3)
        elif kind == "evaluate":
            rates = [call["values"]["images_per_second"] for call in calls if "images_per_second" in call["values"]]
            result.rate = rates[-1] if rates else None


def _logged(spool: Path) -> list[dict[str, Any]]:
    """Return what a stage has logged so far; the last line may not be whole yet."""
    text = spool.read_text(encoding="utf-8") if spool.is_file() else ""
    lines = text[: text.rfind("\n") + 1].splitlines()
    return [call for call in map(json.loads, lines) if call["call"] == "log"]


def _resolved(folder: Path) -> dict[str, dict[str, Any]]:
    """Resolve the profile as it stands in `folder`."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return resolve()
    finally:
        os.chdir(before)


def forecast(rates: Mapping[str, Any], gpus: int) -> str:
    """Return what the full run takes at the rates of a rehearsal: hours by training and in all, memory, disk."""
    params = replace(read_params(), profile=rates["options"]["profile"])
    profile, where = read_profile(params.profile)
    found, rows, hours, after = rates["trainings"], [], dict[str, float](), dict[str, str | None]()
    for name, one in found.items():
        trained = one["crops"] / one["train"] / 3600 if one["train"] else 0.0
        tested = one["images"] / one["evaluate"] / 3600 if one["evaluate"] else 0.0
        hours[name] = trained + tested
        after[name] = one["start"] if one["start"] in found else None
        memory = one["device"] or one["host"]
        rows.append([f"`{name}`", f"{one['crops']:,}", f"{trained:.1f}", f"{tested:.2f}", f"{memory / 1e9:.1f}"])
    rows.append(["all", "", f"{sum(hours.values()):.1f} together", "", ""])
    counts = sorted({1, gpus})
    walls = []
    for count in counts:
        wall = max((slot.end for slot in cost.schedule(hours, after, count)), default=0.0)
        walls.append([str(count), f"{wall:.1f}", f"{wall / 24:.1f}"])
    known, unknown = cost.archives(profile)
    names = [data for data in params.datasets if profile.sources.get(data) != "rendered"]
    disk = [
        [f"archives{f', without {len(unknown)} of unpublished size' if unknown else ''}", f"{known / 1e9:.1f}"],
        ["prepared data", f"{cost.prepared(names) / 1e9:.1f}"],
        ["trained weights", f"{sum(one['weights'] for one in found.values()) / 1e9:.1f}"],
    ]
    about = rates["options"]
    thin = ", thin networks: no forecast of the profile's" if about["thin"] else ""
    return "\n\n".join(
        [
            f"Forecast of profile {params.profile} ({where}) from {about['steps']} steps a phase and {about['images']} "
            f"images an evaluation on {rates['machine']}{thin}:",
            cost.table(("training", "crops", "hours, training", "evaluation", "memory, GB"), rows),
            cost.table((rates["kind"], "hours", "days"), walls),
            cost.table(("disk", "GB"), disk),
        ]
    )


def rates_of(rehearsal: Rehearsal) -> dict[str, Any]:
    """Return what a forecast needs of a rehearsal."""
    trainings = {}
    for name, training in rehearsal.real["train"].items():
        trained, tested = (rehearsal.results.get(f"{kind} {name}") for kind in ("train", "evaluate"))
        if trained is None or trained.rate is None:
            continue
        recipe, file = training["recipe"], Path(training["target"], f"{name}.safetensors")
        size = (rehearsal.folder / file).stat().st_size if (rehearsal.folder / file).is_file() else 0
        counts = datasets.load(training["data"]).COUNTS if training["data"] in datasets.NAMES else {}
        trainings[name] = {
            "start": training["start"],
            "crops": recipe["steps"] * recipe["batch_size"],
            "train": trained.rate,
            "images": counts.get(rehearsal.real["evaluate"].get(name, {}).get("split", "val"), 0),
            "evaluate": tested.rate if tested else None,
            "device": trained.device,
            "host": trained.host,
            "weights": size,
        }
    devices = {training["device"] for training in rehearsal.settings["train"].values()}
    cuda = any(device.startswith("cuda") for device in devices)
    return {
        "options": asdict(rehearsal.options),
        "machine": _gpu() if cuda else f"{os.cpu_count()} CPU cores",
        "kind": "GPUs" if cuda else "machines",
        "trainings": trainings,
    }


def _gpu() -> str:
    import torch

    return f"an {torch.cuda.get_device_name()}"


def run(options: Options, folder: Path, gpus: int, keep: bool) -> int:
    """Rehearse, print a line for each job and the forecast; return how many jobs failed or were skipped."""
    rehearsal = Rehearsal(folder, options)
    drawn = [data for data, one in rehearsal.settings["download"].items() if one["rendered"]]
    real = [data for data in rehearsal.settings["download"] if data not in drawn]
    print(f"rehearsal of profile {options.profile} in {folder}/, {options.steps} steps a phase")
    print(f"archives: {', '.join(real) or 'none'} of this machine; drawn: {', '.join(drawn) or 'none'}", flush=True)
    begin = time.perf_counter()
    results = rehearsal.run(lambda line: print(line, flush=True))
    bad = [result for result in results if result.error is not None]
    rates = rates_of(rehearsal)
    text = json.dumps(rates, indent=1)
    with atomic_file(folder / RATES) as part:
        part.write_text(text + "\n", encoding="utf-8")
    print(f"\n{len(results) - len(bad)} of {len(results)} ok in {(time.perf_counter() - begin) / 60:.1f} minutes\n")
    if rates["trainings"]:
        print(forecast(rates, gpus))
    if not keep:
        for path in folder.iterdir():
            if path.name not in ("logs", RATES, ".gitignore"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    for result in bad:
        if not result.skipped:
            log = log_of(folder, result.name)
            print(f"FAILED {result.name}: {result.error} (all of it in {log})", file=sys.stderr)
    return len(bad)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = command_parser("rehearse", __doc__)
    add = parser.add_argument
    add("--profile", help="a file of profiles/ without .yaml; default: that of params.yaml")
    add("--device", help="cpu, cuda or cuda:N instead of the profile's")
    add("--steps", type=int, default=2, help="optimiser steps of each phase; default: 2. More give a truer rate")
    add("--images", type=int, default=2, help="images of each split; default: 2")
    add("--thin", action="store_true", help="networks of few channels: all of the road, none of the cost")
    add("--jobs", type=int, default=1, help="jobs at once; default: 1. More make rates untrue")
    add("--gpus", type=int, default=1, help="forecast for so many; default: 1")
    add("--folder", type=user_path, default=FOLDER, help=f"the scratch folder, emptied first; default: {FOLDER}/")
    add("--keep", action="store_true", help="leave all that was made in it")
    add("--forecast", action="store_true", help="only the forecast, from the rates of the last rehearsal in FOLDER")
    given = parser.parse_args(arguments)
    attach()

    def rehearse() -> None:
        for name in ("steps", "images", "jobs", "gpus"):
            if getattr(given, name) < 1:
                raise UserError(f"--{name} is {getattr(given, name)}, expected 1 or more")
        if given.forecast:
            file = given.folder / RATES
            if not file.is_file():
                raise UserError(f"{file}: no such file; `make rehearsal` writes it")
            print(forecast(json.loads(file.read_text(encoding="utf-8")), given.gpus))
            return
        # What a rehearsal that was killed has left is one, too.
        mine = given.folder == FOLDER or (given.folder / "logs").is_dir()
        if not mine and given.folder.exists() and any(given.folder.iterdir()):
            raise UserError(f"{given.folder}: holds something else than a rehearsal, expected a folder to empty")
        profile = given.profile or read_params().profile
        options = Options(profile, given.device, given.steps, given.images, given.thin, given.jobs)
        if bad := run(options, given.folder, given.gpus, given.keep):
            raise UserError(f"{bad} of the rehearsal's jobs failed or were skipped, see above")

    return run_cli(rehearse)


if __name__ == "__main__":
    sys.exit(main())
