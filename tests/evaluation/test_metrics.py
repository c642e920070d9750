# SPDX-License-Identifier: Apache-2.0
import json
import math

import numpy as np
import pytest
import torch

from zsq.errors import RunError, UsageError
from zsq.evaluation.metrics import (
    agreement,
    evaluate_networks,
    standard_error,
    topk_correct,
)


def random_logits(seed, n=500, classes=10):
    return torch.randn(n, classes, generator=torch.Generator().manual_seed(seed))


def random_labels(n=500, classes=10):
    return torch.randint(classes, (n,), generator=torch.Generator().manual_seed(99))


def batches_of(logits, labels, size):
    """Images that are their own index, so that a table of logits can stand in for a network."""
    index = torch.arange(len(labels))
    return zip(index.split(size), labels.split(size), strict=True)


@pytest.mark.parametrize("k", [1, 3, 5, 9])
def test_topk_against_sklearn(k):
    metrics = pytest.importorskip("sklearn.metrics")
    logits, labels = random_logits(0), random_labels()
    reference = metrics.top_k_accuracy_score(
        labels.numpy(), logits.numpy(), k=k, labels=np.arange(10)
    )
    correct = topk_correct(logits, labels, k)
    assert correct.dtype == torch.bool
    assert correct.float().mean().item() == pytest.approx(reference)


def test_topk_with_ties_agrees_with_argmax():
    logits = torch.randint(0, 3, (500, 10), generator=torch.Generator().manual_seed(1)).float()
    labels = random_labels()
    assert torch.equal(topk_correct(logits, labels, 1), logits.argmax(1) == labels)
    # exactly k classes are within the k largest, whatever is tied
    for k in (2, 5):
        inside = [topk_correct(logits, torch.full((500,), c), k) for c in range(10)]
        assert (torch.stack(inside).sum(0) == k).all()


def test_topk_of_fewer_classes_and_of_nan():
    logits = torch.tensor([[1.0, 2.0], [math.nan, 0.0]])
    assert topk_correct(logits, torch.tensor([0, 1]), 5).tolist() == [True, True]
    assert topk_correct(logits, torch.tensor([0, 0]), 5).tolist() == [True, False]


def test_standard_error_is_the_spread_of_repeated_samples():
    n, share = 400, 0.88
    samples = np.random.default_rng(0).binomial(n, share, 20000) / n * 100
    assert standard_error(100 * share, n) == pytest.approx(samples.std(), rel=0.03)
    assert standard_error(100.0, n) == standard_error(0.0, n) == 0.0


def test_agreement():
    logits = random_logits(0)
    assert agreement(logits, 3 * logits + 1) == 100.0
    other = random_logits(1)
    same = np.mean(logits.numpy().argmax(1) == other.numpy().argmax(1))
    assert agreement(logits, other) == pytest.approx(100 * same)


def test_networks_are_scored_on_the_same_images():
    metrics = pytest.importorskip("sklearn.metrics")
    labels = random_labels()
    tables = {"teacher": random_logits(0), "student": random_logits(0) + 0.3 * random_logits(1)}
    tables["teacher"][torch.arange(500), labels] += 2
    tables["student"][torch.arange(500), labels] += 1.5
    done = []
    evaluation = evaluate_networks(
        {name: table.__getitem__ for name, table in tables.items()},
        batches_of(tables, labels, 64),
        progress=done.append,
    )
    for name, table in tables.items():
        score = evaluation.scores[name]
        for k, value in ((1, score.top1), (5, score.top5)):
            reference = metrics.top_k_accuracy_score(
                labels.numpy(), table.numpy(), k=k, labels=np.arange(10)
            )
            assert value == pytest.approx(100 * reference)
        assert score.stderr == standard_error(score.top1, 500)
        assert score.images == 500
    assert done == [64, 128, 192, 256, 320, 384, 448, 500]
    assert evaluation.agreement("teacher", "student") == pytest.approx(
        agreement(tables["teacher"], tables["student"])
    )
    assert evaluation.agreement("teacher", "teacher") == 100.0
    assert evaluation.agreement_stderr("teacher", "student") == standard_error(
        evaluation.agreement("teacher", "student"), 500
    )
    assert json.loads(json.dumps(evaluation.scores["student"].to_dict())) == {
        "top1": evaluation.scores["student"].top1,
        "top5": evaluation.scores["student"].top5,
        "stderr": evaluation.scores["student"].stderr,
        "top5_stderr": standard_error(evaluation.scores["student"].top5, 500),
        "images": 500,
    }
    with pytest.raises(UsageError, match="no network 'onnx' here: there are teacher, student"):
        evaluation.agreement("teacher", "onnx")


