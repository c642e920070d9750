# SPDX-License-Identifier: Apache-2.0
"""How pictures of any size become input: the same way wherever a folder is read."""

import numpy as np
import pytest
import torch
from helpers.networks import Residual, with_own_statistics
from helpers.runs import FEW, NORMALISATION, write_model, zsq, zsq_json
from helpers.students import recipe
from PIL import Image

from zsq import judge, quantize
from zsq.artifact.networkfile import load_saved_teacher, save_teacher
from zsq.evaluation.folder import open_folder
from zsq.runtime.checkpoints import load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.stages import choose_images
from zsq.synthesis.images import ImageSet
from zsq.teacher import sources
from zsq.teacher.libraries import Metadata
from zsq.teacher.teacher import load_teacher

CLASSES = 5
FACTS = {"input_shape": (3, 8, 8), "mean": (0.5,) * 3, "std": (0.25,) * 3}


@pytest.fixture
def model(monkeypatch):
    """A network of a library that asks for bicubic pictures."""

    def build(name, *, pretrained):
        torch.manual_seed(0)
        return with_own_statistics(Residual()), Metadata(
            **FACTS, resize=10, interpolation="bicubic"
        )

    monkeypatch.setitem(sources.LIBRARIES, "timm", build)
    return "timm:sharp"


@pytest.fixture
def folder(tmp_path):
    """One picture of 20 x 20 for each class."""
    random = np.random.default_rng(0)
    for label in range(CLASSES):
        path = tmp_path / "pictures" / str(label) / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(random.integers(0, 256, (20, 20, 3), dtype=np.uint8)).save(path)
    return tmp_path / "pictures"


def read(folder, **how):
    return next(open_folder(folder, **FACTS, **how).batches(CLASSES))[0]


def judged(monkeypatch, *arguments, **options):
    """Return the images that `evaluate` shows the networks."""
    seen = []

    def watch(networks, batches, **others):
        batches = list(batches)
        seen.extend(images for images, _ in batches)
        return real(networks, batches, **others)

    real = judge.evaluate_networks
    with monkeypatch.context() as patch:
        patch.setattr(judge, "evaluate_networks", watch)
        judge.evaluate(*arguments, **options)
    return torch.cat(seen)


def test_the_filter_that_a_network_asks_for_is_the_one_it_is_judged_with(
    monkeypatch, model, folder
):
    wanted = read(folder, resize=10, interpolation="bicubic")
    assert not torch.equal(wanted, read(folder, resize=10))
    assert torch.equal(judged(monkeypatch, model, folder), wanted)


def test_and_the_one_it_is_quantized_with(model, folder):
    chosen = choose_images(load_teacher(model), recipe(), folder, Context())
    wanted = read(folder, resize=10, interpolation="bicubic")
    assert torch.equal(chosen.images[chosen.labels.argsort()], wanted)


def test_saved_teachers_keep_it_and_old_files_say_bilinear(model, tmp_path):
    path = tmp_path / "teacher.safetensors"
    save_teacher(load_teacher(model), path)
    assert load_saved_teacher(path).info.interpolation == "bicubic"
    tensors, header = load_tensors(path)
    del header["info"]["interpolation"]
    save_tensors(path, tensors, header)
    assert load_saved_teacher(path).info.interpolation == "bilinear"


def test_an_exported_file_says_it_too(monkeypatch, model, folder, tmp_path):
    quantize(
        model, recipe("tuning.steps=0"), images=torch.randn(4, 3, 8, 8), compile=False,
        out=tmp_path / "run", report=False,
    )  # fmt: skip
    wanted = read(folder, resize=10, interpolation="bicubic")
    assert torch.equal(judged(monkeypatch, tmp_path / "run" / "model.onnx", folder), wanted)


def test_quantize_resizes_as_it_is_told_and_its_run_is_judged_so(
    monkeypatch, capsys, folder, tmp_path
):
    run = tmp_path / "run"
    command = [
        "quantize",
        write_model(tmp_path),
        "--images",
        folder,
        "-o",
        run,
        *NORMALISATION,
        *FEW,
    ]
    code, _, err = zsq(monkeypatch, capsys, *command, "--resize", "7")
    assert (code, run.exists()) == (2, False)
    assert "--resize 7 is smaller than the network's images of 8 x 8; give at least 8" in err
    zsq_json(monkeypatch, capsys, *command, "--resize", "10")
    chosen = ImageSet.load(run / "images.safetensors")
    wanted = read(folder, resize=10)
    assert torch.equal(chosen.images[chosen.labels.argsort()], wanted)
    assert torch.equal(judged(monkeypatch, run, folder), wanted)
    code, _, err = zsq(monkeypatch, capsys, *command, "--resize", "12", "--resume")
    assert code == 2
    assert "resize was 10, now 12" in err
