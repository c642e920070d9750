# SPDX-License-Identifier: Apache-2.0
import re
from typing import get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from zsq.config import Bits, Override, Recipe, load_recipe, recipe_names, to_yaml
from zsq.errors import UsageError

WIDTHS = st.integers(2, 8)


def write(folder, text):
    path = folder / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


@given(WIDTHS, WIDTHS)
def test_bits_notation_round_trips(weights, activations):
    bits = Bits.parse(f"W{weights}A{activations}")
    assert (bits.weights, bits.activations) == (weights, activations)
    assert Bits.parse(str(bits)) == bits


@pytest.mark.parametrize("text", ["", "w4", "4a4", "w4a4 ", "w1a4", "w9a4", "w4a16", "w4a", "a4w4"])
def test_other_notations_are_refused_and_the_right_one_shown(text):
    with pytest.raises(UsageError, match="w4a4") as caught:
        Bits.parse(text)
    assert repr(text) in str(caught.value)


def test_packaged_recipes_load_under_their_own_name():
    assert "genie" in recipe_names()
    for name in recipe_names():
        recipe = load_recipe(name)
        assert recipe.name == name
        assert recipe.title
        assert recipe.paper


def test_genie_has_the_numbers_of_the_paper():
    recipe = load_recipe("genie")
    s, t = recipe.synthesis, recipe.tuning
    assert (s.images, s.batch, s.steps, s.latent) == (1024, 128, 4000, 256)
    assert (s.latent_lr, s.generator_lr, s.generator_decay, s.decay_every) == (0.1, 0.01, 0.95, 100)
    assert (t.steps, t.batch, t.drop, t.mix, t.warmup) == (20000, 32, 0.5, 0.5, 0.2)
    assert (t.rounding_weight, t.beta_start, t.beta_end) == (1.0, 20, 2)
    assert load_recipe("genie-reference").tuning.power == 2.4
    assert recipe.protocol == "edges-8bit"


def test_recipes_of_optimised_pixels_have_the_numbers_of_the_papers():
    """arXiv 2001.00281; 2111.09136, section 4.1; 2303.13826, section 4.1, and what was released with them."""
    zeroq = load_recipe("zeroq-reference")
    assert (zeroq.synthesis.images, zeroq.synthesis.batch, zeroq.synthesis.steps) == (64, 64, 500)
    assert (zeroq.tuning.ranges, zeroq.tuning.margin) == ("minmax", 1)
    for name, learning_rate in (("intraq-reference", 1e-4), ("intraq", 1e-5), ("hast", 1e-5)):
        tuning = load_recipe(name).tuning
        assert (tuning.batch, tuning.lr, tuning.momentum, tuning.weight_decay) == (
            256, learning_rate, 0.9, 1e-4,
        )  # fmt: skip
        assert (tuning.temperature, tuning.losses.kl, tuning.kl_mean) == (20, 20, "sample")
        assert tuning.crop.model_dump() == {"probability": 1, "smallest": 0.5}
        drops = [share * (tuning.steps + tuning.range_steps) for share in tuning.milestones]
        assert drops == pytest.approx([3300, 7300], abs=1), (
            "epochs 16 and 36 of 200 steps, warm-up before"
        )
    intraq, hast = load_recipe("intraq"), load_recipe("hast")
    assert (intraq.synthesis.soft_floor, intraq.synthesis.band) == (0.95, (0.05, 0.8))
    assert (intraq.tuning.losses.ce, intraq.tuning.losses.alignment) == (1, 0)
    assert (hast.synthesis.losses.cross_entropy, hast.synthesis.difficulty) == (10, 2)
    assert (hast.tuning.losses.ce, hast.tuning.losses.alignment) == (0, 1000)
    assert hast.tuning.promotion.epsilon == 0.01
    hundred = load_recipe("hast-cifar100").tuning
    assert (hundred.losses.alignment, hundred.promotion.epsilon) == (2000, 0.02)
    assert (hundred.losses.kl, hundred.lr) == (20, 1e-5)
    hundred = load_recipe("intraq-cifar100").synthesis
    assert (hundred.soft_floor, hundred.band) == (0.6, (0.02, 1.0))
    for name in ("intraq", "hast"):
        large = load_recipe(name, large=True).tuning
        assert (large.lr, large.batch, large.steps) == (1e-6, 16, 29400)
        assert large.milestones[0] * (large.steps + large.range_steps) == pytest.approx(
            19300, abs=2
        )
    large = load_recipe("hast", large=True)
    assert (large.synthesis.losses.cross_entropy, large.synthesis.difficulty) == (0.1, 0.5)
    assert large.synthesis.crop.model_dump() == {"probability": 0.5, "smallest": 0.4}
    assert large.tuning.losses.alignment == 4000


