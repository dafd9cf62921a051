"""Data modules: splits, decoding of every image mode, damaged files, missing classes, loaders."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from lightning_lcnn.data import Digits, ImageFolder, TorchvisionData, load_split, shift_and_mirror
from lightning_lcnn.data.image_files import decode


def make_folder(place: Path, count: int = 6, splits: tuple[str, ...] = ("train", "test")) -> Path:
    """Images of one grey level each: 10·i in the first class, 10·i + 100 in the second."""
    for split in splits:
        for j, name in enumerate(("cats", "dogs")):
            (place / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (9, 7), (10 * i + 100 * j,) * 3).save(place / split / name / f"{i}.png")
    return place


def folder(place: Path, **options) -> ImageFolder:
    return ImageFolder(str(place), 4, cache=str(place / "cache"), **options)


def test_every_image_is_in_one_split(tmp_path):
    data = folder(make_folder(tmp_path), validation=0.25, batch_size=4)
    data.prepare_data()
    data.setup()
    train, validation = data.train_set.tensors, data.validation_set.tensors
    assert (len(train[0]), len(validation[0]), len(data.test_set)) == (9, 3, 12)
    levels = torch.cat([train[0], validation[0]])[:, 0, 0, 0]
    labels = torch.cat([train[1], validation[1]])
    assert sorted(levels.tolist()) == [*range(0, 60, 10), *range(100, 160, 10)]
    assert torch.equal(labels, (levels >= 100).long())
    assert (data.num_classes, data.image_shape, data.classes) == (2, (3, 4, 4), ["cats", "dogs"])
    sizes = [len(batch[1]) for batch in data.train_dataloader()]
    assert sizes == [4, 4]  # the last, smaller one is left out


def test_a_fifth_is_held_out_where_there_is_no_test_folder(tmp_path):
    data = folder(make_folder(tmp_path, 10, ("train",)), validation=0, limit_train=5, batch_size=8)
    data.setup("fit")
    assert (len(data.train_set), len(data.test_set)) == (5, 4)
    assert data.val_dataloader() == []
    assert [len(batch[1]) for batch in data.train_dataloader()] == [5]  # the only batch stays
    again = folder(tmp_path)
    again.setup("test")
    assert torch.equal(again.test_set.tensors[0], data.test_set.tensors[0])


def test_test_alone_does_not_read_the_training_images(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train/cats/0.png").write_bytes(b"damaged")
    data = folder(tmp_path)
    data.setup("test")
    assert len(data.test_set) == 12
    with pytest.raises(ValueError, match=r"0\.png cannot be decoded as an image"):
        data.setup("fit")


def test_all_modes_become_rgb(tmp_path):
    """A grey of 130 in every mode that a file can have; 8-bit palettes, CMYK and JPEG round by a few levels."""
    place = tmp_path / "train" / "grey"
    place.mkdir(parents=True)
    rgb = Image.new("RGB", (8, 8), (130, 130, 130))
    rgb.save(place / "a.png")
    rgb.convert("L").save(place / "b.png")
    rgb.convert("P").save(place / "c.png")
    rgb.convert("RGBA").save(place / "d.png")
    rgb.convert("LA").save(place / "e.png")
    rgb.convert("CMYK").save(place / "f.jpg")
    Image.new("I;16", (8, 8), 130 * 256 + 77).save(place / "g.png")
    palette = rgb.convert("P")
    palette.info["transparency"] = bytes([255] * 256)
    palette.save(place / "h.png", transparency=bytes([255] * 256))
    images, _ = load_split(tmp_path / "train", ["grey"], 8, tmp_path / "cache")
    assert images.shape == (8, 3, 8, 8)
    assert (images.float() - 130).abs().max() <= 51  # the steps of the palette, dithered
    assert (images[[0, 1, 3, 4, 6]].float() - 130).abs().max() <= 1


def test_truncated_image_leaves_no_cache(tmp_path):
    make_folder(tmp_path)
    broken = tmp_path / "train/dogs/3.png"
    Image.effect_noise((64, 64), 50).save(broken)
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"3\.png cannot be decoded as an image: .*Remove or replace it"):
        folder(tmp_path).prepare_data()
    assert not list(tmp_path.glob("cache/*"))


def test_the_cache_is_used_and_renewed(tmp_path):
    make_folder(tmp_path)
    first = folder(tmp_path).load(train=True)
    (cached,) = (tmp_path / "cache").iterdir()
    torch.save((first[0] + 1, first[1]), cached)
    assert torch.equal(folder(tmp_path).load(train=True)[0], first[0] + 1)
    Image.new("RGB", (9, 7)).save(tmp_path / "train/cats/new.png")
    assert len(folder(tmp_path).load(train=True)[1]) == 13


@pytest.mark.parametrize("content", ["cut", "empty", "other", "fewer", "type"])
def test_a_damaged_cache_is_decoded_again(tmp_path, content):
    data = folder(make_folder(tmp_path, splits=("train",)))
    data.prepare_data()
    (cache,) = (tmp_path / "cache").iterdir()
    images, labels = data.load(train=True)
    if content in ("cut", "empty"):
        cache.write_bytes(cache.read_bytes()[: 2000 if content == "cut" else 0])
    else:
        other = {"other": {"images": images}, "fewer": (images[1:], labels[1:]), "type": (images.float(), labels)}
        torch.save(other[content], cache)
    with pytest.warns(UserWarning, match=rf"the cache {cache} is damaged; the images are decoded again"):
        again = data.load(train=True)
    assert torch.equal(again[0], images)
    assert torch.equal(again[1], labels)
    assert torch.equal(data.load(train=True)[0], images)  # from the new cache: no warning


@pytest.mark.parametrize("factor", [1.5, 3])  # pillow warns of the first and raises at the second
def test_images_that_would_fill_the_memory(tmp_path, monkeypatch, factor):
    make_folder(tmp_path, splits=("train",))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", int(9 * 7 / factor))
    with pytest.raises(ValueError, match=r"train/cats/0\.png is too large for an image, .* Scale it down first"):
        folder(tmp_path).prepare_data()


def test_files_are_images_whatever_their_suffix(tmp_path):
    """PostScript, for which pillow would start Ghostscript, is no image here; a GIF that is called PNG is one."""
    make_folder(tmp_path, splits=("train",))
    picture = tmp_path / "train/cats/0.png"
    Image.new("RGB", (9, 7), (50, 50, 50)).save(picture, format="GIF")
    assert (decode(picture, 4) == 50).all()
    Image.new("RGB", (9, 7)).save(picture, format="EPS")
    with pytest.raises(ValueError, match=r"0\.png cannot be decoded as an image"):
        decode(picture, 4)
    for content in (
        b"\x89PNG\r\n\x1a\n" + b"\0" * 20,
        b"\xff\xd8\xff\xe0",
        b"BM" + b"\xff" * 60,
        b"RIFF\0\0\0\0WEBP",
        b"",
    ):
        picture.write_bytes(content)
        with pytest.raises(ValueError, match=r"0\.png cannot be decoded as an image"):
            decode(picture, 4)


def test_folders_that_do_not_fit(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"`train` with one folder per class; .* does not exist"):
        folder(tmp_path)
    (tmp_path / "train").mkdir()
    with pytest.raises(FileNotFoundError, match="holds no class folders"):
        folder(tmp_path)
    (tmp_path / "train").rmdir()
    make_folder(tmp_path)
    (tmp_path / "test/birds").mkdir()
    with pytest.raises(ValueError, match="classes that the train folder lacks: birds"):
        folder(tmp_path).load(train=False)
    (tmp_path / "train/birds").mkdir()
    with pytest.raises(FileNotFoundError, match="birds holds no images"):
        folder(tmp_path).load(train=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"batch_size": 0}, ValueError, "`batch_size` must be at least 1"),
        ({"validation": 1.0}, ValueError, r"`validation` must be a fraction in \[0, 1\)"),
        ({"limit_train": 2.5}, TypeError, "`limit_train` must be an integer"),
    ],
)
def test_arguments(options, error, message):
    with pytest.raises(error, match=message):
        Digits(**options)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    images, ours = Digits().load(train=True)
    assert torch.equal(ours, torch.tensor(labels))
    assert (images.view(-1, 64) / 255 - torch.tensor(pixels) / 16).abs().max() <= 0.5 / 255 + 1e-6


def test_torchvision_data(monkeypatch):
    import torchvision

    class Few(torchvision.datasets.FakeData):
        def __init__(self, root, split, download):
            super().__init__({"train": 12, "test": 4}[split], (3, 20, 20), num_classes=10)

    monkeypatch.setattr(torchvision.datasets, "SVHN", Few)
    data = TorchvisionData("SVHN", size=8, batch_size=4, validation=0.5)
    data.prepare_data()
    data.setup()
    assert data.train_set.tensors[0].shape == (6, 3, 8, 8)
    assert len(data.test_set) == 4
    assert not data.mirror
    assert TorchvisionData("CIFAR100").num_classes == 100
    with pytest.raises(ValueError, match=r"`dataset` must be one of .*'CIFAR10'.*, got 'CIFAR'"):
        TorchvisionData("CIFAR")


def test_augmentation_moves_and_mirrors():
    """A single bright pixel lands within the shift of its place or of its mirror image, and nowhere else."""
    images = torch.zeros(400, 1, 9, 9)
    images[:, 0, 4, 1] = 1
    moved = shift_and_mirror(images, 1).nonzero()[:, 2:]
    assert set(map(tuple, moved.tolist())) == {(r, c) for r in (3, 4, 5) for c in (0, 1, 2, 6, 7, 8)}
    kept = shift_and_mirror(images, 1, mirror=False).nonzero()[:, 2:]
    assert set(map(tuple, kept.tolist())) == {(r, c) for r in (3, 4, 5) for c in (0, 1, 2)}
