"""Finding images in folders and reading them as a viewer would show them."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets.folder import make_dataset

from orca_rank.artifacts.damaged import DamagedFile, check_size, reading

ENDINGS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff", ".gif", ".jp2"})
# What is read, whatever a file is called: Pillow has readers that start other programs.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "TIFF", "GIF", "JPEG2000")
# What file managers leave; names that begin with a dot are passed over too.
LITTER = frozenset({"thumbs.db", "desktop.ini", "icon\r", "__macosx"})


class ImageFiles(NamedTuple):
    """Image files, their labels (None for a folder without classes), the classes' names, and notes on other files."""

    paths: list[Path]
    labels: np.ndarray | None
    classes: list[str]
    notes: list[str]


def scan(folder: Path) -> ImageFiles:
    """The images of a folder of class folders, or of a folder of images; hidden files and folders are passed over.

    Raises:
        FileNotFoundError: no such folder. ValueError: no images in it, or in one of its folders.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is missing: set source.train (data.train) to a folder that holds one folder per class"
        )
    places = [place for place in sorted(folder.iterdir()) if not hidden(Path(place.name))]
    classes = [place.name for place in places if place.is_dir()]
    others = [place for place in places if place.is_file() and place.suffix.lower() not in ENDINGS]
    if not classes:
        flat = [place for place in places if place.is_file() and place.suffix.lower() in ENDINGS]
        if not flat:
            raise ValueError(f"{folder} must hold at least two folders with images, found []")
        return ImageFiles(flat, None, [], _left_out(folder, others))

    def is_image(text: str) -> bool:
        path = Path(text)
        if hidden(path.relative_to(folder)):
            return False
        # A pipe or device would be waited for; a link that leads nowhere is an error when it is read.
        readable = path.suffix.lower() in ENDINGS and (path.is_file() or not path.exists())
        if not readable:
            others.append(path)
        return readable

    found = make_dataset(folder, {name: i for i, name in enumerate(classes)}, is_valid_file=is_image, allow_empty=True)
    labels = np.array([label for _, label in found], dtype=np.int64)
    if empty := [name for label, name in enumerate(classes) if label not in labels]:
        there = Counter(path.suffix or path.name for path in others if path.relative_to(folder).parts[0] in empty)
        raise ValueError(
            f"{folder} must hold at least two folders with images, and no others; without any are {empty[:5]}"
            f"{f', which hold {dict(there)}' if there else ''}: convert what is there to one of "
            f"{', '.join(sorted(ENDINGS))}, or remove the folder"
        )
    others += [place for place in places if place.is_file() and place.suffix.lower() in ENDINGS]
    return ImageFiles([Path(path) for path, _ in found], labels, classes, _left_out(folder, others))


def files_of(folder: Path) -> list[Path]:
    """All files of a folder, also behind links to folders, as `scan` finds them."""
    walk = os.walk(folder, followlinks=True)
    return sorted(path for place, _, names in walk for path in map(Path(place).joinpath, names) if path.is_file())


def read_image(path: Path, size: int) -> np.ndarray:
    """The middle square of an image at size × size, (size, size, 3) uint8.

    Raises:
        DamagedFile: for one that cannot be read, or is larger than the limits, also once its shorter side is `size`.
    """
    with (
        reading(path, "remove it, or replace it by an image", "the image "),
        Image.open(path, formats=FORMATS) as opened,
    ):
        image = as_rgb(opened, path)
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        check_size(path, "an image that is much longer than wide,", (height, width, 3), 1)
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        left, top = (width - size) // 2, (height - size) // 2
        return np.asarray(image.crop((left, top, left + size, top + size)))


def as_rgb(opened: Image.Image, path: Path) -> Image.Image:
    """What a viewer would show of an image, 8 bits a channel: turned as its EXIF data say, 16 bits scaled,
    transparency on white.

    Raises:
        DamagedFile: for numbers of 32 bits, whose range nothing tells.
    """
    image = ImageOps.exif_transpose(opened)
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and opened.format == "PNG")
    if sixteen:
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise DamagedFile(
            f"{path} holds numbers of 32 bits (mode {image.mode}), whose range an image does not tell: give them as an "
            f"array, data=arrays or source=arrays"
        )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def hidden(path: Path) -> bool:
    """Whether a relative path or a folder on its way begins with a dot, or a file manager left it."""
    return any(part.startswith(".") or part.lower() in LITTER for part in path.parts)


def _left_out(folder: Path, others: list[Path]) -> list[str]:
    if not others:
        return []
    kinds = Counter(path.suffix.lower() or path.name for path in others)
    counts = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
    return [f"{folder} holds files that are not read: {counts}, for example {others[0].relative_to(folder)}"]