def test_settings_reach_nested_fields_and_leave_the_rest():
    recipe = load_recipe(
        "genie",
        settings=["tuning.steps=7", "synthesis.swing=false", "tuning.scale_lr=1e-3", "bits=w3a5"],
    )
    assert (recipe.tuning.steps, recipe.synthesis.swing) == (7, False)
    assert recipe.tuning.scale_lr == 1e-3
    assert recipe.bits == Bits(weights=3, activations=5)
    assert recipe.synthesis.steps == load_recipe("genie").synthesis.steps


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("{weights: 3}", "either match, for layers, or edge"),
        ("{match: a, edge: b, activations: 3}", "either match, for layers, or edge"),
        ("{edge: a, weights: 3}", "a tensor has no weights"),
    ],
)
def test_an_override_names_layers_or_tensors(override, message):
    with pytest.raises(UsageError, match=message):
        load_recipe("genie", settings=[f"overrides=[{override}]"])


def test_what_would_be_done_without_effect_is_refused():
    with pytest.raises(UsageError, match="set its fields themselves"):
        load_recipe("genie", schedule="quick", settings=["quick.tuning.steps=7"])
    with pytest.raises(UsageError, match="'fast' is neither quick nor full"):
        load_recipe("genie", schedule="fast")
    assert load_recipe("genie", settings="tuning.steps=7").tuning.steps == 7


@pytest.mark.parametrize("group", ["quick", "large", "large_quick"])
def test_a_typo_in_a_schedule_is_named_whichever_is_asked_for(tmp_path, group):
    (tmp_path / "mine.yaml").write_text(f"extends: genie\n{group}: {{tuning.stepss: 5}}\n")
    with pytest.raises(UsageError, match=r"tuning\.stepss.*did you mean 'tuning\.steps'"):
        load_recipe(tmp_path / "mine.yaml")


def test_schedules_that_only_work_together_are_taken(tmp_path):
    """What is for both comes after each of the two; what is wrong alone may be set right by the request."""
    (tmp_path / "mine.yaml").write_text(
        "extends: genie\nlarge: {tuning: {method: finetune, steps: 100}}\n"
        "quick: {}\nlarge_quick: {tuning.momentum: 0.5}\n"
    )
    assert load_recipe(tmp_path / "mine.yaml").tuning.method == "reconstruct"
    both = load_recipe(tmp_path / "mine.yaml", schedule="quick", large=True)
    assert both.tuning.momentum == 0.5


@pytest.mark.parametrize("name", ["a.yaml", "../sub/a.yaml", "./a.yaml"])
def test_a_recipe_that_extends_itself_is_refused_however_it_is_spelled(tmp_path, name):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.yaml").write_text(f"extends: {name}\n")
    with pytest.raises(UsageError, match="extends itself"):
        load_recipe(tmp_path / "sub" / "a.yaml")


