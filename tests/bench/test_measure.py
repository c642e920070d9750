# SPDX-License-Identifier: Apache-2.0
"""Every loop, measured on a tiny network."""

import time
from dataclasses import replace

import pytest
from helpers.runs import write_model

from zsq.bench import LOOPS, Request, bench, synthesis
from zsq.bench.loops import Job
from zsq.bench.measure import measure
from zsq.bench.peak import SIDES
from zsq.errors import UsageError
from zsq.runtime.policy import Policy
from zsq.teacher.inspect import count_macs
from zsq.teacher.taps import batch_norm_nodes
from zsq.teacher.teacher import load_teacher
from zsq.tuning import pieces
from zsq.tuning.inundation import InundatedSGD

BATCH = 4


@pytest.fixture(scope="module")
def request_(tmp_path_factory):
    model = write_model(tmp_path_factory.mktemp("model"))
    return Request(model, batch=BATCH, steps=2, precision="fp32", compile=False, plain=True)


@pytest.fixture(scope="module")
def found(request_):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIDES, "cpu", 512)
        return {name: measure(replace(request_, loop=name), print) for name in LOOPS}


@pytest.fixture(scope="module")
def job(request_):
    return Job(load_teacher(request_.model), Policy(), BATCH)


@pytest.mark.parametrize("name", LOOPS)
def test_figures_follow_from_each_other(found, name):
    row = found[name]
    steps = len(row.get("parts", [0]))
    assert row["steps_per_second"] == pytest.approx(steps / row["seconds"])
    assert row["images_per_second"] == pytest.approx(BATCH * row["steps_per_second"])
    assert row["flops_per_second"] == pytest.approx(row["flops"] / row["seconds"])
    assert row["share_of_peak"] == pytest.approx(row["flops_per_second"] / row["matmul_peak"])
    assert row["ratio_to_bare"] == pytest.approx(row["seconds"] / row["bare"]["seconds"])
    assert row["speedup_over_plain"] == pytest.approx(row["plain"]["seconds"] / row["seconds"])
    assert 0 < row["share_of_peak"] < 1.5
    assert 0 < row["bare"]["share_of_peak"] < 1.5
    assert (row["batch"], row["precision"], row["compiled"]) == (BATCH, "float32", False)
    assert row["peak_memory_bytes"] is None or row["peak_memory_bytes"] >= 0


def test_frozen_passes_are_twice_the_forward_pass_less_the_first_gradient(found, job):
    macs = sum(count_macs(job.teacher.network, job.teacher.info.input_shape).values())
    assert found["pixels"]["flops"] == 2 * 2 * macs * BATCH


def test_fine_tuning_is_generator_teacher_and_a_student_that_learns(found, job):
    macs = count_macs(job.teacher.network, job.teacher.info.input_shape)
    first = next(iter(macs.values()))
    student = 3 * sum(macs.values()) - first  # no gradient of the images
    teacher = 2 * sum(macs.values())
    generator = found["finetuning"]["flops"] / (2 * BATCH) - student - teacher
    assert generator > 0
    assert generator == found["finetuning"]["flops"] // (2 * BATCH) - student - teacher


def test_blocks_add_up_to_the_network(found, job):
    row = found["reconstruction"]
    macs = sum(count_macs(job.teacher.network, job.teacher.info.input_shape).values())
    assert sum(part["seconds"] for part in row["parts"]) == pytest.approx(row["seconds"])
    assert sum(part["flops"] for part in row["parts"]) == row["flops"]
    # forward and the weights' gradients everywhere, the inputs' behind each block's first layer
    assert 2 * 2 * macs * BATCH < row["flops"] < 3 * 2 * macs * BATCH
    assert row["schedule_seconds"] == pytest.approx(20000 * row["seconds"])


def test_pieces_of_too_many_layers_are_measured_in_parts(request_, monkeypatch):
    monkeypatch.setitem(SIDES, "cpu", 512)
    blocks = measure(replace(request_, loop="reconstruction", plain=False), print)
    monkeypatch.setattr(pieces, "MAX_LAYERS", 2)
    parts = measure(replace(request_, loop="reconstruction", plain=False), print)
    assert (len(blocks["parts"]), len(parts["parts"])) == (4, 6)


