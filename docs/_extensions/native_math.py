r"""Formulas as MathML, which browsers draw themselves: pages need no script and no other site.

The translation from TeX is that of docutils. What it does not know of what the pages use is
rewritten first; what it still does not know is a warning, which fails the build.
"""

import re
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.util import logging

LOGGER = logging.getLogger(__name__)
TAG = re.compile(r"\\tag\{([^{}]*)\}")
FUNCTIONS = r"\\(?:log|exp|det|cosh)(?![A-Za-z])"
# TeX that docutils has under another name.
SAME = {r"\lvert": "|", r"\rvert": "|", r"\lVert": r"\|", r"\rVert": r"\|", r"\dots": r"\ldots"}


def mathml(tex: str, node: nodes.Node, block: bool) -> str:
    """The formula as MathML; as code, with a warning, where it cannot be told."""
    # TeX leaves room around the name of a function.
    tex = re.sub(rf"(?<=[\w}}])\s*(?={FUNCTIONS})", r"\\,", tex)
    tex = re.sub(rf"({FUNCTIONS})\s*(?=[\w|\\])(?!\\[,;!)bB])", r"\1\\,", tex)
    for name, other in SAME.items():
        tex = re.sub(re.escape(name) + r"(?![A-Za-z])", lambda _, other=other: other, tex)
    try:
        return tex2mathml(tex, as_block=block)
    except MathError as error:
        LOGGER.warning("docutils cannot translate %r: %s", tex, error, location=node)
        return f"<code>{nodes.unescape(tex)}</code>"


def visit_inline(translator: Any, node: nodes.math) -> None:
    """A formula in a line."""
    translator.body.append(mathml(node.astext(), node, block=False))
    raise nodes.SkipNode


def visit_block(translator: Any, node: nodes.math_block) -> None:
    """A formula of its own line, with the number that it has."""
    tex = node.astext().strip()
    tags = TAG.findall(tex)
    if "\\\\" in tex and r"\begin" not in tex:
        tex = rf"\begin{{aligned}}{tex}\end{{aligned}}"
    translator.body.append(translator.starttag(node, "div", CLASS="math-block"))
    translator.body.append(mathml(TAG.sub("", tex), node, block=True))
    translator.body.extend(f'<span class="math-tag">({tag})</span>' for tag in tags)
    translator.body.append("</div>\n")
    raise nodes.SkipNode


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls it."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