def test_a_recipe_finds_others_beside_it(tmp_path):
    (tmp_path / "base.yaml").write_text("extends: genie\ntuning: {steps: 9}\n")
    (tmp_path / "heir.yaml").write_text("extends: base.yaml\ntuning: {batch: 8}\n")
    parts = "extends: hast\nsynthesis: {method: mixed, images: 8, parts: [genie, base.yaml]}\n"
    (tmp_path / "parts.yaml").write_text(parts)
    tuning = load_recipe(tmp_path / "heir.yaml").tuning
    assert (tuning.steps, tuning.batch) == (9, 8)
    assert len(load_recipe(tmp_path / "parts.yaml").synthesis.parts) == 2
    (tmp_path / "heir.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(UsageError, match=r"'nowhere\.yaml', which '.*heir\.yaml' names"):
        load_recipe(tmp_path / "heir.yaml")


def test_overrides_can_be_set_as_text():
    recipe = load_recipe("genie", settings=["overrides=[{match: 'a.*', weights: 3}]"])
    assert recipe.overrides == (Override(match="a.*", weights=3),)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ("tuning.stepz=7", "tuning.stepz"),
        ("tunin.steps=7", "tunin"),
        ("tuning.steps=many", "tuning.steps"),
        ("tuning.steps=-1", "tuning.steps"),
        ("tuning.drop=1.5", "tuning.drop"),
        ("synthesis.batch=1", "synthesis.batch"),
        ("protocol=w8a8", "protocol"),
        ("bits=w9a9", "w9a9"),
        ("bits=4", "w4a4"),
        ("name.first=x", "name.first"),
        ("tuning.steps", "KEY=VALUE"),
        ("tuning.steps=[1", "tuning.steps=[1"),
        ("=7", "''"),
    ],
)
def test_bad_settings_are_named(setting, named):
    with pytest.raises(UsageError) as caught:
        load_recipe("genie", settings=[setting])
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "setting", "meant"),
    [
        ("genie", "tuning.stepz=7", "tuning.steps"),
        ("genie", "tunin.steps=7", "tuning"),
        ("genie", "bits.weight=3", "bits.weights"),
        ("genie", "overrides=[{match: a, weight: 3}]", "overrides.0.weights"),
        ("gdfq", "synthesis.latents=7", "synthesis.latent"),
        ("gdfq+ait", "tuning.inundation.targets=0.1", "tuning.inundation.target"),
        ("gdfq", "tuning.loses.kl=1", "tuning.losses"),
    ],
)
def test_unknown_settings_suggest_the_nearest_known_one(recipe, setting, meant):
    with pytest.raises(UsageError, match=f"did you mean '{re.escape(meant)}'"):
        load_recipe(recipe, settings=[setting])


@pytest.mark.parametrize("recipe", ["genie", "gdfq"])
def test_unknown_settings_like_no_other_say_where_all_are_listed(recipe):
    with pytest.raises(
        UsageError, match=r"'tuning\.zzz' .*no such setting; .zsq recipes"
    ) as caught:
        load_recipe(recipe, settings=["tuning.zzz=7"])
    assert "Extra inputs" not in str(caught.value)


@pytest.mark.parametrize("setting", ["bits=w4a4", "bits.weights=4", " bits =w4a4"])
@pytest.mark.parametrize("bits", ["w9a9", "w4a4"])
def test_what_is_given_twice_is_refused_even_where_one_of_them_is_wrong(setting, bits):
    with pytest.raises(UsageError, match=f"bits is given twice, as '{bits}' and by --set"):
        load_recipe("genie", bits=bits, settings=[setting])
    assert load_recipe("genie", bits=None, settings=["bits=w3a3"]).bits == Bits.parse("w3a3")


@pytest.mark.parametrize("text", ["tuning.steps=[1", "name=a: b: c", "name={a: b"])
def test_yaml_that_cannot_be_read_is_one_line_that_says_where(text):
    with pytest.raises(UsageError, match=r"line 1, column \d+\)\.$") as caught:
        load_recipe("genie", settings=[text])
    assert "\n" not in str(caught.value)


