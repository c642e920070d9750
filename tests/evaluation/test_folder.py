# SPDX-License-Identifier: Apache-2.0
import threading
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from zsq.errors import UsageError
from zsq.evaluation.folder import load_images, open_folder

RGB = {"input_shape": (3, 8, 8), "mean": (0.5, 0.4, 0.3), "std": (0.1, 0.2, 0.5)}


def write(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def pictures(tmp_path):
    """Three classes with 4, 3 and 2 images of 8x8; returns the folder and the pixels in order."""
    random = np.random.default_rng(0)
    expected = []
    for label, (name, count) in enumerate([("bird", 4), ("cat", 3), ("dog", 2)]):
        for index in range(count):
            pixels = random.integers(0, 256, (8, 8, 3))
            write(tmp_path / "set" / name / f"{index}.png", pixels)
            expected.append((pixels, label))
    return tmp_path / "set", expected


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_in_order_and_normalised(pictures, batch_size):
    root, expected = pictures
    folder = open_folder(root, **RGB)
    assert folder.classes == ("bird", "cat", "dog")
    batches = list(folder.batches(batch_size))
    assert all(len(images) <= batch_size for images, _ in batches)
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert (images.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert images.shape == (9, 3, 8, 8)
    assert labels.tolist() == [label for _, label in expected]
    for image, (pixels, _) in zip(images, expected, strict=True):
        reference = (pixels / 255 - np.array(RGB["mean"])) / np.array(RGB["std"])
        np.testing.assert_allclose(image.numpy(), reference.transpose(2, 0, 1), atol=1e-5)


def test_nested_and_other_files(pictures):
    root, _ = pictures
    write(root / "cat" / "images" / "x.BMP", np.zeros((8, 8, 3)))
    write(root / "dog" / "y.webp", np.zeros((8, 8, 3)))
    write(root / ".cache" / "z.png", np.zeros((8, 8, 3)))
    write(root / "dog" / ".hidden.png", np.zeros((8, 8, 3)))
    (root / "dog" / "notes.txt").write_text("no image")
    (root / "empty").mkdir()  # between dog and nothing: keeps its place among the classes
    folder = open_folder(root, **RGB)
    assert folder.classes == ("bird", "cat", "dog", "empty")
    assert Counter(folder.labels) == {0: 4, 1: 4, 2: 3}


def test_greyscale(pictures):
    root, expected = pictures
    folder = open_folder(root, input_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    images, _ = next(folder.batches(9))
    assert images.shape == (9, 1, 8, 8)
    grey = expected[0][0] @ [0.299, 0.587, 0.114] / 255
    np.testing.assert_allclose(images[0, 0].numpy(), grey, atol=1 / 255)


def test_resize_and_centre_crop(tmp_path):
    # A ramp along the width: after resizing 40x20 to 20x10, the crop shows columns 6 to 13 of 20.
    ramp = np.broadcast_to(np.arange(40)[None, :, None] * 6, (20, 40, 3))
    write(tmp_path / "a" / "x.png", ramp)
    for interpolation in ("bilinear", "bicubic"):
        folder = open_folder(
            tmp_path,
            input_shape=(3, 8, 8),
            mean=(0.0,) * 3,
            std=(1.0,) * 3,
            resize=10,
            interpolation=interpolation,
        )
        images, _ = next(folder.batches(1))
        columns = images[0, 0].mean(0) * 255
        wanted = (torch.arange(6, 14) * 2 + 0.5) * 6  # middles of pairs of columns
        torch.testing.assert_close(columns, wanted, atol=1.0, rtol=0)


def test_other_size_without_resize(tmp_path):
    write(tmp_path / "a" / "x.png", np.zeros((9, 8, 3)))
    folder = open_folder(tmp_path, **RGB)
    with pytest.raises(UsageError, match=r"x.png is 9x8 and the network takes 8x8.*--resize"):
        list(folder.batches(1))


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_corrupt_image_is_named(pictures, damage):
    root, _ = pictures
    path = root / "cat" / "1.png"
    whole = path.read_bytes()
    content = {"truncated": whole[: len(whole) // 2], "text": b"hello", "empty": b""}
    path.write_bytes(content[damage])
    folder = open_folder(root, **RGB)
    threads = threading.active_count()
    with pytest.raises(UsageError, match=r"cat.1\.png cannot be read as an image"):
        list(folder.batches(2))
    assert threading.active_count() <= threads + 8


def test_truncated_jpeg(tmp_path):
    write(tmp_path / "a" / "x.jpg", np.random.default_rng(0).integers(0, 256, (64, 64, 3)))
    path = tmp_path / "a" / "x.jpg"
    path.write_bytes(path.read_bytes()[:-400])
    folder = open_folder(tmp_path, input_shape=(3, 64, 64), mean=(0,) * 3, std=(1,) * 3)
    with pytest.raises(UsageError, match=r"x\.jpg cannot be read"):
        list(folder.batches(1))


def test_deep_images_are_not_cut_off(tmp_path):
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((8, 8), 4000, np.uint16)).save(tmp_path / "a" / "x.png")
    folder = open_folder(tmp_path, input_shape=(1, 8, 8), mean=(0.0,), std=(1.0,))
    with pytest.raises(UsageError, match="more than 8 bits"):
        list(folder.batches(1))


def test_folders_that_hold_nothing(tmp_path):
    with pytest.raises(UsageError, match="is not a folder"):
        open_folder(tmp_path / "no", **RGB)
    with pytest.raises(UsageError, match="holds no class folders"):
        open_folder(tmp_path, **RGB)
    write(tmp_path / "x.png", np.zeros((8, 8, 3)))
    with pytest.raises(UsageError, match="holds no class folders"):
        open_folder(tmp_path, **RGB)
    (tmp_path / "a").mkdir()
    with pytest.raises(UsageError, match="holds no images"):
        open_folder(tmp_path, **RGB)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_shape": None}, "--input-shape"),
        ({"mean": None}, "--mean and --std"),
        ({"std": None}, "--mean and --std"),
        ({"mean": (0.5,)}, "do not fit 3 channels"),
        ({"std": (0.1, 0.0, 0.1)}, "above 0"),
        ({"mean": (0.5, float("inf"), 0.5)}, "one finite number a channel"),
        ({"std": (float("nan"),) * 3}, "one finite number a channel"),
        ({"input_shape": (4, 8, 8)}, "4 channels"),
        ({"resize": 7}, "smaller than the crop"),
        ({"interpolation": "cubist"}, "'cubist' is unknown: it is one of .*bilinear"),
    ],
)
def test_missing_or_wrong_facts(pictures, change, message):
    with pytest.raises(UsageError, match=message):
        open_folder(pictures[0], **(RGB | change))


def test_batch_size_is_checked(pictures):
    with pytest.raises(UsageError, match="batch size 0"):
        next(open_folder(pictures[0], **RGB).batches(0))


def test_reader_may_stop_early(pictures):
    batches = open_folder(pictures[0], **RGB).batches(1)
    next(batches)
    batches.close()


def test_balanced_subset(pictures):
    folder = open_folder(pictures[0], **RGB)
    everything = torch.cat([images for images, _ in folder.batches(9)])
    for count, sizes in [(3, [1, 1, 1]), (5, [1, 2, 2]), (6, [2, 2, 2]), (8, [2, 3, 3])]:
        images, labels = load_images(folder, count, seed=0)
        assert images.shape == (count, 3, 8, 8)
        assert sorted(Counter(labels.tolist()).values()) == sizes
        # every image is one of the folder, none twice, and carries its own label
        which = [int((everything == image).flatten(1).all(1).nonzero()) for image in images]
        assert len(set(which)) == count
        assert [folder.labels[index] for index in which] == labels.tolist()


def test_subset_depends_on_the_seed_alone(pictures):
    folder = open_folder(pictures[0], **RGB)
    first, again, other = (load_images(folder, 5, seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("count", [0, 10])
def test_subset_larger_than_the_folder(pictures, count):
    with pytest.raises(UsageError, match=f"{count} images asked for: .* has 1 to 9"):
        load_images(open_folder(pictures[0], **RGB), count, seed=0)


def test_no_class_is_preferred_when_the_count_does_not_divide(pictures):
    folder = open_folder(pictures[0], **RGB)
    assert {int(load_images(folder, 1, seed)[1]) for seed in range(20)} == {0, 1, 2}


def test_links_that_lead_back_are_not_followed(pictures):
    """Others are: a class folder may be a link, and hold some."""
    root, _ = pictures
    before = open_folder(root, **RGB).files
    (root / "cat" / "root").symlink_to(root)
    (root / "cat" / "self").symlink_to(root / "cat")
    assert open_folder(root, **RGB).files == before
    (root / "cat" / "more").symlink_to(root / "dog")
    (root / "hound").symlink_to(root / "dog")
    assert len(open_folder(root, **RGB)) == len(before) + 4
