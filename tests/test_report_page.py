"""What is left of a model, counted and shown: summary.py, report_page.py and `packedbert report`."""

import copy
import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
import time

import pytest
import torch
import transformers
from click.testing import CliRunner
from models import encoder_of, prune, some_pruning, tiny_bert, tiny_config
from safetensors.torch import load_file

import packedbert
from packedbert import bench, report_page
from packedbert.cli import main
from packedbert.summary import MATRICES, measure_speed

EVALUATION = {"exact_match": 80.5, "f1": 88.25, "questions": 1200, "seconds": 60.0, "questions_per_second": 20.0}


def pruned(architecture="BertForQuestionAnswering"):
    config = tiny_config()
    return prune(tiny_bert(architecture, config), *some_pruning(config))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-pruned"
    pruned().save_pretrained(folder)
    return folder


@pytest.fixture
def summary():
    return packedbert.summarize_model(pruned(), "tiny")


def run(*arguments):
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


# --------------------------------------------------------------------------------------------- figures


def test_a_dense_model_has_everything():
    model = tiny_bert("BertForQuestionAnswering")
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    summary = packedbert.summarize_model(model)
    assert {matrix.density for matrix in summary.matrices} == {1.0}
    assert summary.dense == summary.packed
    assert summary.dense.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert summary.expected_speedup == 1
    # The model is as it was.
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not hasattr(model, "packedbert_report")


def test_what_is_left_of_each_matrix():
    """Counted once more, from the weights of a model with zeros inside what has to stay."""
    model = pruned()
    kept = packedbert.patch_model(copy.deepcopy(model)).packedbert_report.layers[0]
    size = model.config.hidden_size // model.config.num_attention_heads
    with torch.no_grad():
        encoder_of(model).layer[0].attention.self.query.weight[kept.heads[0] * size] = 0
    summary = packedbert.summarize_model(model)
    hidden, full = model.config.hidden_size, model.config.intermediate_size
    for name, matrix in zip(MATRICES, summary.matrices, strict=False):
        is_ffn = name.startswith("FFN")
        left = kept.ffn_width if is_ffn else len(kept.heads) * size
        assert (matrix.layer, matrix.name, matrix.total) == (0, name, hidden * (full if is_ffn else hidden))
        assert matrix.kept == hidden * left
        assert matrix.nonzero == matrix.kept - (hidden if name == "query" else 0)
    assert [matrix.kept for matrix in summary.matrices if matrix.layer == 1] == [0] * 6
    assert summary.density == sum(matrix.kept for matrix in summary.matrices) / 2 / (4 * 32 * 32 + 2 * 32 * 40)


def test_the_same_of_every_form_of_a_model(checkpoint, tmp_path):
    expected = packedbert.summarize_model(pruned(), "tiny")
    packedbert.load(checkpoint).save_pretrained(tmp_path)
    forms = {
        "patched": packedbert.patch_model(pruned()),
        "released": packedbert.patch_model(pruned(), release_weights=True),
        "pruned checkpoint": packedbert.load(checkpoint),
        "packed checkpoint": packedbert.load(tmp_path),
    }
    for form, model in forms.items():
        found = packedbert.summarize_model(model, "tiny")
        assert (found.matrices, found.dense, found.packed) == (expected.matrices, expected.dense, expected.packed), form


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
@pytest.mark.parametrize("architecture", ["BertForQuestionAnswering", "BertForMaskedLM"])
def test_bytes_are_those_that_are_saved(precision, architecture, tmp_path):
    model = packedbert.patch_model(pruned(architecture), precision=precision)
    summary = packedbert.summarize_model(model)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors").values()
    assert summary.packed.bytes == sum(tensor.numel() * tensor.element_size() for tensor in saved)
    assert {matrix.stored_in for matrix in summary.matrices} == {precision}
    assert all((matrix.nonzero is None) == (precision == "int8") for matrix in summary.matrices)


