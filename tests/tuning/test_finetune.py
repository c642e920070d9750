# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning on images, fixed or from a generator that learns with the student."""

import json
import math

import pytest
import torch
from helpers.networks import Net, Residual, conv, network_of, smooth_images, with_own_statistics
from helpers.students import labelled_images
from torch.fx import Interpreter

from zsq import stages
from zsq.config import Finetuning, Recipe, load_recipe, recipe_names
from zsq.errors import RunError, UsageError
from zsq.quantizers.minmax import MinMaxWeight, TrackedActivation
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.stages import tune
from zsq.student import attach
from zsq.synthesis.images import ImageSet
from zsq.teacher.fold import module_of
from zsq.teacher.graph import build_network, export_module
from zsq.teacher.layers import BatchNorm
from zsq.teacher.teacher import ModelInfo, Teacher, load_teacher
from zsq.together import tune_with_generator
from zsq.tuning import finetune as module
from zsq.tuning import ranges as searching

SMALL = [
    "synthesis.steps=6", "synthesis.batch=8", "synthesis.images=10", "tuning.steps=6",
    "tuning.range_steps=3", "tuning.batch=8", "tuning.lr=0.01",
]  # fmt: skip


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    network = build_network(export_module(with_own_statistics(Residual()), (3, 8, 8)))
    return Teacher(network.requires_grad_(False), ModelInfo("residual", (3, 8, 8)))


def recipe(name="gdfq+ait", *settings, bits="w4a4"):
    return load_recipe(name, bits=bits, settings=[*SMALL, *settings])


def weights_of(student):
    return {k: v.clone() for k, v in student.network.state_dict().items()}


def real(teacher, count=24):
    images = smooth_images(count)
    with torch.no_grad():
        return ImageSet(images, teacher(images).argmax(1))


@pytest.mark.parametrize("name", ["gdfq", "gdfq+ait", "qimera", "qimera+ait", "autorecon+ait",
                                  "qimera-reference", "ait-reference"])  # fmt: skip
def test_every_recipe_runs_and_leaves_the_teacher_alone(teacher, name):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    student, images = tune_with_generator(teacher, attach(teacher, recipe(name)))
    assert len(images) == 10
    assert images.images.isfinite().all()
    assert student(images.images).isfinite().all()
    assert all(torch.equal(v, before[k]) for k, v in teacher.network.state_dict().items())
    assert all(p.grad is None for p in teacher.network.parameters())


def test_batch_norms_keep_their_statistics_and_learn_the_rest(teacher):
    student, _ = tune_with_generator(teacher, attach(teacher, recipe("gdfq")))
    for node in teacher.network.graph.nodes:
        theirs = module_of(teacher.network, node)
        if isinstance(theirs, BatchNorm):
            ours = student.network.get_submodule(str(node.target))
            assert torch.equal(ours.running_mean, theirs.running_mean)
            assert torch.equal(ours.running_var, theirs.running_var)
            assert not torch.equal(ours.weight, theirs.weight)
            assert not torch.equal(ours.bias, theirs.bias)


def test_activations_are_quantized_after_clamps_only(teacher):
    student = attach(teacher, recipe())
    assert all(isinstance(q, TrackedActivation) for q in student.quantizers().values())
    assert {n.split("_")[0] for n in student.quantizers()} == {"relu"}
    assert all(isinstance(x.weight, MinMaxWeight) for x in student.layers().values())
    assert {x.bits for x in student.layers().values()} == {4}


def test_ranges_come_from_the_last_warm_up_steps_and_then_stand_still(teacher, monkeypatch):
    student = attach(teacher, recipe("gdfq"))
    tracked, steps = [], []
    track = TrackedActivation.track

    def spy(self, x):
        tracked.append(len(steps))
        track(self, x)

    learn = module.FineTuner.step

    def count(self, step):
        result = learn(self, step)
        steps.append(step)
        return result

    monkeypatch.setattr(TrackedActivation, "track", spy)
    monkeypatch.setattr(module.FineTuner, "step", count)
    tune_with_generator(teacher, student)
    assert set(tracked) == {3, 4, 5}, "three of the six warm-up steps, none of the student's"


