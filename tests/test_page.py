"""The report's page: complete, made of nothing else, and what its controls do in a real browser."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import quantpass as qp
from quantpass.report.drawing import drawing
from tests.helpers import WeightOnly, compiled

CHROMIUM = shutil.which("chromium")
X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).half()


class Read(HTMLParser):
    """Every tag, in order, and that each that is opened is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br", "link", "img", "rect", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("rect", "path"):
            assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def report():
    model = nn.Sequential(*(WeightOnly(64, 64) for _ in range(3)), WeightOnly(64, 64).float())
    model[3].register_forward_pre_hook(lambda module, args: (args[0].float(),))
    return qp.explain(model, (X,), target=["ascend310p", "ascend910b"])


def written(report, tmp_path):
    report.to_html(tmp_path / "page.html")
    return (tmp_path / "page.html").read_text()


def test_a_page_needs_nothing_from_elsewhere(report, tmp_path):
    tags = Read(written(report, tmp_path)).tags
    assert not [t for t, a in tags if t in ("link", "img", "iframe") or (t == "script" and "src" in a)]
    assert {a["href"][0] for t, a in tags if t == "a"} == {"#"}
    ids = {a["id"] for _, a in tags if "id" in a}
    assert {a["href"][1:] for t, a in tags if t == "a"} <= ids


def test_a_row_for_each_kind_of_site_and_a_column_for_each_chip(report, tmp_path):
    text = written(report, tmp_path)
    assert "ascend310p 3 of 4 fused; ascend910b 3 of 4 fused" in text
    rows = re.findall(r'<tbody data-state="(\w+)" data-count="(\d+)"', text)
    assert rows == [("yes", "3"), ("no", "1")]
    assert ">{0..2}</button>" in text
    assert (
        set(re.findall(r'href="#(cause-\d)"', text))
        == set(re.findall(r'id="(cause-\d)"', text))
        == {"cause-1", "cause-2"}
    )


def test_names_are_escaped(report, tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    sites = tuple(replace(s, name=evil, before=f"%a = {evil}(%b)", after="%c = f(%b)") for s in report.sites)
    text = written(replace(report, sites=sites), tmp_path)
    assert "<img" not in text
    assert "&lt;img" in text


def test_graphs_before_and_after_are_drawn(tmp_path):
    _, of_compile = compiled(nn.Sequential(WeightOnly(64, 64)), X, target="ascend910b")
    text = written(of_compile, tmp_path)
    before, after = re.findall(r"<figure>.*?</figure>", text, flags=re.S)
    assert "aten.mul" in before and "aten.mul" not in after
    assert "quantpass.weight_quant_matmul" in after
    assert 'class="new"' in after and 'class="new"' not in before


def test_boxes_stand_below_what_they_need():
    lines = "%a: f16[2] = aten.relu(%x)\n%b: f16[2] = aten.add.Tensor(%a, %y)\n%c: f16[2] = aten.mul.Tensor(%b, %a)"
    boxes = re.findall(r'<rect(.*?) x="([\d.]+)" y="([\d.]+)" width="([\d.]+)"', drawing(lines))
    assert [bool(kind) for kind, *_ in boxes] == [True, False, True, False, False]  # x, a, y, b, c
    tops = [float(y) for _, _, y, _ in boxes]
    assert tops == sorted(tops)
    assert tops[1] == tops[2] < tops[3] < tops[4]
    assert drawing(lines).count("<path marker-end") == 5


def test_two_thousand_sites(tmp_path):
    _, one = compiled(nn.Sequential(WeightOnly(64, 64)), X, target="ascend910b")
    (site,) = one.sites
    letters = ["".join(chr(97 + i // 26**p % 26) for p in range(3)) for i in range(2000)]
    text = written(replace(one, sites=tuple(replace(site, name=f"model.{x}.up") for x in letters)), tmp_path)
    assert text.count("<tbody data-state") == 2000
    assert len(text) < 6_000_000
    Read(text)


def test_a_model_with_nothing_quantized(tmp_path):
    text = written(qp.explain(nn.Linear(64, 64), (X.float(),), target="cpu"), tmp_path)
    assert "No quantized matmul was found" in text


# -- in a browser: not collected where there is none -------------------------------------------------------------------

STEPS = """
<script>
const found = {};
const visible = () => [...table.tBodies].filter(r => !r.hidden)
    .map(r => r.querySelector("button").textContent);
const type = text => { filter.value = text; filter.dispatchEvent(new Event("input")); };
const pick = value => { which.value = value; which.dispatchEvent(new Event("change")); };
const head = i => document.querySelectorAll("#table th button")[i].click();
const opened = () => document.querySelectorAll("#table button[aria-expanded=true]").length;
found.all = visible(); table.querySelector("td button").click(); found.one = opened();
found.shown = [...document.querySelectorAll(".more")].map(r => r.checkVisibility());
type("float32"); found.filtered = visible(); found.said = document.getElementById("shown").textContent; type("");
pick("no"); found.refused = visible(); pick("yes"); found.fused = visible(); pick("");
head(1); found.ascending = visible(); head(1); found.descending = visible();
document.dispatchEvent(new KeyboardEvent("keydown", {key: "/"})); found.focused = document.activeElement.id;
dispatchEvent(new Event("beforeprint")); found.open = opened();
found.wide = document.documentElement.scrollWidth <= innerWidth;
const out = document.createElement("pre"); out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
</script>"""

if CHROMIUM:

    def browsed(path, *options):
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1200,900", *options]
        done = subprocess.run([*command, path.as_uri()], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def test_controls_in_a_browser(report, tmp_path):
        text = written(report, tmp_path)
        (tmp_path / "page.html").write_text(text.replace("</body>", STEPS + "</body>"))
        shown = browsed(tmp_path / "page.html", "--dump-dom")
        found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', shown)[1].replace("&gt;", ">"))
        assert found["all"] == ["{0..2}", "3"]
        assert found["filtered"] == found["refused"] == ["3"]
        assert found["said"] == "rows: 1, matmuls: 1"
        assert found["fused"] == ["{0..2}"]
        assert (found["ascending"], found["descending"]) == (["3", "{0..2}"], ["{0..2}", "3"])
        assert found["focused"] == "filter"
        assert (found["one"], found["shown"]) == (1, [True, False])
        assert found["open"] == 2
        assert found["wide"]
