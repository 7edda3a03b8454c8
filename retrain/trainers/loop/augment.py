"""Random changes of training images, drawn apart from their application.

What is drawn depends on the generator alone, so that every process of a parallel run draws for the
whole batch and applies its own rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from retrain.trainers.loop.batches import Augmentation

SHIFT = 4


def flip_crop() -> Augmentation:
    """Shift images by up to 4 pixels each way, zeros moving in, and mirror half of them."""
    return Augmentation(_draw, _apply)


def _draw(count: int, generator: torch.Generator) -> Tensor:
    """Rows of (down, across, mirrored): 0 to 8, 0 to 8, 0 or 1."""
    shifts = torch.randint(2 * SHIFT + 1, (count, 2), generator=generator)
    return torch.cat([shifts, torch.randint(2, (count, 1), generator=generator)], 1)


def _apply(images: Tensor, drawn: Tensor) -> Tensor:
    """Crop each padded image where its row says; images are (B, C, height, width).

    Raises
    ------
    ValueError
        If they are not.
    """
    if images.ndim != 4:
        raise ValueError(
            f"augment: flip-crop wants images, (samples, channels, height, width); the samples "
            f"have shape {tuple(images.shape[1:])}"
        )
    height, width = images.shape[2:]
    padded = functional.pad(images, [SHIFT] * 4)
    down, across, mirrored = drawn.to(images.device).unbind(1)
    columns = torch.arange(width, device=images.device).expand(len(images), width)
    columns = torch.where(mirrored[:, None] == 1, width - 1 - columns, columns) + across[:, None]
    rows = torch.arange(height, device=images.device) + down[:, None]
    samples = torch.arange(len(images), device=images.device)[:, None, None]
    # Indices of samples, rows and columns stand around the channels: torch puts channels last.
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
