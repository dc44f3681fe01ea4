"""Sphinx configuration. It documents the installed fastnorm and fetches nothing."""

import doctest
import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import ClassVar

from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.ext.autosummary import Autosummary
from sphinx.ext.autosummary.generate import generate_autosummary_docs
from sphinx.pycode import ModuleAnalyzer
from sphinx.util.docutils import SphinxDirective
from sphinx.util.logging import getLogger

# The gallery multiplies small matrices: BLAS's threads only wait for each other there, a hundred
# seconds of it where another program is at work.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import fastnorm

# fastnorm is imported above, before this: the installed package stays the one documented, even
# though the root also holds its sources.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent / "_ext"))

from at_hand import absent_examples

from fastnorm.operations import OPERATIONS

project = "fastnorm"
author = "The fastnorm developers"
copyright = "2026, the fastnorm developers"
release = fastnorm.__version__
version = ".".join(release.split(".")[:2])

extensions = [
    "chooser",
    "figures",
    "mathml",
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_design",
    "sphinx_gallery.gen_gallery",
]
templates_path = ["_templates"]
# myst_parser reads what pages include; no page is Markdown itself.
source_suffix = {".rst": "restructuredtext"}
exclude_patterns = ["_build", "gallery", "sg_execution_times.rst", "**/sg_execution_times.rst"]
suppress_warnings = ["config.cache"]  # sphinx_gallery_conf holds what is not pickled
default_role = "py:obj"
add_module_names = False

autodoc_typehints = "both"
autodoc_typehints_description_target = "documented_params"
autodoc_typehints_format = "short"
# Names that signatures keep; reference/types.rst explains them.
autodoc_type_aliases = {
    name: f"fastnorm.{name}"
    for name in ("Activation", "Array", "ArrayLike", "Axes", "Gradients", "Statistic")
    + ("WithRstd", "WithStats")
}
python_use_unqualified_type_names = True
napoleon_google_docstring = False
napoleon_use_rtype = False

doctest_default_flags = doctest.DONT_ACCEPT_TRUE_FOR_1 | doctest.ELLIPSIS
doctest_global_setup = "import numpy as np\nimport fastnorm as fn\nimport at_hand"

# Kept here, so that a build fetches nothing; inventories/refresh.py writes them.
intersphinx_mapping = {
    name: (address, f"inventories/{name}.inv")
    for name, address in (
        ("python", "https://docs.python.org/3"),
        ("numpy", "https://numpy.org/doc/stable"),
    )
}

plot_formats = ["svg"]
plot_html_show_source_link = plot_html_show_formats = plot_include_source = False

copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

sphinx_gallery_conf = {
    "examples_dirs": "gallery",
    "gallery_dirs": "auto_examples",
    # what is not installed here is shown without being run
    "filename_pattern": "/plot_" + "".join(f"(?!{name})" for name in absent_examples()),
    "write_computation_times": False,  # a page of other hosts' scripts
    "image_srcset": ["2x"],
    "abort_on_example_error": True,
    "show_memory": False,
    "min_reported_time": 60,
    "download_all_examples": False,
    "remove_config_comments": True,
    "show_signature": False,
    "plot_gallery": True,
    "copyfile_regex": "",
}

html_math_renderer = "mathml"
html_theme = "pydata_sphinx_theme"
html_title = f"fastnorm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_js_files = ["site.js"]
html_favicon = "_static/blocks/logo.svg"
html_show_sourcelink = False
html_copy_source = False
html_context = {"default_mode": "auto"}
html_sidebars = {"index": [], "which-norm": []}
html_theme_options = {
    "logo": {
        "text": "fastnorm",
        "image_light": "_static/blocks/logo.svg",
        "image_dark": "_static/blocks/logo.svg",
        "alt_text": "",
    },
    "collapse_navigation": True,
    "header_links_before_dropdown": 7,
    "navbar_end": ["theme-switcher"],
    "footer_start": ["copyright"],
    "footer_end": [],
    "pygments_light_style": "a11y-high-contrast-light",
    "pygments_dark_style": "a11y-high-contrast-dark",
    "show_toc_level": 2,
}


