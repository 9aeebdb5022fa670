"""The built documentation in a real browser: what a reader sees is there, and nothing is fetched.

Needs what `make docs` installs and a Chromium; skipped where either is missing. `.ci/run` has both.
"""

import ast
import functools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("sphinx")
pytest.importorskip("furo")
pytest.importorskip("myst_parser")

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
OPTIONS = """
    --headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync
    --disable-background-networking --disable-component-update --allow-file-access-from-files
    --dump-dom
""".split()

# Added to a copy of a page: what the browser made of it.
LOOK = """<script>addEventListener("load", () => {
  const box = (node) => node.getBoundingClientRect();
  const all = (query) => [...document.querySelectorAll(query)];
  const found = {
    formulas: all("math").map((node) => [box(node).width, box(node).height]),
    fractions: all("mfrac").map(({children: [top, bottom]}) => box(bottom).top - box(top).top),
    figures: all(".content img, article img").map((node) => [node.naturalWidth, box(node).width]),
    clipped: all("div.highlight pre").filter((node) => node.scrollWidth > node.clientWidth + 1)
      .map((node) => node.textContent.slice(0, 80)),
    wide: all(".table-wrapper").filter((node) => node.scrollWidth > node.clientWidth + 1)
      .map((node) => [getComputedStyle(node).overflowX, getComputedStyle(node).backgroundImage]),
    beyond: document.documentElement.scrollWidth - document.documentElement.clientWidth,
    dollars: document.querySelector("article").innerText.match(/[$]{2}|\\\\\\\\(frac|sum|sigma)/g),
  };
  const told = document.createElement("pre");
  told.id = "found";
  told.textContent = JSON.stringify(found);
  document.body.append(told);
})</script>"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    if BROWSER is None:
        pytest.skip(f"no browser: none of {', '.join(NAMES)} is installed")
    folder = tmp_path_factory.mktemp("pages")
    [listed] = re.findall(
        r"^extensions = (\[.*?\])", (ROOT / "docs/conf.py").read_text(), re.M | re.S
    )
    # The reference and the pages with the source of modules take two thirds of the time, and nobody
    # looks at them here. What refers to them would be told as warnings; `make docs` has them all.
    extensions = [name for name in ast.literal_eval(listed) if name != "sphinx.ext.viewcode"]
    command = [sys.executable, "-m", "sphinx", "-Q", "-D", "run_examples=0"]
    command += ["-D", f"extensions={','.join(extensions)}"]
    command += ["-D", "exclude_patterns=_build,_generated,api.md"]
    command += [str(ROOT / "docs"), str(folder)]
    subprocess.run(command, check=True, timeout=300)
    return folder


@functools.cache
def seen(pages, name, width=1300):
    """What the browser shows of a page in a window of this width, by `LOOK`."""
    page = pages / f"{name}.html"
    copy = page.with_name(f"{name}-looked-at.html")
    copy.write_text(page.read_text().replace("</body>", LOOK + "</body>"))
    command = [BROWSER, *OPTIONS, f"--user-data-dir={pages / 'browser'}"]
    command += [f"--window-size={width},1000", copy.as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    [found] = re.findall(r'<pre id="found">(.*?)</pre>', shown)
    return json.loads(found.replace("&gt;", ">").replace("&lt;", "<").replace("&amp;", "&"))


def test_formulas_are_drawn(pages):
    found = seen(pages, "theory", 1400)  # as below, so that it is looked at once
    assert len(found["formulas"]) > 100
    assert all(width > 2 and height > 5 for width, height in found["formulas"])
    # A numerator stands above its denominator: the browser laid the formula out.
    assert len(found["fractions"]) > 10
    assert min(found["fractions"]) > 5
    assert not found["dollars"]


def test_the_first_page_shows_a_figure(pages):
    found = seen(pages, "index")
    assert found["figures"]
    assert all(own > 300 and shown > 300 for own, shown in found["figures"])


@pytest.mark.parametrize("name", ["index", "samplers", "black-boxes"])
def test_lines_of_code_are_not_clipped(pages, name):
    assert seen(pages, name)["clipped"] == []


@pytest.mark.parametrize("width", [1024, 1400])
def test_pages_do_not_scroll_sideways(pages, width):
    """They did in windows of 1,008 to 1,540 pixels: text and the bars beside it were too wide."""
    assert seen(pages, "theory", width)["beyond"] == 0


def test_wide_tables_scroll_in_their_own_box(pages):
    """They ran past the right edge of a narrow window, and nothing told that they scroll."""
    found = seen(pages, "other-optimizers", 800)
    assert found["beyond"] == 0
    assert found["wide"]
    assert all(overflow == "auto" and "gradient" in shadow for overflow, shadow in found["wide"])


def test_nothing_is_fetched_from_elsewhere(pages):
    for page in pages.glob("*.html"):
        loaded = re.findall(r'<(?:script|img|iframe)[^>]+src="([^"]+)"', page.read_text())
        loaded += re.findall(r'<link[^>]+stylesheet[^>]+href="([^"]+)"', page.read_text())
        assert loaded
        assert not [address for address in loaded if re.match(r"https?:|//", address)], page.name
