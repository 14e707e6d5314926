"""What a person meets who installs the package: its page, its links, its module as a command."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import PACKAGES, ROOT

HOME = "https://github.com/gam-merge/gam-merge"
IN_REPOSITORY = re.compile(
    rf"(?:{HOME}/(?:blob|raw|tree)|https://raw\.githubusercontent\.com/gam-merge/gam-merge)/main/"
)
FOLDERS = ("benchmarks", "examples", "gam", "kernels", "tests")
PAGES = [
    Path("README.md"),
    Path("CHANGELOG.md"),
    *(page.relative_to(ROOT) for folder in FOLDERS for page in (ROOT / folder).rglob("README.md")),
]


def links(page: Path) -> list[str]:
    """Return the targets of links and pictures, in Markdown and in HTML, outside of code."""
    text = re.sub(r"^ *(```|~~~).*?^ *\1", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)", "", text, flags=re.S)
    inline = re.findall(r"\]\(\s*<?([^)>\s]+)", text)
    named = re.findall(r"^ {0,3}\[[^\]]+\]:\s*<?([^>\s]+)", text, re.M)
    html = re.findall(r"""\b(?:src|srcset|href)\s*=\s*["']([^"']+)["']""", text)
    return [*inline, *named, *html]


def headings(page: Path) -> set[str]:
    """Return the anchors that a page's headings get: lower case, hyphens for spaces."""
    text = re.sub(r"^ *```.*?^ *```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    titles = re.findall(r"^#+ +(.+?) *#* *$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def is_outside(target: str) -> bool:
    return bool(re.match(r"[a-z][a-z0-9+.-]*:", target)) and not IN_REPOSITORY.match(target)


def assert_leads_somewhere(target: str, page: Path) -> None:
    """Assert that a link into the repository names a file there, and a heading of that file."""
    base = ROOT if IN_REPOSITORY.match(target) else page.parent
    path, _, heading = IN_REPOSITORY.sub("", target).partition("#")
    place = (base / path).resolve() if path else page
    assert place.is_relative_to(ROOT), target
    assert place.exists(), target
    if heading and place.suffix == ".md":
        assert heading in headings(place), target


def test_the_long_description_has_absolute_links_only() -> None:
    """PyPI shows it, where a path into the repository leads nowhere."""
    for target in links(ROOT / "README.md"):
        assert re.match(r"https://|mailto:|#", target), target


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_lead_to_what_is_there(page: Path) -> None:
    for target in links(ROOT / page):
        if not is_outside(target):
            assert_leads_somewhere(target, ROOT / page)


@pytest.mark.parametrize(
    ("text", "targets"),
    [
        ("[`a`](b.py) and ![c](d.png 'title')", ["b.py", "d.png"]),
        ("[![badge](a.svg)](b)", ["a.svg", "b"]),
        ("[a]\n\n[a]: b.md", ["b.md"]),
        ('<a href="b.md"><img src="c.png"></a>', ["b.md", "c.png"]),
        ("`[a](b)`\n\n```python\n[a](b)\n```\n\n[c](d)", ["d"]),
    ],
)
def test_links_of_every_kind_are_found(text: str, targets: list[str], tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    assert links(page) == targets


def test_the_addresses_of_the_project_are_its_home() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    urls = re.findall(r'^\w+ = "(https:.+)"$', declared, re.M)
    assert HOME in urls
    for url in urls:
        assert url.startswith(HOME)
        if not is_outside(url):
            assert_leads_somewhere(url, ROOT)


def module(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gam", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(PACKAGES)},
        capture_output=True,
        text=True,
    )


def test_the_module_is_the_command(tmp_path: Path) -> None:
    adapters = [str(ROOT / "examples" / "adapters" / name) for name in ("reverse", "sort")]
    done = module(*adapters, "-o", "merged", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Wrote merged: ")
    assert (tmp_path / "merged" / "adapter_model.safetensors").exists()


def test_the_module_goes_by_the_name_of_the_command(tmp_path: Path) -> None:
    done = module("--no-such-option", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("Usage: gam-merge ")
