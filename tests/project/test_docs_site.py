"""The site builds without a warning, and its pages need nothing from elsewhere."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import increlora_rs
import pytest

ROOT = Path(__file__).parents[2]
# Not the tables that the comparisons write beside their results in docs/evidence.
PAGES = sorted(
    str(path.relative_to(ROOT / "docs").with_suffix(""))
    for path in (ROOT / "docs").rglob("*.md")
    if path.parent.name != "evidence"
)
# Attributes through which a page loads something when it is opened.
LOADING = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


class Page(HTMLParser):
    """What a page loads, and what it links to."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids, self.formulas = [], [], set(), 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.ids.add(values.get("id"))
        self.formulas += tag == "math"
        if tag in LOADING and values.get(LOADING[tag]):
            self.loads.append(values[LOADING[tag]])
        if tag == "a" and values.get("href"):
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("mkdocs", reason='the site needs the extra "docs"')
    out = tmp_path_factory.mktemp("site")
    # Not with --quiet, under which no warning is counted.
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stderr[-3000:]
    assert "WARNING  -" not in built.stderr
    return {name: Page((out / f"{name}.html").read_text()) for name in PAGES}


def test_every_page_is_there(site):
    assert list(site) == PAGES


@pytest.mark.parametrize("name", PAGES)
def test_a_page_loads_nothing_from_elsewhere(site, name):
    assert site[name].loads
    assert [source for source in site[name].loads if re.match(r"(https?:)?//", source)] == []


@pytest.mark.parametrize("name", PAGES)
def test_every_link_within_the_site_leads_somewhere(site, name):
    wrong = []
    for link in site[name].links:
        if re.match(r"https?:|mailto:", link):
            continue
        page, _, anchor = link.partition("#")
        beside = Path(name).parent / page
        target = site.get(name if page in ("", ".") else os.path.normpath(beside.with_suffix("")))
        if target is None or (anchor and anchor not in target.ids):
            wrong.append(link)
    assert wrong == []


def test_formulas_need_no_script(site):
    assert site["method"].formulas > 20


@pytest.mark.parametrize("name", increlora_rs.__all__)
def test_every_public_name_is_in_the_reference(site, name):
    assert f"increlora_rs.{name}" in site["api"].ids
