"""What the documents say of files is what the files are."""

import re
from pathlib import Path

from compass_codec import container

ROOT = Path(__file__).parents[1]


def test_the_example_in_the_format_document_is_a_golden_file():
    text = (ROOT / "docs" / "format.md").read_text()
    block = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[-1]
    described = bytes.fromhex("".join(line.split("  ")[0] for line in block.splitlines()))
    assert described == (ROOT / "tests" / "golden" / "small.cmps").read_bytes()


def test_the_largest_header_in_the_format_document(small_file):
    """17 fixed bytes and up to 21 for each layer."""
    header = container.read_header(small_file)
    assert header.length <= 17 + 21 * len(header.layers) <= 80


def test_readme_names_only_commands_that_exist():
    from compass_codec.cli import COMMANDS

    text = (ROOT / "README.md").read_text()
    for command in set(re.findall(r"`?compass ([a-z]+)", text)):
        assert command in COMMANDS, command
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"make ([a-z-]+)", text)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
