# SPDX-License-Identifier: Apache-2.0
import sys

import numpy as np
import pytest
import torch

from zsq import demo
from zsq.errors import UsageError
from zsq.evaluation.folder import open_folder
from zsq.evaluation.metrics import evaluate_networks
from zsq.teacher.sources import load_source


@pytest.fixture(scope="module")
def trained():
    pytest.importorskip("sklearn")
    steps = []
    before = torch.get_rng_state()
    module, images, labels = demo.train_digits(0, lambda *step: steps.append(step))
    assert torch.equal(torch.get_rng_state(), before)  # the user's random numbers are theirs
    return module, images, labels, steps


def test_training_reaches_its_accuracy(trained):
    module, images, labels, steps = trained
    assert images.shape == (540, *demo.DIGITS_SHAPE)
    assert not module.training
    with torch.no_grad():
        assert (module(images).argmax(1) == labels).float().mean() >= 0.97
    done, total, loss = steps[-1]
    assert done == total == len(steps)
    assert loss < steps[0][2] / 10


def test_normalisation_is_that_of_the_data(trained):
    assert trained[1].mean().abs() < 0.03
    assert (trained[1].std() - 1).abs() < 0.03


def test_held_out_images_are_other_images():
    datasets = pytest.importorskip("sklearn.datasets")
    pixels, labels = demo._load_digits()
    assert len(pixels) == 1797
    assert np.array_equal(labels.numpy(), datasets.load_digits().target)
    # enlarging is a small blur: the mean brightness of every image stays
    original = torch.from_numpy(datasets.load_digits().images).mean((1, 2)) / 16 * 255
    torch.testing.assert_close(pixels.double().mean((1, 2, 3)), original, atol=0.6, rtol=0)


def test_same_seed_same_network(trained, monkeypatch):
    monkeypatch.setattr(demo, "_EPOCHS", 1)
    one, images, _ = demo.train_digits(3)
    two, again, _ = demo.train_digits(3)
    other, _, _ = demo.train_digits(4)
    assert torch.equal(images, again)
    assert torch.equal(one.output.weight, two.output.weight)
    assert not torch.equal(one.output.weight, other.output.weight)


def test_saved_network_and_folder_give_everything_back(trained, tmp_path):
    module, images, labels, _ = trained
    demo.save_digits(module, tmp_path / "digits.safetensors")
    demo.write_image_folder(images, labels, tmp_path / "held_out")
    source = load_source("zsq:digits", weights=str(tmp_path / "digits.safetensors"))
    folder = open_folder(
        tmp_path / "held_out", input_shape=source.input_shape, mean=source.mean, std=source.std
    )
    assert folder.classes == tuple("0123456789")
    read = torch.cat([batch for batch, _ in folder.batches(100)])
    order = labels.argsort(stable=True)
    torch.testing.assert_close(read, images[order], rtol=0, atol=1e-6)
    score = evaluate_networks({"net": source.module}, folder.batches(100)).scores["net"]
    with torch.no_grad():
        hits = int((module(images).argmax(1) == labels).sum())
    assert score.top1 == pytest.approx(100 * hits / 540)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UsageError, match=r"pip install 'zsq\[demo\]'"):
        demo.train_digits()
