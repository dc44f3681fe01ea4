"""Sphinx configuration. It documents the installed fastnorm and fetches nothing."""

import sys
from pathlib import Path

from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

import fastnorm

# fastnorm is imported above, before this: the installed package stays the one documented, even
# though the root also holds its sources.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from fastnorm._bench.operations import OPERATIONS

project = "fastnorm"
author = "The fastnorm developers"
copyright = "2026, the fastnorm developers"
release = fastnorm.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
templates_path = ["_templates"]
exclude_patterns = ["_build"]
default_role = "py:obj"
add_module_names = False
maximum_signature_line_length = 88

autodoc_typehints = "none"  # the docstrings name the types
napoleon_google_docstring = False
napoleon_use_rtype = False

doctest_global_setup = "import numpy as np\nimport fastnorm as fn"

html_theme = "furo"
html_title = f"fastnorm {release}"


class OperationsTable(SphinxDirective):
    """``.. operations-table::`` lists every operation of fastnorm/_bench/operations.py."""

    def run(self):
        """Return the table."""
        lines = [".. list-table::", "   :header-rows: 1", "   :widths: auto"]
        rows = [("function", "what is normalised over what", "in PyTorch")]
        for op in OPERATIONS:
            pytorch = f"``{op.torch_name}``" if op.torch_name else ""
            rows.append((f":func:`{op.label} <fastnorm.{op.name}>`", op.description, pytorch))
        for first, *others in rows:
            lines += ["", f"   * - {first}", *(f"     - {cell}" for cell in others)]
        return self.parse_text_to_nodes("\n".join(lines))


def report_undocumented(app, env):
    """Warn (an error under -W) about each public function or class without an entry."""
    documented = env.get_domain("py").objects
    for name in fastnorm.__all__:
        if callable(getattr(fastnorm, name)) and f"fastnorm.{name}" not in documented:
            getLogger(__name__).warning(
                "fastnorm.%s is public and on no page of docs/reference/", name
            )


def setup(app):
    """Register what this file adds to Sphinx."""
    app.add_directive("operations-table", OperationsTable)
    app.connect("env-check-consistency", report_undocumented)
