"""What a base that looks at images does to a picture: its own image processor, as its folder declares it.

The base learned from pictures of one size, cut and scaled in one way, and sees nothing in others; so nothing here is chosen. Transformers has each processor
twice, on Pillow and on torchvision, which round otherwise. Pillow's is always taken: an adapter then sees the same pixels on every machine, and
torchvision need not be there.

What is asked of a tokenizer by those who do not look inside it (a name, the room of a row, saving) is answered here too, so that they need not know which of the two they hold.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ingraft.bases.places import ENDLESS
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from PIL.Image import Image

PROCESSOR = "preprocessor_config.json"
"""Where a folder of transformers keeps what its image processor does."""
MODES = {1: "L", 3: "RGB"}
"""Channels of a base, and Pillow's name for such pictures."""


class ImageReader:
    """A base's image processor.

    Attributes:
        processor: transformers'. channels: that the base looks at, 1 or 3.
        name_or_path: what the user called the base.
        model_max_length, pad_token_id, eos_token_id: a tokenizer's; pictures have no tokens.
    """

    pad_token_id: int | None = None
    eos_token_id: int | None = None

    def __init__(self, processor: Any, channels: int, name: str) -> None:
        self.processor, self.channels, self.name_or_path = processor, channels, name
        self.model_max_length = ENDLESS

    def __call__(self, picture: Image) -> NDArray[np.float32]:
        """What the base is given of a picture: (C, H, W).

        Args:
            picture: of any mode that Pillow converts; an orientation that its file declares was applied.

        Raises:
            IngraftError: the processor refuses it, or does not fit the base.
        """
        image = picture.convert(MODES[self.channels])
        pixels_HWC = np.asarray(image).reshape(image.height, image.width, self.channels)
        try:
            found = self.processor(pixels_HWC, input_data_format="channels_last", return_tensors="np")
        except (ValueError, TypeError, IndexError) as error:
            raise IngraftError(
                f"{self.name_or_path}: its image processor refuses a picture of {image.size}: {error}"
            ) from error
        pixels_CHW = found["pixel_values"][0]
        if pixels_CHW.ndim != 3 or pixels_CHW.shape[0] != self.channels:
            raise IngraftError(
                f"{self.name_or_path}: its image processor makes {pixels_CHW.shape} of a picture, and the base looks at {self.channels} channels."
            )
        return pixels_CHW.astype(np.float32, copy=False)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the processor's settings, as transformers keeps them."""
        self.processor.save_pretrained(str(folder))


def load_images(name: str, source: str, options: dict[str, Any]) -> ImageReader:
    """The image processor of a base.

    Args:
        name: what the user called it. source, options: as `naming.find` gives them.

    Raises:
        IngraftError: Pillow is not installed, or the folder has no processor, or the base looks at something else than grey or coloured pictures.
    """
    require_pillow()
    from transformers import AutoConfig, AutoImageProcessor

    config = AutoConfig.from_pretrained(source, **options)
    if Path(source).is_dir() and not any(
        (Path(source) / file).is_file() for file in (PROCESSOR, "processor_config.json")
    ):
        raise IngraftError(
            f"{name}: holds no {PROCESSOR}, which says how a picture is cut and scaled for it. Put the one there that the base was trained "
            "with, or use a base that looks at images."
        )
    channels = getattr(config, "num_channels", 3)
    if channels not in MODES:
        raise IngraftError(f"{name}: looks at {channels} channels; pictures have 1 (grey) or 3 (coloured).")
    processor = AutoImageProcessor.from_pretrained(source, backend="pil", **options)
    return ImageReader(processor, channels, name)


def require_pillow() -> None:
    """Refuse work on images without Pillow.

    Raises:
        IngraftError: naming what is to be installed.
    """
    if find_spec("PIL") is None:
        raise IngraftError("Reading images needs Pillow: pip install pillow (or the extra: ingraft[vision]).")
