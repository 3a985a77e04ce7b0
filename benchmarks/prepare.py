"""Images a second of `prepare`, beside the bare decoders on the same files with the same cores; and its memory.

    python benchmarks/prepare.py                           archives drawn for it; the lists are read several times
    python benchmarks/prepare.py --real FOLDER --data voc  official archives, FOLDER/voc/benchmark.tgz ...
    python benchmarks/prepare.py --memory                  peak memory for 100 and for 2,000 images
    python benchmarks/prepare.py --scale                   as many small images as ADE20K and COCO have, and a tenth

The bare decoders are as many processes, which read the same members of the same archives and decode them with Pillow,
scipy and h5py into an array each, with which they do nothing. "With writing" they write them one after the other to a
file each, which is what no program that keeps them can do without. Of all the start of the processes and their end are
timed; of `prepare` also that the file is whole on the disk. The archives are open, and have been read before. Each
round takes one after the other, so that what else the machine does meets all; ratios are of the same round. Where
other work takes its share of the cores, the time that the processes had on them (user and system, all processes) says
more than the time that went by. Before what writes, a file of the same size is written and deleted: a virtual machine
is lent its memory page by page when it first writes to it, and that is not what is measured.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from PIL import Image, features

from pipeline import datasets, synthetic
from pipeline.config.schema import Rendered
from pipeline.datasets import Reader
from pipeline.datasets.pool import reading
from pipeline.formats.archive import Archive
from refinenet.data.split import Schema
from refinenet.data.writer import write_split

DRAWN = {name: Rendered(train=20, val=4, height=375, width=500) for name in datasets.NAMES}
DRAWN["cityscapes"] = Rendered(train=4, val=1, height=1024, width=2048)

Task = list[tuple[str, Any]]  # an archive and a member; an HDF5 file, a variable and an index

opened: dict[str, Any] = {}


def start(archives: dict[str, Archive], files: dict[str, str], folder: Path | None) -> None:
    """Make ready a process of the bare decoders; with a folder it writes there."""
    opened.update(archives)
    if files:
        import h5py

        opened.update({name: h5py.File(path) for name, path in files.items()})
    opened["file"] = folder and (folder / f"{os.getpid()}.bare").open("wb", buffering=0)


def decode(task: Task) -> None:
    """Read and decode what an image and its label are made from."""
    for archive, member in task:
        if not isinstance(member, str):
            variable, index = member
            found = opened[archive][variable][index]
            if not isinstance(found, np.ndarray):
                found = opened[archive][found][()]
        elif member.endswith(".mat"):
            from scipy.io import loadmat

            content = loadmat(io.BytesIO(opened[archive].read(member)))
            found = content["LabelMap"] if "LabelMap" in content else content["GTcls"]["Segmentation"][0, 0]
        else:
            found = np.asarray(Image.open(io.BytesIO(opened[archive].read(member))))
        if opened["file"]:
            opened["file"].write(found.data if found.flags.c_contiguous else found.T.data)


def tasks(reader: Reader, name: str, images: Sequence[str], folder: Path) -> tuple[list[Task], tuple[Any, Any]]:
    """What `reader` reads for each of the training images, and the arguments of `start`."""
    seen: Task = []
    archives: dict[str, Archive] = {}
    files: dict[str, str] = {}
    read = Archive.read

    def spy(self: Archive, member: str, *limit: Any) -> bytes:
        seen.append((str(self.path), member))
        archives[str(self.path)] = self
        return read(self, member, *limit)

    Archive.read = spy  # type: ignore[method-assign]
    found: list[Task] = []
    for image in images:
        seen.clear()
        reader.read("train", image)
        index = int(image) - 1 if name in ("nyud", "sunrgbd") else 0
        if name == "nyud":
            files["hdf5"] = str(reader.raw / "nyu_depth_v2_labeled.mat")
            seen += [("hdf5", ("images", index)), ("hdf5", ("labels", index))]
        if name == "sunrgbd":
            files["hdf5"] = str(folder / "SUNRGBD2Dseg.mat")
            seen.append(("hdf5", ("SUNRGBD2Dseg/seglabel", (index, 0))))
        found.append(list(seen))
    Archive.read = read  # type: ignore[method-assign]
    if name == "sunrgbd":
        toolbox = Archive(reader.raw / "SUNRGBDtoolbox.zip")
        Path(files["hdf5"]).write_bytes(b"".join(toolbox.chunks("SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat")))
    return found, (archives, files)


class Clock:
    """Seconds that go by in the block, and that its processes spend on the cores."""

    def _used(self) -> float:
        both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return sum(one.ru_utime + one.ru_stime for one in both)

    def __enter__(self) -> Clock:
        self._begin, self._before = time.perf_counter(), self._used()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds, self.core_seconds = time.perf_counter() - self._begin, self._used() - self._before


def bare(work: Sequence[Task], arguments: tuple[Any, Any], cores: int, folder: Path | None = None) -> Clock:
    """The time of the bare decoders; with a folder, with writing."""
    with Clock() as clock, multiprocessing.get_context("fork").Pool(cores, start, (*arguments, folder)) as pool:
        for _ in pool.imap_unordered(decode, work, chunksize=8):
            pass
        pool.close()
        pool.join()
    for file in folder.glob("*.bare") if folder else ():
        file.unlink()
    return clock


def prepare(reader: Reader, name: str, images: Sequence[str], folder: Path, cores: int) -> Clock:
    """The time of what `prepare` does once its archives are open."""
    dataset = datasets.load(name)
    schema = Schema(name, "train", dataset.CLASSES, dataset.PALETTE)
    with (
        Clock() as clock,
        write_split(folder / "split.arrow", schema) as writer,
        reading(reader, cores) as read,
    ):
        for example in read(schema, images):
            writer.put(*example[:3])
    return clock


def lend(folder: Path, size: int) -> None:
    """Have memory ready for a file of `size` bytes."""
    file = folder / "lent"
    with file.open("wb") as stream:
        for _ in range(size >> 20):
            stream.write(bytes(1 << 20))
    file.unlink()


def speed(name: str, raw: Path, cores: Sequence[int], rounds: int, least: int, folder: Path) -> None:
    """Print the rows of a data set; each round reads `least` images or more."""
    with datasets.load(name).Reader(raw) as reader:
        images = reader.names("train")
        work, arguments = tasks(reader, name, images, folder)
        times = -(-least // len(images))
        images, work = images * times, work * times
        for count in cores:
            clocks: list[list[Clock]] = []
            size = 0
            for _ in range(rounds + 1):
                lend(folder, size)
                row = [prepare(reader, name, images, folder, count)]
                size = (folder / "split.arrow").stat().st_size
                (folder / "split.arrow").unlink()
                row.append(bare(work, arguments, count))
                lend(folder, size)
                clocks.append([*row, bare(work, arguments, count, folder)])
            del clocks[0]  # to warm up
            ours, *others = zip(*clocks, strict=True)
            for what, column in zip(("prepare", "bare decoders", "with writing"), (ours, *others), strict=True):
                wall, on_cores = ([getattr(one, key) for one in column] for key in ("seconds", "core_seconds"))
                ratios = [
                    sorted(100 * getattr(b, key) / getattr(a, key) for a, b in zip(ours, column, strict=True))
                    for key in ("seconds", "core_seconds")
                ]
                told = [f"{statistics.median(one):.0f} % ({one[0]:.0f} to {one[-1]:.0f})" for one in ratios]
                print(
                    f"| {name}, {len(images)} images, {count} cores | {what} "
                    f"| {len(images) / statistics.median(wall):.0f} | {told[0]} "
                    f"| {1000 * statistics.median(on_cores) / len(images):.2f} | {told[1]} |",
                    flush=True,
                )


def copies(drawn: Path, count: int, folder: Path) -> None:
    """An archive of ADE20K with `count` training images: the drawn ones, again and again under other names."""
    file = "ADEChallengeData2016.zip"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(drawn / file) as source, zipfile.ZipFile(folder / file, "w") as target:
        members = [info.filename for info in source.infolist() if not info.is_dir()]
        training = sorted(name for name in members if "images/training" in name)
        for name in members:
            if "/training/" not in name:
                target.writestr(name, source.read(name))
        for index in range(count):
            image = training[index % len(training)]
            label = image.replace("images/", "annotations/").replace(".jpg", ".png")
            for name in (image, label):
                path = Path(name)
                target.writestr(f"{path.parent}/ADE_train_{index:08}{path.suffix}", source.read(name))


def copies_of_coco(drawn: Path, count: int, folder: Path) -> None:
    """COCO's archives with `count` images: the drawn ones and their objects, again and again under other numbers."""
    photos, record = "train2014.zip", "annotations/instances_train2014.json"
    folder.mkdir(parents=True)
    with zipfile.ZipFile(drawn / "annotations_trainval2014.zip") as archive:
        about = json.loads(archive.read(record))
    # The last one has nothing of VOC's on it.
    images = about["images"][:-1]
    objects = {image["id"]: [o for o in about["annotations"] if o["image_id"] == image["id"]] for image in images}
    made: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": []}
    with zipfile.ZipFile(drawn / photos) as source, zipfile.ZipFile(folder / photos, "w") as target:
        for index in range(count):
            image = images[index % len(images)]
            file = f"COCO_train2014_{index:012}.jpg"
            target.writestr(f"train2014/{file}", source.read(f"train2014/{image['file_name']}"))
            made["images"].append({**image, "id": index, "file_name": file})
            for item in objects[image["id"]]:
                made["annotations"].append({**item, "image_id": index, "id": len(made["annotations"])})
    with zipfile.ZipFile(folder / "annotations_trainval2014.zip", "w", zipfile.ZIP_DEFLATED) as target:
        target.writestr(record, json.dumps({**about, **made}))


