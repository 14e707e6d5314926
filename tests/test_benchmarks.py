"""The tables are those that the committed records give, and measuring works."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT


def benchmark(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    # With it, a script cannot import the modules beside it.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("flags", "readme"), [([], "benchmarks/README.md"), (["--short"], "README.md")]
)
def test_readmes_show_the_records(flags, readme):
    printed = benchmark("report.py", *flags)
    assert printed.startswith("| adapters | method | CPU time |")
    assert f"<!-- benchmark table -->\n{printed}<!-- end" in (ROOT / readme).read_text()


def test_linear_of_peft_is_off_and_ours_is_not():
    rows = [line.split() for line in benchmark("peft_linear.py").splitlines()[1:]]
    assert [row[-2] for row in rows] == ["1.00", "0.88"]
    assert all(float(row[-1]) < 1e-6 for row in rows)
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert "by 1.00 times that average for two random rank-8 adapters" in readme
    assert "by 0.88 for two trained ones; `linear --rank sum` here by 1e-7" in readme


def test_operations_are_checked_and_measured():
    printed = benchmark(
        "ops.py", "--device", "cpu", "--model", "tiny", "--rank", "4", "--runs", "1", "--dry"
    )
    records = [json.loads(line) for line in printed.splitlines()]
    operations = ["gram", "combine", "polar", "entries", "resident gam"]
    module = ["module gam", "module linear", "module ties"]
    peft = ["module linear", "module ties"]
    found = {}
    for record in records:
        found.setdefault(record["impl"].split()[0], []).append(record["op"])
    assert found["op"] == found["copy"] == operations + module
    assert (found["reference"], found["literal"], found["peft"]) == (operations, module, peft)
    errors = [r["err_fp64"] for r in records if r["impl"].split()[0] in ("literal", "peft")]
    assert max(errors) < 1e-5
    shapes = [r["shape"] for r in records if r["op"].startswith("module ")]
    smallest = {"module": "model.layers.0.self_attn.k_proj", "out": 32, "in": 64}
    assert all(shape == {"model": "tiny", "rank": 4, "adapters": 3, **smallest} for shape in shapes)
    assert all(record["gpu"] is None and record["p50"] > 0 for record in records)


def test_one_module_may_be_named_and_slow_calls_are_made_once():
    printed = benchmark(
        *("ops.py", "--device", "cpu", "--model", "tiny", "--rank", "2", "--adapters", "2"),
        *("--op", "module ties", "--module", "down_proj", "--seconds", "0", "--dry"),
    )
    records = [json.loads(line) for line in printed.splitlines()]
    assert {(r["op"], r["n"], r["shape"]["out"], r["shape"]["in"]) for r in records} == {
        ("module ties", 1, 64, 160)
    }


@pytest.mark.parametrize("option", [["--inputs", "PLACE"], ["--inputs=PLACE"]])
def test_whole_merges_are_measured_and_records_name_no_place(tmp_path, option):
    words = [word.replace("PLACE", str(tmp_path)) for word in option]
    printed = benchmark(
        *("run.py", "--model", "tiny", "--rank", "4", "--method", "gam", "--runs", "1"),
        *words,
        "--dry",
    )
    records = [json.loads(line) for line in printed.splitlines()]
    assert [r["impl"] for r in records] == ["floor"] * 3 + ["gam"] * 3
    command = "python benchmarks/run.py --model tiny --rank 4 --method gam --runs 1 --dry"
    assert {r["command"] for r in records} == {command}


def test_plot(tmp_path):
    benchmark("plot.py", str(tmp_path / "cost.png"))
    assert (tmp_path / "cost.png").read_bytes().startswith(b"\x89PNG")
