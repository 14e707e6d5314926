"""The record of a merge: what is written is what is read."""

import json
from pathlib import Path

import pytest
from helpers.adapters import assert_refused, make_adapter, memory_adapter

from gam import merge_adapters
from gam.errors import AdapterError, OptionError
from gam.files import REPORT_NAME
from gam.hub.names import HubName
from gam.report.record import Record, RecordedInput
from gam.version import NUMERICS, __version__

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def record(folder: Path, **changes: object) -> Record:
    adapters = [make_adapter(folder / "in" / "a"), memory_adapter(seed=1, name="b")]
    merged = merge_adapters(adapters, modules={"*.q_proj": {"method": "ties"}})
    values = {**Record.of(merged, folder / "out").values, **changes}
    return Record.read(values, "x.json")


def test_what_is_written_is_what_is_read(tmp_path: Path) -> None:
    made = record(tmp_path)
    read = Record.parse(made.text(), "x.json")
    assert read == made
    assert read.text() == made.text()
    assert (read.gam_merge, read.numerics, read.method) == (__version__, NUMERICS, "gam")
    assert read.packages == {"gam": "", "ties": ""}
    assert read.options["method"] == "gam"
    assert read.output is None
    first, second = read.inputs
    assert first == RecordedInput("a", "../in/a", *read.expect["a"])
    assert second == RecordedInput("b", None, None, None)


def test_the_text_has_a_module_on_each_line_and_the_fields_of_the_report(tmp_path: Path) -> None:
    merged = merge_adapters([make_adapter(tmp_path / "in")])
    text = Record.of(merged, tmp_path).text()
    values = json.loads(text)
    assert [*values][:2] == ["gam_merge", "numerics"]
    assert [*values][-1] == "modules"
    assert {**values, "inputs": 0} == {
        "gam_merge": __version__,
        "numerics": NUMERICS,
        **merged.report.as_dict(),
        "inputs": 0,
    }
    lines = [line.strip().rstrip(",") for line in text.splitlines()]
    assert all(json.dumps(module) in lines for module in values["modules"])


def test_places_start_at_the_folder_of_the_record(tmp_path: Path) -> None:
    hub = {"name": "c", "sha256": None, "config_sha256": None}
    hub |= {"source": f"me/c@{COMMIT}:x", "commit": COMMIT}
    made = record(tmp_path)
    made = record(tmp_path / "again", inputs=[*made.values["inputs"], hub])
    places = {"a": Path("/w/in/a"), "b": None, "c": HubName("me/c", COMMIT, "x")}
    assert made.places(Path("/w/out")) == places
    printed = Record.read({"output": "/v/out", **made.values}, "x.json")
    assert printed.places(Path("/w/out"))["a"] == Path("/v/in/a")


def test_programs_are_checked_by_numerics_and_packages(tmp_path: Path) -> None:
    made = record(tmp_path, gam_merge="0.0.1", package="other 2.0")
    made.check_programs({"gam": "other 2.0", "ties": "", "linear": "new 1"}, "x.json")
    assert_refused(
        lambda: made.check_programs({"gam": "", "ties": ""}, "x.json"),
        AdapterError,
        "x.json: made by other 2.0, but this is gam-merge itself, and the result may differ. Pass "
        "--allow-changes to merge all the same.",
    )
    later = record(tmp_path / "later", numerics=NUMERICS + 1)
    assert_refused(
        lambda: later.check_programs({}, "x.json"),
        AdapterError,
        f"x.json: made with numerics {NUMERICS + 1} (gam-merge {__version__}), but this gam-merge "
        f"has numerics {NUMERICS}, and the result may differ: see Numerics in the changelog.",
    )


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", "3", "[" * 100_000])
def test_other_text_is_no_record(text: str) -> None:
    assert_refused(
        lambda: Record.parse(text, REPORT_NAME), OptionError, f"{REPORT_NAME}: not a record of a m"
    )