def scale(cores: int, folder: Path) -> None:
    """Print time and peak memory for as many images as ADE20K and COCO have, and for a tenth of them."""
    small = Rendered(train=20, val=4, height=96, width=128)
    for name, whole, copy in (("ade20k", 22_210, copies), ("coco", 82_783, copies_of_coco)):
        (folder / name).mkdir()
        synthetic.render(name, small, folder / name)
        for count in (whole // 10, whole):
            project = folder / f"{name}-{count}"
            copy(folder / name, count, project / "data/raw" / name)
            (project / "settings.json").write_text(json.dumps({"prepare": {name: {}}}))
            begin = time.perf_counter()
            most = peak(project, cores, name)
            seconds = time.perf_counter() - begin
            each = 1000 * seconds / count
            print(f"| {name}, {small.height} x {small.width} | {count:,} | {seconds:.0f} | {each:.2f} | {most:.0f} |")
            shutil.rmtree(project)


def peak(project: Path, cores: int, name: str = "ade20k") -> float:
    """Peak of the memory of `prepare` and its processes, in MB: pages that they share count once (PSS)."""
    environment = {**os.environ, "PIPELINE_CORES": str(cores), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "pipeline.prepare", name]
    process = subprocess.Popen(command, cwd=project, env=environment)
    most = 0
    while process.poll() is None:
        family = [process.pid]
        total = 0
        for one in family:
            try:
                for thread in Path(f"/proc/{one}/task").iterdir():
                    family += map(int, (thread / "children").read_text().split())
                lines = Path(f"/proc/{one}/smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss:"))
            except OSError:  # it has ended
                continue
        most = max(most, total)
        time.sleep(0.01)
    assert process.returncode == 0
    return most / 1000


