# SPDX-License-Identifier: Apache-2.0
"""GENIE-D end to end on a small residual network, and its parts against torch's own."""

import json
import math

import pytest
import torch
from helpers.networks import Net, Residual, conv, randomise, with_own_statistics
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from zsq.config import GenieSynthesis
from zsq.errors import RunError, UsageError
from zsq.runtime.checkpoints import Checkpoints, load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.runtime.metrics import MetricsLog, read_metrics
from zsq.runtime.policy import Policy
from zsq.synthesis.batches import batch_sizes
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.plateau import Plateau
from zsq.teacher.teacher import load_teacher

QUICK = GenieSynthesis(images=6, batch=6, steps=2, latent=8)


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return randomise(Residual())


@pytest.fixture(scope="module")
def teacher(module):
    return load_teacher(module, input_shape=(3, 8, 8))


def settings(**changes):
    return QUICK.model_copy(update=changes)


# --- the loss ------------------------------------------------------------------------------------


def loss_by_torch(module, images):
    """GENIE-D's loss with statistics that torch's own batch norm collects in training mode."""
    total = 0.0
    terms = []

    def hook(part, args):
        mean, variance = torch.zeros(part.num_features), torch.ones(part.num_features)
        functional.batch_norm(args[0], mean, variance, training=True, momentum=1.0)
        wanted = torch.sqrt(part.running_var + 1e-6)
        terms.append(((mean - part.running_mean) ** 2 + (variance.sqrt() - wanted) ** 2).mean())

    hooks = [
        part.register_forward_pre_hook(hook)
        for part in module.modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        module(images)
    for each in hooks:
        each.remove()
    total = sum(terms)
    mean, std = images.mean((2, 3)), images.flatten(2).std(2)
    return float(total + (mean**2 + (std - 1) ** 2).sum(1).mean())


def test_the_loss_is_that_of_torchs_batch_norm_statistics(module, teacher):
    made = synthesize_genie(teacher, settings(steps=1, swing=False), Context())
    (loss,) = made.provenance["batch_losses"]
    assert loss == pytest.approx(loss_by_torch(module, made.images), rel=1e-4)


def test_the_kept_images_are_those_of_the_last_step(module, teacher):
    made = synthesize_genie(teacher, settings(steps=7, swing=False), Context())
    assert made.provenance["batch_losses"][0] == pytest.approx(
        loss_by_torch(module, made.images), rel=1e-4
    )


@pytest.fixture(scope="module")
def attainable():
    """A network whose stored statistics are those of images, so that a loss near 0 exists."""
    torch.manual_seed(0)
    return with_own_statistics(Residual())


@pytest.mark.parametrize("swing", [True, False])
def test_the_loss_falls(attainable, swing):
    teacher = load_teacher(attainable, input_shape=(3, 8, 8))
    made = [
        synthesize_genie(
            teacher, settings(steps=steps, swing=swing, images=32, batch=32), Context()
        )
        for steps in (1, 80)
    ]
    before, after = (m.provenance["batch_losses"][0] for m in made)
    assert after < 0.5 * before
    before, after = (loss_by_torch(attainable, m.images) for m in made)
    assert after < 0.5 * before


def test_bf16_convolutions_make_the_same_start(teacher):
    plain = synthesize_genie(teacher, settings(steps=1), Context())
    fast = synthesize_genie(
        teacher, settings(steps=1), Context(policy=Policy(dtype=torch.bfloat16))
    )
    assert fast.images.dtype == torch.float32
    assert fast.provenance["batch_losses"][0] == pytest.approx(
        plain.provenance["batch_losses"][0], rel=0.05
    )


def test_swing_changes_what_is_learned(teacher):
    made = [
        synthesize_genie(teacher, settings(steps=4, swing=swing), Context()).images
        for swing in (True, False)
    ]
    assert not torch.allclose(*made, atol=1e-3)


# --- what comes out ------------------------------------------------------------------------------


def test_images_labels_and_provenance(teacher):
    made = synthesize_genie(teacher, settings(images=7, batch=3), Context(seed=5))
    assert made.images.shape == (7, 3, 8, 8)
    assert made.images.dtype == torch.float32
    assert torch.equal(made.labels, teacher(made.images).argmax(1))
    assert made.check((3, 8, 8)) is made
    facts = json.loads(json.dumps(made.provenance))
    assert facts["seed"] == 5
    assert facts["model"] == teacher.info.reference
    assert facts["settings"]["images"] == 7
    assert len(facts["batch_losses"]) == 3


def test_the_teacher_stays_as_it_is(teacher):
    before = {k: v.clone() for k, v in teacher.network.state_dict().items()}
    synthesize_genie(teacher, settings(steps=3), Context())
    after = teacher.network.state_dict()
    assert all(torch.equal(after[k], v) for k, v in before.items())
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_seed_decides_everything(teacher):
    torch.manual_seed(1)
    first = synthesize_genie(teacher, QUICK, Context(seed=3))
    torch.manual_seed(2)
    again = synthesize_genie(teacher, QUICK, Context(seed=3))
    assert torch.equal(first.images, again.images)
    other = synthesize_genie(teacher, QUICK, Context(seed=4))
    assert not torch.allclose(first.images, other.images, atol=0.1)


def test_batches_do_not_depend_on_each_other(teacher):
    one = synthesize_genie(teacher, settings(images=6, batch=6), Context())
    two = synthesize_genie(teacher, settings(images=12, batch=6), Context())
    assert torch.equal(two.images[:6], one.images)
    assert not torch.allclose(two.images[6:], one.images, atol=0.1)


@pytest.mark.parametrize("parallel", [2, 3])
@pytest.mark.parametrize("swing", [True, False])
def test_batches_side_by_side_are_those_made_one_by_one(teacher, parallel, swing):
    one = settings(images=17, batch=6, steps=5, decay_every=2, plateau_patience=1, swing=swing)
    alone = synthesize_genie(teacher, one, Context())  # batches of 6, 6 and 5
    beside = synthesize_genie(teacher, one.model_copy(update={"parallel": parallel}), Context())
    torch.testing.assert_close(beside.images, alone.images, rtol=1e-3, atol=1e-3)
    assert beside.provenance["batch_losses"] == pytest.approx(
        alone.provenance["batch_losses"], rel=1e-3
    )
    assert not torch.allclose(beside.images[:6], beside.images[6:12], atol=0.1)


def test_batches_side_by_side_are_recorded_one_by_one(teacher, tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        three = settings(images=18, steps=3, parallel=2)
        made = synthesize_genie(teacher, three, Context(metrics=log))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["stage"] == "synthesis"]
    assert [(r["batch"], r["step"]) for r in records] == [
        (0, 0), (1, 3), (0, 2), (1, 5), (2, 6), (2, 8)
    ]  # fmt: skip
    last = [r["loss"] for r in records if r["step"] % 3 == 2]
    assert last == pytest.approx(made.provenance["batch_losses"])


def test_metrics_are_written_with_the_step_of_the_whole_run(teacher, tmp_path):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        synthesize_genie(teacher, settings(images=12, steps=3), Context(metrics=log))
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["stage"] == "synthesis"]
    assert [r["step"] for r in records] == [0, 2, 3, 5]
    assert all(math.isfinite(r["loss"]) for r in records)


