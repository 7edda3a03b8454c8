"""A folder of images as arrays."""

import numpy as np
import pytest
from PIL import Image

from retrain.trainers.gates.images import MEAN, STD, image_folder


def save(path, colour, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_classes_are_folders_and_pixels_are_normalised(tmp_path):
    save(tmp_path / "b" / "1.png", (255, 0, 0))
    save(tmp_path / "a" / "2.PNG", (0, 0, 255), (9, 50))
    save(tmp_path / "a" / "1.png", (0, 255, 0))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "c").mkdir()
    x, y = image_folder(tmp_path, size=14)
    assert x.shape == (3, 3, 14, 14) and x.dtype == np.float32
    assert y.tolist() == [0, 0, 1] and y.dtype == np.int64
    for image, bright in zip(x, (1, 2, 0), strict=True):
        for channel in range(3):
            wanted = ((channel == bright) - MEAN[channel]) / STD[channel]
            np.testing.assert_allclose(image[channel], wanted, rtol=1e-5)


def test_the_middle_is_taken(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    x, _ = image_folder(tmp_path, size=14, mean=(0, 0, 0), std=(1, 1, 1))
    assert x.min() == 1


def test_what_is_no_image_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        image_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="has no images in folders, one a class"):
        image_folder(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"1\.png' is not a readable image"):
        image_folder(tmp_path)
    with pytest.raises(ValueError, match="size: 1 or more was wanted, not 0"):
        image_folder(tmp_path, size=0)
