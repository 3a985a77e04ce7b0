"""`refinenet.Predictor` as a user of the package meets it: its own example, and any form in which an image comes."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import refinenet
from pipeline.formats.photo import decoded
from refinenet.config import Protocol
from refinenet.errors import UserError
from refinenet.inference import predictor as module
from refinenet.model.network import RefineNet, save

CLASSES = ("sky", "building", "pole")


def write_model(path: Path) -> None:
    """A network that finds several classes in noise."""
    torch.manual_seed(0)
    model = RefineNet(3, backbone="resnet50", cascade="single", stem=2, width=4, coarse_width=8)
    model.initialise("scaled", torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(2))
    about = {"classes": CLASSES, "palette": [(1, 2, 3), (4, 5, 6), (7, 8, 9)], "short_edge": [48, 64]}
    path.parent.mkdir(parents=True, exist_ok=True)
    save(model, path, about)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """models/street.safetensors and street.jpg."""
    folder = tmp_path_factory.mktemp("project")
    write_model(folder / "models/street.safetensors")
    pixels = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "street.jpg", quality=95)
    return folder


def test_the_example_of_the_docstring(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    finder, runner = doctest.DocTestFinder(recurse=False), doctest.DocTestRunner()
    (example,) = finder.find(refinenet.Predictor, "Predictor", module=module)
    assert len(example.examples) == 5
    assert runner.run(example).failed == 0


def test_a_path_a_picture_and_an_array_are_the_same_image(folder: Path) -> None:
    predictor = refinenet.Predictor(str(folder / "models/street.safetensors"), "cpu")
    file = folder / "street.jpg"
    labels = predictor(file)
    assert len(np.unique(labels)) > 1
    with Image.open(file) as picture:
        assert np.array_equal(predictor(picture), labels)
        array = np.asarray(picture)
    assert np.array_equal(predictor(array), labels)
    assert np.array_equal(predictor(str(file)), predictor.label_photo(array, Protocol((1.0,)), "a"))
    twice = predictor(array, Protocol((0.5, 1.0), flip=True))
    assert not np.array_equal(twice, labels)
    assert predictor.classes == CLASSES


def test_every_kind_of_picture_is_seen_as_the_command_sees_it(folder: Path, tmp_path: Path) -> None:
    """Turned by EXIF, transparent in two ways, grey, in a palette, in CMYK."""
    with Image.open(folder / "street.jpg") as picture:
        picture.load()
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "turned.jpg", exif=turned)
    clear = picture.copy()
    clear.putalpha(Image.linear_gradient("L").resize(picture.size))
    clear.save(tmp_path / "clear.png")
    picture.convert("P").save(tmp_path / "palette.png", transparency=3)
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("1").save(tmp_path / "black.png")
    picture.convert("CMYK").save(tmp_path / "cmyk.jpg")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 6
    for file in files:
        assert np.array_equal(module.pixels_of(file)[0], decoded(file, str(file))), file.name
    assert module.pixels_of(tmp_path / "turned.jpg")[0].shape == (64, 48, 3)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"array (3, 8, 8) of uint8, expected H x W x 3 of uint8"),
        (np.zeros((8, 8, 3), np.float32), r"array (8, 8, 3) of float32, expected"),
        (Image.new("I;16", (8, 8)), "picture: mode I;16, expected 8 bits a channel"),
        ("none.jpg", "none.jpg: cannot be read (No such file or directory), expected an image"),
        ("text.jpg", "text.jpg: cannot be read (cannot identify image file 'text.jpg'), expected an image"),
        ("half.png", "half.png: cannot be read ("),
    ],
)
def test_what_is_no_image_is_one_line(
    image: object, message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.jpg").write_text("no image")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), np.uint8)).save("half.png")
    Path("half.png").write_bytes(Path("half.png").read_bytes()[:5000])
    predictor = refinenet.Predictor(folder / "models/street.safetensors", "cpu")
    with pytest.raises(UserError, match=f"^{re.escape(message)}"):
        predictor(image)  # type: ignore[arg-type]


def test_a_model_that_is_missing_says_which_may_be_meant(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    meant = (
        r"^models/stret\.safetensors: no such file: did you mean models/street\.safetensors\? Else `train stret` makes"
    )
    with pytest.raises(UserError, match=meant):
        refinenet.Predictor("models/stret.safetensors")
    with pytest.raises(
        UserError, match=r"^none/x\.safetensors: no such file; `train x` makes it, or `dvc pull train`$"
    ):
        refinenet.Predictor("none/x.safetensors")
