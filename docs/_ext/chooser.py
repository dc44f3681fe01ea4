"""The chooser of the page "Which norm": its form, and the answers that chooser.js shows."""

import json
from pathlib import Path

from docutils.nodes import raw
from sphinx.util.docutils import SphinxDirective

DATA = Path(__file__).resolve().parent.parent / "_static" / "chooser.json"
FORM = """<div id="chooser" hidden>
<form>
<label>I build <select name="network"></select></label>
<label>with so many samples in a batch, on each device:
<input name="batch" type="number" min="1" value="2" size="6"></label>
</form>
<output aria-live="polite"></output>
</div>
<script type="application/json" id="chooser-data">{data}</script>
"""


class Chooser(SphinxDirective):
    """``.. chooser::`` shows it, where scripts run."""

    def run(self):
        """Return the form with its data, and note the file."""
        self.env.note_dependency(str(DATA))
        data = json.dumps(json.loads(DATA.read_text(encoding="utf-8"))).replace("<", "\\u003c")
        return [raw("", FORM.format(data=data), format="html")]


def setup(app):
    """Register the directive, and its script on every page that has one."""
    app.add_directive("chooser", Chooser)
    app.connect("html-page-context", add_script)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def add_script(app, pagename, templatename, context, doctree):
    """Have the page of the chooser load its script."""
    if pagename == "which-norm":
        app.add_js_file("chooser.js")
