"""A model card for each trained weight: Hugging Face's metadata with its scores (`model-index`), and a page."""

from __future__ import annotations

from pathlib import Path

from pipeline.deposit.croissant import terms_of, terms_of_weights
from pipeline.deposit.finished import Item, Run, Trained
from pipeline.tables.paper import caveat

METRICS = {"mean_iou": "mean IoU", "pixel_accuracy": "pixel accuracy", "mean_accuracy": "mean accuracy"}
_TASK = "image-segmentation"


def path(of: Trained) -> Path:
    """Return where the card lies in the artifact: where the weights would."""
    return Path(of.path).with_suffix(".md")


def write(of: Trained, run: Run, folder: Path) -> None:
    """Write the card of a training into `folder`, the artifact."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    used = [one for one in run.data if one.name in of.data]
    drawn = any(one.drawn for one in used)
    results = []
    if scores := of.scores:
        title = next((one.title for one in used if one.name == scores.dataset), scores.dataset)
        results = [
            EvalResult(
                task_type=_TASK,
                task_name="semantic segmentation",
                dataset_type=scores.dataset,
                dataset_name=f"{title}, drawn scenes" if drawn else title,
                dataset_split=scores.split,
                metric_type=metric,
                metric_name=f"{name}, protocol {protocol}",
                metric_value=getattr(found, metric),
            )
            for protocol, found in scores.protocols.items()
            for metric, name in METRICS.items()
        ]
    free = drawn or not used
    about = ModelCardData(
        license="apache-2.0" if free else "other",
        license_name=None if free else "terms-of-the-data",
        library_name="refinenet-repro",
        pipeline_tag=_TASK,
        tags=["semantic-segmentation", "refinenet", "pytorch", f"profile-{run.profile}"],
        datasets=list(of.data),
        metrics=["mean_iou"] if results else None,
        model_name=of.name,
        eval_results=results or None,
    )
    file = folder / path(of)
    file.parent.mkdir(parents=True, exist_ok=True)
    card = ModelCard(
        f"---\n{about.to_yaml()}\n---\n\n{_page(of, run, run.items[of.path], drawn)}", ignore_metadata_errors=False
    )
    file.write_text(str(card), encoding="utf-8", newline="\n")


def _page(of: Trained, run: Run, item: Item, drawn: bool) -> str:
    step = next((step.address for step in run.steps if item.path in step.outputs), "")
    network, recipe = of.settings["network"], of.settings["recipe"]
    lines = [f"# {of.name}", ""]
    if warning := caveat(run.profile, True, drawn):
        lines += [f"**{warning[0].upper()}{warning[1:]}.**", ""]
    lines += [
        f"RefineNet (CVPR 2017): cascade `{network['cascade']}`, width {network['width']}, {network['pools']} pooling "
        f"blocks, on `{network['backbone']}`, from `{of.settings['start']}`; it has seen {', '.join(of.data)}. "
        f"{recipe['steps']} steps of {recipe['batch_size']} crops of {recipe['crop']} pixels a side, seed "
        f"{of.settings['seed']}, profile `{run.profile}`. Every value is in settings.json, train.{of.name}."
        + (
            " Not trained here: they are finished weights of others, as its `source` says."
            if of.settings["source"]
            else ""
        ),
        "",
        "## The weights",
        "",
        f"- `{item.path}`, safetensors, {_bytes(item)}",
        f"- md5 {item.md5}" + (f", sha256 {item.sha256}" if item.sha256 else ""),
        _where(item, run, step),
        "",
        f"    python -m pipeline.predict photos/ --model {item.path}",
        "",
    ]
    if scores := of.scores:
        lines += [
            "## Scores",
            "",
            f"On {scores.images} images of `{scores.dataset}` {scores.split}, in percent; the interval is of 95 %, "
            "over other images of the same kind.",
            "",
            "| protocol | scales | mean IoU | interval | pixel accuracy | mean accuracy |",
            "| :-- | :-- | --: | --: | --: | --: |",
        ]
        for name, found in scores.protocols.items():
            ends = found.interval and " to ".join(f"{100 * end:.1f}" for end in found.interval)
            cells = [f"{100 * value:.2f}" for value in (found.mean_iou, found.pixel_accuracy, found.mean_accuracy)]
            scales = ", ".join(f"{scale:g}" for scale in found.scales)
            lines.append(f"| {name} | {scales} | {cells[0]} | {ends or '-'} | {cells[1]} | {cells[2]} |")
        lines.append("")
    lines += ["## Data, and for what the weights may be used", ""]
    for one in (one for one in run.data if one.name in of.data):
        terms = terms_of(one)
        lines.append(f"- {one.title}: {terms.terms}." + (f" To cite: {terms.cite}" if terms.cite else ""))
    if of.backbone is not None:
        named = next(iter(of.backbone.values()))
        lines.append(f"- The weights that it started from, {named}: {terms_of_weights(of.backbone)}.")
    lines += [
        "",
        "The code is under Apache-2.0. It labels each pixel with one of the classes of its data set and knows no "
        "other; images unlike those it was trained on may be labelled wrongly without a sign of it.",
    ]
    return "\n".join(lines) + "\n"


def _where(item: Item, run: Run, step: str) -> str:
    if item.kept:
        return "- in this artifact"
    return f"- not in this artifact; {'the record only names it' if run.is_record else f'`dvc pull {step}` gets it'}"


def _bytes(item: Item) -> str:
    return "size not recorded" if item.size is None else f"{item.size:,} bytes"
