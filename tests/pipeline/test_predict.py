"""The command `predict`, from the command line to the files: any kind of image, any list of them, what goes wrong."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline import predict
from pipeline.formats.label_images import VOID_COLOUR, Entry, _above_legend, colour, legend, overlay
from pipeline.predict import Found, find, main, names
from refinenet import RefineNet
from refinenet.config import Protocol, Resizing
from refinenet.data.split import Array
from refinenet.errors import UserError
from refinenet.inference.predictor import Predictor
from refinenet.model.network import save

torch.set_num_threads(1)

CLASSES = ("background", "cat", "Straßenbahn", "dining table", "dog")
PALETTE = ((0, 0, 0), (200, 30, 30), (30, 200, 30), (30, 30, 200), (220, 220, 60))
INPUT_SCALE, SHORT_EDGE = 1.2, (32, 48)


def thin(path: Path, void: float | None = None) -> RefineNet:
    """An untrained network that finds several classes in noise, saved as `train` does; `void` is that output's bias."""
    torch.manual_seed(0)
    model = RefineNet(5, backbone="resnet50", stem=2, width=4, coarse_width=8, void_output=void is not None)
    model.initialise("scaled", torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(2))
        if void is not None:
            model.classifier.bias[-1] = void
    about = {"dataset": "noise", "classes": CLASSES, "palette": PALETTE, "input_scale": INPUT_SCALE}
    save(model, path, about)
    return model.eval()


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "noise-res50.safetensors"
    thin(path)
    return path


def expected(model_file: Path, pixels: Array, scales: Sequence[float] = (1.0,), flip: bool = False) -> Array:
    from refinenet import load
    from refinenet.inference.multiscale import predict

    protocol = Protocol(tuple(scales), flip)
    return predict(load(model_file)[0], pixels, {"one": protocol}, Resizing(INPUT_SCALE, SHORT_EDGE))["one"]


def noise(height: int, width: int) -> Array:
    """Coarse noise, so that the network sees more than grey: H x W x 3."""
    cells = np.random.default_rng(height * width).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(cells).resize((width, height), Image.Resampling.BICUBIC))


def command(model_file: Path, *words: str | Path) -> int:
    fast = ("--model", model_file, "--short-edge", *SHORT_EDGE, "--threads", "1", "--device", "cpu")
    return main([str(word) for word in (*words, *fast)])


def photographs(folder: Path) -> dict[str, Array]:
    """Files of every kind, and what is to be seen on each."""
    folder.mkdir()
    image = noise(40, 60)
    picture, grey = Image.fromarray(image), Image.fromarray(image).convert("L")
    three = np.array(grey.convert("RGB"))
    seen: dict[str, Array] = {}

    def put(name: str, file: Image.Image, pixels: Array | None = None, **options: object) -> None:
        file.save(folder / name, **options)  # type: ignore[arg-type]
        seen[name] = np.array(Image.open(folder / name).convert("RGB")) if pixels is None else pixels

    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held upright: turn by 90 degrees clockwise to see it so
    for name in ("phone.jpg", "phone.tif", "phone.png", "phone.webp"):
        put(name, picture, exif=exif, **({"lossless": True} if name.endswith("webp") else {}))
        seen[name] = np.rot90(np.array(Image.open(folder / name).convert("RGB")) if name.endswith("jpg") else image, -1)
    put("grey.png", grey, three)
    deep = Image.fromarray(np.array(grey).astype(np.uint16) * 257)
    put("deep.png", deep, three)
    put("deep.tif", deep, three)
    put("bits.png", grey.convert("1"))
    put("cmyk.jpg", picture.convert("CMYK"))
    put("palette.png", picture.quantize(40))
    mask = Image.fromarray(np.where(np.arange(60) < 30, 0, 255).astype(np.uint8)[None].repeat(40, 0))
    for name, opaque, page in (("alpha.png", picture, image), ("grey_alpha.png", grey, three)):
        clear = opaque.copy()
        clear.putalpha(mask)
        put(name, clear, np.where(np.arange(60)[:, None] < 30, 255, page).astype(np.uint8))
    moving = picture.quantize(40)
    put("moving.gif", moving, np.array(moving.convert("RGB")), save_all=True, append_images=[grey.convert("P")])
    for name, height, width in (("one.png", 1, 1), ("line.png", 1, 300), ("odd.png", 57, 33), ("wide.png", 20, 400)):
        put(name, Image.fromarray(noise(height, width)), noise(height, width))
    return seen


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory, model_file: Path) -> tuple[Path, dict[str, Array]]:
    """The results of a folder with every kind of image."""
    folder = tmp_path_factory.mktemp("predict")
    seen = photographs(folder / "photos")
    assert command(model_file, folder / "photos", "--output", folder / "out") == 0
    return folder / "out", seen


