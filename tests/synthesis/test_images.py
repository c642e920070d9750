# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from zsq.errors import UsageError
from zsq.runtime.checkpoints import save_tensors
from zsq.synthesis.images import ImageSet


def image_set(**provenance):
    return ImageSet(torch.randn(4, 3, 5, 6), torch.tensor([3, 1, 0, 2]), provenance)


def test_a_set_comes_back_from_its_file(tmp_path):
    made = image_set(method="genie", seed=3, losses=[0.5, 0.25])
    made.save(tmp_path / "images.safetensors")
    again = ImageSet.load(tmp_path / "images.safetensors")
    assert torch.equal(again.images, made.images)
    assert torch.equal(again.labels, made.labels)
    assert again.provenance == made.provenance
    assert len(again) == 4


@pytest.mark.parametrize("keep", [0, 7, 100, -1])
def test_truncated_files_are_refused(tmp_path, keep):
    path = tmp_path / "images.safetensors"
    image_set().save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(UsageError, match=r"images\.safetensors cannot be read"):
        ImageSet.load(path)


def test_files_that_are_missing_are_refused(tmp_path):
    with pytest.raises(UsageError, match="missing, truncated"):
        ImageSet.load(tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "tensors",
    [
        {"weights": torch.zeros(3)},
        {"images": torch.zeros(2, 3, 4, 4)},
        {"images": torch.zeros(2, 3), "labels": torch.zeros(2)},
    ],
)
def test_other_tensors_are_refused(tmp_path, tensors):
    save_tensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(UsageError, match="not images and labels"):
        ImageSet.load(tmp_path / "x.safetensors")


def test_a_set_that_suits_the_network_passes():
    made = image_set()
    assert made.check((3, 5, 6)) is made


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_pixels_that_are_not_finite_are_refused(value):
    made = image_set()
    made.images[2, 1, 0, 0] = value
    with pytest.raises(UsageError, match="NaN or Inf"):
        made.check((3, 5, 6))


def test_other_shapes_and_empty_sets_are_refused():
    with pytest.raises(UsageError, match=r"\(3, 5, 6\) but the network takes \(3, 6, 5\)"):
        image_set().check((3, 6, 5))
    with pytest.raises(UsageError, match="empty"):
        ImageSet(torch.zeros(0, 3, 5, 6), torch.zeros(0)).check((3, 5, 6))
