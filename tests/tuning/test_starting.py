# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning that begins with reconstructed weights."""

import math

import pytest
import torch
from helpers.networks import Inverted, network_of, smooth_images

from zsq.config import load_recipe
from zsq.errors import RunError, UsageError
from zsq.functional.losses import kl_divergence
from zsq.runtime.checkpoints import Checkpoints, load_tensors
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import produce, tune, tuned
from zsq.student import attach
from zsq.synthesis import warming
from zsq.synthesis.images import ImageSet
from zsq.synthesis.learner import GeneratorLearner
from zsq.synthesis.warming import synthesize_with_generator
from zsq.teacher.teacher import ModelInfo, Teacher
from zsq.together import tune_with_generator
from zsq.tuning import finetune as finetuning
from zsq.tuning.reconstruct import reconstruct

START = ["tuning.start.steps=20", "tuning.start.power=2"]
SMALL = [
    "synthesis.steps=6", "synthesis.batch=8", "synthesis.images=16", "tuning.steps=6",
    "tuning.range_steps=3", "tuning.batch=8", "tuning.lr=0.01",
]  # fmt: skip


def recipe(*settings, name="gdfq+ait", bits="w3a3"):
    return load_recipe(name, bits=bits, settings=[*SMALL, *START, *settings])


def same(a, b):
    ours, theirs = a.network.state_dict(), b.network.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(v, theirs[k]) for k, v in ours.items())


@pytest.mark.parametrize("bits", ["w3a3", "w4a8"])
def test_without_further_steps_the_student_is_the_reconstructed_one(teacher, images, bits):
    found = tune(teacher, attach(teacher, recipe("tuning.steps=0", bits=bits)), images)
    alone = load_recipe("genie", bits=bits, settings=[
        "protocol=all-low-bit", "fold_batch_norm=false", "tuning.steps=20", "tuning.power=2"])  # fmt: skip
    expected = tune(teacher, attach(teacher, alone), images, context=Context().within("start"))
    for path, layer in expected.layers().items():
        assert torch.equal(found.layers()[path].frozen.codes(), layer.frozen.codes())
        assert torch.equal(found.layers()[path].frozen.scale, layer.frozen.scale)
        assert torch.equal(found.layers()[path].frozen.zero_point, layer.frozen.zero_point)
    for name, quantizer in expected.quantizers().items():
        assert torch.allclose(found.quantizer(name).scale, quantizer.scale)
        assert torch.equal(found.quantizer(name).zero_point, quantizer.zero_point)
    assert torch.allclose(found(images.images), expected(images.images), atol=1e-5)


def test_learning_goes_on_from_there(teacher, images):
    def divergence(steps):
        settings = [f"tuning.steps={steps}", "tuning.lr=1e-3", "tuning.losses.ce=0", "tuning.batch=24",
                    "tuning.kl_mean=sample", "tuning.temperature=1", "tuning.milestones=[]"]  # fmt: skip
        student = tune(teacher, attach(teacher, recipe(*settings, name="gdfq")), images)
        with torch.no_grad():
            found = kl_divergence(student(images.images), teacher(images.images), 1.0, "sample")
        return float(found)

    assert divergence(60) < 0.9 * divergence(0)


def test_grids_of_weights_stand_still_and_integers_move(teacher, images):
    before = tune(teacher, attach(teacher, recipe("tuning.steps=0")), images).layers()
    after = tune(teacher, attach(teacher, recipe("tuning.inundation.target=0.05")), images).layers()
    moved = 0
    for path, layer in after.items():
        assert torch.equal(layer.frozen.scale, before[path].frozen.scale)
        assert torch.equal(layer.frozen.zero_point, before[path].frozen.zero_point)
        moved += int((layer.frozen.codes() != before[path].frozen.codes()).sum())
    assert moved > 0


def test_the_first_images_are_those_that_a_generator_makes_after_its_warm_up(teacher, monkeypatch):
    given, trained = [], []
    learn = GeneratorLearner.next

    def count(self, rate):
        trained.append(rate)
        return learn(self, rate)

    def spy(teacher, student, images, context):
        given.append((images, len(trained)))
        return reconstruct(teacher, student, images, context)

    monkeypatch.setattr("zsq.tuning.starting.reconstruct", spy)
    monkeypatch.setattr(GeneratorLearner, "next", count)
    student, kept = tune_with_generator(teacher, attach(teacher, recipe()))
    ((first, before),) = given
    assert (before, len(trained)) == (6, 12), "six steps of warm-up, six with the student"
    assert len(first) == len(kept) == 16
    expected = synthesize_with_generator(teacher, recipe().synthesis, Context())
    assert torch.equal(first.images, expected.images)
    assert not torch.allclose(first.images, kept.images)
    assert student(first.images).isfinite().all()


def test_a_generators_first_images_teach_the_equalization(teacher, tmp_path):
    settings = ["tuning.start.equalize_steps=5", "equalize=0"]
    context = Context(checkpoints=Checkpoints(tmp_path))
    student, kept = produce(teacher, recipe(*settings), None, context)
    learned, _ = load_tensors(tmp_path / "equalization.safetensors")
    assert any(k.startswith("factors.") and not torch.all(v == 1) for k, v in learned.items())
    again, same_images = produce(teacher, recipe(*settings), None, Context())
    assert same(student, again)
    assert torch.equal(kept.images, same_images.images)


