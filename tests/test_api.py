"""The examples in docs/api.md, run as they stand."""

import doctest
import http.server
import re
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "api.md"


def test_the_examples_of_the_api_document(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    text = DOCUMENT.read_text()
    assert len(re.findall(r"^```pycon$", text, re.MULTILINE)) == len(re.findall(r"^```$", text, re.MULTILINE)) >= 8
    test = doctest.DocTestParser().get_doctest(re.sub(r"(?m)^```.*$", "", text), {}, DOCUMENT.name, str(DOCUMENT), 0)
    assert len(test.examples) > 30
    output: list[str] = []
    runner = doctest.DocTestRunner()
    failed, _ = runner.run(test, out=output.append)
    assert not failed, "".join(output)