def test_ranges_of_least_error_are_found_on_the_last_warm_up_batch(teacher):
    images = real(teacher)
    found = {}
    for ranges in ("minmax", "error"):
        one = recipe("gdfq", f"tuning.ranges={ranges}", "tuning.steps=0", "tuning.range_steps=1",
                     "tuning.batch=24", bits="w8a2")  # fmt: skip
        found[ranges] = tune(teacher, attach(teacher, one), images)
    float_student = attach(teacher, recipe("gdfq", "tuning.steps=0", bits="w8a8"))
    tensors = {}

    class Recorder(Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            tensors[n.name] = result
            return result

    with torch.no_grad():
        Recorder(float_student.network).run(images.images)
    for name in float_student.quantizers():
        x = tensors[name]
        errors = {
            k: float((s.quantizer(name)(x) - x).abs().pow(2.4).mean()) for k, s in found.items()
        }
        assert errors["error"] < errors["minmax"]


def test_searched_ranges_see_as_many_images_as_the_recipe_says(teacher, monkeypatch):
    seen, calibrate = [], searching.calibrate
    monkeypatch.setattr(
        searching, "calibrate", lambda n, q, b, **k: (seen.append(b), calibrate(n, q, b, **k))[1]
    )
    images = real(teacher)
    one = recipe("gdfq", "tuning.ranges=error", "tuning.range_steps=5", "tuning.steps=1",
                 "tuning.batch=8", "tuning.calibration_images=17")  # fmt: skip
    tune(teacher, attach(teacher, one), images)
    (batches,) = seen
    assert [len(batch) for batch in batches] == [8, 8, 8]
    assert len(torch.cat(batches).flatten(1).unique(dim=0)) >= 16, "not one batch three times"


@pytest.mark.parametrize("done", [1, 4])
def test_searched_ranges_are_the_same_if_the_warm_up_is_interrupted(
    teacher, tmp_path, monkeypatch, done
):
    one = recipe(
        "gdfq", "tuning.ranges=error", "tuning.range_steps=5", "tuning.calibration_images=32"
    )
    images, context = real(teacher), Context(checkpoints=Checkpoints(tmp_path))
    whole = tune(teacher, attach(teacher, one), images)
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 1)
    step = module.FineTuner.step

    def killed(self, number):
        if number == done:
            raise KeyboardInterrupt
        return step(self, number)

    with monkeypatch.context() as patched:
        patched.setattr(module.FineTuner, "step", killed)
        with pytest.raises(KeyboardInterrupt):
            tune(teacher, attach(teacher, one), images, context=context)
    again = tune(teacher, attach(teacher, one), images, context=context)
    found = again.network.state_dict()
    assert all(torch.equal(v, found[k]) for k, v in whole.network.state_dict().items())


def test_labels_that_are_no_classes_are_refused_before_a_student_is_reconstructed(
    teacher, monkeypatch
):
    monkeypatch.setattr(stages, "begin_with_reconstruction", lambda *_: pytest.fail("too late"))
    one = load_recipe("hast", bits="w4a4", schedule="quick")
    images = ImageSet(smooth_images(4), torch.arange(4) + 2)
    with pytest.raises(UsageError, match="5 classes, 0 to 4"):
        tune(teacher, attach(teacher, one), images)


def test_evaluation_changes_nothing(teacher):
    student, images = tune_with_generator(teacher, attach(teacher, recipe()))
    before = weights_of(student)
    first = student(images.images)
    student(7 * images.images)
    assert torch.equal(student(images.images), first)
    assert all(torch.equal(v, before[k]) for k, v in student.network.state_dict().items())


@pytest.mark.parametrize(("name", "kept"), [("gdfq", 0.9), ("gdfq+ait", 0.97), ("hast", 0.95)])
def test_a_student_of_eight_bits_stays_with_its_teacher(teacher, name, kept):
    """A hundred steps have nothing to win at 8 bits, and must not lose what there is; others' images judge.

    Cross-entropy with hard labels pulls GDFQ's away a little; inundation has to change integers in every step.
    """
    settings = ["tuning.lr=1e-4", "tuning.steps=100", "tuning.batch=32"]
    student = attach(teacher, recipe(name, *settings, bits="w8a8"))
    before = {path: layer.weight.codes() for path, layer in student.layers().items()}
    student = tune(teacher, student, real(teacher, 64))
    others = labelled_images(teacher, 256, seed=123)
    with torch.no_grad():
        assert (student(others.images).argmax(1) == others.labels).float().mean() >= kept
    moved = {
        path: student.layers()[path].frozen.integers != codes for path, codes in before.items()
    }
    assert any(bool(m.any()) for m in moved.values()), "it did learn"


