# SPDX-License-Identifier: Apache-2.0
"""Images of several methods, or of several runs, in one set."""

import json
from itertools import pairwise

import pytest
import torch
import yaml
from helpers.runs import SHAPE, write_model, zsq, zsq_json
from safetensors.torch import load_file

from zsq.config import Recipe, load_recipe, to_yaml
from zsq.errors import UsageError
from zsq.runtime.checkpoints import Checkpoints
from zsq.runtime.context import Context
from zsq.runtime.metrics import read_metrics
from zsq.runtime.seeds import derive_seed
from zsq.stages import synthesize
from zsq.synthesis.images import ImageSet
from zsq.teacher.teacher import load_teacher

PARTS = "synthesis={method: mixed, images: 16, steps: 3, batch: 8, parts: [hast, genie, gdfq]}"
FEW = ["--set", PARTS, "--set", "tuning.steps=2", "--set", "tuning.batch=8", "--set", "tuning.range_steps=2",
       "--no-compile", "--precision", "fp32", "--no-report"]  # fmt: skip


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path)


def arguments(model, run, *more):
    return [
        "quantize",
        model,
        "--recipe",
        "mixed",
        "--bits",
        "w4a4",
        *SHAPE,
        *FEW,
        "-o",
        run,
        *more,
    ]


def mixed(settings):
    return load_recipe("genie", schedule="quick", settings=[f"synthesis={settings}"]).synthesis


def test_named_parts_are_the_synthesis_of_those_recipes():
    made = mixed("{method: mixed, images: 9, parts: [hast, intraq, genie]}")
    own = [
        load_recipe(name, schedule="quick").synthesis.model_copy(update={"images": 3})
        for name in ("hast", "intraq", "genie")
    ]
    assert list(made.parts) == own


def test_the_packaged_recipe_mixes_images_and_trains_like_hast():
    for schedule in ("quick", "full"):
        recipe, hast = (load_recipe(name, schedule=schedule) for name in ("mixed", "hast"))
        assert recipe.tuning == hast.tuning
        assert recipe.protocol == hast.protocol
        assert recipe.equalize == hast.equalize
        assert [part.method for part in recipe.synthesis.parts] == ["pixels", "pixels", "genie"]
        assert recipe.synthesis.parts[0].losses == hast.synthesis.losses
    large = load_recipe("mixed", large=True).synthesis.parts
    assert large[0] == load_recipe("hast", large=True).synthesis.model_copy(
        update={"images": large[0].images}
    )


@pytest.mark.parametrize(
    ("images", "shares"), [(7, [3, 2, 2]), (3, [1, 1, 1]), (1024, [342, 341, 341])]
)
def test_images_are_shared_out_whatever_a_part_says(images, shares):
    made = mixed(
        f"{{method: mixed, images: {images}, parts: [genie, {{images: 99}}, {{method: pixels}}]}}"
    )
    assert [part.images for part in made.parts] == shares
    assert sum(shares) == images


def test_steps_and_batch_are_every_parts_where_they_are_given():
    made = mixed("{method: mixed, steps: 7, batch: 5, parts: [hast, genie]}")
    assert {(part.steps, part.batch) for part in made.parts} == {(7, 5)}
    made = mixed("{method: mixed, parts: [{steps: 11}, {steps: 12, batch: 6}]}")
    assert [(part.steps, part.batch) for part in made.parts] == [(11, 128), (12, 6)]


def test_settings_change_a_mixture_that_was_resolved_before():
    recipe = load_recipe("mixed", schedule="quick")
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe
    fewer = load_recipe(recipe, settings=["synthesis.images=30"]).synthesis
    assert [part.images for part in fewer.parts] == [10, 10, 10]


def test_a_mixture_that_a_recipe_extends_is_replaced_whole(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: mixed\nsynthesis: {method: genie, steps: 5}\n")
    for schedule in ("quick", "full"):
        recipe = load_recipe(tmp_path / "mine.yaml", schedule=schedule, large=True)
        assert (recipe.synthesis.method, recipe.synthesis.steps) == ("genie", 5)
        assert recipe.tuning == load_recipe("hast", schedule=schedule, large=True).tuning


def test_what_is_no_settings_in_an_heir_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("extends: mixed\nsynthesis: genie\n")
    with pytest.raises(UsageError, match="recipe setting 'synthesis' \\(='genie'\\)"):
        load_recipe(tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("{method: mixed}", "parts.*Field required"),
        ("{method: mixed, parts: []}", "at least 1"),
        ("{method: mixed, parts: [hasst]}", "'hasst' is neither"),
        ("{method: mixed, parts: [mixed]}", "name its parts instead"),
        (
            "{method: mixed, parts: [{method: mixed, parts: [hast]}]}",
            "'genie', 'generator', 'pixels'",
        ),
        ("{method: mixed, images: 2, parts: [hast, genie, gdfq]}", "fewer than the 3 parts"),
        ("{method: mixed, images: many, parts: [hast]}", r"synthesis\.images.*valid integer"),
        ("{method: mixed, batch: 1, parts: [hast]}", r"synthesis\.batch"),
        (
            "{method: mixed, parts: [hast, {method: pixels, loses: {}}]}",
            "did you mean 'synthesis.parts.1.losses'",
        ),
        ("{method: mixed, parts: [hast], latent: 3}", r"synthesis\.latent.*no such setting"),
    ],
)
def test_mixtures_that_cannot_be_made_are_refused(settings, message):
    with pytest.raises(UsageError, match=message) as caught:
        mixed(settings)
    assert len(str(caught.value)) < 400


