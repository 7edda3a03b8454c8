"""A folder of images as training data, and random changes of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from training_cases import assert_resumes, tables

import retrain
from retrain.trainers.loop.augment import flip_crop
from retrain.trainers.loop.images import ImageFolder
from retrain.trainers.recipes.recipe import read_recipe


@pytest.fixture
def folder(tmp_path):
    """Two classes of images of several sizes, told by their brightness."""
    rng = np.random.default_rng(0)
    for which in ("train", "test"):
        for number, name in enumerate(("bright", "dark")):
            here = tmp_path / which / name
            here.mkdir(parents=True)
            for image in range(9):
                height, width = rng.integers(8, 20, 2)
                pixels = rng.integers(0, 120, (height, width, 3)) + 120 * (1 - number)
                kind = "png" if image % 2 else "jpg"
                Image.fromarray(pixels.astype(np.uint8)).save(here / f"{image}.{kind}")
    (tmp_path / "train" / "dark" / "notes.txt").write_text("no image")
    return tmp_path


def network():
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def recipe():
    changed = tables(data={"train": "images:train", "test": "images:test", "size": 7,
                           "normalise": "0.5,0.25", "augment": "flip-crop"},
                     training={"epochs": 4, "batch_size": 4})  # fmt: skip
    return {**changed, "model": {"factory": "test_images:network"}}


def test_a_folder_is_read_as_it_is_there(folder):
    images = ImageFolder(folder / "train", 7)
    assert images.classes == ["bright", "dark"]
    assert images.shape == (18, 3, 7, 7)
    assert images.labels.tolist() == [0] * 9 + [1] * 9
    rows = torch.tensor([16, 0, 5])
    assert torch.equal(images[rows][1], images[0:1][0])
    exact = Image.new("RGB", (8, 8), (255, 0, 51))
    exact.save(folder / "train" / "bright" / "0.jpg", format="png")
    assert torch.equal(
        ImageFolder(folder / "train", 7)[:1][0],
        torch.tensor([1.0, 0.0, 0.2]).reshape(3, 1, 1).expand(3, 7, 7),
    )
    assert images[:].min() >= 0
    assert images[:].max() <= 1
    shifted = ImageFolder(folder / "train", 7, normalise="0.5,0.25,0,1,2,4")[:]
    mean, std = torch.tensor([[0.5, 0.25, 0.0], [1.0, 2.0, 4.0]]).reshape(2, 3, 1, 1)
    torch.testing.assert_close(shifted, (images[:] - mean) / std)


def save(path, colour, size=(40, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def test_classes_are_folders_and_pixels_are_normalised(tmp_path):
    save(tmp_path / "b" / "1.png", (255, 0, 0))
    save(tmp_path / "a" / "2.PNG", (0, 0, 255), (9, 50))
    save(tmp_path / "a" / "1.png", (0, 255, 0))
    (tmp_path / "a" / "notes.txt").write_text("not an image")
    (tmp_path / "c").mkdir()
    normalise = read_recipe("gates-imagenet-resnet50").data.normalise
    images = ImageFolder(tmp_path, 14, normalise=normalise)
    x, y = images[:].numpy(), images.labels
    assert x.shape == (3, 3, 14, 14) and x.dtype == np.float32
    assert y.tolist() == [0, 0, 1] and y.dtype == torch.int64
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    for image, bright in zip(x, (1, 2, 0), strict=True):
        for channel in range(3):
            wanted = ((channel == bright) - mean[channel]) / std[channel]
            np.testing.assert_allclose(image[channel], wanted, rtol=1e-5)


def test_the_middle_is_taken(tmp_path):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 8:24] = 255
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "1.png")
    assert ImageFolder(tmp_path, 14)[:].min() == 1


def test_what_is_no_image_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        ImageFolder(tmp_path / "none", 14)
    with pytest.raises(ValueError, match="data:"):
        ImageFolder(tmp_path, 14)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "1.png").write_bytes(b"not a png")
    with pytest.raises(ValueError, match=r"1\.png' is not a readable image"):
        ImageFolder(tmp_path, 14)[:]


def test_the_middle_is_taken_without_stretching(tmp_path):
    (tmp_path / "a").mkdir()
    wide = np.zeros((8, 40, 3), np.uint8)
    wide[:, 15:25] = 255
    Image.fromarray(wide).save(tmp_path / "a" / "wide.png")
    assert ImageFolder(tmp_path, 7)[:].min() == 1


def test_batches_read_ahead_are_those_asked_for(folder):
    images = ImageFolder(folder / "train", 7)
    wanted = [torch.tensor([3, 1]), torch.tensor([2]), torch.tensor([9, 9, 0]), torch.tensor([4])]
    for rows, found in zip(wanted, images.each(wanted), strict=True):
        assert torch.equal(found, torch.stack([images[row : row + 1][0] for row in rows]))


def test_a_limit_takes_of_every_class(folder):
    assert ImageFolder(folder / "train", 7, limit=4).labels.tolist() == [0, 0, 1, 1]
    assert len(ImageFolder(folder / "train", 7, limit=100)) == 18


def test_it_trains_and_resumes(folder, monkeypatch):
    monkeypatch.chdir(folder)
    run = assert_resumes(recipe(), folder, after=(1, 2))
    assert run.record["train"]["samples"] == 18
    with pytest.raises(ValueError, match=r"belongs to another run \(data.test was"):
        retrain.train(recipe(), out=folder / "parts", changes={"data.test_limit": 4})


def test_what_cannot_be_read_is_named(folder):
    with pytest.raises(FileNotFoundError, match="no folder"):
        ImageFolder(folder / "absent", 7)
    with pytest.raises(ValueError, match="data:"):
        ImageFolder(folder / "train" / "dark", 7)
    with pytest.raises(ValueError, match="size: got 0, want a whole number >= 1"):
        ImageFolder(folder / "train", 0)
    with pytest.raises(
        ValueError, match="normalise: got 0,0,1,1, want one mean and one positive STD, or three of"
    ):
        ImageFolder(folder / "train", 7, normalise="0,0,1,1")
    path = folder / "train" / "dark" / "0.jpg"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"dark/0.jpg' is not a readable image"):
        ImageFolder(folder / "train", 7)[:]


def test_flip_crop_shifts_and_mirrors():
    images = torch.arange(3 * 2 * 5 * 6, dtype=torch.float32).reshape(3, 2, 5, 6) + 1
    kind = flip_crop()
    drawn = torch.tensor([[4, 4, 0], [4, 4, 1], [6, 1, 0]])
    same, mirrored, shifted = kind.apply(images, drawn)
    assert torch.equal(same, images[0])
    assert torch.equal(mirrored, images[1].flip(-1))
    wanted = torch.zeros(2, 5, 6)
    wanted[:, :3, 3:] = images[2][:, 2:, :3]
    assert torch.equal(shifted, wanted)


def test_flip_crop_draws_all_there_is():
    rows = flip_crop().draw(4000, torch.Generator().manual_seed(0))
    for column, count in enumerate((9, 9, 2)):
        seen, counts = rows[:, column].unique(return_counts=True)
        assert seen.tolist() == list(range(count))
        assert counts.min() > 0.7 * 4000 / count


def test_an_image_of_the_same_name_and_length_makes_another_run(folder):
    before = ImageFolder(folder / "train", 7).fingerprint
    assert ImageFolder(folder / "train", 7).fingerprint == before
    file = folder / "train" / "dark" / "3.png"
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    file.write_bytes(content)
    assert ImageFolder(folder / "train", 7).fingerprint != before
