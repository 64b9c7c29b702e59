"""Pictures and their classes as examples. What the base looks at is made when a batch is: an example says where the pixels are and which processor reads them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ingraft.data.examples import Example, Tally
from ingraft.data.labelled import check_labels
from ingraft.data.pixels import Picture
from ingraft.data.records import Pictured
from ingraft.data.rows import Row

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ingraft.bases.images import ImageReader

SHADES = " .:-=+*#%@"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sight:
    """A picture as a base will see it; a `Lazy`."""

    picture: Picture
    reader: ImageReader

    @property
    def content(self) -> str:
        """What decides it, for a checkpoint's identity."""
        return self.picture.digest

    def arrays(self) -> Mapping[str, NDArray[Any]]:
        """`pixel_values` (C, H, W) float32.

        Raises:
            IngraftError: the picture is no longer what it was, or the processor refuses it.
        """
        return {"pixel_values": self.reader(self.picture.read())}


def encode_pictured(
    records: Sequence[Pictured], rows: Sequence[Row], reader: ImageReader, labels: Sequence[str], *, tally: Tally
) -> list[Example]:
    """One example a picture, with the number of its class.

    Raises:
        IngraftError: as `check_labels`; the base's processor refuses the first picture.
    """
    del tally  # nothing is cut, and nothing is dropped
    check_labels([(record.label,) for record in records], rows, labels)
    numbers = {name: number for number, name in enumerate(labels)}
    examples = [
        Example(input_ids=[], label=numbers[record.label], lazy=Sight(picture=record.image, reader=reader), row_id=n)
        for n, record in enumerate(records)
    ]
    if examples and examples[0].lazy is not None:
        examples[0].lazy.arrays()
    return examples


def about_pictures(records: Sequence[Pictured]) -> list[str]:
    """What a report says of the pictures of a part."""
    sizes = Counter(record.image.size for record in records)
    modes = Counter(record.image.mode for record in records)
    least, most = min(sizes, key=lambda size: size[0] * size[1]), max(sizes, key=lambda size: size[0] * size[1])
    range_ = "" if least == most else f"from {least[0]} x {least[1]} to "
    return [
        f"size in pixels: {range_}{most[0]} x {most[1]}",
        "colours: " + ", ".join(f"{mode} {count:,}" for mode, count in modes.most_common()),
    ]


def sketch(example: Example, widest: int = 48) -> str:
    """What the base sees of a picture, in characters.

    Args:
        widest: columns.
    """
    assert example.lazy is not None, "an example of a picture"
    pixels_CHW = example.lazy.arrays()["pixel_values"]
    grey_HW = pixels_CHW.mean(axis=0)
    step = max(1, -(-grey_HW.shape[1] // widest))
    grey_HW = grey_HW[:: 2 * step, ::step]  # a character is about twice as high as wide
    low, high = float(grey_HW.min()), float(grey_HW.max())
    places = ((grey_HW - low) / max(high - low, 1e-9) * (len(SHADES) - 1)).round().astype(int)
    lines = "\n".join("".join(SHADES[place] for place in row).rstrip() for row in places.tolist())
    return f"{' x '.join(map(str, pixels_CHW.shape))}, values from {pixels_CHW.min():.2f} to {pixels_CHW.max():.2f}\n{lines}\n"
