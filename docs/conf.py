"""The site: ``make docs``."""

import re
from importlib import metadata
from pathlib import Path, PurePosixPath
from posixpath import normpath, relpath

try:
    version = metadata.version("zokern")
except metadata.PackageNotFoundError:
    version = ""

project = "zokern"
author = "the zokern authors"
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
html_theme = "furo"
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
autodoc_typehints = "none"
autodoc_member_order = "bysource"
napoleon_use_rtype = False
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!zokern\.).*")]

ROOT = Path(__file__).parent.parent
# Pages that lie elsewhere in the repository, by the name of the page that stands for them.
ELSEWHERE = {
    "get_started": "README.md",
    "examples": "examples/README.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}


def _read_elsewhere(app, name: str, source: list[str]) -> None:
    """A page's text, with links for the place that the site has it at."""
    file = PurePosixPath(ELSEWHERE.get(name, f"docs/{name}.md"))
    pages = {path: f"docs/{page}.md" for page, path in ELSEWHERE.items()}

    def link(match: re.Match) -> str:
        target = normpath(str(file.parent / match[1]))
        return f"]({relpath(pages.get(target, target), 'docs')}"

    if name in ELSEWHERE:
        source[0] = (ROOT / file).read_text(encoding="utf-8")
    source[0] = re.sub(r"\]\((?!\w+:|#)([^)#]+)", link, source[0])


def setup(app) -> None:
    app.connect("source-read", _read_elsewhere)