KINDS = (
    *("phone.jpg", "phone.tif", "phone.png", "phone.webp", "grey.png", "deep.png", "deep.tif", "bits.png", "cmyk.jpg"),
    *("palette.png", "alpha.png", "grey_alpha.png", "moving.gif", "one.png", "line.png", "odd.png", "wide.png"),
)


@pytest.mark.parametrize("name", KINDS)
def test_the_label_is_that_of_the_image_as_it_is_seen(
    labelled: tuple[Path, dict[str, Array]], model_file: Path, tmp_path: Path, name: str
) -> None:
    out, seen = labelled
    read = predict.read_image(out.parent / "photos" / name)
    assert np.array_equal(read, seen[name])
    # deep.png and deep.tif differ in their suffix only: then all names have theirs.
    with Image.open(out / "labels" / f"{name}.png") as label, Image.open(out / "overlays" / f"{name}.jpg") as shown:
        assert (label.mode, label.size) == ("P", seen[name].shape[1::-1])
        values = np.array(label)
        assert np.array_equal(np.array(label.convert("RGB")), colour(values, PALETTE))
        assert shown.width >= 100
        assert shown.height >= 50
    if name not in ("line.png", "wide.png"):  # those are larger to the network than their short edge says
        assert np.array_equal(values, expected(model_file, seen[name]))
    assert name in ("one.png", "line.png", "wide.png") or len(np.unique(values)) > 1


def test_nothing_but_results_in_the_folder(labelled: tuple[Path, dict[str, Array]]) -> None:
    out, seen = labelled
    assert set(seen) == set(KINDS)
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {f"labels/{name}.png" for name in seen} | {f"overlays/{name}.jpg" for name in seen}


def test_scales_and_flip(tmp_path: Path, model_file: Path) -> None:
    Image.fromarray(noise(40, 60)).save(tmp_path / "a.png")
    words = ("--scales", "0.7,1.3", "--flip", "--no-overlay", "--output", tmp_path)
    assert command(model_file, tmp_path / "a.png", *words) == 0
    values = np.array(Image.open(tmp_path / "labels/a.png"))
    assert np.array_equal(values, expected(model_file, noise(40, 60), (0.7, 1.3), flip=True))
    assert not np.array_equal(values, expected(model_file, noise(40, 60)))
    assert not (tmp_path / "overlays").exists()


@pytest.mark.parametrize("bias", [-1e3, 1e3])
def test_a_void_output_becomes_255(tmp_path: Path, bias: float) -> None:
    thin(tmp_path / "v.safetensors", void=bias)
    Image.fromarray(noise(40, 60)).save(tmp_path / "a.png")
    assert command(tmp_path / "v.safetensors", tmp_path / "a.png", "--output", tmp_path) == 0
    values = set(np.unique(np.array(Image.open(tmp_path / "labels/a.png"))).tolist())
    assert values == {255} if bias > 0 else values <= set(range(5))


@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_a_list_on_stdin_beside_folders(
    tmp_path: Path,
    model_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    separator: str,
) -> None:
    for name in ("a/one.png", "a/deep/two.png", "b/thrée .png", "c.png", "not listed.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(9, 9)).save(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    listed = separator.join(["b/thrée .png", "", "a/one.png"]) + separator
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed.encode())))
    assert command(model_file, "-", "a", "c.png") == 0
    # The default folder is not that of the graph's own predictions, predictions/<experiment>.
    out = Path("predictions/photos/noise-res50")
    labels = {str(path.relative_to(out / "labels")) for path in out.rglob("*.png")}
    assert labels == {"one.png", "deep/two.png", "thrée .png", "c.png"}
    assert capsys.readouterr().out == f"4 images: {out}/labels, {out}/overlays\n"


