"""Sphinx's configuration of the site: `make docs`. Nothing is fetched: no inventories, fonts or scripts."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "src"))
sys.path.insert(0, str(HERE))  # draw_architecture
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the tutorials' networks are too small for more
# the tutorials' kernels import this source, wherever the environment's own fimo is
os.environ["PYTHONPATH"] = os.pathsep.join(
    [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
)

from sphinx.application import Sphinx  # noqa: E402

import fimo  # noqa: E402

# the kernels read no profile of the user's, and keep quiet
profile = HERE / "_build" / "ipython" / "profile_default"
profile.mkdir(parents=True, exist_ok=True)
(profile / "ipython_kernel_config.py").write_text("c.IPKernelApp.log_level = 40\n")
os.environ["PYTHONWARNINGS"] = "ignore:IProgress"  # progress bars as text will do
os.environ["IPYTHONDIR"] = str(profile.parent)

project = "fimo"
author = "The fimo authors"
copyright = author
version = release = fimo.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build", "**/.ipynb_checkpoints"]
nitpicky = True  # but for names that are not on the site: other packages' and the inner parts of this one
nitpick_ignore_regex = [
    ("py:.*", r"(abc|collections|datetime|enum|matplotlib|numpy|pandas|pathlib|torch|types|typing)\..*"),
    ("py:.*", r"fimo\.(app|checking|curvature|engine|linear_response|validation)\..*"),
    # imported for types alone
    ("py:class", r"(AuditRun|Figure|Method|Origin|Path|Results|Tensor|pd\.DataFrame)"),
    ("py:.*", r"fimo\.(models\.train_mode|models\.frozen|further_training\.(trajectory|distribution))\..*"),
    ("py:.*", r"fimo\.(data\.origin|methods\.others)\..*"),
]

# Markdown
myst_enable_extensions = ["deflist", "colon_fence", "attrs_inline"]
myst_heading_anchors = 3

# tutorials are run anew whenever the site is built
nb_execution_mode = "force"
nb_execution_timeout = 300
nb_execution_in_temp = True  # what they write stays out of the sources
nb_execution_raise_on_error = True
nb_execution_show_tb = True
nb_merge_streams = True
nb_ipywidgets_js: dict[str, Any] = {}  # no widgets, hence none of their scripts from elsewhere

# reference
autodoc_typehints = "signature"
autodoc_member_order = "bysource"
autodoc_default_options = {"show-inheritance": False}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = [("Attributes", "params_style")]
python_maximum_signature_line_length = 88

html_theme = "furo"
html_title = "fimo"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"navigation_with_keys": True}
pygments_style = "friendly"
pygments_dark_style = "monokai"


def escaped(lines: list[str]) -> None:
    """Escape in place what formulas in docstrings have, |g_i|, but reStructuredText reads as markup."""
    literal = re.compile(r"(``.*?``)")
    code = False
    for k, line in enumerate(lines):
        code = line.lstrip().startswith(">>>") or (code and bool(line.strip()))
        if not code:
            parts = literal.split(line)
            lines[k] = "".join(
                p if i % 2 else re.sub(r"(?<!\\)([|])", r"\\\1", p) for i, p in enumerate(parts)
            )


def process(app: Sphinx, kind: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Prepare a docstring for napoleon, which takes words before a property's first colon for its type."""
    escaped(lines)
    if kind in ("attribute", "property"):
        lines[0] = lines[0].replace(": ", "; ", 1)


def setup(app: Sphinx) -> None:
    app.connect("autodoc-process-docstring", process, priority=400)  # before napoleon
