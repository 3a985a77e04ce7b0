"""Stage `evaluate`: a trained model on held-out images -> metrics/<data>/<experiment>.json, predictions/.

Metrics of an experiment that repeats another with a further seed go to metrics/seeds/<data>/.

One pass over the images evaluates every protocol that the tables need for this model.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from pipeline.config import resolve
from pipeline.formats.label_images import GAP, colour
from pipeline.runtime import progress
from pipeline.runtime.cli import main
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.runtime.machine import cores
from pipeline.tracking import track
from refinenet.atomic import atomic_file, atomic_folder
from refinenet.config import Protocol
from refinenet.data.split import RGB, Array, Integers, Sample, Split
from refinenet.errors import UserError
from refinenet.metrics import Confusion, Counts, Rule, alternatives, bootstrap, most_frequent, scores
from refinenet.portable import portable_arithmetic

if TYPE_CHECKING:
    from refinenet.inference.predictor import Predictor

# Official tools with another rule than the paper's; their scores are stored as `alternatives`.
OFFICIAL: Mapping[str, Rule] = {"cityscapes": "cityscapes", "ade20k": "ade20k"}

# Cityscapes' categories (cityscapesScripts, labels.py) of the classes that are scored.
CATEGORIES: Mapping[str, Sequence[str]] = {
    "flat": ("road", "sidewalk"),
    "construction": ("building", "wall", "fence"),
    "object": ("pole", "traffic light", "traffic sign"),
    "nature": ("vegetation", "terrain"),
    "sky": ("sky",),
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}


def triptych(sample: Sample, prediction: Array, palette: Sequence[RGB]) -> Image.Image:
    """Return image | truth | prediction (H x W uint8) side by side."""
    assert sample.label is not None
    gap = np.full((sample.image.shape[0], GAP, 3), 255, np.uint8)
    parts = [sample.image, gap, colour(sample.label, palette), gap, colour(prediction, palette)]
    return Image.fromarray(np.concatenate(parts, axis=1))


def summary(data: str, classes: Sequence[str], counts: Counts, per_image: Counts, seed: int) -> dict[str, Any]:
    """Return the scores of one protocol for the metrics file: fractions, None for classes not in the truth.

    `interval`: 95 %, bootstrap over images with the weights fixed. `alternatives`: the scores of the official tool of
    Cityscapes or ADE20K, with Cityscapes' category IoU.

    Args:
        data: the data set.
        classes: their names.
        counts: confusion matrix of the set, classes x (classes + 1).
        per_image: N x 3 x classes, from `Confusion.per_image`.
        seed: of the bootstrap.
    """
    result = scores(counts)
    interval = bootstrap(per_image, seed=seed)
    values: dict[str, Any] = {
        "pixel_accuracy": result.pixel_accuracy,
        "mean_accuracy": result.mean_accuracy,
        "mean_iou": result.mean_iou,
        "iou": dict(zip(classes, result.iou, strict=True)),
        "interval": {"mean_iou": interval.mean_iou, "pixel_accuracy": interval.pixel_accuracy},
    }
    if data in OFFICIAL:
        groups = None
        if data == "cityscapes":
            groups = {category: [classes.index(name) for name in names] for category, names in CATEGORIES.items()}
        values["alternatives"] = alternatives(counts, OFFICIAL[data], groups)
    return values


def headline(protocols: Mapping[str, Protocol]) -> str:
    """Choose the protocol whose scores stand for the model in MLflow: without a CRF, of the most scales.

    It is the one that most of the paper's rows are printed with.
    """
    return max(protocols, key=lambda name: (not protocols[name].crf, len(protocols[name].scales), protocols[name].flip))


def batches(sizes: Integers, most: int) -> list[list[int]]:
    """Group images of one size into batches of at most `most` indices. sizes: N x 2, height and width."""
    of_size: dict[tuple[int, ...], list[int]] = {}
    for index, size in enumerate(sizes.tolist()):
        of_size.setdefault(tuple(size), []).append(index)
    return [same[i : i + most] for same in of_size.values() for i in range(0, len(same), most)]


def run(name: str) -> None:
    """Evaluate the experiment `name` with its settings in settings.json."""
    cfg = resolve.load("evaluate", name)
    data = Path("data") / cfg.data
    split = Split(data / f"{cfg.split}.arrow")
    classes, palette = split.schema.classes, split.schema.palette
    if not len(split):
        raise UserError(f"{split.path}: no image to evaluate on")
    if cfg.portable:
        portable_arithmetic()

    from refinenet.device import repeatable_device
    from refinenet.inference.crf_processes import CRFProcesses
    from refinenet.inference.multiscale import upload
    from refinenet.inference.predictor import Predictor

    trained = Predictor(
        Path("models") / f"{name}.safetensors",
        repeatable_device(cfg.device, cfg.seed, cfg.threads),
        **cfg.predictor_settings(),
    )
    trained.expect_classes(classes, cfg.data)
    config = trained.model.config

    totals = {protocol: Confusion(len(classes), trained.device) for protocol in cfg.protocols}
    shown = {round(i * (len(split) - 1) / max(cfg.pictures - 1, 1)) for i in range(cfg.pictures)}
    last = list(cfg.protocols)[-1]
    pictures = []
    params = {
        "profile": cfg.profile,
        "images": len(split),
        "precision": trained.precision,
        **{f"scales.{k}": p.scales for k, p in cfg.protocols.items()},
    }
    with (
        track(
            *("evaluate", name, cfg.data, params, {"evaluation data": data}),
            weights=trained.path,
            headline=headline(cfg.protocols),
        ) as log,
        progress.bar(f"evaluate {name}", "image", total=len(split)) as bar,
        CRFProcesses(cores()) as crf,
    ):
        begin = time.perf_counter()
        every = batches(split.sizes(), cfg.batch_size)
        images = ([split[index].image for index in batch] for batch in every)
        for batch, answers in zip(every, trained.stream(images, cfg.protocols, crf), strict=True):
            for index, labels in zip(batch, answers, strict=True):
                sample = split[index]
                if sample.label is None:
                    raise UserError(f"{split.path}: {sample.name} has no label to score against")
                truth = upload(sample.label, trained.device)
                for protocol, label in labels.items():
                    totals[protocol].add(truth, label)
                if index in shown:
                    pictures.append((sample.name, triptych(sample, labels[last].cpu().numpy(), palette)))
            bar.update(len(batch))

        results: dict[str, Any] = {}
        counts = {protocol: total.counts() for protocol, total in totals.items()}
        log.scores({"images_per_second": len(split) / (time.perf_counter() - begin), **memory(trained)})
        for protocol, how in cfg.protocols.items():
            per_image = totals[protocol].per_image()
            values = summary(cfg.data, classes, counts[protocol], per_image, cfg.seed)
            results[protocol] = {**asdict(how), **values}
            log.scores({f"{protocol}/{k}": values[k] for k in ("pixel_accuracy", "mean_accuracy", "mean_iou")})
            low, high = values["interval"]["mean_iou"]
            log.scores({f"{protocol}/mean_iou_low": low, f"{protocol}/mean_iou_high": high})
            log.scores({f"{protocol}/official/{k}": v for k, v in values.get("alternatives", {}).items()})
            log.scores({f"{protocol}/iou/{k}": v for k, v in values["iou"].items()})
        winner, baseline = most_frequent(counts[last])
        metrics = {
            "experiment": cfg.of or name,
            "dataset": cfg.data,
            "split": split.schema.split,
            "profile": cfg.profile,
            "seed": cfg.seed,
            "drawn": cfg.drawn,
            "images": len(split),
            "weights": {"md5": dvc_md5(trained.path)},
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
        with atomic_folder(target) as folder:
            for image_name, picture in pictures:
                picture.save(folder / f"{image_name.replace('/', '_')}.png", optimize=True)
            # Plain .npy files: an .npz contains the time it was written.
            for protocol, table in counts.items():
                np.save(folder / f"confusion-{protocol}.npy", table)
        scored = Path("metrics", *(["seeds"] if cfg.of else []), cfg.data, f"{name}.json")
        with atomic_file(scored) as part:
            part.write_text(json.dumps(metrics, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
        for file in sorted(target.glob("*.png")):
            log.artifact(file, "predictions")
    scores = ", ".join(f"{protocol} {100 * values['mean_iou']:.1f}" for protocol, values in results.items())
    print(f"{scored}: mean IoU {scores}")


def memory(trained: Predictor) -> dict[str, float]:
    """Return the peak bytes of tensors on the GPU; empty on a CPU."""
    import torch

    return {"memory_bytes": torch.cuda.max_memory_allocated(trained.device)} if trained.device.type == "cuda" else {}


if __name__ == "__main__":
    main(run, __doc__, "EXPERIMENT")