@pytest.mark.parametrize("protocol", ["edges-8bit", "integer", "all-low-bit"])
def test_every_protocol_lets_a_generators_student_begin_reconstructed(teacher, protocol):
    settings = [
        f"protocol={protocol}",
        "equalize=0.5",
        "tuning.start.equalize_steps=3",
        "tuning.lr=1e-6",
    ]
    student, kept = produce(teacher, recipe(*settings, bits="w8a4"), None, Context())
    with torch.no_grad():
        wanted, given = teacher(kept.images), student(kept.images)
    assert float((given - wanted).norm() / wanted.norm()) < 0.25
    assert {layer.bits for layer in student.layers().values()} == {8}


def test_channels_are_equalized_by_learned_factors_before(teacher, images, tmp_path):
    settings = ["equalize=0.5", "tuning.start.equalize_steps=5"]
    context = Context(checkpoints=Checkpoints(tmp_path))
    with_factors = tuned(teacher, recipe(*settings, name="hast"), images, context)
    without = tuned(teacher, recipe("equalize=0.5", name="hast"), images, Context())
    assert (tmp_path / "equalization.safetensors").exists()
    scales = [
        torch.stack([q.scale for q in s.quantizers().values()]) for s in (with_factors, without)
    ]
    assert not torch.allclose(*scales)


def test_moved_integers_are_counted_from_where_reconstruction_ended(
    teacher, images, tmp_path, monkeypatch
):
    monkeypatch.setattr(finetuning, "RECORD_EVERY", 1)
    with MetricsLog(tmp_path / "m.jsonl") as metrics:
        tune(teacher, attach(teacher, recipe("tuning.lr=1e-12", name="gdfq")), images,
             context=Context(metrics=metrics))  # fmt: skip
    records = read_metrics(tmp_path / "m.jsonl")
    assert [max(r["moved"].values()) for r in records if "moved" in r] == [0.0] * 6
    assert any(r["stage"] == "tuning start" for r in records)


class StopError(Exception):
    pass


@pytest.mark.parametrize(
    ("learns", "after"),
    [
        (True, "the warm-up"),
        (True, "a block"),
        (True, "a step"),
        (False, "a block"),
        (False, "a step"),
    ],
)
def test_an_interrupted_run_goes_on_to_the_same_weights(
    teacher, images, tmp_path, monkeypatch, learns, after
):
    monkeypatch.setattr(finetuning, "CHECKPOINT_EVERY", 1)
    monkeypatch.setattr(warming, "CHECKPOINT_EVERY", 1)

    def run(context):
        student = attach(teacher, recipe())
        if learns:
            return tune_with_generator(teacher, student, context=context)[0]
        return tune(teacher, student, images, context=context)

    whole = run(Context())
    context = Context(checkpoints=Checkpoints(tmp_path))
    save = Checkpoints.save

    def stop(self, name, tensors):
        save(self, name, tensors)
        done = int(tensors["done"]) if "done" in tensors else 0
        reached = {
            "the warm-up": name == "generator" and done == 4, "a block": self.part == "start",
            "a step": name == "finetune" and done == 3,
        }  # fmt: skip
        if reached[after]:
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(Checkpoints, "save", stop)
        with pytest.raises(StopError):
            run(context)
    torch.randn(7)
    assert same(run(context), whole)


def test_a_damaged_generator_is_no_checkpoint(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(warming, "CHECKPOINT_EVERY", 2)
    learn, steps = GeneratorLearner.next, []

    def spoil(self, rate):
        batch = learn(self, rate)
        steps.append(rate)
        if len(steps) == 4:
            with torch.no_grad():
                next(self.generator.parameters()).fill_(math.nan)
        return batch

    monkeypatch.setattr(GeneratorLearner, "next", spoil)
    context = Context(checkpoints=Checkpoints(tmp_path))
    with pytest.raises(RunError, match=r"NaN or infinite at or before step 3.*kept"):
        synthesize_with_generator(teacher, recipe().synthesis, context)
    kept, _ = load_tensors(tmp_path / "generator.safetensors")
    assert int(kept["done"]) == 2
    assert all(t.isfinite().all() for name, t in kept.items() if name.startswith("source."))


def test_what_is_said_about_a_start_that_cannot_be(teacher):
    with pytest.raises(UsageError, match=r"tuning\.start\.steps"):
        recipe("tuning.start.steps=-1")
    with pytest.raises(UsageError, match=r"did you mean 'tuning\.start\.steps'"):
        recipe("tuning.start.step=5")


def test_a_depthwise_network_starts_from_reconstruction_too():
    teacher = Teacher(network_of(Inverted()), ModelInfo("depthwise", (3, 8, 8)))
    pixels = smooth_images(16)
    with torch.no_grad():
        images = ImageSet(pixels, teacher(pixels).argmax(1))
    for protocol in ("edges-8bit", "integer", "all-low-bit"):
        student = tune(teacher, attach(teacher, recipe(f"protocol={protocol}")), images)
        assert student(pixels).isfinite().all()
