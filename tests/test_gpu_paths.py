# SPDX-License-Identifier: Apache-2.0
"""What only a GPU runs, on an emulated one: what lies where, and what is waited for."""

import shutil
from collections import Counter
from contextlib import contextmanager
from functools import reduce

import pytest
import torch
from helpers.emulated_gpu import DEVICE, OnGpu, emulated_gpu
from helpers.kills import Killed
from helpers.networks import Residual, with_own_statistics
from helpers.runs import write_images
from helpers.watching import WATCHED, watch
from torch import nn

import zsq
from zsq.bench import peak
from zsq.bench.loops import Job
from zsq.bench.measure import LOOPS, Request, measure
from zsq.bits.choose import choose_bits
from zsq.config import load_recipe
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.policy import make_policy
from zsq.stages import produce
from zsq.synthesis.images import ImageSet
from zsq.synthesis.search import SearchSettings, search_architecture
from zsq.teacher.teacher import load_teacher
from zsq.tuning import finetune

TOY = {
    "synthesis.images": 8, "synthesis.batch": 4, "synthesis.steps": 3,
    "tuning.steps": 3, "tuning.batch": 4, "tuning.start.steps": 2,
}  # fmt: skip
RECIPES = [
    "genie",
    "adaround",
    "hast+ait",
    "intraq",
    "gdfq+ait",
    "qimera",
    "autorecon+ait",
    "zeroq",
]


@pytest.fixture(scope="module")
def module():
    torch.manual_seed(0)
    return with_own_statistics(Residual())


@pytest.fixture(scope="module")
def teacher(module):
    return load_teacher(module, input_shape=(3, 8, 8))


def toy(name, **changes):
    recipe = load_recipe(name, schedule="quick", bits="w4a4")
    settings = []
    for key, value in (TOY | changes).items():
        *parts, field = key.split(".")
        if hasattr(reduce(lambda holder, part: getattr(holder, part, None), parts, recipe), field):
            settings.append(f"{key}={value}")
    return load_recipe(name, schedule="quick", bits="w4a4", settings=settings)


# --- the emulation itself ------------------------------------------------------------------------


def test_two_places_do_not_mix():
    with emulated_gpu():
        here, there = torch.ones(2), torch.ones(2, device=DEVICE)
        assert there.device == DEVICE
        assert float((there + 1.0 + torch.tensor(1.0)).sum()) == 6  # numbers may come from the host
        with pytest.raises(RuntimeError, match=r"same device.*cuda:0 and cpu"):
            here + there
        with pytest.raises(RuntimeError, match="same device"):
            torch.stack([torch.tensor(1.0), torch.tensor(1.0, device=DEVICE)])
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(2, device=DEVICE, generator=torch.Generator())
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_what_makes_the_host_wait_is_noted():
    with emulated_gpu() as waits:
        x = torch.arange(4.0).to(DEVICE, non_blocking=True)
        y = x[torch.arange(2, device=DEVICE)] * 2
        y[0] = 3.0
        assert not waits
        for count, wait in enumerate(
            [
                lambda: float(y.sum()), y.tolist, y.cpu, lambda: torch.ones(1).to(DEVICE), lambda: y[y > 1],
                lambda: y[torch.tensor([0])], lambda: y.copy_(torch.ones(2)), lambda: bool(y[0] > 0),
            ],
            start=1,
        ):  # fmt: skip
            wait()
            assert len(waits) == count


def test_a_network_learns_there_as_on_the_cpu():
    def learned(device):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU()).to(device)
        optimizer = torch.optim.Adam(network.parameters(), fused=True)
        for _ in range(3):
            x = torch.randn(4, 2, 5, 5).to(device)
            optimizer.zero_grad()
            network(x).square().sum().backward()
            optimizer.step()
        assert isinstance(network[0].weight, OnGpu) == (device != "cpu")
        return {name: value.cpu() for name, value in network.state_dict().items()}

    with emulated_gpu():
        there = learned(DEVICE)
    here = learned("cpu")
    assert all(torch.equal(there[name], here[name]) for name in here)


# --- recipes -------------------------------------------------------------------------------------


