# SPDX-License-Identifier: Apache-2.0
"""Jobs that several processes do together, and that one does alone for comparison.

As a script, ``torchrun ranks.py FOLDER``, every process does all jobs and writes what each returned to
``FOLDER/JOB.RANK.safetensors``. A job takes the group and returns named tensors.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import pytest
import torch
from helpers import students
from helpers.students import image_set, labelled_images, recipe

from zsq.config import load_recipe
from zsq.runtime.checkpoints import SharedCheckpoints, load_tensors, save_tensors
from zsq.runtime.context import Context
from zsq.runtime.group import Group
from zsq.runtime.joining import joined
from zsq.stages import synthesize, tune
from zsq.student import attach
from zsq.synthesis.labels import Labels
from zsq.synthesis.learner import GeneratorLearner
from zsq.together import tune_with_generator
from zsq.tuning import finetune

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node"]
#: Short fine-tuning; 7 images a batch are 4 and 3 for two processes.
SHORT = ["tuning.steps=5", "tuning.range_steps=3", "tuning.batch=7", "tuning.lr=0.01",
         "synthesis.steps=4", "synthesis.batch=7", "synthesis.images=10"]  # fmt: skip
#: Pixels in three rounds, of 8, 8 and 6 images.
ROUNDS = ["synthesis.images=22", "synthesis.batch=8", "synthesis.steps=3"]


@cache
def teacher_of():
    return students.teacher_of()


def launch(processes, script, *arguments, seconds=110):
    """Run a script, or ``-m MODULE``, on several processes; return what it did and said."""
    roots = [str(Path(__file__).parents[2] / name) for name in ("src", "tests")]
    path = os.pathsep.join([*roots, os.environ.get("PYTHONPATH", "")])
    command = [*LAUNCH, str(processes), *script, *map(str, arguments)]
    return subprocess.run(
        command, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True,
        timeout=seconds, check=False,
    )  # fmt: skip


def results(folder, job, rank):
    return load_tensors(Path(folder) / f"{job}.{rank}.safetensors")[0]


# --- the group's own operations ------------------------------------------------------------------


def operations(group):
    rank, whole = group.rank, torch.arange(14.0).reshape(7, 2)
    part = group.part(whole)
    share = len(part) / len(whole)
    module = torch.nn.BatchNorm1d(3)
    torch.nn.init.constant_(module.weight, float(rank))
    group.align(module)
    given = {"mask": torch.tensor([True, False]), "none": torch.empty(0, 3), "one": torch.tensor(4)}
    told = group.share(given if rank == 0 else None)
    from_last = group.share({"x": torch.full((2,), float(rank))}, source=group.size - 1)
    mean = group.mean({"a": part.mean()}, share)["a"]
    return {
        "gathered": group.gather(part), "mean": mean, "align": module.weight.detach(),
        "ends": group.extremes(torch.stack(part.aminmax())), "mask": told["mask"],
        "none": told["none"], "one": told["one"], "from_last": from_last["x"],
        "said": group.first_says(torch.tensor([rank + 5])),
        "object": torch.tensor(group.from_first(lambda: 7 + rank)),
    }  # fmt: skip


def gradients(group):
    """A mean over images, and one of the whole batch's statistics, each with its gradient."""
    torch.manual_seed(0)
    images, weight = torch.randn(7, 4), torch.randn(4, 3, requires_grad=True)
    unused = torch.zeros(2, requires_grad=True)
    part = group.part(images)
    share = len(part) / 7
    (part @ weight).square().sum(1).mean().backward()
    group.sum_gradients([weight, unused], share)
    found = {"mean": weight.grad.clone()}
    weight.grad = None
    y = part @ weight
    mean, variance = group.pool(y.mean(0), y.var(0, correction=0), share)
    loss = (mean - 1).square().sum() + variance.square().sum() + y.cos().mean()
    (loss * share).backward()
    group.sum_gradients([weight])
    return found | {"pooled": weight.grad, "moments": torch.stack([mean, variance]).detach()}


# --- images --------------------------------------------------------------------------------------


def _images(group, name, *settings):
    made = synthesize(
        teacher_of(), load_recipe(name, settings=settings), context=Context(group=group)
    )
    return {"images": made.images, "labels": made.labels}


def genie(group):
    return _images(group, "genie", *ROUNDS)


def hast(group):
    return _images(group, "hast", *ROUNDS, "synthesis.parallel=2")