class OperationsTable(SphinxDirective):
    """``.. operations-table::`` lists every operation of fastnorm/operations.py."""

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


class PublicFunctions(Autosummary):
    """``.. public-functions:: related`` is an autosummary of what that module's __all__ names.

    With ``:only:`` of these, with ``:but:`` of the others.
    """

    has_content = False
    required_arguments = 1
    option_spec: ClassVar = {"only": directives.unchanged, "but": directives.unchanged}

    def run(self):
        """Return the table, and the entries of its pages."""
        names = import_module(f"fastnorm.{self.arguments[0]}").__all__
        only = self.options.get("only", " ".join(names)).split()
        but = self.options.get("but", "").split()
        self.options["toctree"] = "generated"
        self.content = StringList([n for n in names if n in only and n not in but], "conf.py")
        return super().run()


def write_pages(app):
    """Write the page of each public function, as autosummary does for what it finds by itself."""
    names = [
        name
        for module in ("functional", "backward", "related", "elementwise")
        for name in import_module(f"fastnorm.{module}").__all__
    ]
    found = Path(app.doctreedir, "public.rst")
    found.parent.mkdir(parents=True, exist_ok=True)
    pages = Path(app.srcdir, "reference", "generated")
    head = [".. currentmodule:: fastnorm", "", ".. autosummary::", f"   :toctree: {pages}", ""]
    found.write_text("\n".join([*head, *(f"   {name}" for name in names), ""]))
    generate_autosummary_docs([str(found)], app=app)


def forget_overloads(app):
    """Show the signature of a function itself, which has all that its overloads have."""
    for module in ("functional", "moments"):
        analyzer = ModuleAnalyzer.for_module(f"fastnorm.{module}")
        analyzer.analyze()
        analyzer.overloads.clear()


# autodoc writes its own class where an alias is part of a union.
ALIAS = re.compile(r"TypeAliasForwardRef\('([\w.]+)'\)")


def name_aliases(app, what, name, obj, options, signature, returned):
    """Have a signature name its types as the code does."""
    return tuple(text and ALIAS.sub(r"~\1", text) for text in (signature, returned))


def name_aliases_below(app, domain, objtype, content):
    """Have the list of parameters do so, too."""
    for annotations in app.env.current_document.autodoc_annotations.values():
        annotations |= {name: ALIAS.sub(r"~\1", text) for name, text in annotations.items()}


def report_undocumented(app, env):
    """Warn (an error under -W) about each public function or class without an entry."""
    documented = env.get_domain("py").objects
    for name in fastnorm.__all__:
        if callable(getattr(fastnorm, name)) and f"fastnorm.{name}" not in documented:
            getLogger(__name__).warning(
                "fastnorm.%s is public and on no page of docs/reference/", name
            )


def mend_page(app, pagename, templatename, context, doctree):
    """Mend what Sphinx writes: a role with children of another kind, links back from sources."""
    body = context.get("body", "").replace('<div role="list" class="cit', '<div class="cit')
    if pagename.startswith("_modules/"):
        # of a function that is documented under another module than its neighbours
        body = re.sub(r"(generated/((?:fastnorm)[\w.]*)\.html)#(?!\2)[\w.]*", r"\1#\2", body)
    if body:
        context["body"] = body


def setup(app):
    """Register what this file adds to Sphinx."""
    app.add_directive("operations-table", OperationsTable)
    app.add_directive("public-functions", PublicFunctions)
    app.connect("builder-inited", write_pages)
    app.connect("builder-inited", forget_overloads)
    app.connect("autodoc-process-signature", name_aliases)
    app.connect("object-description-transform", name_aliases_below, priority=400)
    app.connect("env-check-consistency", report_undocumented)
    app.connect("html-page-context", mend_page)