def test_a_folder_is_searched_but_not_for_results_and_hidden_files(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/z.heic", "a/y.tiff", "a/notes.txt", ".hidden/x.png", "a/._y.png", "out/labels/b.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found, wrong = find([str(tmp_path), str(tmp_path / "a/y.tiff"), str(tmp_path / "n.a")], [tmp_path / "out/labels"])
    assert [str(image.name) for image in found] == ["a/y.tiff", "a/z.heic", "b.JPG", "n.a"]
    assert wrong == []


def test_no_two_results_have_one_name() -> None:
    def of(*paths: str) -> list[str]:
        return [str(name) for name in names([Found(Path(path), Path(Path(path).name)) for path in paths])]

    assert of("/p/a.jpg", "/p/b.2024.jpg", "/q/c") == ["a", "b.2024", "c"]
    assert of("/p/1/a.jpg", "/p/2/a.png", "/p/c.jpg") == ["1/a", "2/a", "c"]
    assert of("/p/a.jpg", "/p/a.png", "/p/a.jpg.png") == ["a.jpg", "a.png", "a.jpg.png"]
    assert of("/p/a.jpg", "/p/a.png", "/q/a.png") == ["p/a.jpg", "p/a.png", "q/a.png"]


def test_equal_names_end_to_end(tmp_path: Path, model_file: Path) -> None:
    sizes = {"p/a.png": 8, "q/a.png": 9, "q/deep/a.png": 10}
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(size, size)).save(tmp_path / name)
    assert command(model_file, tmp_path / "p", tmp_path / "q", "--output", tmp_path / "out") == 0
    written = {name: Image.open(tmp_path / "out/labels" / name).width for name in sizes}
    assert written == sizes


def test_what_cannot_be_read_is_named_and_the_rest_done(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, data = tmp_path / "good.jpg", io.BytesIO()
    Image.fromarray(noise(40, 60)).save(data, "jpeg")
    good.write_bytes(data.getvalue())
    (tmp_path / "cut.jpg").write_bytes(data.getvalue()[:-200])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "phone.heic").write_bytes(b"\0\0\0\x24ftypheic")
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    (tmp_path / "nothing").mkdir()
    bad = [tmp_path / n for n in ("cut.jpg", "empty.png", "missing.jpg", "text.png", "phone.heic", "float.tif")]
    out = tmp_path / "out"
    assert command(model_file, *bad[:3], good, *bad[3:], tmp_path / "nothing", "--output", out) == 1
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    for path in (*bad, tmp_path / "nothing"):
        assert len([line for line in lines if line.startswith(f"error: {path}: ")]) == 1, printed.err
    assert lines[-1] == "error: 6 of 7 images not labelled, 1 folder gave none"
    assert len(lines) == 8
    assert "expected it as JPEG" in printed.err
    files = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert files == {"labels/good.png", "overlays/good.jpg"}