@pytest.mark.parametrize(("asked", "seen"), [(1, 64), (64, 64), (100, 128), (9999, 500)])
def test_a_slow_network_looks_at_the_first_images_only(asked, seen):
    tables = {"file": random_logits(0), "simulation": random_logits(0) + 0.3 * random_logits(1)}
    labels = random_labels()
    evaluation = evaluate_networks(
        {name: table.__getitem__ for name, table in tables.items()},
        batches_of(tables, labels, 64),
        first={"simulation": asked},
    )
    assert evaluation.scores["file"].images == 500
    assert evaluation.scores["simulation"].images == seen
    right = tables["simulation"][:seen].argmax(1) == labels[:seen]
    assert evaluation.scores["simulation"].top1 == pytest.approx(100 * float(right.float().mean()))
    both = [table[:seen] for table in tables.values()]
    assert evaluation.agreement("file", "simulation") == pytest.approx(agreement(*both))
    gap = (both[0].argmax(1) == labels[:seen]).sum() - right.sum()
    assert evaluation.difference("file", "simulation").points == pytest.approx(
        100 * int(gap) / seen
    )


def test_paired_difference_is_that_of_the_per_image_differences():
    labels = random_labels()
    tables = {"a": random_logits(0), "b": random_logits(1)}
    tables["a"][torch.arange(500), labels] += 1
    evaluation = evaluate_networks(
        {name: table.__getitem__ for name, table in tables.items()},
        batches_of(tables, labels, 100),
    )
    hits = {n: (t.argmax(1) == labels).double().numpy() for n, t in tables.items()}
    gap = 100 * (hits["a"] - hits["b"])
    difference = evaluation.difference("a", "b")
    assert difference.points == pytest.approx(gap.mean())
    assert difference.stderr == pytest.approx(gap.std() / math.sqrt(500))
    assert evaluation.difference("b", "a").points == -difference.points
    assert evaluation.difference("a", "a").stderr == 0.0


def test_divergence_is_kl_from_the_first_network_image_by_image():
    tables = {"teacher": random_logits(0), "student": random_logits(0) + 0.3 * random_logits(1)}
    evaluation = evaluate_networks(
        {name: table.__getitem__ for name, table in tables.items()},
        batches_of(tables, random_labels(), 64),
        first={"student": 100},
    )
    p, q = (np.exp(t.double().numpy()) for t in tables.values())
    p, q = p / p.sum(1, keepdims=True), q / q.sum(1, keepdims=True)
    each = (p * np.log(p / q)).sum(1)[:128]
    found = evaluation.divergence("student")
    assert found.nats == pytest.approx(each.mean())
    assert found.stderr == pytest.approx(each.std(ddof=1) / math.sqrt(128))
    assert found.images == 128
    assert evaluation.divergence("teacher").nats == pytest.approx(0, abs=1e-12)


def test_networks_run_without_gradients():
    weight = torch.randn(4, 10, requires_grad=True)
    seen = []

    def network(images):
        logits = images @ weight
        seen.append(logits.requires_grad)
        return logits

    evaluate_networks({"net": network}, [(torch.randn(3, 4), torch.tensor([0, 1, 2]))])
    assert seen == [False]


@pytest.mark.parametrize(
    ("output", "label", "error", "message"),
    [
        (torch.zeros(1, 3), 3, UsageError, "label 3 is not one of the 3 classes"),
        (torch.zeros(1, 3), -1, UsageError, "label -1 is not one of"),
        ((torch.zeros(1, 3),), 0, UsageError, "returned tuple for 1 images"),
        (torch.zeros(1, 3, 2, 2), 0, UsageError, r"returned \[1, 3, 2, 2\]"),
        (torch.full((1, 3), math.nan), 0, RunError, "NaN or infinite logits"),
    ],
)
def test_unsuitable_networks(output, label, error, message):
    with pytest.raises(error, match=message):
        evaluate_networks({"net": lambda x: output}, [(torch.zeros(1, 4), torch.tensor([label]))])


@pytest.mark.parametrize("folders", [2, 4])
def test_other_classes_than_the_networks_are_refused_at_once(folders):
    def batches():
        yield torch.zeros(1, 4), torch.tensor([0])
        pytest.fail("the first batch is enough")

    message = f"{folders} class folders and network 'net' has 3 classes: .* may be empty"
    with pytest.raises(UsageError, match=message):
        evaluate_networks({"net": lambda x: torch.zeros(1, 3)}, batches(), classes=folders)


def test_no_images():
    with pytest.raises(UsageError, match="no images"):
        evaluate_networks({"net": lambda x: x}, [])