def gpu(**options):
    return make_policy("cuda:0", "fp32", compile=False, **options)


CPU = make_policy("cpu", "fp32", compile=False)


def produced(teacher, recipe, policy, checkpoints=None):
    """Return a run's images, the codes of its weights and the steps of its activations."""
    context = Context(seed=1, policy=policy, checkpoints=checkpoints or Checkpoints())
    student, images = produce(teacher, recipe, None, context)
    student = student.to("cpu")
    codes = [layer.weight.codes() for layer in student.layers().values()]
    steps = torch.stack([q.scale for q in student.quantizers().values()])
    assert not any(isinstance(x, OnGpu) for x in (images.images, *codes, steps))
    return images.images, torch.cat([c.flatten() for c in codes]), steps


def assert_alike(there, here):
    torch.testing.assert_close(there[0], here[0], rtol=1e-3, atol=1e-3)
    assert float((there[1] == here[1]).float().mean()) > 0.98  # a search may be decided by rounding
    torch.testing.assert_close(there[2], here[2], rtol=0.05, atol=1e-3)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_do_on_a_gpu_what_they_do_on_a_cpu(teacher, name):
    with emulated_gpu():
        there = produced(teacher, toy(name), gpu())
    assert_alike(there, produced(teacher, toy(name), CPU))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("genie", {"tuning.importance": "fisher"}),
        ("genie", {"synthesis.parallel": 1}),
        ("hast", {"synthesis.parallel": 2}),
        ("gdfq", {"synthesis.conditional": "true"}),
    ],
)
def test_settings_do_so_too(teacher, name, changes):
    recipe = toy(name, **changes)
    with emulated_gpu():
        there = produced(teacher, recipe, gpu())
    assert_alike(there, produced(teacher, recipe, CPU))


@pytest.mark.parametrize("name", ["genie", "adaround"])
def test_a_small_gpu_is_fed_from_the_host(teacher, name):
    with emulated_gpu(free=1 << 16) as waits:
        there = produced(teacher, toy(name), gpu(memory=1 << 12))
    assert_alike(there, produced(teacher, toy(name), CPU))
    assert not [w for w in waits if w.line.startswith("runtime/fetching")]


@pytest.mark.parametrize(
    ("name", "last"),
    [
        ("genie", "synthesis_000"),
        ("genie", "piece_001"),
        ("gdfq+ait", "finetune"),
        ("hast", "finetune"),
    ],
)
def test_a_run_on_a_gpu_is_resumed(teacher, tmp_path, monkeypatch, name, last):
    monkeypatch.setattr(finetune, "CHECKPOINT_EVERY", 1)
    recipe = toy(name)
    with emulated_gpu():
        whole = produced(teacher, recipe, gpu(), Checkpoints(tmp_path / "whole"))
        with pytest.raises(KeyboardInterrupt):
            produced(teacher, recipe, gpu(), Killed(tmp_path / "killed", last))
        resumed = produced(teacher, recipe, gpu(), Checkpoints(tmp_path / "killed"))
    assert all(torch.equal(a, b) for a, b in zip(resumed, whole, strict=True))


# --- what is waited for --------------------------------------------------------------------------


@contextmanager
def _noted(waits, found):
    before = len(waits)
    yield
    found.extend(waits[before:])


@pytest.mark.parametrize("name", LOOPS)
def test_loops_do_not_wait_for_the_device_in_steady_state(teacher, name):
    """The same as on a GPU proper (tests/bench/test_syncs.py), without compiled code."""
    found = []
    with emulated_gpu() as waits:
        part = next(LOOPS[name](Job(teacher, gpu(), batch=8)))
        watch(part.drive, part.skip, _noted(waits, found))
    assert found == []


def test_a_loop_that_waits_is_found_out():
    found = []

    def drive(tick):
        value = torch.ones((), device=DEVICE)
        while True:
            float(value)
            tick(1)

    with emulated_gpu() as waits:
        watch(drive, 0, _noted(waits, found))
    assert len(found) == WATCHED