def test_one_line_where_nothing_can_be_done(
    tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo, out = tmp_path / "a.png", tmp_path / "out"
    Image.fromarray(noise(8, 8)).save(photo)

    def refused(*words: str | Path) -> str:
        assert main([str(word) for word in (*words, "--output", out)]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert not out.exists()
        return line

    assert refused(photo, "--model", tmp_path / "no.safetensors").startswith(f"error: {tmp_path}/no.safetensors: no")
    assert "not a RefineNet" in refused(photo, "--model", photo)
    assert "toaster" in refused(photo, "--model", model_file, "--device", "toaster")
    assert "GPUs" in refused(photo, "--model", model_file, "--device", "cuda:99")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    assert "empty list" in refused("-", "--model", model_file)
    for words in (("--scales", "0"), ("--scales", "x"), ("--short-edge", "9", "8"), ("--threads", "0")):
        with pytest.raises(SystemExit, match="2"):
            main([str(photo), "--model", str(model_file), *words])


def test_an_image_is_never_written_over(tmp_path: Path, model_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "labels").mkdir()
    photo = tmp_path / "labels" / "a.png"
    Image.fromarray(noise(8, 8)).save(photo)
    before = photo.read_bytes()
    assert command(model_file, photo, "--output", tmp_path) == 1
    assert photo.read_bytes() == before
    assert str(photo) in capsys.readouterr().err


def test_panoramas_take_no_more_than_photographs(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factors = []

    def pretend(_: object, images: list[Array], __: object, resizing: Resizing, *more: object) -> list[Any]:
        factors.append(resizing.factor(*images[0].shape[:2]))
        return [{"label": torch.zeros(images[0].shape[:2], dtype=torch.uint8)}]

    monkeypatch.setattr("refinenet.inference.predictor.predict_many", pretend)
    predictor = Predictor(model_file, torch.device("cpu"))
    for height, width in ((600, 2400), (100, 100), (1000, 40_000), (1, 20_000), (20_000, 1)):
        predictor.label_photo(np.zeros((height, width, 3), np.uint8), Protocol((1.0,)), "")
    assert factors[:2] == [1.2, 4.5 * 1.2]  # as the authors do: the short edge within 450 and 800, then 1.2
    assert 1000 * 40_000 * factors[2] ** 2 == pytest.approx(4 * (800 * 1.2) ** 2)
    assert factors[3:] == [1.0, 1.0]


def test_too_large_for_memory_is_one_line(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")

    predictor = Predictor(model_file, torch.device("cpu"))
    monkeypatch.setattr("refinenet.inference.predictor.predict_many", full)
    with pytest.raises(UserError, match=r"^a\.png: 7 x 5 pixels.*--short-edge$"):
        predictor.label_photo(np.zeros((5, 7, 3), np.uint8), Protocol((1.0,)), "a.png")


def test_the_legend_names_the_classes_that_occur() -> None:
    label = np.array([[4, 4, 4, 1], [1, 4, 4, 4], [255, 5, 4, 4]], np.uint8)
    assert legend(label, CLASSES, PALETTE) == [
        Entry("dog", PALETTE[4], 8 / 12),
        Entry("cat", PALETTE[1], 2 / 12),
        Entry("void", VOID_COLOUR, 2 / 12),
    ]
    assert legend(label[:1, :3], CLASSES, PALETTE) == [Entry("dog", PALETTE[4], 1.0)]


@pytest.mark.parametrize("size", [(1, 1), (8, 600), (900, 20), (400, 300), (2000, 2000)])
@pytest.mark.parametrize("count", [1, 150])
def test_the_whole_legend_is_on_the_page(size: tuple[int, int], count: int) -> None:
    entries = [Entry(f"a class with number {i}", (100, i, 10), 1 / count) for i in range(count)]
    page = np.array(_above_legend(Image.new("RGB", size), entries))
    band = page[size[1] :]
    assert (band[:, :8] == 255).all()
    assert (band[:, -8:] == 255).all()  # nothing is cut off on the right
    assert (band[-4:] == 255).all()  # nor at the bottom
    drawn = band[(band[:, :, 0] == 100) & (band[:, :, 2] == 10)][:, 1]
    assert set(np.unique(drawn).tolist()) >= set(range(count))
    assert page.shape[0] <= size[1] + max(size[1], 1200)
    assert page.shape[1] <= size[0] + 1500


@pytest.mark.parametrize("size", [(1, 1), (100, 75), (20_000, 300), (3, 40_000), (4000, 3000)])
def test_an_overlay_is_of_a_size_to_look_at(size: tuple[int, int]) -> None:
    width, height = size
    label = np.zeros((height, width), np.uint8)
    label[height // 2 :] = 4
    page = np.array(overlay(np.full((height, width, 3), 100, np.uint8), label, CLASSES, PALETTE))
    assert 150 <= max(page.shape[:2]) < 33_000
    assert page.size < 3 * 6_000_000
    middle = page.shape[1] // 2
    assert tuple(page[0, middle]) in ((50, 50, 50), (160, 160, 80))  # half image, half colour


@pytest.mark.parametrize(("size", "line"), [((500, 375), 1), ((1600, 900), 2), ((2800, 1400), 3)])
def test_an_overlay_outlines_the_classes(size: tuple[int, int], line: int) -> None:
    """So many pixels on either side of an edge have the pure colour of their class, all others half of the image's."""
    width, height = size
    label = np.zeros((height, width), np.uint8)
    label[:, width // 2 :] = 4
    page = np.array(overlay(np.full((height, width, 3), 100, np.uint8), label, CLASSES, PALETTE))
    left = (page.shape[1] - width) // 2
    row = page[height // 2, left : left + width].astype(int)
    pure = np.array(PALETTE)[label[0]]
    outlined = np.abs(np.arange(width) - (width - 1) / 2) < line
    assert (row == np.where(outlined[:, None], pure, (pure + 100) // 2)).all()
