"""The README's table is the one that the committed records give."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readme_shows_the_records():
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "report.py"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert printed.startswith("| adapters | method | CPU time |")
    assert printed.strip() in (ROOT / "README.md").read_text()
