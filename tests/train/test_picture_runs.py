"""Classes of pictures, whole: train, log, report, the same numbers from the folder, predictions, merging, going on to the same bits, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ingraft.cli.main import main
from ingraft.errors import IngraftError
from ingraft.train import loop
from ingraft.train.journal import entries
from ingraft.train.run import train

Make = Callable[..., dict[str, Any]]
BASES = ("vit", "convnext")
ADAPTER = "adapter_model.safetensors"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`vit/`, `convnext/` and `resnet/`, all at random, and class folders `photos/`: reddish, greenish and bluish noise."""
    import transformers as t
    from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    home = tmp_path_factory.mktemp("pictures")
    torch.manual_seed(0)
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    vit = t.ViTConfig(**size, image_size=16, patch_size=4)
    t.ViTForImageClassification(vit).save_pretrained(home / "vit")
    stages = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 4}
    t.ConvNextForImageClassification(t.ConvNextConfig(**stages, layer_scale_init_value=0.5)).save_pretrained(
        home / "convnext"
    )
    resnet = t.ResNetConfig(embedding_size=8, hidden_sizes=[16, 16], depths=[1, 1])
    t.ResNetForImageClassification(resnet).save_pretrained(home / "resnet")
    square = ViTImageProcessorPil(size={"height": 16, "width": 16})
    square.save_pretrained(home / "vit")
    square.save_pretrained(home / "resnet")
    ConvNextImageProcessorPil(size={"shortest_edge": 16}, crop_pct=1.0).save_pretrained(home / "convnext")
    rng = np.random.default_rng(0)
    for number in range(60):
        channel = number % 3
        pixels = rng.integers(0, 120, (*rng.integers(16, 24, 2), 3))
        pixels[..., channel] += 120
        file = home / "photos" / ("red", "green", "blue")[channel] / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(file)
    return home


@pytest.fixture
def of(recipe: Make, pictures: Path) -> Make:
    def make(base: str, **changes: Any) -> dict[str, Any]:
        values = {
            "model": str(pictures / base),
            "task": "image-classify",
            "data_train": str(pictures / "photos"),
            "method_config": {"lora_dropout": 0.1, "r": 4},
        }
        return recipe(**{**values, **changes})

    return make


