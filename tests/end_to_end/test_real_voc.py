"""VOC's official archives, cut down: all stages from file:// sources to the table."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import small_project

PROFILE = """\
base: voc-files
title: the way a lab would start, for two steps
datasets: {voc: {train: {steps: 2, batch_size: 2, log_every: 1}}}
evaluate: {protocols: {single: {scales: [0.5]}, multi: {scales: [0.5]}}}
"""


@pytest.mark.slow
def test_from_local_archives_to_the_table(real: Path, tmp_path: Path) -> None:
    project = small_project.make(tmp_path, PROFILE)
    small_project.call(project, "snakemake", "--cores", "2", "--", "results/voc_table.csv", VOC=str(real / "voc"))
    metrics = json.loads((project / "metrics" / "voc" / "voc-res101.json").read_text())
    assert (metrics["images"], metrics["split"], metrics["profile"]) == (461, "val", "test")
    # The share of background, counted once with Pillow over these labels.
    assert metrics["most_frequent"]["class"] == "background"
    assert metrics["most_frequent"]["pixel_accuracy"] == pytest.approx(0.7085433262025572, abs=1e-12)
    with (project / "results" / "voc_table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len([row for row in rows if "not comparable" in " ".join(map(str, row.values()))]) == 3