def test_learning_lowers_the_divergence(teacher):
    images = real(teacher, 64)
    wanted = teacher(images.images).log_softmax(1)
    found = []
    for steps in (0, 150):
        one = recipe("gdfq", f"tuning.steps={steps}", "tuning.losses.ce=0", "tuning.kl_mean=sample",
                     "tuning.batch=32", "tuning.weight_decay=0", bits="w2a4")  # fmt: skip
        student = tune(teacher, attach(teacher, one), images)
        gap = wanted.exp() * (wanted - student(images.images).log_softmax(1))
        found.append(float(gap.sum(1).mean()))
    assert found[1] < 0.7 * found[0]


def test_the_loss_is_made_of_the_named_terms(teacher, tmp_path):
    for ce in (0, 2):
        path = tmp_path / f"{ce}.jsonl"
        with MetricsLog(path) as metrics:
            one = recipe("gdfq", f"tuning.losses.ce={ce}")
            tune_with_generator(teacher, attach(teacher, one), context=Context(metrics=metrics))
        last = read_metrics(path)[-1]
        assert last["step"] == 11
        assert ("ce" in last) == bool(ce)
        assert {"kl", "generator_ce", "generator_bns", "changed", "multiplier"} <= set(last)
        assert set(last["changed"]) == set(attach(teacher, one).layers())


def test_gradients_are_compared_as_often_as_asked(teacher, tmp_path):
    with MetricsLog(tmp_path / "m.jsonl") as metrics:
        one = recipe("gdfq", "tuning.agreement_every=4", "tuning.steps=9")
        tune_with_generator(teacher, attach(teacher, one), context=Context(metrics=metrics))
    records = [r for r in read_metrics(tmp_path / "m.jsonl") if r["stage"] == "agreement"]
    assert [r["step"] for r in records] == [6, 10, 14]
    assert all(-1 <= v <= 1 for r in records for v in r["kl,ce"].values())
    assert set(records[0]["kl,ce"]) == {"overall", *attach(teacher, one).layers()}


def test_comparing_gradients_changes_nothing(teacher):
    made = [
        tune_with_generator(teacher, attach(teacher, recipe("gdfq+ait", f"tuning.agreement_every={n}")))[0]
        for n in (0, 1)
    ]  # fmt: skip
    for name, tensor in made[0].network.state_dict().items():
        assert torch.equal(tensor, made[1].network.state_dict()[name])


def test_integers_that_ever_moved_are_counted(teacher, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "RECORD_EVERY", 1)
    start = attach(teacher, recipe()).freeze().layers()
    with MetricsLog(tmp_path / "m.jsonl") as metrics:
        settings = ["tuning.lr=0.05", "tuning.steps=8"]
        student, _ = tune_with_generator(
            teacher, attach(teacher, recipe("gdfq", *settings)), context=Context(metrics=metrics)
        )
    moved = [r["moved"] for r in read_metrics(tmp_path / "m.jsonl") if "moved" in r]
    assert len(moved) == 8
    assert max(moved[-1].values()) > 0
    for path, layer in student.layers().items():
        shares = [record[path] for record in moved]
        assert shares == sorted(shares), "what has moved stays counted"
        ended_elsewhere = (layer.frozen.integers != start[path].frozen.integers).float().mean()
        assert shares[-1] >= float(ended_elsewhere)


def test_inundation_moves_more_integers(teacher):
    frozen = {}
    for target in (0.0, 0.05):
        settings = [f"tuning.inundation.target={target}", "tuning.lr=1e-5", "tuning.milestones=[]",
                    "tuning.inundation.first_steps=0"]  # fmt: skip
        student, _ = tune_with_generator(teacher, attach(teacher, recipe("gdfq+ait", *settings)))
        frozen[target] = student.layers()
    start = attach(teacher, recipe()).freeze().layers()
    moved = {
        target: sum(int((layer.frozen.integers != start[n].frozen.integers).sum())
                    for n, layer in layers.items()) for target, layers in frozen.items()
    }  # fmt: skip
    assert moved[0.05] > 20 * max(moved[0.0], 1)


