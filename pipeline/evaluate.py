"""Stage `evaluate`: a trained model on the validation images -> metrics/<data>/<experiment>.json, predictions/.

One pass over the images answers every protocol that the tables ask of this model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import progress, settings
from pipeline.pictures import GAP, colour
from pipeline.stage import main
from pipeline.tracking import track
from pipeline.trained import Trained
from refinenet.data import RGB, Array, Sample, Split
from refinenet.files import UserError, whole_file, whole_folder
from refinenet.metrics import Counts, confusion, most_frequent, scores


def triptych(sample: Sample, prediction: Array, palette: Sequence[RGB]) -> Image.Image:
    """Image | truth | prediction, side by side."""
    assert sample.label is not None
    gap = np.full((sample.image.shape[0], GAP, 3), 255, np.uint8)
    parts = [sample.image, gap, colour(sample.label, palette), gap, colour(prediction, palette)]
    return Image.fromarray(np.concatenate(parts, axis=1))


def summary(classes: Sequence[str], counts: Counts) -> dict[str, Any]:
    """The scores of one protocol as they stand in the metrics file: fractions, None for classes not in the truth."""
    result = scores(counts)
    return {
        "pixel_accuracy": result.pixel_accuracy,
        "mean_accuracy": result.mean_accuracy,
        "mean_iou": result.mean_iou,
        "iou": dict(zip(classes, result.iou, strict=True)),
    }


def run(name: str) -> None:
    """Evaluate the experiment `name` as settings.json says."""
    choice = settings.load("evaluate", name)
    data = Path("data") / choice.data
    split = Split(data / "val.arrow")
    classes, palette = split.schema.classes, split.schema.palette
    if not len(split):
        raise UserError(f"{split.path}: no image to evaluate on")
    trained = Trained(name, choice, classes)
    config = trained.model.config

    totals = {protocol: np.zeros((len(classes), len(classes) + 1), np.int64) for protocol in choice.protocols}
    shown = {round(i * (len(split) - 1) / max(choice.pictures - 1, 1)) for i in range(choice.pictures)}
    last = list(choice.protocols)[-1]
    pictures = []
    params = {
        "profile": choice.profile,
        "images": len(split),
        **{f"scales.{k}": p.scales for k, p in choice.protocols.items()},
    }
    with track("evaluate", name, choice.data, params, {"evaluation data": data}, weights=trained.path) as log:
        for index, sample in enumerate(progress.bar(f"evaluate {name}", "image", split)):
            if sample.label is None:
                raise UserError(f"{split.path}: {sample.name} has no label to score against")
            labels = trained(sample.image, choice.protocols)
            for protocol, label in labels.items():
                totals[protocol] += confusion(sample.label, label, len(classes))
            if index in shown:
                pictures.append((sample.name, triptych(sample, labels[last], palette)))

        results: dict[str, Any] = {}
        for protocol, how in choice.protocols.items():
            results[protocol] = {**asdict(how), **summary(classes, totals[protocol])}
            log.scores(
                {f"{protocol}/{k}": results[protocol][k] for k in ("pixel_accuracy", "mean_accuracy", "mean_iou")}
            )
            log.scores({f"{protocol}/iou/{k}": v for k, v in results[protocol]["iou"].items()})
        winner, baseline = most_frequent(totals[last])
        metrics = {
            "experiment": name,
            "dataset": choice.data,
            "split": split.schema.split,
            "profile": choice.profile,
            "seed": choice.seed,
            "images": len(split),
            "network": {
                "backbone": config.backbone,
                "cascade": config.cascade if isinstance(config.cascade, str) else "own",
                "pools": config.pools,
                "width": config.width,
            },
            "most_frequent": {
                "class": classes[winner],
                "mean_iou": baseline.mean_iou,
                "pixel_accuracy": baseline.pixel_accuracy,
            },
            "protocols": results,
        }
        target = Path("predictions") / name
        with whole_folder(target) as folder:
            for image_name, picture in pictures:
                picture.save(folder / f"{image_name.replace('/', '_')}.png", optimize=True)
            # Plain .npy files: an .npz carries the time it was written at.
            for protocol, counts in totals.items():
                np.save(folder / f"confusion-{protocol}.npy", counts)
        with whole_file(Path("metrics") / choice.data / f"{name}.json") as part:
            part.write_text(json.dumps(metrics, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in sorted(target.glob("*.png")):
            log.artifact(file, "predictions")


if __name__ == "__main__":
    main(run, __doc__, "EXPERIMENT")