def found(images, image):
    """Return where an image is among others."""
    return int((images == image).flatten(1).all(1).nonzero())


def test_each_part_is_what_its_method_makes_alone(model):
    teacher = load_teacher(model, input_shape=(3, 8, 8))
    recipe = load_recipe("mixed", settings=[PARTS])
    made = synthesize(teacher, recipe, context=Context(seed=3))
    assert made.provenance["images"] == [6, 5, 5]
    assert made.provenance["synthetic"]
    for index, part in enumerate(recipe.synthesis.parts, start=1):
        alone = synthesize(
            teacher, Recipe(synthesis=part), context=Context(seed=derive_seed(3, f"part {index}"))
        )
        places = [found(made.images, image) for image in alone.images]
        assert places == sorted(places)
        assert len(set(places)) == part.images
        assert max(b - a for a, b in pairwise([-1, *places, len(made)])) <= 4, "evenly mixed"
        assert torch.equal(made.labels[places], alone.labels)
        assert made.provenance["parts"][index - 1] == alone.provenance


def test_a_method_that_is_named_twice_makes_other_images_each_time(model):
    teacher = load_teacher(model, input_shape=(3, 8, 8))
    settings = ["synthesis={method: mixed, images: 8, steps: 2, parts: [hast, hast]}"]
    made = synthesize(teacher, load_recipe("genie", settings=settings), context=Context(seed=0))
    assert len({tuple(image.flatten().tolist()) for image in made.images}) == 8


def test_interrupted_anywhere_and_resumed_a_run_ends_with_the_same_images_and_weights(
    model, tmp_path, monkeypatch, capsys
):
    code, _, err = zsq(monkeypatch, capsys, *arguments(model, tmp_path / "whole"))
    assert code == 0, err
    stages = {r["stage"] for r in read_metrics(tmp_path / "whole" / "metrics.jsonl")}
    assert {f"synthesis part {i}" for i in (1, 2, 3)} <= stages
    whole = {
        n: load_file(tmp_path / "whole" / n) for n in ("images.safetensors", "student.safetensors")
    }
    save = Checkpoints.save
    for pieces in (1, 2, 3):
        saved = []

        def save_and_stop(self, name, *rest, saved=saved, pieces=pieces):
            save(self, name, *rest)
            saved.append(name)
            if len(saved) == pieces:
                raise KeyboardInterrupt

        run = tmp_path / f"cut{pieces}"
        with monkeypatch.context() as patched:
            patched.setattr(Checkpoints, "save", save_and_stop)
            assert zsq(patched, capsys, *arguments(model, run))[0] == 130
        assert len(list((run / "checkpoints").glob("part *.safetensors"))) == pieces
        code, _, err = zsq(monkeypatch, capsys, *arguments(model, run, "--resume"))
        assert code == 0, err
        for name, expected in whole.items():
            found = load_file(run / name)
            assert all(torch.equal(found[key], expected[key]) for key in expected), name


def test_each_part_counts_its_own_steps(model, tmp_path, monkeypatch, capsys):
    assert zsq(monkeypatch, capsys, *arguments(model, tmp_path / "run"))[0] == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    at = [(r["stage"], r["step"]) for r in records if r["stage"].startswith("synthesis")]
    assert len(at) == len(set(at))


def save_set(path, count, shape=(3, 8, 8), **provenance):
    torch.manual_seed(count)
    made = ImageSet(torch.randn(count, *shape), torch.zeros(count).long(), provenance)
    made.save(path)
    return made


def test_the_images_of_several_runs_are_put_together(model, tmp_path, monkeypatch, capsys):
    sets = [save_set(tmp_path / f"{n}.safetensors", n, synthetic=n > 4) for n in (4, 6)]
    few = ["--set", "tuning.steps=2", "--set", "tuning.batch=4", "--no-compile", "--no-report"]
    several = [
        part for n in (4, 6) for part in ("--images-from", tmp_path / f"{n}.safetensors")
    ]  # fmt: skip
    zsq_json(monkeypatch, capsys, "quantize", model, *SHAPE, *few, *several, "-o", tmp_path / "run")
    together = ImageSet.load(tmp_path / "run" / "images.safetensors")
    order = [(1, 0), (0, 0), (1, 1), (0, 1), (1, 2), (1, 3), (0, 2), (1, 4), (0, 3), (1, 5)]
    assert torch.equal(together.images, torch.stack([sets[s].images[i] for s, i in order]))
    assert together.provenance["images"] == [4, 6]
    assert together.provenance["synthetic"] is False
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert identity["images"].startswith("given ")


def test_one_set_alone_stays_as_it_is():
    made = ImageSet(torch.randn(2, 3, 8, 8), torch.zeros(2).long(), {"method": "genie"})
    assert ImageSet.joined([made]) is made


def test_images_of_other_shapes_cannot_be_put_together(model, tmp_path, monkeypatch, capsys):
    save_set(tmp_path / "a.safetensors", 2)
    save_set(tmp_path / "b.safetensors", 2, (3, 8, 9))
    code, _, err = zsq(
        monkeypatch, capsys, "quantize", model, *SHAPE, "-o", tmp_path / "run", "--quiet",
        "--images-from", tmp_path / "a.safetensors", "--images-from", tmp_path / "b.safetensors",
    )  # fmt: skip
    assert code == 2
    assert "(3, 8, 8), (3, 8, 9)" in err
    assert not (tmp_path / "run").exists()
