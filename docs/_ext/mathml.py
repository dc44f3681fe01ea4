"""Formulas as MathML, which browsers draw by themselves: no script, nothing fetched."""

from docutils.nodes import SkipNode
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.errors import ExtensionError
from sphinx.util.logging import getLogger


def _mathml(node, block):
    text = node.astext()
    if block and ("&" in text or r"\\" in text):
        text = rf"\begin{{aligned}}{text}\end{{aligned}}"
    try:
        return tex2mathml(text, as_block=block)
    except MathError as error:
        getLogger(__name__).warning("%s: %s", error, text, location=node)
        return f"<code>{text}</code>"


def visit_inline(self, node):
    """Write a formula of a line."""
    self.body.append(_mathml(node, block=False))
    raise SkipNode


def visit_block(self, node):
    """Write a formula of its own, which scrolls where the page is too narrow for it."""
    if node["number"]:
        raise ExtensionError("numbered formulas are not drawn")
    self.body.append('<div class="math" tabindex="0" role="group" aria-label="formula">')
    self.body.append(_mathml(node, block=True) + "</div>\n")
    raise SkipNode


def setup(app):
    """Register the renderer: html_math_renderer = "mathml"."""
    app.add_html_math_renderer("mathml", (visit_inline, None), (visit_block, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
