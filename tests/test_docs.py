"""What the documents say of files is what the files are."""

import re
from pathlib import Path

import pytest
from conftest import GOLDEN

from compass_codec import container

ROOT = Path(__file__).parents[1]


def test_the_example_in_the_format_document_is_a_golden_file():
    text = (ROOT / "docs" / "format.md").read_text()
    block = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[-1]
    described = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert described == (GOLDEN / "small.cmps").read_bytes()


def test_the_largest_header_in_the_format_document(small_file):
    """17 fixed bytes and up to 21 for each layer."""
    header = container.read_header(small_file)
    assert header.length <= 17 + 21 * len(header.layers) <= 80


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_only_commands_that_exist(name):
    from compass_codec.cli import COMMANDS

    text = (ROOT / name).read_text()
    for command in set(re.findall(r"`?compass ([a-z]+)", text)):
        assert command in COMMANDS, command
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_contributing_names_only_files_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for name in set(re.findall(r"`((?:\w+/)*[a-z_]+\.py)`", text)):
        assert any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "compass_codec")), name


PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "models" / "README.md"])


def prose(page: Path) -> str:
    """A page without its code."""
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Those that GitHub gives the headings of a page without code."""
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    heads = [re.sub(r"[^\w\- ]", "", head.lower()) for head in re.findall(r"^#+ (.+)$", text, re.MULTILINE)]
    return {head.replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_something(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        found = page.parent / name if name else page
        assert found.exists(), link
        assert not anchor or anchor in anchors(found), link


def test_the_index_lists_every_document():
    text = (ROOT / "docs" / "README.md").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "README.md" or f"]({name})" in text, name
