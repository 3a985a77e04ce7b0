"""What a profile costs: counted in the networks, added up by hand here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from pipeline import cost
from refinenet import RefineNet
from refinenet.config import Recipe
from refinenet.errors import UserError
from refinenet.training.memory import activation_bytes
from refinenet.training.step import pixel_loss

ROOT = Path(__file__).resolve().parents[2]
THIN = {"backbone": "resnet50", "stem": 3, "width": 8, "coarse_width": 16, "pools": 1}


@pytest.fixture(autouse=True)
def in_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def work(adds: float, crops: int, testing: float = 0, crf: float = 0) -> cost.Work:
    return cost.Work("a", 480, adds, crops, testing, crf, 0, 0, 1, "float32", None)


def test_counted_in_the_network() -> None:
    """231 GMAC, as benchmarks/inference.md has it; memory as of the same step on a CPU."""
    adds, parameters, _ = cost.counted(*cost.REFERENCE)
    assert round(adds / 1e9) == 231
    assert parameters == sum(p.numel() for p in RefineNet(21, pools=4).parameters())
    _, _, held = cost.counted(json.dumps(THIN), 5, 64, batch=2)
    model = RefineNet(5, **THIN).train()
    images, labels = torch.zeros(2, 3, 64, 64), torch.zeros(2, 64, 64, dtype=torch.uint8)
    # Counted as a GPU has it, which resizes by two products and keeps a map between them for a moment.
    assert held == pytest.approx(activation_bytes(lambda: pixel_loss(model(images), labels)), rel=0.01)


def test_one_convolution_by_hand() -> None:
    """Of two networks that differ in the residual conv units before the classifier: two convolutions each, at 1/4."""
    counts = [cost.counted(json.dumps({**THIN, "last_units": units}), 5, 64)[0] for units in (1, 3)]
    assert counts[1] - counts[0] == 2 * 2 * (8 * 8 * 9) * (16 * 16)


def test_hours_follow_from_operations() -> None:
    assert work(10e9, 3600).hours(60e9) == (1.0, 0)
    assert work(10e9, 3600, testing=36e12, crf=1800).hours(1e10) == (6.0, 2.0)  # beside the network
    assert work(10e9, 3600, testing=36e12, crf=9000).hours(1e10) == (6.0, 2.5)
    assert cost.rate_of("h100", "bfloat16", 16) == pytest.approx(989.4e12 * 0.35)
    assert cost.rate_of("h100", "float32", 1) == cost.rate_of("h100", "float32", 7) == pytest.approx(494.7e12 * 0.1)


def test_longest_first_and_a_pretraining_before_its_training() -> None:
    hours = {"long": 5.0, "first": 2.0, "second": 4.0, "short": 1.0}
    after = {"long": None, "first": None, "second": "first", "short": None}
    told = {slot.name: (slot.gpu, slot.begin, slot.end) for slot in cost.schedule(hours, after, 2)}
    # What waits for `first` makes it the longest chain.
    assert told == {"first": (0, 0, 2), "long": (1, 0, 5), "second": (0, 2, 6), "short": (1, 5, 6)}
    assert max(slot.end for slot in cost.schedule(hours, after, 1)) == 12
    assert max(slot.end for slot in cost.schedule(hours, after, 9)) == 6  # the chain, however many there are
    with pytest.raises(UserError, match="--gpus is 0"):
        cost.schedule(hours, after, 0)


def test_evaluation_and_disk_by_hand() -> None:
    params, profile, _ = cost.read("paper")
    views = 0.8**2 + (0.6**2 + 0.8**2 + 1.0**2)
    # NYUDv2: a short edge of 480 is within 450 to 600, so 1.2 times the image.
    pixels, crf = cost.tested("a", profile, params.experiments["nyud-res50"], Recipe(steps=1), "here")
    assert pixels == pytest.approx(654 * 480 * 640 * 1.2**2 * views)
    assert crf == 0
    # VOC: 375 is brought to 450 first, and the CRF's protocol is its own.
    views += 0.6**2 + 0.8**2 + 1.0**2
    pixels, crf = cost.tested("a", profile, params.experiments["voc-res101"], Recipe(steps=1), "here")
    assert pixels == pytest.approx(1449 * 375 * 500 * (1.2 * 450 / 375) ** 2 * views)
    assert crf == pytest.approx(1449 * 4.4 / 8)
    # CamVid: 360 is brought to 450, too; it is scored on its 233 test images, which have labels.
    pixels, _ = cost.tested("a", profile, params.experiments["camvid-res50"], Recipe(steps=1), "here")
    assert pixels == pytest.approx(233 * 360 * 480 * (1.2 * 450 / 360) ** 2 * (views - 0.6**2 - 0.8**2 - 1.0**2))
    assert cost.prepared(["camvid"]) == 4 * 360 * 480 * (367 + 101 + 233)
    size, unknown = cost.archives(profile)
    assert unknown == ["59_labels.txt", "pascal_person_part.zip"]
    assert 42e9 < size < 44e9  # the README's 43 GB
    cityscapes = (2975 + 500) * 1024 * 2048 * 4 + 1525 * 1024 * 2048 * 3
    assert cost.prepared(params.datasets) > cityscapes
    assert cost.prepared(["cityscapes"]) == cityscapes


def test_what_cannot_be_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"profiles/mini\.yaml: device is cpu, expected cuda"):
        cost.main(["--profile", "mini"])
    with pytest.raises(UserError, match="--rate is -1"):
        cost.main(["--rate", "-1"])
    page = tmp_path / "page.md"
    page.write_text("nothing\n")
    with pytest.raises(UserError, match=r"page\.md: expected the lines"):
        cost.rewrite(page, "text")


@pytest.mark.slow
def test_the_page_and_its_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs/explanation/cost.md"
    text = cost.tell("paper", "h100", None, None)
    assert page.read_text() == cost.rewrite(page, text), "python -m pipeline.cost --page docs/explanation/cost.md"
    # A rate is that of the reference network: a training of another is longer by its multiply-adds.
    cost.main(["--rate", "100", "--gpus", "2"])
    told = capsys.readouterr().out
    assert "Measured: 100 images/s" in told
    adds = [cost.counted(*cost.REFERENCE)[0]]
    row = next(line for line in told.splitlines() if line.startswith("| `voc-res101-coco`"))
    gmac, hours = float(row.split("|")[3]), float(row.split("|")[5])
    assert hours == pytest.approx(400_000 / 100 / 3600 * gmac * 1e9 / adds[0], rel=0.05)
    assert "| GPU | training | from hour | to hour |" in told
    cost.main(["--gpu", "a100", "--gpus", "4"])
    assert "A100 80GB at 10 % of its float32 peak" in capsys.readouterr().out
    cost.main(["--profile", "modern"])
    assert "H100 SXM at 35 % of its bfloat16 peak" in capsys.readouterr().out


def test_rates_that_were_measured_by_batch_and_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "gpu.json"
    row = {"variant": "x", "precision": "bfloat16", "plain": True}
    rows = [
        {**row, "batch": batch, "images_per_second": rate} for batch, rate in ((1, 40), (1, 50), (8, 200), (32, 300))
    ]
    rows.append({**row, "batch": 16, "images_per_second": 900, "plain": False})  # a CUDA graph: no stage takes it
    path.write_text(json.dumps({"device": "a GPU", "thin": False, "training": rows}))
    read = cost.measured_rates(path)
    for batch, rate in ((1, 50), (7, 50), (8, 200), (16, 200), (64, 300)):
        assert cost.measured_rate(read, "bfloat16", batch, path) == rate
    with pytest.raises(UserError, match=r"gpu\.json: has no training step in float32"):
        cost.measured_rate(read, "float32", 1, path)
    # A training of the reference network, of 720,000 crops: an hour at 200 images/s.
    work = cost.Work("w", 480, 1e9, 720_000, 0.0, 0.0, 1.0, 1, 16, "bfloat16", None)
    monkeypatch.setattr(cost, "works", lambda *given: [work])
    monkeypatch.setattr(cost, "counted", lambda *given: (1e9, 1, 1.0))
    cost.main(["--profile", "modern", "--measured", str(path)])
    told = capsys.readouterr().out
    assert "Measured on a GPU: 200.0 images/s in bfloat16 at a batch of 16 for RefineNet-101" in told
    assert "| `w` | 480 | 1 | 720,000 | 1.0 |" in told
    for text in ("{", "[]", '{"training": []}', json.dumps({"device": "x", "thin": True, "training": rows})):
        path.write_text(text)
        with pytest.raises(UserError, match=r"gpu\.json: expected gpu.json of benchmarks/gpu.py"):
            cost.measured_rates(path)