def intraq(group):
    return _images(group, "intraq", *ROUNDS)


# --- tuning --------------------------------------------------------------------------------------


def _weights(student):
    return {k: v.detach().clone().float() for k, v in student.network.state_dict().items()}


def _reconstructed(group, *settings):
    teacher = teacher_of()
    student = attach(teacher, recipe("tuning.batch=7", *settings))
    return _weights(tune(teacher, student, image_set(), context=Context(group=group)))


def reconstruction(group):
    """Without chance but for the order of the images, which all processes share."""
    return _reconstructed(group, "tuning.drop=0", "tuning.mix=0", "tuning.steps=8")


def dropping(group):
    return _reconstructed(group)


def _tuned(group, name, *settings):
    teacher = teacher_of()
    student = attach(teacher, load_recipe(name, bits="w4a4", settings=[*SHORT, *settings]))
    return _weights(tune(teacher, student, labelled_images(teacher), context=Context(group=group)))


def inundation(group):
    return _tuned(group, "gdfq+ait")


def promotion(group):
    return _tuned(group, "hast", "tuning.crop=null", "tuning.ranges=error")


def learning(group):
    """The generator's step on a given total batch of labels and noise."""
    torch.manual_seed(group.rank)  # whatever chance says, process 0's generator is everybody's
    teacher = teacher_of()
    settings = load_recipe("gdfq", settings=SHORT).synthesis
    learner = GeneratorLearner(teacher, settings, Context(group=group), 1)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in learner.generator.parameters():
            parameter.copy_(torch.randn(parameter.shape) * 0.05)
    classes, noise = torch.randint(5, (7, 1)), torch.randn(7, 100)
    learner.draw_labels = lambda: Labels(group.part(classes), group.part(torch.ones(7, 1)))
    learner.generator.draw_noise = lambda labels: group.part(noise)
    batch = learner.next(1.0)
    slopes = {f"slope.{k}": p.grad for k, p in learner.generator.named_parameters()}
    return slopes | {
        "images": group.gather(batch.images), "distance": batch.terms["generator_bns"],
    }  # fmt: skip


def together(group, *settings):
    """A generator and a student that learn together, with mixtures of classes and inundation."""
    teacher = teacher_of()
    chosen = load_recipe("qimera+ait", bits="w4a4", settings=[*SHORT, *settings])
    student, kept = tune_with_generator(
        teacher, attach(teacher, chosen), context=Context(group=group)
    )
    return _weights(student) | {"kept": kept.images}


def starting(group):
    """The same, the student beginning with weights reconstructed from the generator's images."""
    return together(group, "tuning.start.steps=4", "tuning.start.batch=4", "synthesis.images=8")


def _stopped_at(last, save):
    def save_and_stop(self, done):
        save(self, done)
        if done == last:
            raise InterruptedError

    return save_and_stop


def resumed(group):
    """Fine-tuning with a learning generator, whole and interrupted after six of its nine steps."""
    teacher = teacher_of()
    chosen = load_recipe("gdfq+ait", bits="w4a4", settings=SHORT)
    found = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        pytest.MonkeyPatch.context() as patched,
    ):
        patched.setattr(finetune, "CHECKPOINT_EVERY", 2)
        for run, last in (("whole", None), ("stopped", 6), ("stopped", None)):
            mine = Path(folder) / run if group.rank == 0 else None
            context = Context(checkpoints=SharedCheckpoints(mine, group), group=group)
            with patched.context() as stopping, contextlib.suppress(InterruptedError):
                if last:
                    stopping.setattr(
                        finetune.FineTuner, "save", _stopped_at(last, finetune.FineTuner.save)
                    )
                student, kept = tune_with_generator(
                    teacher, attach(teacher, chosen), context=context
                )
                weights = _weights(student) | {"kept": kept.images}
                found |= {f"{run}.{k}": v for k, v in weights.items()}
    return found


JOBS = [operations, gradients, genie, hast, intraq, reconstruction, dropping, inundation, promotion,
        learning, together, starting, resumed]  # fmt: skip


def alone(job):
    """Do a job on one process."""
    return job(Group())


def main(folder):
    with joined("cpu", lambda error: print(error, file=sys.stderr)) as group:
        for job in JOBS:
            save_tensors(Path(folder) / f"{job.__name__}.{group.rank}.safetensors", job(group))


if __name__ == "__main__":
    main(sys.argv[1])
