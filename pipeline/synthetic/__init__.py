"""Archives to download, without a download: the official file names, layouts and encodings, filled with drawn scenes.

`pipeline/datasets` reads these and the published archives with the same code. Drawn from the same settings they have
the same bytes on every machine (encode.py). Where several forms of the official files are told of in public code,
these have the less convenient one. What is written here and what is left out, by data set:

    voc         palette PNGs with void borders; SBD's GTcls with Boundaries; no Annotations, no SegmentationObject;
                test images
    context     459-name LabelMaps, their list among them; background is drawn as labels outside the 59
    person      as published by the authors of DeepLab
    nyud        MATLAB 7.3 with images in their white frame, labels, names; no depths
    sunrgbd     image/ and scene.txt of each frame; toolbox without 3-D boxes and without code; labels are doubles, and
                the lists have doubled slashes, which the zip has not
    cityscapes  fine labels of all four kinds; test labels hold the void regions only; README and licence beside them
    ade20k      as published; some classes have synonyms and a blank behind their name
    coco        instances of train2014 only: polygons, one crowd as run lengths; VOC's categories and one other; a grey
                photograph
    camvid      frames and labels of train, val and test, and their lists; nothing else of the repository

Archives have entries for their folders, as those that are packed from a disk.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

from pipeline.config.schema import Rendered
from refinenet.errors import UserError

_WRITERS = {
    "voc": "pascal.render_voc",
    "context": "pascal.render_context",
    "person": "pascal.render_person",
    "nyud": "nyud.render",
    "sunrgbd": "sunrgbd.render",
    "cityscapes": "cityscapes.render",
    "ade20k": "ade20k.render",
    "coco": "coco.render",
    "camvid": "camvid.render",
}


def render(dataset: str, settings: Rendered, folder: Path) -> None:
    """Write every official archive of `dataset` into `folder`; each appears whole or not at all.

    Raises UserError for a data set that nobody draws and for settings from which no scene can be drawn.
    """
    if dataset not in _WRITERS:
        raise UserError(f"rendered data set {dataset!r}: unknown, expected one of {', '.join(sorted(_WRITERS))}")
    for key, least in (("train", 1), ("val", 1), ("height", 32), ("width", 32)):
        value = getattr(settings, key)
        if value < least:
            raise UserError(f"rendered {dataset}: {key} is {value}, expected at least {least}")
    module, function = _WRITERS[dataset].split(".")
    folder.mkdir(parents=True, exist_ok=True)
    getattr(import_module(f"{__name__}.{module}"), function)(settings, folder)
