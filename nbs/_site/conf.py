"""How Sphinx draws the site. The pages are written by build.py; nothing is executed, nothing is fetched."""
import re

from docutils import nodes
from latex2mathml.converter import convert
from sphinx.application import Sphinx

project = "fedmpqkd"
author = "The fedmpqkd authors"
copyright = "2026 onwards, the fedmpqkd authors"
extensions = ["myst_nb"]
nb_execution_mode = "off"
nb_merge_streams = True
nb_render_markdown_format = "myst"  # tables in outputs
myst_enable_extensions = ["dollarmath", "amsmath"]
myst_heading_anchors = 3
html_theme = "furo"
html_title = "fedmpqkd"
html_show_sphinx = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
suppress_warnings = ["mystnb.unknown_mime_type"]  # an output that a browser cannot show has its text, too


def mathml(tex: str, block: bool) -> str:
    "MathML, which browsers draw themselves: no script, no font, no request."
    return convert(re.sub(r"\\(?:label|tag)\{[^}]*\}", "", tex), display="block" if block else "inline")


def inline(self, node: nodes.math) -> None:
    self.body.append(mathml(node.astext(), block=False))
    raise nodes.SkipNode


def block(self, node: nodes.math_block) -> None:
    self.body.append(f'<div class="equation">{mathml(node.astext(), block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    "The renderer of formulas."
    app.add_html_math_renderer("mathml", (inline, None), (block, None))