# --- interruptions -------------------------------------------------------------------------------


class Killed(Checkpoints):
    """Checkpoints of a run that is killed right after it saved one."""

    def save(self, name, tensors):
        super().save(name, tensors)
        if name == self.last:
            raise KeyboardInterrupt


@pytest.mark.parametrize("parallel", [1, 2])
@pytest.mark.parametrize("last", ["synthesis_000", "synthesis_001"])
def test_a_resumed_run_ends_with_the_images_of_an_uninterrupted_one(
    teacher, tmp_path, last, parallel
):
    three = settings(images=9, batch=3, parallel=parallel)
    expected = synthesize_genie(teacher, three, Context())
    killed = Killed(tmp_path)
    killed.last = last
    with pytest.raises(KeyboardInterrupt):
        synthesize_genie(teacher, three, Context(checkpoints=killed))
    torch.manual_seed(99)  # another process starts with another generator
    resumed = synthesize_genie(teacher, three, Context(checkpoints=Checkpoints(tmp_path)))
    assert torch.equal(resumed.images, expected.images)
    assert torch.equal(resumed.labels, expected.labels)
    assert resumed.provenance == expected.provenance


def test_finished_batches_are_not_made_again(teacher, tmp_path):
    context = Context(checkpoints=Checkpoints(tmp_path))
    synthesize_genie(teacher, settings(images=6, batch=3), context)
    path = tmp_path / "synthesis_000.safetensors"
    tensors = load_tensors(path)[0]
    save_tensors(path, {**tensors, "images": torch.full_like(tensors["images"], 7.0)})
    again = synthesize_genie(teacher, settings(images=6, batch=3), context)
    assert bool((again.images[:3] == 7).all())
    assert not bool((again.images[3:] == 7).any())


