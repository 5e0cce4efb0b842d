"""The pages of this folder and the API reference as one site: ``make docs``.

Sphinx, since the docstrings are reStructuredText with Google's sections, which its napoleon
reads; since it resolves every reference between pages and docstrings, and fails on one that leads
nowhere (``-W``); and since MyST lets the pages stay plain Markdown. Nothing is fetched.
"""

import dataclasses
import inspect
from typing import Any

import fused_peft

project = "fused_peft"
release = version = fused_peft.__version__
root_doc = "contents"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
html_theme = "furo"
html_title = f"{project} {release}"
html_copy_source = False
exclude_patterns = ["conf.py"]

myst_heading_anchors = 3
nitpicky = True
# Types of libraries whose own reference is not read: that would need the network.
nitpick_ignore_regex = [
    (r"py:.*", r"(torch|transformers|peft|numpy|np|collections|os|typing|types|pathlib)(\..*)?"),
    (r"py:.*", r"(.*\.)?_[A-Z]\w*"),  # type variables and other private names
]

autodoc_default_options = {"members": True, "member-order": "bysource"}
# In the signatures: a layer's attribute may have another type than the argument of the same name.
autodoc_typehints = "signature"
python_maximum_signature_line_length = 88
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False


def fields_as_signature(
    app: Any, what: str, name: str, obj: Any, options: Any, signature: Any, returns: Any
) -> tuple[str, None] | None:
    """The configs are dataclasses whose ``__new__`` takes, and names, any keyword."""
    if what == "class" and dataclasses.is_dataclass(obj) and "__new__" in obj.__dict__:
        parameters = list(inspect.signature(obj.__init__).parameters.values())[1:]
        return str(inspect.Signature(parameters)), None
    return None


def setup(app: Any) -> None:
    """Called by Sphinx."""
    app.connect("autodoc-process-signature", fields_as_signature)
