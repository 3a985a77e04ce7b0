"""Crops and the loader: what is drawn, what becomes of it, and that no order of work changes either."""

from __future__ import annotations

import gc
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from refinenet.data import augment
from refinenet.data import crops as crops_module
from refinenet.data.augment import Batch, make_batch
from refinenet.data.crops import Crops, Epochs, Window, nth_pixel_of_class
from refinenet.data.loader import Loader
from refinenet.data.split import Array, Sample, Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError

CPU = torch.device("cpu")
SCALES = (0.7, 1.0, 1.3)
SIZES = [(48, 60), (60, 48), (20, 90), (57, 57), (33, 41), (48, 60), (90, 21), (70, 64), (40, 40)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    path = tmp_path_factory.mktemp("split") / "train.arrow"
    rng = np.random.default_rng(0)
    with write_split(path, Schema("toy", "train", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))) as writer:
        for i, size in enumerate(SIZES):
            label = rng.integers(0, 3 if i % 3 else 2, size, dtype=np.uint8)
            label[:3] = 255
            writer.add(f"image{i}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), label)
    return Split(path)


def make(split: Split, **changed: bool | float) -> Crops:
    return Crops(split, 44, SCALES, flip=True, seed=3, **{"class_balanced": True, **changed})  # type: ignore[arg-type]


def equal(a: Batch, b: Batch) -> bool:
    return a.names == b.names and torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_samples_are_views_of_the_mapped_file(split: Split) -> None:
    with Path("/proc/self/maps").open() as file:
        ranges = [line.split()[0].split("-") for line in file if line.rstrip().endswith(str(split.path))]
    for sample in split:
        for values in (sample.image, sample.label):
            assert values is not None
            begin, end = np.lib.array_utils.byte_bounds(values)
            assert any(int(a, 16) <= begin < end <= int(b, 16) for a, b in ranges)


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_batches_are_those_of_draw_and_make_batch(split: Split, batch: int, ahead: int) -> None:
    crops = make(split)
    for start in (0, 5):
        with Loader(crops, batch, 44, 1.2, CPU, start=start, stop=12, ahead=ahead) as loader:
            found = list(loader)
        assert len(found) == 12 - start
        for step, one in enumerate(found, start):
            assert equal(one, make_batch(crops.draw(step, batch), 44, 1.2, CPU))


@pytest.mark.parametrize(("batch", "world"), [(5, 3), (2, 2), (4, 1)])
def test_processes_together_have_the_whole_batch(split: Split, batch: int, world: int) -> None:
    crops = make(split)
    parts = [list(Loader(crops, batch, 44, 1.2, CPU, rank, world, stop=6)) for rank in range(world)]
    for step, shares in enumerate(zip(*parts, strict=True)):
        whole = make_batch(crops.draw(step, batch), 44, 1.2, CPU)
        names = tuple(name for share in shares for name in share.names)
        images, labels = (torch.cat([getattr(share, key) for share in shares]) for key in ("images", "labels"))
        assert equal(Batch(names, images, labels), whole)
    with pytest.raises(
        UserError, match=r"train\.batch_size is 2, expected one image or more for each of the 3 processes"
    ):
        Loader(crops, 2, 44, 1.2, CPU, 0, 3)


def cubic(n: int, m: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Matrix m x n of the anti-aliased bicubic resize that ends at the border; and which rows reach beyond it."""
    squeeze = min(m / n, 1.0)
    centres = (np.arange(m) + 0.5) * n / m - 0.5
    weights = np.array([[reference.keys(squeeze * (centre - i)) for i in range(n)] for centre in centres])
    beyond = (centres - 2 / squeeze < 0) | (centres + 2 / squeeze > n - 1)
    return weights / weights.sum(1, keepdims=True), beyond


def plainly(windows: Sequence[Window], crop: int, input_scale: float) -> tuple[Tensor, Tensor]:
    """What `make_batch` should do, one window after the other, in float64 with dense matrices."""
    full = round(crop * input_scale)
    images, labels = [], []
    for window in windows:
        size = [min(full, max(1, round(side * window.scale * input_scale))) for side in window.label.shape]
        rows, columns = (cubic(n, m)[0] for n, m in zip(window.label.shape, size, strict=True))
        image = torch.from_numpy(rows @ window.image.transpose(2, 0, 1) @ columns.T)[None].clamp(0, 255)
        label = F.interpolate(torch.from_numpy(window.label.copy())[None, None], size=size, mode="nearest-exact")
        if window.flip:
            image, label = image.flip(3), label.flip(3)
        padding = (0, full - size[1], 0, full - size[0]) if len(windows) > 1 else (0, 0)
        images.append(F.pad(image, padding, value=128.0))
        labels.append(F.pad(label, padding, value=255)[:, 0])
    return torch.cat(images).float(), torch.cat(labels)


@given(n=st.integers(1, 90), m=st.integers(1, 120))
@settings(max_examples=60, deadline=None)
def test_resizing_is_imresize_but_at_the_border(n: int, m: int) -> None:
    matrix, beyond = cubic(n, m)
    np.testing.assert_allclose(matrix[~beyond], reference.bicubic(n, m, m / n)[~beyond], rtol=0, atol=1e-12)


# As a GPU has it; as a CPU has it: rounded after each pass, and pixels that overshoot cut off after the first.
@pytest.mark.parametrize(
    ("on_bytes", "low", "high", "largest", "mean"), [((), 0, 256, 2e-3, 1e-3), (("cpu",), 64, 192, 1.5, 0.5)]
)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 70), st.integers(1, 70)), min_size=1, max_size=4),
    scale=st.sampled_from((0.3, 0.7, 0.9, 1.0, 1.3, 2.6)),
    input_scale=st.sampled_from((0.5, 1.0, 1.2)),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=60, deadline=None)
def test_image_and_label_are_resized_alike(
    on_bytes: tuple[str, ...],
    low: int,
    high: int,
    largest: float,
    mean: float,
    sizes: list[tuple[int, int]],
    scale: float,
    input_scale: float,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    windows = [
        Window(
            str(size),
            rng.integers(low, high, (*size, 3), dtype=np.uint8),
            rng.integers(0, 5, size, dtype=np.uint8),
            scale * rng.choice([1.0, 1.1]),
            bool(rng.integers(2)),
        )
        for size in sizes
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(augment, "ON_BYTES", on_bytes)
        found = make_batch(windows, 40, input_scale, CPU)
    images, labels = plainly(windows, 40, input_scale)
    assert torch.equal(found.labels, labels)
    assert found.images.dtype == torch.float32
    torch.testing.assert_close(found.images, images, rtol=0, atol=largest)
    assert (found.images - images).abs().mean() < mean


def test_a_window_is_the_same_in_any_company_and_threads(split: Split) -> None:
    windows = make(split).draw(0, 6)
    whole = make_batch(windows, 44, 1.2, CPU)
    torch.set_num_threads(3)
    try:
        for place, window in enumerate(windows):
            alone = make_batch([window], 44, 1.2, CPU, pad=True)
            assert torch.equal(alone.images[0], whole.images[place])
            assert torch.equal(alone.labels[0], whole.labels[place])
    finally:
        torch.set_num_threads(1)
    with pytest.raises(ValueError, match="expected one size or padding"):
        make_batch(windows, 44, 1.2, CPU, pad=False)


def chi_square(counts: Sequence[int]) -> float:
    """Of counts that should be equal, over its expectation: 1 where they are as unequal as chance makes them."""
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts) / (len(counts) - 1)


def test_classes_pixels_scales_and_flips_are_drawn_evenly(split: Split) -> None:
    crops = make(split)
    draws = [draw for step in range(1500) for draw in crops.plan(step, 4)]
    for values in ([d.klass for d in draws], [d.scale for d in draws], [d.flip for d in draws]):
        assert chi_square(list(Counter(values).values())) < 4
    # Class c is in six of nine images, which share its third evenly, as the pixels of each do.
    found = Counter(d.sample for d in draws if d.klass == 2)
    assert len(found) == 6
    assert chi_square(list(found.values())) < 3
    pixels = Counter(d.pixel * 10 // int(split.counts()[4, 2]) for d in draws if (d.sample, d.klass) == (4, 2))
    assert len(pixels) == 10
    assert chi_square(list(pixels.values())) < 3


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_classes_are_drawn_by_a_power_of_their_images(split: Split, power: float) -> None:
    draws = [draw for step in range(1500) for draw in make(split, class_sampling_power=power).plan(step, 4)]
    found, images = Counter(d.klass for d in draws), (9, 9, 6)
    assert sum(present.size for present in split.present()) == sum(images)
    shares = [count**power / sum(count**power for count in images) for count in images]
    assert sum((found[c] - 6000 * share) ** 2 / (6000 * share) for c, share in enumerate(shares)) < 12
    of_c = Counter(d.sample for d in draws if d.klass == 2)
    assert len(of_c) == 6
    assert chi_square(list(of_c.values())) < 3


def test_pixel_of_a_class_is_found() -> None:
    label = np.random.default_rng(0).choice(
        np.array([0, 1, 2, 255], np.uint8), (400, 401), p=[0.9, 0.09, 0.0001, 0.0099]
    )
    for klass in (0, 1, 2):
        positions = np.flatnonzero(label == klass)
        for n in {0, 1, len(positions) // 2, len(positions) - 1}:
            assert nth_pixel_of_class(label, klass, n) == positions[n]
        assert nth_pixel_of_class(label, klass, len(positions)) is None


class Plain:
    """Images that know no counts, as `ConcatSplits` before it had them; image 4 cannot be read."""

    def __init__(self, split: Split, broken: bool = False) -> None:
        self.split, self.broken = split, broken

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> Sample:
        if self.broken and index == 4:
            raise OSError("image4: Input/output error")
        return self.split[index]

    def present(self) -> Sequence[Array]:
        return self.split.present()


def test_counts_are_a_short_cut_only(split: Split) -> None:
    plain = Crops(Plain(split), 44, SCALES, True, True, 3)
    for step in range(30):
        assert plain.plan(step, 2) == make(split).plan(step, 2)


def test_square_crops_are_no_larger_than_the_short_edge(split: Split) -> None:
    crops = make(split, square_crops=True)
    sizes = {sample.name: sample.image.shape[:2] for sample in split}
    for step in range(100):
        for window in crops.draw(step, 1):
            height, width = window.label.shape
            assert height == width <= min(44 / window.scale + 0.5, *sizes[window.name])
            even = round(min(sizes[window.name]) * window.scale) // 2 * 2
            assert abs(height * window.scale - min(44, even)) <= max(window.scale / 2, 0.5) + 1e-9


def test_epochs_are_the_authors(monkeypatch: pytest.MonkeyPatch) -> None:
    """60 images of a common class, of which some have others: every class comes, and every image in its turn."""
    present = [np.array([0] + [1] * (i % 5 == 0) + [2] * (i % 20 == 1) + [3] * (i == 7), np.uint8) for i in range(60)]
    whole = Epochs(present, 1)
    assert all(sorted(whole[60 * e + i] for i in range(60)) == list(range(60)) for e in range(3))
    monkeypatch.setattr(crops_module, "EPOCH", (14, 30))
    monkeypatch.setattr(crops_module, "IMAGES_PER_CLASS", 6)
    epochs = Epochs(present, 1)
    places = [epochs[place] for place in range(400)]
    again = Epochs(present, 1)
    assert [again[place] for place in (399, 20, 130)] == [places[place] for place in (399, 20, 130)]
    lengths, start = [], 0
    while start + 30 < 400:
        epochs[start]
        length = len(epochs._order)
        counts = Counter(one for i in places[start : start + length] for one in present[i].tolist())
        assert counts[0] >= 6 <= counts[1]
        assert (counts[2], counts[3]) == (3, 1)  # all there are
        assert len(set(places[start : start + length])) == length
        lengths.append(length)
        start += length
    assert 14 <= min(lengths) <= max(lengths) <= 30
    # Most images of the common class wait for their turn, and get it.
    assert len(set(places)) == 60


def test_centre_in_the_authors_epochs_is_any_class_of_the_image(split: Split) -> None:
    crops = make(split, epoch_sampling=True)
    draws = [draw for step in range(900) for draw in crops.plan(step, 1)]
    assert set(Counter(d.sample for d in draws).values()) == {100}  # 100 epochs of all images
    present = split.present()
    assert all(d.klass in present[d.sample] for d in draws)
    assert chi_square(list(Counter(d.klass for d in draws if d.sample == 4).values())) < 4


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("loader")]


def test_error_of_the_thread_is_raised_and_ends_it(split: Split) -> None:
    plan = [draw.sample for step in range(100) for draw in make(split).plan(step, 1)]
    loader = Loader(Crops(Plain(split, broken=True), 44, SCALES, True, True, 3), 1, 44, 1.0, CPU)
    found: list[Batch] = []
    with pytest.raises(OSError, match="image4"):
        found.extend(loader)
    assert len(found) == plan.index(4) > 0
    assert not loader_threads()
    with pytest.raises(StopIteration):
        next(loader)


def test_no_thread_is_left(split: Split) -> None:
    crops = make(split)
    with Loader(crops, 2, 44, 1.0, CPU) as loader:
        next(loader)
        assert loader_threads()
    assert not loader_threads()
    with pytest.raises(KeyboardInterrupt), Loader(crops, 2, 44, 1.0, CPU):
        raise KeyboardInterrupt
    assert not loader_threads()
    forgotten = Loader(crops, 2, 44, 1.0, CPU)
    next(forgotten)
    threads = loader_threads()
    assert threads
    del forgotten
    gc.collect()
    for thread in threads:
        thread.join(timeout=300)
        assert not thread.is_alive()


def test_program_ends_although_the_loader_was_not_closed(split: Split) -> None:
    program = f"""
import torch
from pathlib import Path
from refinenet.data.crops import Crops
from refinenet.data.split import Split
from refinenet.data.loader import Loader
loader = Loader(Crops(Split(Path({str(split.path)!r})), 44, (1.0,), True, True, 0), 2, 44, 1.0, torch.device("cpu"))
print(len(next(loader).names))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "2\n", "")


@pytest.mark.gpu
def test_on_a_gpu_without_waiting(split: Split) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    device, crops = torch.device("cuda"), make(split)
    kept = []
    with Loader(crops, 4, 44, 1.2, device, stop=20) as loader:
        kept.append(next(loader))
        torch.cuda.set_sync_debug_mode("error")
        try:
            kept += loader
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for step, batch in enumerate(kept):
        expected = make_batch(crops.draw(step, 4), 44, 1.2, CPU)
        assert batch.names == expected.names
        assert torch.equal(batch.labels.cpu(), expected.labels)
        images, _ = plainly(crops.draw(step, 4), 44, 1.2)
        torch.testing.assert_close(batch.images.cpu(), images, rtol=0, atol=2e-3)
        assert equal(batch, make_batch(crops.draw(step, 4), 44, 1.2, device))