def test_a_truncated_checkpoint_is_named_with_the_next_step(teacher, tmp_path):
    context = Context(checkpoints=Checkpoints(tmp_path))
    synthesize_genie(teacher, QUICK, context)
    path = tmp_path / "synthesis_000.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(UsageError, match=r"synthesis_000\.safetensors cannot be read.*--resume"):
        synthesize_genie(teacher, QUICK, context)


# --- what goes wrong -----------------------------------------------------------------------------


def test_a_loss_that_becomes_nan_stops_with_the_step_and_a_hint(teacher):
    with pytest.raises(
        RunError, match=r"became nan at or before step 2\. Lower synthesis\.latent_lr"
    ):
        synthesize_genie(teacher, settings(steps=3, latent_lr=1e38), Context())


def test_a_nan_is_seen_within_fifty_steps(teacher):
    with pytest.raises(RunError, match="became nan at or before step 50"):
        synthesize_genie(teacher, settings(steps=500, latent_lr=1e38), Context())


def test_a_network_without_batch_norms_is_refused():
    bare = load_teacher(Net(lambda n, x: n.c(x), c=conv()), input_shape=(3, 8, 8))
    with pytest.raises(UsageError, match="--images FOLDER"):
        synthesize_genie(bare, QUICK, Context())


def test_a_single_image_and_a_norm_of_vectors_is_no_crash():
    class Vectors(nn.Module):
        def __init__(self):
            super().__init__()
            self.c, self.f, self.bn = conv(), nn.Linear(4, 6), nn.BatchNorm1d(6)

        def forward(self, x):
            return self.bn(self.f(self.c(x).mean((2, 3))))

    vectors = load_teacher(randomise(Vectors()), input_shape=(3, 8, 8))
    synthesize_genie(vectors, settings(images=3, batch=2), Context())  # batches of 2 and 1


# --- batches and learning rates ------------------------------------------------------------------


@given(st.integers(1, 3000), st.integers(1, 300))
def test_batches_are_few_full_and_equal(images, batch):
    sizes = batch_sizes(images, batch)
    assert sum(sizes) == images
    assert len(sizes) == -(-images // batch)
    assert max(sizes) <= batch
    assert max(sizes) - min(sizes) <= 1


@given(
    st.lists(st.sampled_from([3.0, 1.0, 0.99995, 0.9998, 0.5, float("inf")]), max_size=60),
    st.integers(1, 5),
)
@example([1.0, *[0.99995] * 8], 3)  # not enough of an improvement
def test_the_plateau_rule_is_torchs(losses, patience):
    rate = torch.tensor(0.1, dtype=torch.float64)
    ours = Plateau(rate, patience)
    optimizer = torch.optim.Adam([torch.zeros(1)], lr=0.1)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        optimizer, patience=patience, threshold=1e-4, min_lr=1e-4
    )
    for loss in losses:
        ours.step(torch.tensor(loss, dtype=torch.float64))
        theirs.step(loss)
        assert rate.item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)


def test_the_generators_rate_decays_on_schedule(teacher):
    """With a decay of almost nothing after the first step, the generator stands still from then."""
    frozen = settings(steps=6, decay_every=1, generator_decay=1e-9, latent_lr=1e-12, swing=False)
    made = [
        synthesize_genie(teacher, frozen.model_copy(update={"steps": steps}), Context()).images
        for steps in (1, 3, 6)
    ]
    assert not torch.allclose(made[0], made[1], atol=1e-4)
    assert torch.allclose(made[1], made[2], atol=1e-4)
