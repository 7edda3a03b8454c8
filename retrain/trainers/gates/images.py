"""A folder of images, one folder a class, as arrays: what section 6.3's ResNet50 trains on.

All of it is held in memory, 602 kB an image of 224 x 224: 6 GB for ten thousand.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

ENDINGS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".webp")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def image_folder(
    folder: str | Path,
    *,
    size: int = 224,
    mean: Sequence[float] = MEAN,
    std: Sequence[float] = STD,
) -> tuple[np.ndarray, np.ndarray]:
    """Read FOLDER/CLASS/IMAGE, for ``retrain.train(recipe, data=image_folder(...))``.

    Each image is scaled until its shorter side is 8/7 of `size`, and its middle taken.

    Parameters
    ----------
    folder : str or Path
        Its folders are the classes, numbered from 0 in the order of their names.
    size : int, optional
        Pixels a side.
    mean, std : three floats, optional
        Of red, green and blue in [0, 1]; taken off and divided by. ImageNet's by default.

    Returns
    -------
    x : ndarray of float32, shape (images, 3, size, size)
    y : ndarray of int64, shape (images,)

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If it holds no class or no image, or a file is not an image; the message names it.
    """
    root = Path(folder)
    if not root.is_dir():
        raise FileNotFoundError(f"folder: there is no folder {str(root)!r}")
    if size < 1:
        raise ValueError(f"size: 1 or more was wanted, not {size}")
    classes = sorted(path for path in root.iterdir() if path.is_dir())
    files = [
        (path, number)
        for number, kind in enumerate(classes)
        for path in sorted(kind.rglob("*"))
        if path.suffix.lower() in ENDINGS
    ]
    if not files:
        raise ValueError(f"folder: {str(root)!r} has no images in folders, one a class")
    x = np.empty((len(files), 3, size, size), np.float32)
    shift, scale = (np.array(v, np.float32)[:, None, None] for v in (mean, std))
    for row, (path, _) in zip(x, files, strict=True):
        row[:] = (_read(path, size).transpose(2, 0, 1) / np.float32(255) - shift) / scale
    return x, np.array([number for _, number in files], np.int64)


def _read(path: Path, size: int) -> np.ndarray:
    """Return the middle of an image, shape (size, size, 3), 0 to 255."""
    try:
        with Image.open(path) as file:
            image = file.convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(f"folder: {str(path)!r} is not a readable image ({error})") from error
    ratio = size * 8 / 7 / min(image.size)
    width, height = (max(size, round(side * ratio)) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    scaled = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(scaled.crop((left, top, left + size, top + size)), np.float32)
