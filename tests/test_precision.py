# SPDX-License-Identifier: Apache-2.0
"""bf16 costs no accuracy: differences between precisions are those between seeds, or smaller."""

import pytest
import torch

import zsq
from zsq.demo import DIGITS_SHAPE, train_digits

SETTINGS = {
    "genie": [
        "synthesis.images=64",
        "synthesis.batch=64",
        "synthesis.steps=40",
        "tuning.steps=60",
    ],
    "gdfq+ait": ["synthesis.steps=80", "synthesis.batch=64", "tuning.steps=120"],
}


@pytest.fixture(scope="module")
def digits():
    return train_digits()


@torch.no_grad()
def top1(network, images, labels):
    return 100 * float((network(images).argmax(1) == labels).float().mean())


@pytest.mark.parametrize(
    ("recipe", "seeds"),
    [
        ("genie", (0,)),
        pytest.param("genie", (0, 1, 2), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
        pytest.param("gdfq+ait", (0, 1, 2), marks=[pytest.mark.slow, pytest.mark.timeout(900)]),
    ],
)
def test_bf16_ends_where_float32_ends(digits, recipe, seeds):
    module, images, labels = digits
    scores = {}
    for precision in ("fp32", "bf16"):
        for seed in seeds:
            student = zsq.quantize(
                module, recipe, bits="w3a3", settings=SETTINGS[recipe], input_shape=DIGITS_SHAPE,
                precision=precision, compile=False, seed=seed,
            )  # fmt: skip
            scores[precision, seed] = top1(student, images, labels)
    fp32, bf16 = ([scores[p, seed] for seed in seeds] for p in ("fp32", "bf16"))
    between_seeds = max(max(fp32) - min(fp32), max(bf16) - min(bf16))
    difference = abs(sum(fp32) - sum(bf16)) / len(seeds)
    # 1.5: the standard error of the difference of two scores around 95 % on 540 images is 1.3
    assert difference <= max(between_seeds, 1.5), scores
    assert min(fp32 + bf16) > 80, scores
