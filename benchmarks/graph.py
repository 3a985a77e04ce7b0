"""Measures what grows with the number of experiments: settings, the engines' decisions, telling DVC, tables, report.

    python benchmarks/graph.py --seeds 0 150 300 --commits main HEAD

clones the repository for each number of seeds and each commit, makes up all outputs but the data (small files; scores
of the seeds are those of their experiment, a little off) and prints a table: seconds of processor time, in which other
work on the machine counts little, the fastest of n (the slowest).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
OF = "nyud-res50"

# Runs in the clone, with its code: markers as after a Snakemake run of everything, then what its end does.
TELL = """
import sys, time
from pathlib import Path
from dvc.repo import Repo
from pipeline import graph
repo = Repo(".")
known = graph.stages(repo)
for stage in known:
    stage.done.parent.mkdir(parents=True, exist_ok=True)
    stage.done.write_text(stage.digest())
begin = time.process_time()
graph.commit(repo, known)
print("seconds", time.process_time() - begin)
"""
OUTPUTS = """
import json
from dvc.repo import Repo
repo = Repo(".")
print(json.dumps([(stage.addressing, [o.def_path for o in stage.outs]) for stage in repo.index.stages]))
"""


def call(folder: Path, *command: str) -> str:
    """Run a command of this environment in `folder`, with the code of that folder; return what it printed."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {**os.environ, "PYTHONPATH": str(folder), "PATH": path}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)[:80]}: {done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def project(folder: Path, commit: str, seeds: int) -> None:
    """Clone the repository with `seeds` more trainings of one experiment."""
    call(ROOT, "git", "clone", "--quiet", str(ROOT), str(folder))
    call(folder, "git", "checkout", "--quiet", call(ROOT, "git", "rev-parse", commit).strip())
    params = folder / "params.yaml"
    rows = "".join(
        f"  {OF}-seed{n}: {{of: {OF}, seed: {n}, data: nyud, start: resnet50}}\n" for n in range(1, seeds + 1)
    )
    params.write_text(params.read_text().replace("seeds: {}\n", f"seeds:\n{rows}" if rows else "seeds: {}\n"))


def make_up(folder: Path, seed: int) -> int:
    """Write all outputs anew, those of git as they are; return the number of stages."""
    rng = random.Random(seed)
    scores = json.loads((folder / f"metrics/nyud/{OF}.json").read_text())
    stages = json.loads(call(folder, sys.executable, "-c", OUTPUTS).splitlines()[-1])
    for _, outputs in stages:
        for output in outputs:
            path = folder / output
            path.parent.mkdir(parents=True, exist_ok=True)
            if output.startswith("metrics"):
                again = "/seeds/" in output
                new = json.loads(json.dumps(scores)) if again else json.loads(path.read_bytes())
                if again:
                    new["seed"] = int(path.stem.rpartition("seed")[2])
                    for values in new["protocols"].values():
                        values["mean_iou"] += rng.uniform(-0.01, 0.01)
                weights = (folder / f"models/{path.stem}.safetensors").read_bytes()
                new["weights"] = {"md5": hashlib.md5(weights).hexdigest()}
                path.write_text(json.dumps(new, indent=1, sort_keys=True) + "\n")
            elif path.suffix == ".csv" and output.startswith("curves"):
                path.write_text(f"step,loss,lr\n{rng.randrange(999)},1,0.1\n")
            elif path.suffix:
                if not output.startswith(("results", "settings", "data")):
                    path.write_bytes(rng.randbytes(60000))
            elif not output.startswith("data"):
                path.mkdir(exist_ok=True)
                found = folder.glob(f"metrics/*/{path.name}.json")
                of = scores if "-seed" in path.name else json.loads(next(found).read_text())
                for protocol, values in of["protocols"].items():
                    np.save(
                        path / f"confusion-{protocol}.npy",
                        np.eye(len(values["iou"]), len(values["iou"]) + 1, dtype=np.int64) * 1000 + 1,
                    )
                Image.fromarray(np.frombuffer(rng.randbytes(60000), np.uint8).reshape(100, 200, 3)).save(path / "a.png")
    return len(stages)


def _processor_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measure(folder: Path, repeats: int) -> dict[str, list[float]]:
    """Return the seconds of processor time of each command."""
    found: dict[str, list[float]] = {}

    def timed(name: str, *command: str) -> None:
        for _ in range(repeats):
            before = _processor_seconds()
            call(folder, *command)
            found.setdefault(name, []).append(_processor_seconds() - before)

    timed("python -m pipeline.settings", sys.executable, "-m", "pipeline.settings")
    for repeat in range(repeats):
        make_up(folder, repeat)
        shutil.rmtree(folder / ".dvc/cache", ignore_errors=True)
        call(folder, "git", "checkout", "--quiet", "dvc.lock")
        told = call(folder, sys.executable, "-c", TELL)
        found.setdefault("telling DVC of all stages", []).append(float(told.rpartition("seconds ")[2].split()[0]))
    timed("snakemake --list-rules", "snakemake", "--list-rules")
    timed("snakemake -n", "snakemake", "-n")
    timed("dvc status", "dvc", "status", "--json")  # ends with 0 whatever it finds
    timed("python -m pipeline.tabulate nyud", sys.executable, "-m", "pipeline.tabulate", "nyud")
    timed("python -m pipeline.report", sys.executable, "-m", "pipeline.report")
    return found


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 150, 300])
    parser.add_argument("--commits", nargs="+", default=["HEAD"])
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    columns: dict[str, dict[str, list[float]]] = {}
    scratch_of_data = tempfile.TemporaryDirectory()
    prepared = Path(scratch_of_data.name, "project")
    project(prepared, given.commits[-1], 0)
    outputs = [
        path
        for _, paths in json.loads(call(prepared, sys.executable, "-c", OUTPUTS).splitlines()[-1])
        for path in paths
    ]
    call(prepared, "snakemake", "--cores", "2", "--", *(path for path in outputs if path.startswith("data/")))
    for seeds in given.seeds:
        for commit in given.commits:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "project")
                project(folder, commit, seeds)
                shutil.copytree(prepared / "data", folder / "data")
                count = make_up(folder, -1)
                columns[f"{count} stages, {commit}"] = measure(folder, given.repeats)
                print(f"{count} stages, {commit}: measured", file=sys.stderr, flush=True)
                for name, seconds in columns[f"{count} stages, {commit}"].items():
                    print(f"  {name}: {' '.join(f'{s:.1f}' for s in seconds)}", file=sys.stderr, flush=True)
    print(f"| s, fastest (slowest) of {given.repeats} | {' | '.join(columns)} |")
    print(f"| --- |{' --- |' * len(columns)}")
    for name in next(iter(columns.values())):
        cells = [f"{min(column[name]):.1f} ({max(column[name]):.1f})" for column in columns.values()]
        print(f"| `{name}` | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
