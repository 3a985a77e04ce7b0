"""A user's own files as people have them: kinds of masks, names, lists, and everything that is wrong at once."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import zlib
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import own_files
import pytest
from own_files import ABOUT, NAMES, draw, lists, packed, png_of_16_bits, refused, samples, save
from PIL import Image

from pipeline import prepare
from pipeline.config.names import check_names
from pipeline.config.schema import Folder, Params
from pipeline.datasets import custom
from pipeline.fetch import own_folders
from pipeline.formats import user_pictures
from refinenet.data.split import Array
from refinenet.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with photos/ and masks/."""
    monkeypatch.chdir(tmp_path)
    own_files.write(tmp_path)
    return tmp_path


LABEL = draw("a")[1]
FEW = np.where(LABEL == 255, 0, LABEL).astype(np.uint8)  # without void: 0, 1, 2
TWO = (FEW > 0).astype(np.uint8)


def with_palette(array: Array, bits: int) -> Image.Image:
    """A palette image of so many bits, whose colours say nothing."""
    picture = Image.fromarray(array, "P")
    picture.putpalette([9, 9, 9] * (1 << bits))
    return picture


def grey_bits(array: Array, bits: int) -> bytes:
    """A grey PNG of 1, 2 or 4 bits, which Pillow does not write: a palette PNG's header and palette changed."""
    height, width = array.shape
    packed_rows = b""
    for row in array:
        text = "".join(f"{value:0{bits}b}" for value in row)
        text += "0" * (-len(text) % 8)
        packed_rows += b"\0" + int(text, 2).to_bytes(len(text) // 8, "big")

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(packed_rows)) + chunk(b"IEND", b"")
    )


def picture(array: Any, mode: str | None = None) -> Callable[..., None]:
    def write(path: Path, **more: Any) -> None:
        made = array if isinstance(array, Image.Image) else Image.fromarray(array)
        (made.convert(mode) if mode else made).save(path, **more)

    return write


def raw(data: bytes) -> Callable[..., None]:
    return lambda path: path.write_bytes(data)


# Kind -> ending, how it is written, what it has to be read as.
MASKS: dict[str, tuple[str, Callable[..., None], Array]] = {
    "RGB of equal channels": (".png", picture(np.stack([LABEL] * 3, -1)), LABEL),
    "opaque RGBA": (".png", picture(LABEL, "RGBA"), LABEL),
    "opaque grey": (".png", picture(LABEL, "LA"), LABEL),
    "16 bits": (".png", picture(LABEL.astype(np.uint16)), LABEL),
    "TIFF of 16 bits": (".tif", picture(LABEL.astype(np.uint16)), LABEL),
    "TIFF of 32 bits": (".tiff", picture(LABEL.astype(np.int32)), LABEL),
    "TIFF": (".TIF", lambda path: Image.fromarray(LABEL).save(path, compression="tiff_lzw"), LABEL),
    "BMP": (".bmp", picture(LABEL), LABEL),
    "palette BMP": (".bmp", picture(with_palette(LABEL, 8)), LABEL),
    "WebP": (".webp", lambda path: Image.fromarray(LABEL).convert("RGB").save(path, lossless=True), LABEL),
    "GIF": (".gif", picture(with_palette(FEW, 2)), FEW),
    "1 bit": (".png", picture(TWO == 1), TWO),
    "TIFF of 1 bit": (".tif", picture(TWO == 1), TWO),
    "grey of 1 bit": (".png", raw(grey_bits(TWO, 1)), TWO),
    "grey of 2 bits": (".png", raw(grey_bits(FEW, 2)), FEW),
    "grey of 4 bits": (".png", raw(grey_bits(FEW, 4)), FEW),
    "palette of 1 bit": (".png", lambda path: with_palette(TWO, 1).save(path, bits=1), TWO),
    "palette of 2 bits": (".png", lambda path: with_palette(FEW, 2).save(path, bits=2), FEW),
    "palette of 4 bits": (".png", lambda path: with_palette(FEW, 4).save(path, bits=4), FEW),
    "palette, its first colour transparent": (
        ".png",
        lambda path: with_palette(FEW, 2).save(path, transparency=0),
        FEW,
    ),
}


