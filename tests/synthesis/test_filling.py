# SPDX-License-Identifier: Apache-2.0
"""How many batches are made side by side."""

import dataclasses
import math

import pytest
import torch
from helpers.emulated_gpu import DEVICE, emulated_gpu
from helpers.networks import Residual, randomise
from hypothesis import given
from hypothesis import strategies as st

from zsq.config import GenieSynthesis, PixelSynthesis, load_recipe
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.group import Group
from zsq.runtime.policy import Policy, make_policy
from zsq.runtime.progress import QuietReporter
from zsq.synthesis import filling, genie, pixels
from zsq.synthesis.filling import Passes, batches_at_a_time
from zsq.synthesis.genie import synthesize_genie
from zsq.synthesis.pixels import synthesize_pixels
from zsq.teacher.teacher import load_teacher

GPU = Policy(DEVICE)


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    return load_teacher(randomise(Residual()), input_shape=(3, 8, 8))


# --- the rule ------------------------------------------------------------------------------------


@given(most=st.integers(1, 64), capacity=st.integers(1, 64))
def test_a_device_is_filled_and_not_more(most, capacity):
    """Of a device that does ``capacity`` batches in the time of one."""
    found = filling.filling(most, lambda count: max(1.0, count / capacity))
    rounds = math.ceil(most / found)
    assert 1 <= found <= most
    assert found == math.ceil(most / rounds)  # as even as so many rounds can be
    # no more rounds than the largest power of two within the capacity needs
    assert rounds <= math.ceil(most / min(most, 2 ** int(math.log2(capacity))))


def test_a_full_device_gets_one_batch_at_a_time():
    assert filling.filling(16, float) == 1
    hardly_faster = {1: 1.0, 2: 1.9}
    assert filling.filling(16, hardly_faster.__getitem__) == 1


def test_what_does_not_fit_is_not_chosen():
    asked = []

    def seconds(count):
        asked.append(count)
        return math.inf if count > 4 else 1.0

    assert filling.filling(16, seconds) == 4
    assert asked == [1, 2, 4, 8]


def test_nothing_is_measured_where_there_is_no_choice():
    assert filling.filling(1, lambda count: pytest.fail("measured")) == 1


# --- who is asked --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class First(Group):
    """Process 0 of a group, without the others."""

    def from_first(self, make):
        return make()


@pytest.fixture
def measured(monkeypatch):
    """Let a measurement say that all fit; return what it was asked."""
    asked = []

    def all_fit(most, passes, context):
        asked.append((most, passes.batch[0]))
        return most

    monkeypatch.setattr(filling, "_measured", all_fit)
    with emulated_gpu():
        yield asked


def test_a_recipe_has_the_last_word(teacher, measured):
    assert batches_at_a_time(3, [4] * 8, teacher, Context(policy=GPU)) == 3
    assert not measured


def test_a_cpu_is_not_measured(teacher, measured, tmp_path):
    context = Context(checkpoints=Checkpoints(tmp_path))
    assert batches_at_a_time(None, [4] * 8, teacher, context) == 1
    assert not measured
    assert not list(tmp_path.iterdir())


def test_only_batches_of_one_size_go_side_by_side(teacher, measured):
    assert batches_at_a_time(None, [5, 5, 4, 4, 4], teacher, Context(policy=GPU)) == 3
    assert measured == [(3, 5)]


def test_a_resumed_run_goes_on_with_what_was_measured(teacher, measured, tmp_path):
    context = Context(policy=GPU, checkpoints=Checkpoints(tmp_path))
    assert batches_at_a_time(None, [4] * 6, teacher, context) == 6
    assert batches_at_a_time(None, [4] * 6, teacher, context) == 6
    more = dataclasses.replace(context, group=First(size=6))  # as many processes as batches
    assert batches_at_a_time(None, [4] * 6, teacher, more) == 6
    assert measured == [(6, 4)]


