"""Runs fairseq's commands, each in a process that is forked from one that has imported fairseq already."""

import re
from pathlib import Path
from typing import Optional, Sequence

from tests.forked import ROOT, Command

PLUGIN = str(ROOT / "fairseq_plugin")
WATCHED = str(Path(__file__).resolve().parent / "watched")


class Runner:
    """Runs commands in a work folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, name: str, arguments: Sequence, cwd: Optional[Path] = None, **environment: str) -> Command:
        """Start ``fairseq-NAME ARGUMENTS``."""
        words = [str(word) for word in arguments]
        user_dirs = [folder for option, folder in zip(words, words[1:]) if option == "--user-dir"]
        # Another may register methods, whose options the warm server's parser does not have.
        kind = "fairseq_plugin" if user_dirs and user_dirs[-1] in (PLUGIN, WATCHED) else "fairseq"
        return Command(kind, ["-m", f"fairseq_cli.{name.replace('-', '_')}", *words], cwd or self.folder, environment)

    def run(self, name: str, arguments: Sequence, cwd: Optional[Path] = None, **environment: str) -> Command:
        """Run ``fairseq-NAME ARGUMENTS`` and expect success."""
        done = self.start(name, arguments, cwd, **environment)
        assert done.wait() == 0, f"fairseq-{name} ended with {done.returncode}\n{done.out[-3000:]}\n{done.err[-3000:]}"
        return done

    def fail(self, name: str, arguments: Sequence, cwd: Optional[Path] = None) -> str:
        """Run a command that must fail with one sentence, which is returned."""
        done = self.start(name, arguments, cwd)
        assert done.wait() == 1, f"fairseq-{name} ended with {done.returncode}\n{done.out[-2000:]}\n{done.err[-2000:]}"
        assert "Traceback" not in done.err, done.err
        sentences = [line for line in done.err.splitlines() if line.startswith("error: ")]
        assert len(sentences) == 1, done.err
        return sentences[0]


def logged(output: str, name: str) -> list:
    """The values of ``name`` in fairseq's JSON log, in order."""
    return [float(value) for value in re.findall(rf'"{re.escape(name)}": "([^"]+)"', output)]
