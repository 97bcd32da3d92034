"""The site: `make docs` writes build/site from these pages, with Sphinx, and needs no network.

The options of the commands and the Python reference come from the code when the site is built.
"""

import importlib
import re
import sys
import warnings
from pathlib import Path

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

sys.path.insert(0, str(Path(__file__).parent.parent))

project = "gpt2-triton"
html_title = "gpt2-triton"
extensions = ["myst_parser", "sphinx.ext.autodoc"]
html_theme = "furo"
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_static_path = ["site.css"]
html_css_files = ["site.css"]
highlight_language = "none"
smartquotes = False  # they would make one dash of --option
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say shapes and dtypes
suppress_warnings = ["misc.highlighting_failure"]


class _Parsed(Exception):
    """Ends a command where it would begin its work."""


def command(name: str) -> tuple[type, str]:
    """The config class of a command and its help, as the command gives them to gpt2.cli.parse."""
    module, found = importlib.import_module(f"gpt2.commands.{name}"), []

    def parse(cls, description):
        found.extend((cls, description))
        raise _Parsed

    real, module.parse = module.parse, parse
    try:
        module.main()
    except _Parsed:
        return tuple(found)
    finally:
        module.parse = real


class Options(SphinxDirective):
    """```{options} NAME``` is a command's help: its words, examples and a table of options."""

    required_arguments = 1

    def run(self):
        import tyro

        cls, description = command(self.arguments[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            parser = tyro.extras.get_parser(cls, config=(tyro.conf.FlagConversionOff,))
        # Indented lines are code in Markdown, as they should be, behind an empty line.
        description = re.sub(r"\n(Data sets:\n)", r"\n\1\n", description)
        lines = [*description.splitlines(), "", "| option | default | meaning |", "|---|---|---|"]
        for action in parser._actions[1:]:
            words, _, default = action.help.partition("(default: ")
            words, default = words.replace("(required)", ""), default.removesuffix(")")
            default = "required" if action.required else f"`{default}`"
            option = f"`{action.option_strings[0].replace('-', '_').replace('__', '--', 1)}`"
            metavar = f" `{action.metavar}`" if action.metavar else ""
            cells = option + metavar, default, words.strip().replace("<", "&lt;")
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        parent = nodes.container()
        self.state.nested_parse(StringList(lines, "options"), 0, parent)
        return parent.children


def as_it_stands(app, what, name, obj, options, lines):
    """A docstring keeps its layout: behind the first paragraph it is shown as it was written."""
    first = lines.index("") if "" in lines else len(lines)
    if any(lines[first:]):
        lines[first:] = ["", "::", "", *(f"   {line}" for line in lines[first + 1 :]), ""]


def setup(app):
    app.add_directive("options", Options)
    app.connect("autodoc-process-docstring", as_it_stands)