def test_a_run_that_many_began_is_resumed_by_one(teacher, measured, tmp_path):
    many = Context(policy=GPU, checkpoints=Checkpoints(tmp_path), group=First(size=6))
    assert batches_at_a_time(None, [4] * 6, teacher, many) == 1
    assert batches_at_a_time(None, [4] * 6, teacher, dataclasses.replace(many, group=Group())) == 1


def test_no_process_is_left_without_batches(teacher, measured):
    found = batches_at_a_time(None, [4] * 10, teacher, Context(policy=GPU, group=First(size=4)))
    assert found == 3
    assert batches_at_a_time(None, [4] * 4, teacher, Context(policy=GPU, group=First(size=4))) == 1
    assert measured == [(3, 4), (1, 4)]


# --- the passes that are timed -------------------------------------------------------------------


def test_passes_go_forward_and_back(teacher):
    passes = Passes.of(teacher, 4, Policy())
    assert 0 < passes.seconds(2) < math.inf
    images = passes._blank(4)
    assert images.shape == (4, 3, 8, 8)
    (slope,) = torch.autograd.grad(passes._loss(images + torch.randn(4, 3, 8, 8)), images)
    assert bool((slope.flatten(1).abs().sum(1) > 0).all())


def test_memory_counts_for_every_image(teacher):
    one, two = (Passes.of(teacher, batch, Policy()).kept_bytes() for batch in (4, 8))
    assert two == 2 * one
    image = 3 * 8 * 8 * 4  # the least that is kept of one
    assert one > 4 * image


def test_too_little_memory_is_infinitely_slow(teacher):
    def full(images):
        raise torch.OutOfMemoryError

    passes = Passes.of(teacher, 4, Policy())
    assert dataclasses.replace(passes, tapped=full).seconds(1) == math.inf


class Notes(QuietReporter):
    def __init__(self):
        self.told = []

    def note(self, message):
        self.told.append(message)


def test_as_many_as_fit_the_memory(teacher, monkeypatch):
    monkeypatch.setattr(Passes, "seconds", lambda self, count: 1.0)
    passes = Passes.of(teacher, 4, Policy())
    needed = passes.kept_bytes()
    notes = Notes()
    for fit, expected in [(0, 1), (1, 1), (3, 3), (100, 8)]:
        context = Context(policy=Policy(memory=2 * fit * needed + needed), reporter=notes)
        assert filling._measured(8, passes, context) == expected
    assert len(notes.told) == 2
    assert "3 of the batches of 4 images are made side by side" in notes.told[0]


# --- what becomes of it --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["genie", "hast", "zeroq", "intraq"])
def test_recipes_leave_it_to_the_device(name):
    assert load_recipe(name).synthesis.parallel is None


@pytest.mark.parametrize(
    ("module", "make", "settings"),
    [
        (genie, synthesize_genie, GenieSynthesis(images=12, batch=4, steps=2, latent=8)),
        (pixels, synthesize_pixels, PixelSynthesis(images=12, batch=4, steps=2)),
    ],
)
def test_images_are_those_made_one_by_one(teacher, monkeypatch, module, make, settings):
    alone = make(teacher, settings, Context())
    monkeypatch.setattr(module, "batches_at_a_time", lambda *_: 3)
    beside = make(teacher, settings, Context())
    torch.testing.assert_close(beside.images, alone.images, rtol=1e-3, atol=1e-3)
    chosen = [made.provenance["settings"]["parallel"] for made in (alone, beside)]
    assert chosen == [1, 3]  # images say how they were made


@pytest.mark.gpu
def test_a_gpu_is_measured(teacher, tmp_path):
    settings = GenieSynthesis(images=32, batch=4, steps=3, latent=8)
    context = Context(
        policy=make_policy("cuda", "fp32", compile=False), checkpoints=Checkpoints(tmp_path)
    )
    made = synthesize_genie(teacher, settings, context)
    assert 1 <= made.provenance["settings"]["parallel"] <= 8
    alone = settings.model_copy(update={"parallel": 1})
    one_by_one = synthesize_genie(teacher, alone, Context(policy=context.policy))
    torch.testing.assert_close(made.images, one_by_one.images, rtol=1e-2, atol=1e-2)
