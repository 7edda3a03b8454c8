"""A folder of images as training data, read as they are wanted: DIR/CLASS/IMAGE.

For data that does not fit in memory. Each image is scaled until its shorter side is 8/7 of the size
wanted (256 for 224), and its middle taken; classes are the folders, sorted, and numbered from 0.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from retrain.data.arrays import parse_normalise
from retrain.files import READ_ERRORS, first_line
from retrain.trainers.loop.batches import Rows
from solvers import checks

KINDS = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")
_AHEAD = 2  # batches read while one is trained on


class ImageFolder(Rows):
    """Images of a folder, (3, size, size) each, in float32, read when they are indexed.

    Parameters
    ----------
    folder : Path
        Has a folder for each class.
    size : int
        Pixels each way.
    normalise : str, optional
        As of `retrain.data.sources.load_data`; of images scaled to [0, 1].
    limit : int, optional
        Take so many images only, spread evenly over the classes' sorted files.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    ValueError
        If there is no image in it, or an argument is out of range.
    """

    def __init__(
        self, folder: Path, size: int, *, normalise: str | None = None, limit: int | None = None
    ) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"data: there is no folder {str(folder)!r}")
        checks.count(1, size=size)
        self.folder, self.size = folder, size
        self.classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir())
        found = [
            (path, number)
            for number, name in enumerate(self.classes)
            for path in sorted((folder / name).rglob("*"))
            if path.suffix.lower() in KINDS
        ]
        if not found:
            raise ValueError(
                f"data: {str(folder)!r} has no images, want DIR/CLASS/IMAGE with one of "
                f"{', '.join(KINDS)}"
            )
        if limit is not None and limit < len(found):
            found = [found[number * len(found) // limit] for number in range(limit)]
        self.paths = [path for path, _ in found]
        self.labels = torch.tensor([number for _, number in found])
        mean, std = parse_normalise(normalise) if normalise else (0.0, 1.0)
        self.mean, self.std = (torch.tensor(value).reshape(-1, 1, 1) for value in (mean, std))
        if self.mean.numel() not in (1, 3) or not bool((self.std > 0).all()):
            raise ValueError(
                f"normalise: got {normalise}, want one mean and one positive STD, or three of each"
            )
        self.shape = (len(found), 3, size, size)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the files' names and bytes, and of how they are read.

        Reads every file once, which costs less than the first epoch does: it decodes them too.
        """
        digest = hashlib.sha256(f"{self.size};{self.mean.tolist()};{self.std.tolist()}".encode())
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            for path, content in zip(self.paths, pool.map(_content, self.paths), strict=True):
                digest.update(f"{path.relative_to(self.folder).as_posix()};{content};".encode())
        return digest.hexdigest()

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        numbers = range(len(self))[rows] if isinstance(rows, slice) else rows.tolist()
        return next(self.each([numbers]))

    def each(self, wanted: Iterable[Sequence[int] | Tensor]) -> Iterator[Tensor]:
        """Yield the images of each of several lists of rows, the next ones read meanwhile."""
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            ahead: deque[Iterator[Tensor]] = deque()
            for rows in wanted:
                ahead.append(pool.map(self._read, [int(row) for row in rows]))
                if len(ahead) > _AHEAD:
                    yield torch.stack(list(ahead.popleft()))
            while ahead:
                yield torch.stack(list(ahead.popleft()))

    def _read(self, row: int) -> Tensor:
        path = self.paths[row]
        try:
            with Image.open(path) as file:
                image = file.convert("RGB")
                if min(image.size) < 1:
                    raise ValueError("it has no pixels")
        except (*READ_ERRORS, Image.DecompressionBombError) as error:
            raise ValueError(
                f"data: {str(path)!r} is not a readable image ({first_line(error)})"
            ) from error
        scale = 8 / 7 * self.size / min(image.size)
        width, height = (max(round(scale * side), self.size) for side in image.size)
        left, top = (width - self.size) // 2, (height - self.size) // 2
        image = image.resize((width, height), Image.Resampling.BILINEAR)
        image = image.crop((left, top, left + self.size, top + self.size))
        pixels = torch.from_numpy(np.array(image, dtype=np.float32) / 255).permute(2, 0, 1)
        return (pixels - self.mean) / self.std


def _content(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