@pytest.mark.parametrize("kind", MASKS)
def test_kinds_of_masks(here: Path, kind: str) -> None:
    ending, write, expected = MASKS[kind]
    Path("masks/a.png").unlink()
    write(Path(f"masks/a{ending}"))
    assert np.array_equal(samples()["a"][1], expected)


REFUSED: dict[str, tuple[str, Callable[..., None], str]] = {
    "JPEG": (".png", lambda path: Image.fromarray(LABEL).save(path, "JPEG"), r"a JPEG, which changes values"),
    "lossy WebP": (".webp", lambda path: Image.fromarray(LABEL).convert("RGB").save(path), r"a lossy WebP, which"),
    "TIFF with JPEG": (".tif", lambda path: Image.fromarray(LABEL).save(path, compression="jpeg"), r"a TIFF with JPEG"),
    "floats": (".tif", picture(LABEL.astype(np.float32)), r"32 bits a channel, mode F; expected 8 bits of grey"),
    "CMYK": (".tif", picture(LABEL, "CMYK"), r"8 bits a channel, mode CMYK; expected"),
    "16-bit colours": (".png", raw(png_of_16_bits()), r"16 bits a channel, mode RGB; expected"),
    "two pages": (
        ".tif",
        lambda path: Image.fromarray(LABEL).save(path, save_all=True, append_images=[Image.fromarray(LABEL)]),
        r"2 pages or frames, expected 1",
    ),
    "a transparent pixel": (
        ".png",
        picture(np.dstack([*[FEW] * 3, np.where(np.indices(FEW.shape).sum(0) == 0, 254, 255).astype(np.uint8)])),
        r"1 transparent pixels, expected none",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_masks_whose_values_nobody_knows(here: Path, kind: str) -> None:
    ending, write, message = REFUSED[kind]
    Path("masks/a.png").unlink()
    write(Path(f"masks/a{ending}"))
    refused(rf"^masks/a\{ending}: {message}")


@pytest.mark.parametrize("ending", [".tif", ".tiff", ".bmp", ".webp"])
def test_kinds_of_images(here: Path, ending: str) -> None:
    image = draw("a")[0]
    Path("photos/a.png").unlink()
    Image.fromarray(image).save(Path(f"photos/a{ending}"), **({"lossless": True} if ending == ".webp" else {}))
    assert np.array_equal(samples()["a"][0], image)


def test_cmyk_and_16_bit_images(here: Path) -> None:
    image = Image.fromarray(draw("a")[0]).convert("CMYK")
    Path("photos/a.png").unlink()
    image.save("photos/a.jpg")
    assert np.array_equal(samples()["a"][0], np.asarray(Image.open("photos/a.jpg").convert("RGB")))
    Path("photos/a.jpg").unlink()
    Path("photos/a.png").write_bytes(png_of_16_bits())
    refused(r"^photos/a\.png: 16 bits a channel, expected 8")


def test_values_of_classes(here: Path) -> None:
    """0 and 255, ids from 1, in any order; 255 is void until it is a class."""
    for name in NAMES:
        save(np.where(draw(name)[1] == 255, 255, 0).astype(np.uint8), Path("masks", f"{name}.png"))
    Image.fromarray(draw("b")[1] == 255).save("masks/b.png")  # one of 1 bit among them
    binary = Folder("photos", "masks", ("background", "polyp"), values=(0, 255))
    for name, (_, label) in samples(binary).items():
        assert np.array_equal(label, draw(name)[1] == 255)
    for name in NAMES:
        save(draw(name)[1] + np.uint8(1), Path("masks", f"{name}.png"))  # 1 to 3, void is 0
    from_one = replace(ABOUT, values=(3, 1, 2), void=0)
    for name, (_, label) in samples(from_one).items():
        assert np.array_equal(label, np.array([1, 2, 0, *[255] * 253], np.uint8)[draw(name)[1]])
    refused(r"value 0, expected 3, 1, 2, or 255 for void, at row", replace(from_one, void=255))
    refused(r"value 0, expected 3, 1, 2, at row", replace(from_one, void=None))


def test_suffixes_of_names(here: Path) -> None:
    for name in NAMES:
        Path(f"photos/{name}.png").rename(f"photos/{name}_rgb.png")
        Path(f"masks/{name}.png").rename(f"masks/{name}_rgb.png.png")
        save(draw(name)[1], Path(f"masks/{name}_colour.png"))  # another kind beside them, as in Cityscapes
    about = replace(ABOUT, image_suffix="_rgb", mask_suffix="_rgb.png")
    found = samples(about)
    assert sorted(found) == sorted(NAMES)
    assert np.array_equal(found["field/a"][1], draw("field/a")[1])
    os.truncate("photos/a_rgb.png", 100)
    refused(r"^photos/a_rgb\.png: not a whole image", about)
    save(draw("a")[0], Path("photos/a_rgb.png"))
    Path("masks/a_rgb.png.png").unlink()
    refused(r"^photos/a_rgb\.png: no mask masks/a_rgb\.png\.png$", about)
    with pytest.raises(UserError, match=r"own\.leaves: mask_suffix is 'a/b', expected the end of a file's name"):
        custom.dataset("leaves", replace(about, mask_suffix="a/b"))


@pytest.mark.parametrize(
    "lines",
    [
        "./b\n./field/a.png\n",
        "photos/b.png\nphotos/field/a\n",
        "b.png b.png\nfield/a.png\tfield/a.png\n",
        "photos/b.png, masks/b.png\r\n\r\n photos/field/a.png ,masks/field/a.png\r\n",
        "/elsewhere/photos/b.png /elsewhere/masks/b.png\n/elsewhere/photos/field/a.png x/masks/field/a.png\n",
        "/SegNet/train/b.png /SegNet/trainannot/b.png\n/SegNet/train/field/a.png /SegNet/trainannot/field/a.png\n",
    ],
)
def test_entries_of_lists(here: Path, lines: str) -> None:
    Path("val.txt").write_bytes(lines.encode())
    assert lists(replace(ABOUT, val="val.txt"))["val"] == ["b", "field/a"]
    Path("val.txt").write_text(f"{here}/photos/b.png\nfield/c d.png masks/field/a.png\n")
    refused(
        r"^val\.txt: 'field/c d.png masks/field/a.png': masks/field/a.png is the mask of field/a, expected",
        replace(ABOUT, val="val.txt"),
    )
    Path("val.txt").write_text("elsewhere/b\n")  # another folder's
    refused(r"^val\.txt: 'elsewhere/b' is no image in photos$", replace(ABOUT, val="val.txt"))


def test_splits_by_folder(here: Path) -> None:
    """As CamVid's: train/ and trainannot/, val/ and valannot/."""
    for name in NAMES:
        Path("photos", f"{name}.png").unlink()
        Path("masks", f"{name}.png").unlink()
    for folder, names in (("train", ["a", "field/a", "é"]), ("valid", ["a", "b"])):
        for name in names:
            image, label = draw(f"{folder}{name}")
            save(image, Path(f"photos/{folder}/{name}.png"))
            save(label, Path(f"photos/{folder}annot/{name}_gt.png"))
    about = replace(
        ABOUT, images="photos/{split}", masks="photos/{split}annot", mask_suffix="_gt", split_folders=("train", "valid")
    )
    assert lists(about) == {"train": ["train/a", "train/field/a", "train/é"], "val": ["val/a", "val/b"]}
    found = samples(about)
    assert np.array_equal(found["val/a"][1], draw("valida")[1])
    assert np.array_equal(found["train/field/a"][0], draw("trainfield/a")[0])
    os.truncate("photos/validannot/b_gt.png", 60)
    refused(r"^photos/validannot/b_gt\.png: not a whole image", about)
    Path("photos/validannot/b_gt.png").unlink()
    refused(r"^photos/valid/b\.png: no mask photos/validannot/b_gt\.png$", about)
    for wrong, message in (
        ({"masks": "masks"}, r"\{split\} stands in one of images and masks, expected it in both"),
        ({"val": "val.txt"}, r"\{split\} and a list, expected one of them"),
    ):
        with pytest.raises(UserError, match=rf"^own\.leaves: {message}"):
            custom.dataset("leaves", replace(about, **wrong))


# All at once ----------------------------------------------------------------------------------------------------------


def many(count: int) -> None:
    for index in range(count):
        for folder, part in (("photos", 0), ("masks", 1)):
            save(draw(f"x{index:03}")[part], Path(folder, f"x{index:03}.png"))


def prepared(cores: int, monkeypatch: pytest.MonkeyPatch, about: Folder = ABOUT) -> None:
    """Stages `download` and `prepare` of leaves."""
    Path("settings.json").write_text(json.dumps({"prepare": {"leaves": {"own": asdict(about)}}}))
    own_folders.pack("leaves", about, Path("data/raw/leaves"))
    monkeypatch.setattr(prepare, "SMALL", 0)
    monkeypatch.setenv("PIPELINE_CORES", str(cores))
    prepare.run("leaves")


def lines_of(error: pytest.ExceptionInfo[UserError]) -> list[str]:
    return [line.strip() for line in str(error.value).splitlines()]


@pytest.mark.parametrize("cores", [1, 2])
def test_what_pixels_have_wrong(here: Path, monkeypatch: pytest.MonkeyPatch, cores: int) -> None:
    many(30)
    os.truncate("photos/x003.png", 90)
    save(np.full((24, 32), 77, np.uint8), Path("masks/x009.png"))
    save(np.zeros((9, 9), np.uint8), Path("masks/x015.png"))
    with pytest.raises(UserError) as error:
        prepared(cores, monkeypatch)
    first, *others = lines_of(error)
    assert first == "3 files cannot be used"
    told = [r"photos/x003\.png: not a whole", r"masks/x009\.png: value 77", r"masks/x015\.png: 9 x 9 pixels"]
    for line in told:
        assert sum(re.match(line, other) is not None for other in others) == 1
    assert len(others) == 3
    for index in range(28):
        os.truncate(f"masks/x{index:03}.png", 50)
    with pytest.raises(UserError) as error:
        prepared(cores, monkeypatch)
    assert lines_of(error)[0] == "at least 20 files cannot be used"
    assert len(lines_of(error)) == 21
    assert not Path("data/leaves").exists()


def test_what_folders_and_lists_have_wrong(here: Path) -> None:
    many(30)
    for index in range(12):
        Path(f"masks/x{index:03}.png").unlink()
        Path(f"photos/x{index + 12:03}.png").unlink()
    Path("photos/b.JPG").touch()
    Path("photos/b\nc.png").touch()
    with pytest.raises(UserError) as error:
        packed()
    first, *others = lines_of(error)
    assert first == "photos and masks: 26 files do not fit"
    assert len(others) == 21
    assert others[-1] == "and 6 more"
    Path("val.txt").write_text("b\nq\nr\nb\n")
    with pytest.raises(UserError) as error:
        packed(replace(ABOUT, val="val.txt"))
    assert lines_of(error) == [
        "val.txt: 3 lines are wrong",
        "val.txt: 'q' is no image in photos",
        "val.txt: 'r' is no image in photos",
        "val.txt: 'b' is there twice",
    ]


def test_a_file_that_goes_while_it_is_packed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = own_folders.contents

    def late(about: Folder) -> Any:
        found = real(about)
        Path("photos/b.png").unlink()
        return found

    monkeypatch.setattr(own_folders, "contents", late)
    refused(r"^photos/b\.png: gone since the folder was listed$")


# Nothing of the user's is replaced ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["incoming", "archives", "raw", "splits", "Raw", "ablation", "seeds"])
def test_reserved_names(name: str) -> None:
    params = Params("mini", (), (), (), {}, own=(name,))
    with pytest.raises(UserError, match=rf"own: '{name}' is a (folder of the project|table of the paper)"):
        check_names(params, "params.yaml")


def test_files_where_a_stage_writes(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared(1, monkeypatch)
    prepared(1, monkeypatch)  # its own files are no hindrance
    Path("data/leaves/photos").mkdir()
    with pytest.raises(UserError, match=r"^data/leaves/photos: no stage has written it, and data/leaves is replaced"):
        prepared(1, monkeypatch)
    Path("data/leaves/photos").rmdir()
    Path("photos").rename("data/leaves/photos")
    with pytest.raises(UserError, match=r"^own\.leaves: data/leaves/photos lies in data/leaves, which stages replace"):
        prepared(1, monkeypatch, replace(ABOUT, images="data/leaves/photos"))
    assert len(list(Path("data/leaves/photos").rglob("*.png"))) == len(NAMES)


def test_lossy_webp_is_told_by_its_chunks(tmp_path: Path) -> None:
    """Also behind other chunks, and whatever bytes the pixels have."""
    path = tmp_path / "a.webp"
    exif = Image.Exif()
    exif[0x010E] = "VP8 VP8L"
    for lossless in (True, False):
        Image.fromarray(np.stack([LABEL] * 3, -1)).save(path, lossless=lossless, exif=exif)
        if lossless:
            assert np.array_equal(user_pictures.mask(path.read_bytes(), "a").values, LABEL)
        else:
            with pytest.raises(UserError, match="a lossy WebP"):
                user_pictures.mask(path.read_bytes(), "a")


def encoded() -> dict[str, bytes]:
    """An image or mask in each format and kind."""
    made: dict[str, tuple[Image.Image, dict[str, Any]]] = {
        "PNG": (Image.fromarray(LABEL), {}),
        "TIFF": (Image.fromarray(LABEL), {}),
        "TIFF ": (Image.fromarray(draw("a")[0]), {"compression": "tiff_lzw"}),
        "TIFF  ": (with_palette(FEW, 2), {"save_all": True, "append_images": [with_palette(FEW, 2)]}),
        "BMP": (Image.fromarray(draw("a")[0]), {}),
        "GIF": (with_palette(FEW, 2), {}),
        "WEBP": (Image.fromarray(draw("a")[0]), {"lossless": True}),
        "JPEG": (Image.fromarray(draw("a")[0]), {}),
    }
    files = {}
    for kind, (image, more) in made.items():
        sink = io.BytesIO()
        image.save(sink, kind.strip(), **more)
        files[kind] = sink.getvalue()
    return files


@pytest.mark.parametrize("read", [user_pictures.photo, user_pictures.mask])
@pytest.mark.parametrize("kind", list(encoded()))
def test_half_a_file_of_any_format(kind: str, read: Callable[[bytes, str], Any]) -> None:
    data = encoded()[kind]
    with pytest.raises(UserError, match=r"^a: not a whole image \("):
        read(data[: len(data) // 2], "a")


def test_damaged_files_are_one_line() -> None:
    """Bytes changed, most of them in the header: a picture, or one line; never another error."""
    random = np.random.default_rng(0)
    files = encoded()
    refusals = 0
    for turn in range(1200):
        kind = list(files)[turn % len(files)]
        data = bytearray(files[kind])
        for _ in range(int(random.integers(1, 5))):
            end = min(len(data), int(random.choice([64, 200, 1 << 20])))
            data[int(random.integers(end))] = int(random.choice([0, 1, 2, 8, 16, 127, 255, random.integers(256)]))
        for read in (user_pictures.photo, user_pictures.mask):
            try:
                found = read(bytes(data), "a")
            except UserError:
                refusals += 1
                continue
            colours = found if isinstance(found, np.ndarray) else found.colours()
            assert colours.dtype == np.uint8
            assert colours.ndim == 3
    assert 200 < refusals < 2400
