"""What the documents say of files is what the files are."""

import re
from pathlib import Path

import make_golden
import pytest
from conftest import GOLDEN

from compass_codec.weights import choose

ROOT = Path(__file__).parents[1]


def test_the_example_in_the_format_document_is_a_golden_file():
    text = (ROOT / "docs" / "format.md").read_text()
    block = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[-1]
    described = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert described == (GOLDEN / "small.cmps").read_bytes()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_pages_name_only_commands_that_exist(name):
    from compass_codec.cli import COMMANDS

    text = (ROOT / name).read_text()
    for command in set(re.findall(r"`?compass ([a-z][a-z-]*)", text)):
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


def rates(table: str) -> dict[str, list[str]]:
    """The rows of a table in Markdown, each with its figures in percent."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]
    return {name: [cell.split(" %")[0] for cell in cells] for name, *cells in rows if any("%" in c for c in cells)}


def test_figures_of_the_readme_are_those_of_the_results():
    """They are copied from what `make tables` and `make speed` write, of the default set."""
    readme = (ROOT / "README.md").read_text()
    results, performance = ((ROOT / "docs" / name).read_text() for name in ("results.md", "performance.md"))
    two, three = (rates(results.split(f"## {head} layers")[1].split("\n\nThe PSNRs")[0]) for head in ("Two", "Three"))
    places = results.split("## Two layers")[1].split("|")[2:5], results.split("## Three layers")[1].split("|")[2:5]
    columns = [[name.strip() for name in place].index(scale) for place, scale in zip(places, ("2x", "4x"), strict=True)]
    found = rates(readme)
    assert len(found) >= 5
    for name, figures in found.items():
        assert figures == [two[name][columns[0]], three[name][columns[1]]], name
    identity = choose().identity
    assert f"weights {identity}" in readme and f"weights {identity}" in results
    ((encoding, decoding),) = re.findall(r"\| lean \| ([\d.]+) s \| ([\d.]+) s", performance)
    assert f"{float(encoding):.1f} s of processor time a megapixel to encode and {float(decoding):.1f} s" in readme


def test_printed_examples_are_what_is_printed():
    """`make golden` writes the figures anew; the bytes of a file may differ a little between processors."""
    serving, models = ((ROOT / "docs" / name).read_text() for name in ("serving.md", "models.md"))
    assert make_golden.with_models(models) == models
    assert make_golden.FETCHED.sub("", make_golden.with_fetched(serving)) == make_golden.FETCHED.sub("", serving)
    numbers = [
        [int(n) for match in make_golden.FETCHED.findall(text) for n in match if n]
        for text in (serving, make_golden.with_fetched(serving))
    ]
    assert len(numbers[0]) == 3 and numbers[0] == pytest.approx(numbers[1], rel=0.01)
