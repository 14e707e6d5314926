"""One merge from end to end: what is looked at before, what is told meanwhile, what comes back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import MODULES, make_adapter, memory_adapter

from gam import Adapter, AdapterError, OptionError, OutputError, merge_adapters
from gam.api import run_merge
from gam.hub.push import Target
from gam.report.rerun import rerun_line


def pair() -> list[Adapter]:
    return [memory_adapter(seed=seed, name=f"a{seed}") for seed in range(2)]


def test_a_dry_run_plans_as_the_merge_does_and_writes_nothing(tmp_path: Path) -> None:
    out = tmp_path / "out"
    planned = run_merge(pair(), {"method": "linear"}, output=out, dry_run=True)
    assert (planned.merged, planned.folder, planned.pushed) == (None, None, None)
    assert list(tmp_path.iterdir()) == []
    done = run_merge(pair(), {"method": "linear"}, output=out)
    assert done.merged is not None
    ranks = {module.name: module.rank for module in planned.plan.modules}
    assert {name: module.rank for name, module in done.merged.modules.items()} == ranks
    assert planned.as_dict(out) == {"output": str(out.resolve()), **done.plan.as_dict()}


def test_what_is_printed_is_what_was_recorded(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    done = run_merge([*map(str, folders)], {}, output=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "gam_merge.json").read_text())
    assert json.loads(json.dumps(done.as_dict())) == {"output": str(tmp_path / "out"), **record}


def test_the_folder_is_told_before_the_push_and_the_target_looked_at_before_the_merge(
    tmp_path: Path,
) -> None:
    told: list[Path] = []
    with pytest.raises(OptionError, match="push_to_hub: got 'no name'"):
        run_merge(
            pair(),
            {},
            output=tmp_path / "out",
            target=Target("no name"),
            saved=lambda merged, folder: told.append(folder),
        )
    assert list(tmp_path.iterdir()) == []
    run_merge(pair(), {}, output=tmp_path / "out", saved=lambda _, folder: told.append(folder))
    assert told == [tmp_path / "out"]


def test_an_output_that_is_there_is_refused_before_adapters_are_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="the folder exists"):
        merge_adapters([tmp_path / "nowhere"], output=tmp_path / "out")


def test_progress_is_a_function_or_a_bar(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[tuple[int, int]] = []
    merge_adapters(pair(), progress=lambda done, count: seen.append((done, count)))
    assert seen[-1] == (len(MODULES), len(MODULES))
    assert seen == sorted(set(seen))
    assert capsys.readouterr().err == ""
    merge_adapters(pair(), progress=True)
    assert f"{len(MODULES)}/{len(MODULES)}" in capsys.readouterr().err


def test_entrywise_methods_move_on_with_every_module() -> None:
    modules = {f"layers.{layer}.q": (12, 8, 4) for layer in range(5)}
    adapters = [memory_adapter(modules, seed=seed, name=f"a{seed}") for seed in range(2)]
    seen: list[int] = []
    merge_adapters(adapters, method="ties", progress=lambda done, _: seen.append(done))
    assert seen == [1, 2, 3, 4, 5]


def test_what_fails_in_the_callback_reaches_the_caller() -> None:
    def fail(done: int, count: int) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        merge_adapters(pair(), progress=fail)


def test_notebooks_are_shown_tables() -> None:
    merged = merge_adapters([memory_adapter(name="<b>"), *pair()])
    for shown in (merged, merged.report):
        html = shown._repr_html_()
        assert "<table" in html
        assert "<b>&lt;b&gt;" not in html
        assert len(repr(shown).splitlines()) == 1
    assert "&lt;b&gt;" in merged.report._repr_html_()
    assert merged.report.as_dict()["method"] == "gam"


def test_what_is_no_adapter_and_no_option_is_refused_in_one_line() -> None:
    wrong: list[tuple[Any, dict[str, Any]]] = [
        (5, {}),
        ([None], {}),
        ([b"a"], {}),
        ([["a"]], {}),
        (pair(), {"progress": 5}),
        (pair(), {"expect": {}}),
        (pair(), {"weights": [[1.0, math.nan], 1.0]}),
        (pair(), {"weights": {1.0, 2.0}}),
        (pair(), {"weights": b"ab"}),
        (pair(), {"scale": b"4"}),
        (pair(), {"rank": b"4"}),
        (pair(), {"modules": 0}),
        (pair(), {"modules": {"*": {3: 2}}}),
    ]
    for adapters, options in wrong:
        with pytest.raises(OptionError) as caught:
            merge_adapters(adapters, **options)
        assert str(caught.value).endswith("."), caught.value
        assert "\n" not in str(caught.value)


def test_a_generator_takes_the_places_of_a_recipe(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("adapters: {x: nowhere, y: there}\nmethod: linear\n")
    merged = merge_adapters((a for a in pair()), config=tmp_path / "recipe.yaml")
    assert [entry.name for entry in merged.report.inputs] == ["x", "y"]


def test_the_rerun_line_tells_of_skipped_modules() -> None:
    skipped = merge_adapters(pair(), modules={next(iter(MODULES)): {"skip": True}})
    assert rerun_line(skipped.report) == "gam-merge --config gam_merge.json -o OUT"


def test_a_small_merge_by_its_rank_alone_is_told_of_the_rank() -> None:
    adapters = [memory_adapter(seed=seed, name=f"a{seed}") for seed in range(6)]
    merged = merge_adapters(adapters, method="iso_c", size="mean", rank=1)
    assert not [text for text in merged.report.warnings if "--size" in text]
    assert [text for text in merged.report.warnings if "--rank" in text]


def test_a_record_from_when_the_size_was_a_parameter_of_gam(tmp_path: Path) -> None:
    folders = [make_adapter(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    merge_adapters(folders, output=tmp_path / "out", size="mean")
    file = tmp_path / "out" / "gam_merge.json"
    record = json.loads(file.read_text())
    del record["numerics"], record["options"]["size"]
    record["options"]["match_norm"] = True
    file.write_text(json.dumps(record))
    with pytest.raises(AdapterError, match="numerics 1"):
        merge_adapters(config=file)
    again = merge_adapters(config=file, allow_changes=True)
    for module in again.report.modules:
        assert module.norm_ratio == pytest.approx(1, abs=1e-6)