def test_heads_and_widths_of_the_seed():
    shape = dataclasses.replace(bench.SEED, hidden_size=96, vocab_size=31)  # the rest is as published
    summary = packedbert.summarize_model(bench.build_stock(shape, stored=True), batch=2, length=384)
    assert (summary.heads_kept, summary.ffn_rows_kept) == (64, sum(shape.ffn_widths))
    assert summary.packed.flops == shape.flops(2, 384)
    assert summary.dense.flops == shape.unpruned().flops(2, 384)
    assert summary.expected_speedup == summary.dense.flops / summary.packed.flops
    gone = tuple(tuple(sorted(set(range(12)) - set(layer.heads))) for layer in summary.report.layers)
    assert gone == bench.SEED.pruned_heads


def test_speed_is_measured_of_three():
    results = measure_speed(pruned(), 2, 8, rounds=2)
    assert [result.model for result in results][1:] == ["dense BERT, packedbert", "this model, packedbert"]
    assert all((result.batch, result.length) == (2, 8) and result.median_ms > 0 for result in results)


@pytest.mark.parametrize(("settings", "text"), [({"length": 25}, "1 to 24 tokens"), ({"batch": 0}, "got 0 of 24")])
def test_shapes_that_a_model_cannot_take(settings, text):
    with pytest.raises(ValueError, match=text):
        packedbert.summarize_model(pruned(), **settings)


def test_no_bert():
    with pytest.raises(TypeError, match=r"expected a model with a transformers.BertModel in it, got a Linear"):
        packedbert.summarize_model(torch.nn.Linear(2, 2))


# ------------------------------------------------------------------------------------------------ page


def test_the_page_says_it_all(summary):
    speed = [bench.Result(name, 1, 24, 1.0, median, 9.0) for name, median in (("eager", 6), ("dense", 4), ("ours", 2))]
    page = report_page.render_page(summary, evaluations={"after <b>": EVALUATION}, speed=speed)
    assert len(page) < 3_000_000
    for text in ("<h1>tiny</h1>", f"{summary.density:.1%}", f"{summary.packed.parameters:,}", "88.25", "1,200"):
        assert text in page
    assert "<b>2.00x</b><span>measured over dense</span>" in page
    assert "<td>3.00x</td>" in page
    assert "after &lt;b&gt;" in page  # labels are text, never markup
    assert "after <b>" not in page
    # What a browser would fetch. The library's own code, in script tags, is judged by the browser below.
    markup = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not [url for url in re.findall(r"(?:src|href)=\"?([^\s\">]+)", markup) if not url.startswith("data:")]
    assert "url(" not in markup


def test_layers_without_anything_and_unpruned_ones():
    for model in (pruned(), tiny_bert("BertModel"), packedbert.patch_model(pruned(), precision="int8")):
        summary = packedbert.summarize_model(model)
        assert f"<h1>{type(model).__name__}</h1>" in report_page.render_page(summary)


def test_a_page_is_written_whole_or_not_at_all(summary, tmp_path, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("the old one")

    def interrupted(*_):
        raise KeyboardInterrupt

    def full(*_):
        raise OSError(28, "No space left on device")

    for failure, expected in ((interrupted, KeyboardInterrupt), (full, OSError)):
        with monkeypatch.context() as patch:
            patch.setattr(report_page.os, "replace", failure)
            with pytest.raises(expected):
                packedbert.write_report(summary, page)
        assert page.read_text() == "the old one"
        assert os.listdir(tmp_path) == ["report.html"]
    assert packedbert.write_report(summary, page) == [page]
    assert page.read_text().startswith("<!DOCTYPE html>")
    assert os.listdir(tmp_path) == ["report.html"]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[1]", "got a list"),
        ("{", "got no JSON"),
        ('{"f1": 80}', "got exact_match None"),
        ('{"exact_match": 80, "f1": "high"}', "got f1 'high'"),
        ('{"exact_match": 80, "f1": NaN}', "got f1 nan"),
        ('{"exact_match": 80, "f1": 101}', "got f1 101"),
        ('{"exact_match": 80, "f1": 80, "questions": "many"}', "got questions 'many'"),
    ],
)
def test_evaluations_that_are_none(tmp_path, content, text):
    file = tmp_path / "evaluation.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=f"evaluation.json: expected what .*{re.escape(text)}"):
        report_page.read_evaluation(file)


