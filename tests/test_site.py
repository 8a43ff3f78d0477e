"The site is built from the pages as they are: no warning, every link has an end, nothing is fetched."
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT


def every_page_is_there(site: Path):
    pages = [p for p in (ROOT / "nbs").rglob("[!_.]*.ipynb") if "_site" not in p.parts]
    for page in pages: assert (site / page.relative_to(ROOT / "nbs")).with_suffix(".html").exists(), page.name
    assert len(list((site / "api").glob("*.html"))) >= 50


def nothing_is_fetched(site: Path):
    "Links may lead away; scripts, styles, fonts and pictures may not."
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//[^"]+"', text), page.name
        styles = re.findall(r'<link[^>]+rel="(?:stylesheet|preload)"[^>]+href="(?:https?:)?//', text)
        assert not styles, page.name


def formulas_figures_and_shapes_are_shown(site: Path):
    bits = (site / "quant" / "06_bits.html").read_text(encoding="utf-8")
    assert "<math" in bits and "$" not in re.sub(r"<(pre|code|script)\b.*?</\1>", "", bits, flags=re.S)
    assert re.search(r'<img[^>]+src="[^"]+\.png"', bits)
    assert "most significant plane first" in (site / "api" / "quant.bits.html").read_text(encoding="utf-8")
    assert "default_exp" not in bits and "fastcore.test" not in bits, "hidden cells stay hidden"


def tables_of_outputs_are_tables(site: Path):
    "Those that cells print as Markdown, on the first page and on that of results."
    for name, least in (("index", 3), ("93_results", 5)):
        text = re.sub(r"<pre.*?</pre>", "", (site / f"{name}.html").read_text(encoding="utf-8"), flags=re.S)
        assert text.count("<table") >= least and "| Method |" not in text


def test_the_site():
    "One build, warnings as errors; about 40 s."
    pytest.importorskip("myst_nb", reason="pip install -e '.[docs]'")
    command = [sys.executable, ROOT / "nbs" / "_site" / "build.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    site = ROOT / "build" / "site"
    every_page_is_there(site)
    nothing_is_fetched(site)
    formulas_figures_and_shapes_are_shown(site)
    tables_of_outputs_are_tables(site)
