"""SUN RGB-D in the layout of its two archives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Rendered
from pipeline.datasets import sunrgbd
from pipeline.formats.encode import Mat73, Member, cells, in_folders, jpeg, mat, write_zip
from pipeline.synthetic.album import Picture, paint, shifted

_HOME = "/n/fs/sun3d/data/"  # where the authors had it: the prefix of every path in the metadata
_FIELDS = (
    *("sequenceName", "groundtruth3DBB", "Rtilt", "K", "depthpath", "rgbpath"),
    *("anno_extrinsics", "depthname", "rgbname", "sensorType", "valid", "gtCorner3D"),
)


def _place(number: int) -> tuple[str, str]:
    """The folder and the image's stem of frame `number`, in the styles of the four sensors and their sets."""
    frame = 41 + 13 * number
    stamped = f"{frame:07d}-{frame * 33333:012d}"
    styles = (
        (f"kv1/NYUdata/NYU{number + 1:04d}", f"NYU{number + 1:04d}"),
        (f"kv1/b3dodata/img_{frame:04d}", f"img_{frame:04d}"),
        (f"kv2/kinect2data/{number:06d}_2014-05-26_14-23-37_260595134347_rgbf{frame:06d}-resize", f"{frame:07d}"),
        (f"realsense/lg/2014_10_21-17_41_{number % 60:02d}-1311000{number:03d}", "0000042"),
        (f"xtion/sun3ddata/hotel_umd/maryland_hotel3/{stamped}", stamped),
    )
    folder, stem = styles[number % len(styles)]
    return f"SUNRGBD/{folder}", stem


def _listed(folder: str) -> str:
    """Return the path of a frame's folder on the authors' machine: of two of the four sensors with a final slash."""
    return f"{_HOME}{folder}{'/' if folder.startswith(('SUNRGBD/realsense', 'SUNRGBD/xtion')) else ''}"


def render(settings: Rendered, folder: Path) -> None:
    """SUNRGBD.zip with the frames, SUNRGBDtoolbox.zip with their labels (0 = void, 1 to 37) and the split."""
    pictures = paint("sunrgbd", sunrgbd.CLASSES, settings, "indoor", void="seams")

    def frames() -> Iterator[Member]:
        for p in pictures:
            place, stem = _place(p.number)
            yield f"{place}/image/{stem}.jpg", jpeg(p.image)
            yield f"{place}/scene.txt", b"bedroom"

    def toolbox() -> Iterator[Member]:
        split = {"alltrain": "train", "alltest": "val"}
        folders = {key: [_listed(_place(p.number)[0]) for p in pictures if p.split == s] for key, s in split.items()}
        yield "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat", _labels(pictures)
        yield "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat", mat({"SUNRGBDMeta": _metadata(pictures)})
        yield "SUNRGBDtoolbox/Metadata/seg37list.mat", mat({"seg37list": cells(sunrgbd.CLASSES)})
        yield "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat", mat({k: cells(v) for k, v in folders.items()})

    write_zip(folder / "SUNRGBD.zip", in_folders(frames()))
    write_zip(folder / "SUNRGBDtoolbox.zip", in_folders(toolbox()))


def _labels(pictures: list[Picture]) -> bytes:
    """The struct array SUNRGBD2Dseg with its field seglabel: N x 1 references to W x H maps."""
    file = Mat73()
    file.file.create_group("SUNRGBD2Dseg").attrs["MATLAB_class"] = np.bytes_("struct")
    # MATLAB's own type, which nobody has converted: public code casts what it reads, and needs 64 GB to load all of it.
    maps = ((np.ascontiguousarray(shifted(p.label).T, np.float64), "double") for p in pictures)
    seglabel = file.cell("SUNRGBD2Dseg/seglabel", maps, (len(pictures), 1))
    del seglabel.attrs["MATLAB_class"]  # a field of a struct array is no cell array
    return file.content()


def _metadata(pictures: list[Picture]) -> NDArray[Any]:
    """The 1 x N struct array SUNRGBDMeta; no boxes, a level camera."""
    structs = np.empty((1, len(pictures)), [(field, "O") for field in _FIELDS])
    for p in pictures:
        place, stem = _place(p.number)
        height, width = p.label.shape
        camera = np.array([[width, 0, width / 2], [0, width, height / 2], [0, 0, 1]], np.float64)
        structs[0, p.number] = (
            *(place, np.zeros((0, 0)), np.eye(3), camera),
            *(f"{_listed(place)}/depth/{stem}.png", f"{_listed(place)}/image/{stem}.jpg"),
            *(np.eye(3), f"{stem}.png", f"{stem}.jpg", place.split("/")[1], 1, np.zeros((0, 0))),
        )
    return structs