def memory(cores: Sequence[int], rounds: int, folder: Path) -> None:
    """Print peaks for 100 and for 2,000 images."""
    synthetic.render("ade20k", DRAWN["ade20k"], folder)
    for images in (100, 2000):
        project = folder / str(images)
        copies(folder, images, project / "data/raw/ade20k")
        (project / "settings.json").write_text(json.dumps({"prepare": {"ade20k": {}}}))
    for count in cores:
        for images in (100, 2000):
            peaks = [peak(folder / str(images), count) for _ in range(rounds)]
            print(f"| {images} | {count} | {statistics.median(peaks):.0f} | {min(peaks):.0f} to {max(peaks):.0f} |")


def main() -> None:
    """Measure what is asked for."""
    here = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", nargs="+", default=list(DRAWN), choices=DRAWN)
    parser.add_argument("--cores", nargs="+", type=int, default=[here])
    parser.add_argument("--images", type=int, default=2000, help="at least, in a round")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--real", type=Path, help="a folder with a folder of official archives for each data set")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--scale", action="store_true")
    given = parser.parse_args()
    print(f"{platform.machine()}, {here} cores; Python {platform.python_version()}, Pillow {Image.__version__},")
    print(f"libjpeg-turbo {features.version('libjpeg_turbo')}, NumPy {np.__version__}, pyarrow {pyarrow.__version__}\n")
    with tempfile.TemporaryDirectory() as folder:
        if given.memory:
            print("| images | cores | peak, MB | of all rounds |\n|---|---|---|---|")
            memory(given.cores, given.rounds, Path(folder))
            return
        if given.scale:
            print("| archives | images | seconds | ms an image | peak, MB |\n|---|---|---|---|---|")
            scale(given.cores[0], Path(folder))
            return
        print("| on | what | images/s | prepare's share | ms of a core | prepare's share |")
        print("|---|---|---|---|---|---|")
        for name in given.data:
            if given.real:
                raw = given.real / name
            else:
                raw = Path(folder, name)
                raw.mkdir()
                synthetic.render(name, DRAWN[name], raw)
            speed(name, raw, given.cores, given.rounds, given.images, Path(folder))


if __name__ == "__main__":
    main()
