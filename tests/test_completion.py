"""Shell completion, in the shells themselves."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = {
    "bash": 'eval "$(_COMPASS_COMPLETE=bash_source compass)"\n',
    "zsh": 'autoload -Uz compinit; compinit -u\neval "$(_COMPASS_COMPLETE=zsh_source compass)"\n',
    "fish": "_COMPASS_COMPLETE=fish_source compass | source\n",
}
# what a person typed is completed the way the shell does it
ASK = {
    "bash": 'COMP_WORDS=(compass {words}); COMP_CWORD={last}; {function}; printf "%s\\n" "${{COMPREPLY[@]}}"',
    "zsh": "compadd() {{ print -rl -- $completions }}\n_describe() {{ print -rl -- $completions_with_descriptions }}\n"
    "words=(compass {words}); CURRENT={current}; {function}",
    "fish": 'complete --do-complete "compass {plain}"',
}


@pytest.fixture
def environment(tmp_path) -> dict[str, str]:
    """Variables with which `compass` is found, in a home of its own."""
    found = Path(sys.executable).parent
    if not (found / "compass").exists():
        pytest.skip("the compass command is not installed beside this Python")
    return os.environ | {"PATH": f"{found}:{os.environ['PATH']}", "HOME": str(tmp_path), "ZDOTDIR": str(tmp_path)}


@pytest.mark.parametrize("shell", SOURCE)
@pytest.mark.parametrize(
    ("words", "expected", "unexpected"),
    [
        (["de"], "decode", "encode"),
        (["encode", "--sc"], "--scales", "--quality"),
        (["decode", "--device", "c"], "cuda", "auto"),
    ],
)
def test_completion(shell, words, expected, unexpected, environment):
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    function = "_compass_completion compass" if shell == "bash" else "_compass_completion"
    values = {"words": " ".join(words), "plain": " ".join(words), "last": len(words), "current": len(words) + 1}
    script = SOURCE[shell] + ASK[shell].format(**values, function=function)
    done = subprocess.run([shell, "-c", script], capture_output=True, text=True, env=environment, timeout=60)
    lines = [line.split("\t")[0].split(":")[0] for line in done.stdout.splitlines()]
    assert expected in lines and unexpected not in lines, (done.stdout, done.stderr)


def test_completing_loads_nothing_heavy():
    """A key press must not wait for PyTorch."""
    code = (
        "import sys; from compass_codec.cli import main\n"
        "try: sys.argv[0] = 'compass'; main()\n"
        "finally: print(sorted({'torch', 'numpy', 'PIL', 'starlette', 'uvicorn'} & set(sys.modules)), file=sys.stderr)"
    )
    variables = os.environ | {"_COMPASS_COMPLETE": "bash_complete", "COMP_WORDS": "compass ", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, timeout=60)
    assert "plain,serve" in done.stdout.splitlines() and done.stderr.splitlines()[-1] == "[]", done
