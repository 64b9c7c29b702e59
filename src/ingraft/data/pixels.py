"""Where the pixels of a row are, and reading them.

A row names its picture in text, whatever it came from: a file (`cat/1.png`, seen from the folder of the rows' own file) or one of many in a file of arrays
(`train.npz[17]`). So rows stay small and can be written out again, and pixels are decoded when a batch is made, not kept: a thousand photographs are gigabytes.

Each picture is decoded once while rows are read, because a broken one should be told of with all the others and not in the third hour. What is kept of it is a digest of
its content. That makes equal pictures under two names one thing for a split, says in a checkpoint which rows it learned from, and shows a file
that was changed during the run.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from ingraft.data.arrays import images_in
from ingraft.data.rows import RowProblem
from ingraft.errors import IngraftError

if TYPE_CHECKING:
    from PIL.Image import Image

_ONE_OF_MANY = re.compile(r"(.+)\[(\d+)\]")
EIGHT_BITS = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV"})
"""Modes of Pillow whose pixels have eight bits a channel, or fewer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Picture:
    """A picture that was found.

    Attributes:
        name: as the row has it.
        path, index: the file, and which one of several in it.
        digest: of its content; alone decides whether two pictures are the same.
        size: width and height. mode: Pillow's, of the pixels as they are stored.
    """

    name: str = field(repr=False, compare=False)
    path: Path = field(default=Path(), repr=False, compare=False)
    index: int | None = field(default=None, repr=False, compare=False)
    digest: str = ""
    size: tuple[int, int] = (0, 0)
    mode: str = ""

    def read(self) -> Image:
        """The pixels.

        Raises:
            IngraftError: the file is gone, or is not what it was.
        """
        try:
            image, digest = _look(self.path, self.index)
        except RowProblem as problem:
            raise IngraftError(f"{problem}; it could be read when its row was.") from problem
        if digest != self.digest:
            raise IngraftError(
                f"{self.path}: was changed since its row was read. Leave data alone while a run reads it."
            )
        return image

    def thumbnail(self, most: int = 96) -> str:
        """A small PNG of it, as a `data:` address.

        Args:
            most: width and height, in pixels.
        """
        image, kept = self.read().convert("RGB"), io.BytesIO()
        image.thumbnail((most, most))
        image.save(kept, format="PNG")
        return "data:image/png;base64," + base64.b64encode(kept.getvalue()).decode()


def found(name: str, beside: Path) -> Picture:
    """The picture that a row names, looked at.

    Args:
        beside: the folder that names are seen from.

    Raises:
        RowProblem: nothing is there, or no picture, or one whose pixels have no eight bits.
    """
    if "://" in name:
        raise RowProblem(f"{name!r} is an address; pictures are read from files of this machine")
    match = _ONE_OF_MANY.fullmatch(name)
    file, index = (match[1], int(match[2])) if match and not (beside / name).is_file() else (name, None)
    path = beside / Path(file).expanduser()
    if not path.is_file():
        raise RowProblem(f"there is no file {path}")
    image, digest = _look(path, index)
    if image.mode not in EIGHT_BITS:
        raise RowProblem(
            f"{path} has pixels of mode {image.mode} (16 bits, or no whole numbers), whose range nobody but you knows; save it with 8 bits a channel"
        )
    return Picture(name=name, path=path, index=index, digest=digest, size=image.size, mode=image.mode)


def _look(path: Path, index: int | None) -> tuple[Image, str]:
    """The decoded pixels and the digest of what they were decoded from.

    Raises:
        RowProblem: they cannot be.
    """
    from ingraft.bases.images import require_pillow

    require_pillow()
    from PIL import Image, ImageOps

    if index is not None:
        try:
            pixels = images_in(path)
        except (IngraftError, OSError, ValueError) as error:
            raise RowProblem(f"{path} cannot be read as a file of pictures: {error}") from error
        if index >= len(pixels):
            raise RowProblem(f"{path} holds {len(pixels)} pictures, and {index} is asked for (they count from 0)")
        one = pixels[index]
        digest = blake2b(repr(one.shape).encode() + one.tobytes(), digest_size=16).hexdigest()
        return Image.fromarray(one), digest
    with warnings.catch_warnings():  # of odd metadata; the pixels are what counts
        warnings.simplefilter("ignore")
        try:
            data = path.read_bytes()
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                if "transparency" in image.info and image.mode == "P":
                    image = image.convert("RGBA")
                whole = ImageOps.exif_transpose(image)
        except Exception as error:  # a foreign library over foreign files
            raise RowProblem(f"{path} cannot be read as a picture: {str(error) or type(error).__name__}") from error
    return whole, blake2b(data, digest_size=16).hexdigest()