class StopError(Exception):
    pass


@pytest.mark.parametrize("name", ["gdfq+ait", "qimera"])
@pytest.mark.parametrize("after", [2, 4, 6, 9])
def test_an_interrupted_run_goes_on_to_the_same_weights(
    teacher, tmp_path, monkeypatch, name, after
):
    """In the warm-up, while ranges are tracked, at its end, and in training."""
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 1)
    whole, images = tune_with_generator(teacher, attach(teacher, recipe(name)))
    context = Context(checkpoints=Checkpoints(tmp_path))
    save = module.FineTuner.save

    def stop(self, done):
        save(self, done)
        if done == after:
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(module.FineTuner, "save", stop)
        with pytest.raises(StopError):
            tune_with_generator(teacher, attach(teacher, recipe(name)), context=context)
    torch.randn(7)  # the outer stream may be anywhere
    again, same = tune_with_generator(teacher, attach(teacher, recipe(name)), context=context)
    assert torch.equal(same.images, images.images)
    expected, found = whole.network.state_dict(), again.network.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[k], expected[k]) for k in expected)


@pytest.mark.parametrize("after", [4, 8])
@pytest.mark.parametrize("more", [(), ("average=0.8",)])
def test_fixed_images_resume_too(teacher, tmp_path, monkeypatch, more, after):
    monkeypatch.setattr(module, "CHECKPOINT_EVERY", 2)
    images = real(teacher)

    def recipe():
        return load_recipe("gdfq+ait", bits="w4a4",
                           settings=[*SMALL, *(f"tuning.{x}" for x in more)])  # fmt: skip

    whole = tune(teacher, attach(teacher, recipe()), images)
    context = Context(checkpoints=Checkpoints(tmp_path))
    save = module.FineTuner.save

    def stop(self, done):
        save(self, done)
        if done == after:
            raise StopError

    with monkeypatch.context() as patched:
        patched.setattr(module.FineTuner, "save", stop)
        with pytest.raises(StopError):
            tune(teacher, attach(teacher, recipe()), images, context=context)
    again = tune(teacher, attach(teacher, recipe()), images, context=context)
    assert all(
        torch.equal(v, again.network.state_dict()[k]) for k, v in whole.network.state_dict().items()
    )


def test_the_student_can_be_the_average_of_its_steps(teacher, monkeypatch):
    """Equal to a weighted sum of what every step left, the weights written out."""
    seen = []
    learn = module.FineTuner._learn

    def spy(self, *arguments, **named):
        result = learn(self, *arguments, **named)
        seen.append([p.detach().clone() for p in self.trained])
        return result

    monkeypatch.setattr(module.FineTuner, "_learn", spy)
    settings = ["tuning.average=0.25", "tuning.steps=5", "tuning.lr=1"]
    student = attach(teacher, recipe("gdfq", *settings))
    paths = list(student.layers())
    student = tune(teacher, student, real(teacher))
    decays = [0.0, 2 / 11, 3 / 12, 0.25, 0.25]
    weights = [(1 - d) * math.prod(decays[i + 1 :]) for i, d in enumerate(decays)]
    assert sum(weights) == pytest.approx(1)
    for i, path in enumerate(paths):
        mean = sum(w * step[i] for w, step in zip(weights, seen, strict=True))
        expected = MinMaxWeight(mean, 4)
        found = student.layers()[path].weight
        assert torch.allclose(found.scale, expected.scale, rtol=1e-4)
        assert (found.codes() == expected.codes()).float().mean() > 0.99
        assert not torch.allclose(found.scale, MinMaxWeight(seen[-1][i], 4).scale, rtol=1e-4)


def test_only_the_recipe_with_narrow_ranges_stops_gradients_where_it_clamps(teacher):
    for name, stops in (("hast", True), ("hast-reference", False), ("gdfq", False)):
        student = attach(teacher, recipe(name))
        assert {q.stop for q in student.quantizers().values()} == {stops}


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize(
    "name",
    ["gdfq-reference", "qimera-reference", "ait-reference", "hast-reference", "intraq-reference"],
)
def test_short_schedules_of_reference_recipes_differ_in_length_alone(name, large):
    full, quick = (
        load_recipe(name, schedule=s, large=large).model_dump() for s in ("full", "quick")
    )
    length = {"steps", "batch", "milestones", "range_steps", "range_start", "edge_margin", "images"}
    for part in ("synthesis", "tuning"):
        apart = {key for key in full[part] if full[part][key] != quick[part][key]}
        assert apart <= length
        assert "steps" in apart
    assert full["equalize"] == quick["equalize"] == 0


