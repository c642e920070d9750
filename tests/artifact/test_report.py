# SPDX-License-Identifier: Apache-2.0
"""The report: complete, self-contained, and alive in a browser."""

import json
import re
import shutil

import numpy as np
import pytest
from helpers.browser import needs_browser, run_in_browser, screenshot
from helpers.runs import FEW, NORMALISATION, SHAPE, write_images, write_model, zsq, zsq_json
from PIL import Image

from zsq.artifact.report import write_report
from zsq.errors import UsageError


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A reconstructed, evaluated run with mixed bits and a fine-tuned one of another protocol."""
    import zsq as package

    folder = tmp_path_factory.mktemp("runs")
    model = write_model(folder)
    normal = {"mean": (0.5,) * 3, "std": (0.25,) * 3, "input_shape": (3, 8, 8)}
    small = ["synthesis.images=16", "synthesis.batch=8", "synthesis.steps=4", "tuning.steps=4",
             "tuning.batch=8"]  # fmt: skip
    common = {"bits": "w4a4", "compile": False, "precision": "fp32", **normal}
    package.quantize(model, "genie", settings=small, out=folder / "one", **common)
    package.quantize(
        model, "gdfq+ait", settings=[*small, "tuning.range_steps=2"], out=folder / "two", **common
    )
    package.evaluate(folder / "one", write_images(folder / "images"))
    return folder / "one", folder / "two"


def test_quantize_leaves_a_report(runs):
    for run in runs:
        names = {path.name for path in run.iterdir()}
        assert {"report.html", "report.md", "diagnosis.json", "diagnosis.png"} <= names


def test_a_page_needs_nothing_but_itself(runs):
    page = write_report(runs[:1]).read_text(encoding="utf-8")
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]*)", page)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert "@import" not in page
    assert "url(" not in page


def test_it_says_what_was_done_and_what_came_out(runs):
    page = write_report(runs[:1]).read_text(encoding="utf-8")
    record = json.loads((runs[0] / "run.json").read_text())
    for text in ("FP32", "genie", "edges-8bit", "w4a4", "onnxruntime", "zsq.load", "rounding_weight",
                 f"{record['results']['evaluation']['student']['top1']:.2f}",
                 f"{record['results']['export']['ratio']:.1f}x", "Losses", "What hurts"):  # fmt: skip
        assert text in page, text


def test_layers_are_those_of_the_diagnosis(runs):
    page = write_report(runs[:1]).read_text(encoding="utf-8")
    for item in json.loads((runs[0] / "diagnosis.json").read_text())["items"]:
        assert f"<td>{item['name']}</td>" in page


def test_fine_tuning_is_shown_with_its_gradients_and_crossings(runs):
    page = write_report(runs[1:]).read_text(encoding="utf-8")
    for text in ("Do the losses agree?", "Integers that change"):
        assert text in page
    assert "Do the losses agree?" not in write_report(runs[:1]).read_text(encoding="utf-8")


def test_runs_of_other_protocols_are_not_compared_without_a_word(runs, tmp_path):
    together = write_report(runs, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "not to be compared" in together
    assert "all-low-bit, edges-8bit" in together
    assert "not to be compared" not in write_report(runs[:1]).read_text(encoding="utf-8")
    assert "not to be compared" in (tmp_path / "both.md").read_text(encoding="utf-8")


def test_accuracies_on_other_images_are_not_compared_without_a_word(runs, tmp_path):
    score = {"top1": 50.0, "stderr": 1.0, "top5": 90.0, "images": 10}

    def copied(run, name, data):
        shutil.copytree(run, tmp_path / name)
        record = json.loads((tmp_path / name / "run.json").read_text())
        scores = {"data": data, "teacher": score, "student": score}
        record["results"].pop("evaluation", None)
        record["results"] |= {"evaluation": scores} if data else {}
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        return tmp_path / name

    one, two, three = (
        copied(runs[0], name, data) for name, data in (("a", "here"), ("b", "there"), ("c", None))
    )
    both = write_report([one, two], tmp_path / "both.html").with_suffix(".md").read_text()
    assert "evaluated on different images (" in both
    assert both.index("/here, ") < both.index("/there): ")
    assert "* evaluated on: there" in both.replace("\\", "")
    late = write_report([three, one], tmp_path / "late.html").with_suffix(".md").read_text()
    assert "different images" not in late
    float_row = next(line for line in late.splitlines() if "FP32" in line)
    assert "50.00" in float_row  # the second run's: of the same network


def test_the_command_line_writes_it(runs, tmp_path, monkeypatch, capsys):
    found = zsq_json(monkeypatch, capsys, "report", *runs, "-o", tmp_path / "page.html")
    assert found["report"].endswith("page.html")
    assert (tmp_path / "page.md").read_text().startswith("# Quantized without data: one, two")
    code, out, _ = zsq(monkeypatch, capsys, "diagnose", runs[0], "--quiet")
    assert code == 0
    assert "nats from the teacher" in out


def test_real_images_are_set_beside(runs, tmp_path, monkeypatch, capsys):
    folder = write_images(tmp_path / "real", 9)
    one = zsq_json(
        monkeypatch, capsys, "report", runs[0], "--real", folder, "-o", tmp_path / "a.html"
    )
    two = zsq_json(monkeypatch, capsys, "report", runs[0], "-o", tmp_path / "b.html")
    pages = [(tmp_path / name).read_text(encoding="utf-8") for name in ("a.html", "b.html")]
    assert one["report"] != two["report"]
    assert pages[0] != pages[1]
    code, _, err = zsq(
        monkeypatch, capsys, "report", runs[0], "--real", tmp_path / "none", "--quiet"
    )
    assert code == 2
    assert "none" in err


def test_names_cannot_break_the_page(runs, tmp_path):
    nasty = tmp_path / "<script>alert(1)</script>"
    nasty = tmp_path / "a<b>&'x"
    shutil.copytree(runs[0], nasty)
    page = write_report([nasty], tmp_path / "p.html").read_text(encoding="utf-8")
    assert "a<b>" not in page
    assert "a&lt;b&gt;&amp;&#x27;x" in page
    record = json.loads((nasty / "run.json").read_text())
    record["identity"]["model"] = "<img src=x>\n\n# Injected `|` \x1b[2J"
    (nasty / "run.json").write_text(json.dumps(record))
    summary = write_report([nasty], tmp_path / "p.html").with_suffix(".md").read_text()
    assert "<" not in summary
    assert "\x1b" not in summary
    assert "\n# Injected" not in summary
    assert r"&lt;img src=x&gt; # Injected \`\|\` ?\[2J" in summary


@pytest.mark.parametrize("change", [
    {"identity": {"network": None, "recipe": {}}}, {"timings": {"tuning": "abc"}},
    {"results": {"evaluation": []}}, {"results": {"export": {"bytes": "abc"}}},
    {"results": {"evaluation": {"data": "x", "teacher": {}}}},
])  # fmt: skip
def test_a_record_that_somebody_changed_is_one_sentence(runs, tmp_path, change):
    shutil.copytree(runs[0], tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    for part, values in change.items():
        record[part] |= values
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    with pytest.raises(UsageError, match=r"run\.json or metrics\.jsonl is damaged or was changed"):
        write_report(tmp_path / "run", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def test_a_report_can_be_left_out(tmp_path, monkeypatch, capsys):
    model = write_model(tmp_path)
    zsq_json(monkeypatch, capsys, "quantize", model, *SHAPE, *NORMALISATION, *FEW, "--no-report",
             "-o", tmp_path / "run")  # fmt: skip
    assert not (tmp_path / "run" / "report.html").exists()


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("the diagnosis began")

    monkeypatch.setattr("zsq.artifact.report.collect_facts", worked)
    with pytest.raises(UsageError, match="no folder"):
        write_report([tmp_path], tmp_path / "missing" / "report.html")
    with pytest.raises(UsageError, match="it is a folder"):
        write_report([tmp_path], tmp_path)
    with pytest.raises(UsageError, match=r"ends in \.html"):  # the summary would take its place
        write_report([tmp_path], tmp_path / "report.md")


def test_what_cannot_be_shown_is_refused_before_the_work(runs, tmp_path, monkeypatch):
    def worked(*_, **__):
        raise AssertionError("the diagnosis began")

    monkeypatch.setattr("zsq.artifact.report.collect_facts", worked)
    with pytest.raises(UsageError, match="not a readable zsq run"):
        write_report([runs[0], tmp_path])
    with pytest.raises(UsageError, match="none"):
        write_report(runs[0], real=tmp_path / "none")


def test_folders_without_a_finished_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match="not a readable zsq run"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="no run was given"):
        write_report([])


SORT = """
const table = document.getElementById('layers');
const column = (i) => [...table.tBodies[0].rows].map((r) => r.cells[i].textContent);
const names = [...table.tHead.rows[0].cells].map((c) => c.textContent);
const i = names.indexOf('alone');
const before = column(i);
table.tHead.rows[0].cells[i].querySelector('button').click();
const up = column(i);
table.tHead.rows[0].cells[i].querySelector('button').click();
const down = column(i);
table.tHead.rows[0].cells[0].querySelector('button').click();
const images = [...document.images].map((m) => m.naturalWidth);
return {before, up, down, names: column(0), images, sorted: table.tHead.rows[0].cells[0].ariaSort};
"""


@needs_browser
def test_it_renders_and_sorts_in_a_browser_without_errors(runs, tmp_path):
    page = write_report(runs[:1], tmp_path / "page.html")
    found, errors, console = run_in_browser(page, tmp_path, SORT)
    assert errors == []
    assert console == []
    assert [float(x) for x in found["up"]] == sorted(map(float, found["before"]))
    assert found["down"] == found["up"][::-1] or sorted(found["down"]) == sorted(found["up"])
    assert [float(x) for x in found["down"]] == sorted(map(float, found["before"]), reverse=True)
    assert found["names"] == sorted(found["names"], key=str.lower)
    assert found["sorted"] == "ascending"
    assert found["images"]
    assert min(found["images"]) > 50, "every picture is there"


@needs_browser
@pytest.mark.parametrize("dark", [False, True])
def test_it_looks_like_something_light_and_dark(runs, tmp_path, dark):
    page = write_report(runs, tmp_path / "page.html")
    flags = ["--blink-settings=preferredColorScheme=0"] if dark else []
    pixels = np.asarray(Image.open(screenshot(page, tmp_path, *flags)).convert("L"))
    background = np.median(pixels[:, :8])
    assert (background < 64) == dark
    assert pixels.std() > 10
