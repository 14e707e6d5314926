"""The README's tables are those that the committed records give, and measuring works."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def benchmark(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    # With it, a script cannot import the modules beside it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_shows_the_records():
    printed = benchmark("report.py")
    assert printed.startswith("| adapters | method | CPU time |")
    assert printed.strip() in (ROOT / "README.md").read_text()


def test_operations_are_checked_and_measured():
    printed = benchmark(
        "ops.py", "--device", "cpu", "--model", "tiny", "--rank", "4", "--runs", "1", "--dry"
    )
    records = [json.loads(line) for line in printed.splitlines()]
    operations = ("gram", "combine", "polar", "entries", "resident gam")
    assert tuple(dict.fromkeys(record["op"] for record in records)) == operations
    for impl in ("op", "reference", "copy"):
        assert [r["op"] for r in records if r["impl"] == impl] == list(operations)
    assert all(record["gpu"] is None and record["p50"] > 0 for record in records)


def test_plot(tmp_path):
    benchmark("plot.py", str(tmp_path / "cost.png"))
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
