"""What the site needs beyond mkdocs: links that lead out of it, and formulas without a script."""

import html
import logging
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

_log = logging.getLogger("mkdocs.hooks")

# A fenced block, or a link that leaves this folder.
_OUTWARD = re.compile(r"^```.*?^```|\[(?P<text>[^\]]+)\]\((?P<path>\.\./[^)\s]+)\)", re.MULTILINE | re.DOTALL)
_ROLE = re.compile(r":(?:func|meth|class):<code>([\w.]+)</code>")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.DOTALL)


def on_page_markdown(markdown: str, page: Any, config: Any, **_: Any) -> str:
    """Links to files outside of docs become their paths: the site holds no copy of them."""
    folder = Path(config["docs_dir"]).resolve()
    here = (folder / page.file.src_path).parent

    def path_alone(match: re.Match[str]) -> str:
        if match["path"] is None:
            return match[0]
        target = (here / match["path"].partition("#")[0]).resolve()
        if target.is_relative_to(folder):
            # Of a page in a folder, another page: mkdocs checks it.
            return match[0]
        inside = str(target.relative_to(folder.parent))
        if not target.exists():
            _log.warning("%s: there is no file %s in the repository", page.file.src_path, inside)
        text = match["text"].strip("`")
        return f"`{inside}`" if text == inside else f"{match['text']} (`{inside}`)"

    return _OUTWARD.sub(path_alone, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Formulas become MathML, which browsers draw by themselves; names in docstrings become links."""

    def mathml(match: re.Match[str]) -> str:
        block = match[1] == "div"
        return convert(html.unescape(match[2]), display="block" if block else "inline")

    return _FORMULA.sub(mathml, _ROLE.sub(_reference, content))


def _reference(role: re.Match[str]) -> str:
    """A name in a docstring becomes a link to its place in the reference, where it has one."""
    name = role[1]
    full = name if "." in name else f"increlora_rs._core.{name}"
    return f'<autoref identifier="{full}" optional><code>{name}</code></autoref>'