@pytest.mark.parametrize("base", BASES)
def test_the_task_from_pictures_to_predictions(
    base: str, of: Make, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It learns what can be learned; the folder gives the run's numbers again; pictures without a class get one; merged, it is a plain model that says the same."""
    run = train(of(base, max_steps=60, eval_steps=0, save_steps=0), quiet=True)
    before, after = run.metrics["before"], run.metrics["after"]
    assert after["loss"] < 0.5 * before["loss"]
    assert after["accuracy"] >= 0.9 and after["macro_f1"] >= 0.9
    lines = entries(run.folder / "log.jsonl")
    assert lines[1]["images_per_second"] == lines[1]["learned_images_per_second"] > 0
    assert not any("token" in name for line in lines for name in line)
    report = (run.folder / "report.html").read_text()
    assert report.count('<img src="data:image/png;base64,') == len(run.samples) == 3
    assert {sample["expected"] for sample in run.samples} == {"red", "green", "blue"}
    assert "images a second" in report and "ingraft chat" not in report
    capsys.readouterr()
    assert main(["eval", "--adapter", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["eval"]
    assert {metric: found[metric] for metric in after} == after

    folder = str(run.folder)
    assert main(["eval", "--adapter", folder, "--data", str(pictures / "photos"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out)["train"]
    merged = ["--model", str(tmp_path / "merged"), "--task", "image-classify", "--dtype", "float32"]
    assert main(["merge", "--adapter", folder, "--output-dir", str(tmp_path / "merged")]) == 0
    assert "1 images, logits up to" in capsys.readouterr().out
    said: list[list[dict[str, Any]]] = []
    for number, way in enumerate((["--adapter", folder], merged)):
        target = str(tmp_path / f"out{number}.jsonl")
        words = ["--data", str(pictures / "photos"), "--output", target, "--per-device-eval-batch-size", "5"]
        assert main(["predict", *way, *words]) == 0
        said.append([json.loads(line) for line in Path(target).read_text().splitlines()])
    assert [one["prediction"] for one in said[0]] == [one["prediction"] for one in said[1]]
    assert sum(one["prediction"] == one["label"] for one in said[0]) == round(60 * whole["accuracy"])
    lone = pictures / "photos" / said[0][0]["image"]
    for place in (lone, lone.parent):  # a picture by itself, and a folder without classes
        assert (
            main(
                [
                    "predict",
                    "--adapter",
                    folder,
                    "--data",
                    str(place),
                    "--output",
                    str(tmp_path / "lone.jsonl"),
                    "--overwrite",
                ]
            )
            == 0
        )
        one = json.loads((tmp_path / "lone.jsonl").read_text().splitlines()[0])
        assert one["image"] == lone.name and "label" not in one
        assert one["scores"] == pytest.approx(said[0][0]["scores"], abs=1e-4)


class Killed(BaseException):
    pass


@pytest.mark.parametrize("base", BASES)
def test_a_killed_run_goes_on_to_the_same_bits(
    base: str, of: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"max_steps": 4, "save_steps": 2, "eval_steps": 0, "data_eval": 9}
    whole, plain = train(of(base, **short), quiet=True), loop.step

    def dying(session: Any, progress: Any, *rest: Any) -> Any:
        if progress.step == 3:
            raise Killed
        return plain(session, progress, *rest)

    monkeypatch.setattr(loop, "step", dying)
    again = of(base, output_dir=str(tmp_path / "killed"), **short)
    with pytest.raises(Killed):
        train(again, quiet=True)
    monkeypatch.setattr(loop, "step", plain)
    done = train(again, resume_from_checkpoint="last", quiet=True)
    assert (done.folder / ADAPTER).read_bytes() == (whole.folder / ADAPTER).read_bytes()
    assert done.metrics == whole.metrics


def test_a_checkpoint_knows_its_pictures_by_their_content(of: Make, pictures: Path, tmp_path: Path) -> None:
    """A run does not go on with another picture under a name that it learned from."""
    import shutil

    shutil.copytree(pictures / "photos", tmp_path / "photos")
    made = of("vit", data_train=str(tmp_path / "photos"), data_eval=0, max_steps=4, save_steps=2)
    train(made, quiet=True)
    (tmp_path / "run" / "ingraft.json").unlink()
    shutil.copy(tmp_path / "photos" / "red" / "03.png", tmp_path / "photos" / "red" / "00.png")
    with pytest.raises(IngraftError, match="it differs in training rows"):
        train(made, resume_from_checkpoint="last", quiet=True)


@pytest.mark.parametrize("base", BASES)
def test_eight_pictures_at_once_and_two_four_times_are_one_step(base: str, of: Make, tmp_path: Path) -> None:
    found = []
    for size in (8, 2):
        split = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size, "logging_steps": 1}
        plain = {"adam_epsilon": 1.0, "max_steps": 3, "eval_steps": 0, "save_steps": 0, "data_eval": 9}
        run = train(of(base, output_dir=str(tmp_path / str(size)), **split, **plain), quiet=True)
        found.append([line["loss"] for line in entries(run.folder / "log.jsonl") if "loss" in line])
    assert found[0] == pytest.approx(found[1], rel=1e-4)


def test_a_base_of_convolutions_is_adapted_in_them(of: Make) -> None:
    """A ResNet has no linear layer but its head: by default its convolutions are adapted; what was saved is what was trained."""
    run = train(of("resnet", max_steps=30, eval_steps=0, save_steps=0, learning_rate=3e-2), quiet=True)
    assert run.metrics["after"]["loss"] < 0.9 * run.metrics["before"]["loss"]
    assert "convolution" in (run.folder / "adapter_config.json").read_text()
    assert main(["eval", "--adapter", str(run.folder)]) == 0


def test_half_precision_computes_in_the_bases_dtype(of: Make) -> None:
    """Pixels are float32, and a convolution in bfloat16 takes none."""
    run = train(of("convnext", dtype="bfloat16", max_steps=2, eval_steps=0, save_steps=0), quiet=True)
    assert run.metrics["after"]["loss"] > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "llama"}, "transformers has no image classifier for a llama model"),
        ({"task": "classify"}, "task classify needs .*image-label rows.*--task image-classify"),
        ({"task": "sft"}, "vit: looks at images, and the task 'sft' reads text"),
        ({"cache_frozen": True, "num_train_epochs": 2}, "cache_frozen: is for tokens"),
        ({"data_packing": True}, "data.packing: is for tokens"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: is for tokens"),
        ({"data_train": "rows.jsonl"}, "task image-classify needs pictures with a class"),
    ],
)
def test_what_does_not_go_together_is_refused(
    changes: dict[str, Any], said: str, of: Make, home: Path, tmp_path: Path
) -> None:
    named = {key: str(home / value) for key, value in changes.items() if key in ("model", "data_train")}
    if changes.get("task") == "classify":
        named["model"] = str(home / "bert")
    with pytest.raises(IngraftError, match=said):
        train(of("vit", **{**changes, **named}), quiet=True)
    assert not (tmp_path / "run").exists()


def test_bad_pictures_end_the_command_with_2(
    of: Make, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before the base is loaded, every one of them named, and nothing written."""
    rows = [{"image": "gone.png", "label": "a"}, {"image": "text.png", "label": "b"}, {"image": "text.png"}]
    (tmp_path / "text.png").write_text("none")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--model", str(pictures / "vit"), "--task", "image-classify", "--data", str(tmp_path / "rows.jsonl")]
    assert main(["train", *words, "--output-dir", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    for words in (
        "rows.jsonl:1: there is no file",
        "rows.jsonl:2: ",
        "cannot be read as a picture",
        "rows.jsonl:3: field 'label' is missing",
    ):
        assert words in said
    assert not (tmp_path / "run").exists()


def test_a_base_without_its_processor_says_what_is_missing(of: Make, pictures: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(pictures / "vit", tmp_path / "bare", ignore=shutil.ignore_patterns("preprocessor*"))
    with pytest.raises(IngraftError, match=r"holds no preprocessor_config\.json"):
        train(of("vit", model=str(tmp_path / "bare")), quiet=True)