@pytest.mark.parametrize("name", ["genie", "hast+ait", "gdfq+ait"])
def test_no_step_of_a_run_waits_for_the_device(teacher, name):
    """Between two looks at a loss; setting up, checkpoints and results do wait."""

    def waits_of(steps):
        changes = {"synthesis.steps": steps, "tuning.steps": steps, "tuning.start.steps": steps}
        recipe = toy(name, **changes, **{"synthesis.parallel": 2})
        with emulated_gpu() as waits:
            produced(teacher, recipe, gpu())
        return Counter(waits)

    assert waits_of(12) == waits_of(4)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOPS)
def test_loops_are_measured_on_a_gpu(monkeypatch, name):
    monkeypatch.setitem(peak.SIDES, "cuda", 64)
    asked = Request(
        "zsq:resnet20_cifar10", name, batch=4, steps=1, device="cuda:0", precision="fp32",
        compile=False, plain=True,
    )  # fmt: skip
    with emulated_gpu():
        found = measure(asked, lambda note: None)
    assert found["memory_kind"] == "allocated on the GPU"
    assert min(found[name] for name in ("seconds", "ratio_to_bare", "speedup_over_plain")) > 0


# --- everything else that takes a device ---------------------------------------------------------


def test_bits_are_chosen_on_a_gpu(teacher):
    pictures = ImageSet(torch.randn(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))

    def chosen(policy):
        return choose_bits(
            teacher, "4.0", toy("zeroq"), activations=4, images=pictures,
            context=Context(policy=policy),
        )  # fmt: skip

    with emulated_gpu():
        there = chosen(gpu())
    here = chosen(CPU)
    assert there.layers == here.layers
    assert there.edges.edges == here.edges.edges


@pytest.fixture(scope="module")
def finished(module, tmp_path_factory):
    """A fine-tuned run, made on the CPU."""
    out = tmp_path_factory.mktemp("runs") / "run"
    zsq.quantize(module, toy("gdfq"), input_shape=(3, 8, 8), out=out, report=False)
    return out


def test_a_run_is_examined_on_a_gpu(finished):
    with emulated_gpu():
        there = zsq.diagnose(finished, images=4, context=Context(policy=gpu()))
    here = zsq.diagnose(finished, images=4, context=Context(policy=CPU))
    assert there.divergence == pytest.approx(here.divergence, rel=1e-3)
    ours, theirs = ({i.name: i.without for i in each.items} for each in (there, here))
    assert ours == pytest.approx(theirs, rel=1e-2)


def test_a_landscape_is_drawn_on_a_gpu(finished):
    def drawn(policy):
        return zsq.analyse(
            finished, images=4, probes=2, eigenvalues=1, points=3, context=Context(policy=policy)
        )

    with emulated_gpu():
        there = drawn(gpu())
    shutil.rmtree(finished / "analysis")
    here = drawn(CPU)
    torch.testing.assert_close(there.plane.values, here.plane.values, rtol=1e-3, atol=1e-4)
    for name, trace in here.curvature.traces.items():
        assert there.curvature.traces[name].value == pytest.approx(trace.value, rel=1e-2)


def test_a_run_is_evaluated_on_a_gpu(finished, tmp_path):
    def found(device):
        norm = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
        return zsq.evaluate(finished, pictures, device=device, simulated=0, **norm)

    pictures = write_images(tmp_path / "images")
    with emulated_gpu():
        there = found("cuda:0")
    assert there == found("cpu")


def test_a_whole_run_ends_with_a_file_and_a_report(module, tmp_path):
    with emulated_gpu():
        zsq.quantize(
            module, toy("genie"), device="cuda:0", precision="fp32", compile=False,
            input_shape=(3, 8, 8), out=tmp_path / "run",
        )  # fmt: skip
    made = {file.name for file in (tmp_path / "run").iterdir()}
    assert {"model.onnx", "integer.safetensors", "diagnosis.json", "report.html"} <= made


def test_an_architecture_is_searched_on_a_gpu(teacher):
    def found(policy):
        settings = SearchSettings(steps=2, batch=4)
        return search_architecture(teacher, settings, Context(policy=policy))

    with emulated_gpu():
        there = found(gpu())
    assert there == found(CPU)