@pytest.mark.parametrize("compiled", [0.02, 0.001])
def test_bare_passes_are_compiled_or_eager_whichever_is_faster(request_, monkeypatch, compiled):
    def bare(policy, images, compile):
        return lambda: time.sleep(compiled if compile else 0.008)

    def loop(job):
        for part in LOOPS["pixels"](job):
            yield replace(part, compiled=True, bare=bare)

    monkeypatch.setitem(LOOPS, "sleepy", loop)
    monkeypatch.setitem(SIDES, "cpu", 512)
    row = measure(replace(request_, loop="sleepy"), print)
    assert row["bare"]["seconds"] == pytest.approx(min(compiled, 0.008), abs=0.004)


class EnoughSeenError(Exception):
    """Ends a loop."""


def plain_losses(part, steps):
    """Let a loop get under way; return the losses of its plain version."""
    losses, ticks = [], []

    def tick(count):
        ticks.append(count)
        if len(ticks) > part.skip:
            step = part.plain()
            losses.extend(float(step()) for _ in range(steps))
            raise EnoughSeenError

    with pytest.raises(EnoughSeenError):
        part.drive(tick)
    return losses


@pytest.mark.parametrize("name", ["genie", "pixels", "reconstruction"])
def test_plain_loops_learn(job, name):
    for part in LOOPS[name](job):
        losses = plain_losses(part, 40)
        assert sum(losses[-10:]) < sum(losses[:10]), part.name


def test_the_plain_fine_tuning_changes_integers(job, monkeypatch):
    rates, step = [], InundatedSGD.step

    def watched(self, lr, target=0.0, **options):
        before = [weight.codes().clone() for weight in self._weights]
        step(self, lr, target, **options)
        rates.append(
            sum(int((w.codes() != b).sum()) for w, b in zip(self._weights, before, strict=True))
        )

    (part,) = LOOPS["finetuning"](job)
    monkeypatch.setattr(InundatedSGD, "step", watched)
    losses = plain_losses(part, 4)
    assert all(loss >= 0 for loss in losses)
    assert sum(rates[-4:]) > 0


def test_the_bare_networks_teacher_is_frozen_and_a_copy(job):
    network = job.network(Policy())
    assert not any(p.requires_grad for p in network.parameters())
    assert network is not job.teacher.network
    assert batch_norm_nodes(network)


def test_a_schedule_covers_all_images(request_, monkeypatch):
    monkeypatch.setitem(SIDES, "cpu", 64)
    asked = replace(request_, loop="pixels", images=3 * BATCH, plain=False)
    row = measure(asked, print)
    assert row["schedule_seconds"] == pytest.approx(3 * 1000 * row["seconds"])
    assert "plain" not in row


@pytest.mark.parametrize(
    ("change", "message"),
    [({"loop": "nonsense"}, "genie, pixels"), ({"batch": 1}, "--batch 1"), ({"steps": 0}, "--steps 0"),
     ({"images": 1}, "--images 1")],
)  # fmt: skip
def test_bad_requests_are_refused(change, message):
    with pytest.raises(UsageError, match=message):
        bench(replace(Request("zsq:resnet20_cifar10"), **change), [change.get("loop", "genie")])


@pytest.mark.parametrize("loop", ["genie", "pixels"])
def test_a_step_is_one_of_one_batch_however_many_would_fill_the_device(request_, loop, monkeypatch):
    """The bare passes beside it, its FLOPs and the planned steps are those of one batch."""
    asked = []
    monkeypatch.setattr(
        synthesis, f"synthesize_{loop}", lambda teacher, settings, _: asked.append(settings)
    )
    job = Job(load_teacher(request_.model), Policy(), BATCH, 4 * BATCH)
    (part,) = LOOPS[loop](job)
    part.drive(lambda _: None)
    assert (asked[0].images, asked[0].batch, asked[0].parallel) == (4 * BATCH, BATCH, 1)
    assert part.schedule == 4 * asked[0].steps