# --------------------------------------------------------------------------------------------- command


def test_the_command(checkpoint, tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps(EVALUATION))
    page, pictures = tmp_path / "page.html", tmp_path / "new" / "pictures"
    options = ("--png", pictures, "--evaluation", tmp_path / "dev.json", "--evaluation", f"dense={tmp_path}/dev.json")
    shown = run(checkpoint, "-o", page, *options)
    assert shown.exit_code == 0, shown.output
    assert "stored parameters" in shown.stdout
    assert "wrote" in shown.stderr
    assert all(text in page.read_text() for text in ("<h1>tiny-pruned</h1>", "<td>dev</td>", "<td>dense</td>"))
    for name in ("density", "heads"):
        assert (pictures / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    result = run(checkpoint, "-o", page, *options, "--json", "--measure", "--runs", 2, "--length", 8)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["length"] == 8
    assert found["evaluations"]["dense"] == EVALUATION
    assert len(found["matrices"]) == 12
    assert found["speed"][2]["model"] == "this model, packedbert"
    assert found["files"] == [str(page), *(str(pictures / f"{name}.png") for name in ("density", "heads"))]
    assert "Measured speed" in page.read_text()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("/nowhere",), 1, "expected a folder with a checkpoint, found none"),
        (("MODEL", "-o", "/nowhere/page.html"), 1, "expected a folder /nowhere to write into, found none"),
        (("MODEL", "-o", "TMP"), 1, "expected the name of a file to write, got a folder"),
        (("MODEL", "--png", "TMP/file/pictures"), 1, "expected a folder for pictures, got Not a directory"),
        (("MODEL", "--evaluation", "TMP/file"), 1, "expected what `packedbert eval --json` prints"),
        (("MODEL", "--evaluation", "a=/nowhere.json"), 1, "/nowhere.json: expected a file with an evaluation"),
        (("MODEL", "--evaluation", "a=TMP/good", "--evaluation", "a=TMP/good"), 2, "expected a label of its own"),
        (("MODEL", "--length", "25"), 1, "1 to 24 tokens"),
        (("TMP/other",), 1, "expected a BERT architecture"),
    ],
)
def test_errors_are_one_line_and_leave_nothing(checkpoint, tmp_path, monkeypatch, arguments, code, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("nothing")
    (tmp_path / "good").write_text(json.dumps(EVALUATION))
    config = transformers.DistilBertConfig(vocab_size=9, dim=8, n_layers=1, n_heads=2, hidden_dim=8)
    transformers.DistilBertModel(config).save_pretrained(tmp_path / "other")
    result = run(*(argument.replace("MODEL", str(checkpoint)).replace("TMP", str(tmp_path)) for argument in arguments))
    assert result.exit_code == code, result.output
    assert text in " ".join(result.output.split())
    assert "Traceback" not in result.output
    assert sorted(os.listdir(tmp_path)) == ["file", "good", "other"]


def test_no_write_access(checkpoint, tmp_path, monkeypatch):
    """Asked of the system, which denies a superuser nothing: so the answer is put into its mouth."""
    monkeypatch.setattr(report_page.os, "access", lambda *_: False)
    result = run(checkpoint, "-o", tmp_path / "page.html")
    assert result.exit_code == 1
    assert "got one without write access" in result.output


@pytest.mark.parametrize(("library", "options"), [("bokeh", ()), ("matplotlib", ("--png", "pictures"))])
def test_a_missing_library(checkpoint, tmp_path, monkeypatch, library, options):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, library, None)
    result = run(checkpoint, *options)
    assert result.exit_code == 1
    assert f"pip install {library}" in result.output
    assert os.listdir(tmp_path) == []


# --------------------------------------------------------------------------------------------- browser