def test_changes_apply_unless_none():
    recipe = load_recipe("genie", bits="w2a4", protocol=None)
    assert str(recipe.bits) == "w2a4"
    assert recipe.protocol == load_recipe("genie").protocol


def test_a_recipe_is_not_changed_by_deriving_from_it():
    original = Recipe()
    derived = load_recipe(original, settings=["tuning.steps=3"])
    assert derived.tuning.steps == 3
    assert original == Recipe()


def test_quick_schedule_applies_the_recipes_own_settings(tmp_path):
    path = write(tmp_path, "quick: {tuning.steps: 11, synthesis.images: 12}\ntuning: {batch: 9}\n")
    full, quick = load_recipe(path), load_recipe(path, schedule="quick")
    assert (full.tuning.steps, full.synthesis.images) == (20000, 1024)
    assert (quick.tuning.steps, quick.synthesis.images, quick.tuning.batch) == (11, 12, 9)
    explicit = load_recipe(path, schedule="quick", settings=["tuning.steps=5"])
    assert explicit.tuning.steps == 5, "what the user sets wins over the schedule"


@given(bits=st.builds(Bits, weights=WIDTHS, activations=WIDTHS), steps=st.integers(0, 10**6),
       rate=st.floats(1e-12, 1e3), title=st.text(max_size=30))  # fmt: skip
def test_yaml_round_trip(bits, steps, rate, title):
    recipe = Recipe(
        bits=bits,
        title=title,
        overrides=(Override(match="*.conv", weights=8),),
        tuning={"steps": steps, "scale_lr": rate},
        quick={"tuning.steps": 3},
    )
    assert Recipe.model_validate(yaml.safe_load(to_yaml(recipe))) == recipe


def test_yaml_file_round_trip(tmp_path):
    recipe = load_recipe("genie", bits="w3a3", settings=["synthesis.steps=9"])
    assert load_recipe(write(tmp_path, to_yaml(recipe))) == recipe


def test_yaml_cannot_run_code(tmp_path):
    touched = tmp_path / "touched"
    path = write(tmp_path, f"name: !!python/object/apply:os.mkdir ['{touched}']\n")
    with pytest.raises(UsageError, match="not readable YAML"):
        load_recipe(path)
    with pytest.raises(UsageError, match="not readable YAML"):
        load_recipe("genie", settings=[f"name=!!python/object/apply:os.mkdir ['{touched}']"])
    assert not touched.exists()


@pytest.mark.parametrize(
    "content",
    ["", "- a\n", "a: [", "1: 2\n", "tuning: 5\n", "quick: 3\n", "quick: {1: 2}\n", "nonsense: 1\n",
     b"\xff\xfe\x00\x01\x02", b"name: \x80"],
)  # fmt: skip
def test_unusable_files_are_refused_in_a_sentence(tmp_path, content):
    with pytest.raises(UsageError):
        load_recipe(write(tmp_path, content), schedule="quick")


@pytest.mark.parametrize("name", ["nonsense", "../genie", "missing.yaml", "", "/etc/passwd"])
def test_unknown_recipes_list_the_known_ones(name):
    with pytest.raises(UsageError, match="genie"):
        load_recipe(name)


@pytest.mark.parametrize("value", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize("key", ["tuning.scale_lr", "tuning.beta_start", "synthesis.latent_lr"])
def test_settings_are_finite(key, value):
    with pytest.raises(UsageError, match=rf"{key}.*finite"):
        load_recipe("genie", settings=[f"{key}={value}"])


def test_every_setting_says_what_it_means():
    """`zsq recipes NAME` lists them, and errors promise that."""
    models, silent = [Recipe], []
    for model in models:
        for name, field in model.model_fields.items():
            if not field.description and name != "method":
                silent.append(f"{model.__name__}.{name}")
            models += [
                found
                for found in _models_in(field.annotation)
                if found not in models and found not in (Bits, Override)
            ]
    assert not silent
    assert len(models) > 10


def _models_in(annotation):
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [found for part in get_args(annotation) for found in _models_in(part)]