@pytest.mark.parametrize("large", [False, True])
def test_no_short_schedule_learns_many_times_as_fast_as_was_published(large):
    for name in recipe_names():
        full, quick = (load_recipe(name, schedule=s, large=large).tuning for s in ("full", "quick"))
        if isinstance(full, Finetuning):
            assert quick.lr <= 3.001 * full.lr, name


def test_quick_schedules_of_hast_keep_its_harder_images_and_only_one_begins_reconstructed():
    ours = load_recipe("hast", bits="w4a4", schedule="quick")
    theirs = load_recipe("hast-reference", bits="w4a4", schedule="quick")
    assert (ours.tuning.average, theirs.tuning.average) == (0.99, 0)
    assert (ours.equalize, theirs.equalize) == (0.5, 0)
    assert ours.tuning.start.steps == 500
    assert theirs.tuning.start is None
    assert theirs.tuning.lr == load_recipe("hast").tuning.lr == 1e-5
    assert (ours.synthesis.init_slope, ours.synthesis.lr) == (1.4, 0.1)
    for published in (theirs, load_recipe("hast")):
        assert (published.synthesis.init_slope, published.synthesis.lr) == (0, 0.5)
    assert ours.tuning.promotion is not None
    assert theirs.tuning.promotion.through_teacher
    assert (ours.tuning.clamped_gradient, theirs.tuning.clamped_gradient) == ("stop", "pass")


def test_nan_stops_with_the_term_and_the_step(teacher):
    broken = ImageSet(torch.full((8, 3, 8, 8), 3e38), torch.zeros(8, dtype=torch.long))
    with pytest.raises(RunError, match=r"step \d+ of finetune"):
        tune(teacher, attach(teacher, recipe()), broken)


def test_a_network_without_clamps_or_batch_norms_in_places_still_tunes():
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.SiLU(),
        torch.nn.Conv2d(4, 4, 3), torch.nn.ReLU6(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 5),
    )  # fmt: skip
    one = Teacher(network_of(net).requires_grad_(False), ModelInfo("mixed", (3, 8, 8)))
    student, _ = tune_with_generator(one, attach(one, recipe()))
    assert set(student.quantizers()) == {"hardtanh_default"} or len(student.quantizers()) == 1


def test_weights_may_be_all_there_is_to_learn():
    """Without batch norms and biases."""
    plain = Net(lambda n, x: n.a(x).relu(), a=conv(bias=False))
    plain.fc.bias = None
    bare = load_teacher(plain, input_shape=(3, 8, 8))
    student = attach(bare, recipe("gdfq", "tuning.steps=3"))
    before = student.layers()["a"].weight.master.clone()
    tuned = tune(bare, student, real(bare))
    assert not torch.equal(before, tuned.layers()["a"].weight())


def test_the_ait_recipes_differ_from_their_hosts_by_the_ait_lines_only():
    for host in ("gdfq", "qimera", "autorecon"):
        plain = json.loads(load_recipe(host).model_dump_json())
        ait = json.loads(load_recipe(f"{host}+ait").model_dump_json())
        differing = {k for k in plain if plain[k] != ait[k]}
        assert differing <= {"name", "title", "paper", "tuning", "large", "large_quick"}
        tuning = {k for k in plain["tuning"] if plain["tuning"][k] != ait["tuning"][k]}
        assert tuning == {"losses", "weight_decay", "inundation"}
    assert load_recipe("ait").tuning == load_recipe("gdfq+ait").tuning


def test_large_images_get_the_published_imagenet_settings():
    small, large = load_recipe("gdfq+ait"), load_recipe("gdfq+ait", large=True)
    assert (small.synthesis.conditional, large.synthesis.conditional) == (False, True)
    assert large.tuning.inundation.target == 1e-4
    assert load_recipe("gdfq", large=True).tuning.lr == 1e-6
    assert load_recipe("gdfq", large=True).synthesis.batch == 16
    assert isinstance(Recipe.model_validate(large.model_dump()), Recipe)
