"""A small ViT is trained from nothing on most classes of an .npz of pictures and then adapted to the classes it never saw, by a LoRA, in full, and by a linear probe.

    python examples/vision/pretrain.py --data train.npz --test dev.npz --hold-out 4 9

Writes to --output: `base/` (a model folder as any other: `ingraft train --model base --task image-classify ...`), the pictures of the classes held out, and a run
folder for each adaptation. The rate of each is the best of three on rows set aside from its training; the figure is of the test file, which nothing else saw.
"""

from __future__ import annotations

import argparse
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ingraft
from ingraft.bases import load_base
from ingraft.data import collate
from ingraft.data.dataset import load
from ingraft.evaluate.measures import of_classes
from ingraft.train.run import train

RATES = {"lora": (1e-3, 3e-3, 1e-2), "full": (3e-4, 1e-3, 3e-3)}
TASK = "image-classify"


def main() -> None:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--data", required=True, help="an .npz with images (N, H, W) or (N, H, W, 3) and labels")
    ask.add_argument("--test", required=True, help="another, of the same classes")
    ask.add_argument("--hold-out", nargs="+", default=["4", "9"], help="the classes that pretraining does not see")
    ask.add_argument("--epochs", type=int, default=8, help="of pretraining")
    ask.add_argument("--pictures", type=int, nargs="+", default=[50, 500], help="how many the base is adapted by")
    ask.add_argument("--output", default="runs/vision")
    asked = ask.parse_args()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    home = Path(asked.output)
    parts = {name: arrays(file, set(asked.hold_out)) for name, file in (("train", asked.data), ("test", asked.test))}
    files = {name: write(home / f"{name}.npz", *part) for name, (part, _) in parts.items()}
    began = time.process_time()
    base = pretrain(home, files["train"], files["test"], parts["train"][0][0].shape[1:], asked.epochs)
    print(f"pretraining: {time.process_time() - began:.0f} s of one processor\n")
    test = write(home / "unseen-test.npz", *parts["test"][1])
    print("| pictures | method | rate | trained parameters | accuracy on test |\n|---|---|---|---|---|")
    for count in asked.pictures:
        images, labels = parts["train"][1]
        some = write(home / f"unseen-{count}.npz", images[:count], labels[:count])
        print(f"| {count} | linear probe | | | {probe(base, some, test):.3f} |")
        for method, rates in RATES.items():
            runs = [adapt(base, some, test, method, rate, home / f"{method}-{count}-{rate:g}") for rate in rates]
            rate, best = max(zip(rates, runs, strict=True), key=lambda one: one[1].metrics["after"]["accuracy"])
            trained = sum(p.numel() for p in ingraft.parameters(best.model, "default").values())
            print(f"| {count} | {method} | {rate:g} | {trained:,} | {best.metrics['after']['test_accuracy']:.3f} |")


def arrays(file: str, held_out: set[str]) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Images and labels of the classes that are learned first, and of those held out."""
    with np.load(file, allow_pickle=False) as archive:
        images, labels = archive["images"], archive["labels"]
        names = archive["names"][labels] if "names" in archive.files else labels.astype(str)
    out = np.isin(names, sorted(held_out))
    return (images[~out], names[~out]), (images[out], names[out])


def write(path: Path, images: Any, labels: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, images=images, labels=labels)
    return str(path)


def recipe(model: Path, data: str, test: str, output: Path, **more: Any) -> dict[str, Any]:
    quiet = {"eval_steps": 0, "save_steps": 0, "dtype": "float32"}
    return (
        {
            "model": str(model),
            "task": TASK,
            "data": {"train": data, "eval": 0.2, "test": test},
            "output_dir": str(output),
        }
        | quiet
        | more
    )


def pretrain(home: Path, data: str, test: str, shape: Any, epochs: int) -> Path:
    """The base: random at first, then trained in full."""
    from transformers import ViTConfig, ViTForImageClassification
    from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

    torch.manual_seed(0)
    channels, side = (shape[2] if len(shape) > 2 else 1), shape[0]
    size: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    config = ViTConfig(**size, image_size=side, patch_size=side // 4, num_channels=channels)
    ViTForImageClassification(config).save_pretrained(home / "random")
    half = [0.5] * channels
    processor = ViTImageProcessorPil(size={"height": side, "width": side}, image_mean=half, image_std=half)
    processor.save_pretrained(home / "random")
    long = {"num_train_epochs": epochs, "per_device_train_batch_size": 64, "learning_rate": 2e-3, "weight_decay": 0.05}
    wanted = recipe(home / "random", data, test, home / "pretraining", method="full", warmup_ratio=0.1, **long)
    run = train(wanted, overwrite_output_dir=True, quiet=True)
    print("pretraining:", {name: round(value, 4) for name, value in run.metrics["after"].items()})
    ingraft.merge(run.model)
    ingraft.detach(run.model, keep_merged=True)
    run.model.save_pretrained(home / "base")
    processor.save_pretrained(home / "base")
    return home / "base"


def adapt(base: Path, data: str, test: str, method: str, rate: float, output: Path) -> Any:
    steps = {"max_steps": 120, "per_device_train_batch_size": 16, "learning_rate": rate, "method": method}
    return train(recipe(base, data, test, output, **steps), overwrite_output_dir=True, quiet=True)


def probe(base: Path, data: str, test: str) -> float:
    """Accuracy of a logistic regression on what the base says of a whole picture, nothing of it changed."""
    from sklearn.linear_model import LogisticRegression

    loaded = load_base(str(base), "float32")
    rows = load(data, loaded.tokenizer, task=TASK, test=test)

    def seen(examples: Any) -> tuple[Any, Any]:
        batch = collate(examples, 0)
        with torch.no_grad():
            states_BTD = loaded.model.base_model(batch["pixel_values"]).last_hidden_state
        return states_BTD[:, 0].numpy(), batch["labels"].numpy()

    fitted = LogisticRegression(max_iter=2000).fit(*seen(rows.train))
    x_BD, labels = seen(rows.test)
    return of_classes(labels.tolist(), fitted.predict(x_BD).tolist())["accuracy"]


if __name__ == "__main__":
    main()