@pytest.fixture
def browser(tmp_path):
    """A headless Chromium that notes what it asks the network for."""
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    missing = [
        name
        for name, there in {
            "chromium": chromium,
            "chromedriver": driver,
            "selenium": importlib.util.find_spec("selenium"),
        }.items()
        if not there
    ]
    if missing:
        pytest.skip(f"needs a browser to open the page in; not found: {', '.join(missing)}")
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    switches = ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "window-size=1280,2000")
    quiet = ("disable-background-networking", "disable-component-update", "disable-sync")
    for switch in (*switches, *quiet, f"user-data-dir={tmp_path / 'profile'}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield driver
    driver.quit()


#: Where on the window a point of a chart's axes is.
PLACE = """
    const view = [...Bokeh.index].find(view => view.model.name === arguments[0])
    if (view === undefined) return null
    view.el.scrollIntoView({block: "center"})
    const {left, top} = view.el.getBoundingClientRect()
    return [left + view.frame.x_scale.compute(arguments[1]), top + view.frame.y_scale.compute(arguments[2])]
"""

#: The text of the tooltips that are shown, wherever in the page's shadow trees they are.
TOOLTIPS = """
    const texts = []
    const walk = node => {
        for (const element of node.querySelectorAll("*")) {
            if (element.classList.contains("bk-Tooltip") && element.checkVisibility())
                texts.push((element.shadowRoot ?? element).textContent)
            if (element.shadowRoot) walk(element.shadowRoot)
        }
    }
    walk(document)
    return texts
"""


def eventually(ask, wanted, seconds=20):
    """The first answer that `wanted` accepts, or the last."""
    end = time.monotonic() + seconds
    while not wanted(answer := ask()) and time.monotonic() < end:
        time.sleep(0.05)
    return answer


def tooltips(browser, chart, x, y):
    """What is shown once the mouse has moved to a point of a chart."""
    place = eventually(lambda: browser.execute_script(PLACE, chart, x, y), bool)
    assert place, f"no chart {chart}"

    def point():
        for away in (3, 0):  # a mouse that stands still tells nobody
            position = {"type": "mouseMoved", "x": place[0] + away, "y": place[1]}
            browser.execute_cdp_cmd("Input.dispatchMouseEvent", position)
        return browser.execute_script(TOOLTIPS)

    return eventually(point, bool)


def requests(browser, page):
    """URLs that a page has asked for since the last call. (Chromium's own pages ask for parts of itself.)"""
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    return {
        params["request"]["url"]
        for params in sent
        if params["documentURL"] == page.as_uri() or params["request"]["url"].startswith(("http", "ws", "ftp"))
    }


def test_the_page_in_a_browser(browser, summary, tmp_path):
    page = tmp_path / "report.html"
    packedbert.write_report(summary, page, evaluations={"dev": EVALUATION})
    browser.get(page.as_uri())
    assert browser.title == "tiny - packedbert report"

    matrix = next(matrix for matrix in summary.matrices if (matrix.layer, matrix.name) == (0, "FFN up"))
    (shown,) = tooltips(browser, "density", 0, "FFN up")
    for text in ("FFN up", f"{matrix.kept:,} of {matrix.total:,}", f"{matrix.density:.1%}", "fp32"):
        assert text in shown
    layer = summary.report.layers[0]
    for head in range(4):
        # Tooltips of the other charts go when the mouse leaves them.
        wanted = f"{head}, {'left' if head in layer.heads else 'removed'}"
        shown = eventually(lambda head=head: tooltips(browser, "heads", 0, head), lambda s, w=wanted: w in s[-1])
        assert len(shown) == 1
        assert wanted in shown[0]
        assert f"{len(layer.heads)} of 4" in shown[0]
    shown = eventually(lambda: tooltips(browser, "ffn", 0, 1), lambda shown: "rows" in shown[-1])
    assert len(shown) == 1
    assert f"{layer.ffn_width} of 40" in shown[0]

    asked = requests(browser, page)
    assert page.as_uri() in asked
    assert {url for url in asked if not url.startswith(("data:", "blob:"))} == {page.as_uri()}
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == []

    # And a page that does ask would have been noticed.
    picture = "http://127.0.0.1:9/picture.png"
    page.write_text(f'<img src="{picture}">')
    browser.get(page.as_uri())
    assert picture in eventually(lambda: requests(browser, page), lambda asked: picture in asked)
