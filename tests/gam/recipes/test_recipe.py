"""Recipes: files of options, and merges made again from their record."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from helpers.adapters import assert_refused, make_adapter, make_file, memory_adapter
from safetensors.torch import load_file, save_file

import gam
from gam import Adapter, merge_adapters
from gam.commands.merge import main
from gam.errors import AdapterError, OptionError
from gam.recipes.recipe import Recipe, read_recipe
from gam.report.types import MergeReport
from gam.strategies import STRATEGIES
from gam.version import NUMERICS

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(autouse=True)
def _in_tmp_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def make_three(folder: Path) -> list[Path]:
    return [make_adapter(folder / name, seed=seed) for seed, name in enumerate("abc")]


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def without_places(merged: Adapter) -> MergeReport:
    """The report, but for where the inputs are."""
    inputs = [replace(entry, source=None) for entry in merged.report.inputs]
    return replace(merged.report, inputs=inputs)


def rewrite(file: Path, **changes: object) -> None:
    """Change fields of a record; None takes one away."""
    fields = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: value for k, value in fields.items() if value is not None}))


def recipe(text: str, folder: str = ".") -> Path:
    path = Path(folder) / "recipe.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


# --- rerun ----------------------------------------------------------------------------

OPTIONS = {
    "weights": {"weights": [0.5, 0.3, -0.2], "scale": 1.5, "dtype": "bfloat16"},
    "absent": {"weights": [1, 0, 2], "normalize": False, "missing": "renormalize"},
    "energy": {"rank": "energy=0.9", "uniform_rank": True},
    "modules": {
        "weights": [[0.2, 1], 1, 0],
        "modules": {
            "*.q_proj": {"weights": [1, 2, 0], "rank": 3},
            "*.mlp.*": {"method": "ties", "density": 0.3, "scale": 2},
            "*.v_proj": {"skip": True},
        },
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", STRATEGIES)
def test_the_record_gives_the_same_bytes(
    method: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_three(tmp_path / "in")
    monkeypatch.chdir(tmp_path / "in")
    with threads(1):
        merge_adapters(["a", "./b", "../in/c"], method=method, output="../out/first", **options)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with threads(2):
        merge_adapters(config="../out/first/gam_merge.json", output="../out/second")
    first, second = (files(tmp_path / "out" / name) for name in ("first", "second"))
    assert sorted(first) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "gam_merge.json",
    ]
    assert first == second


def test_the_record_of_special_inputs_gives_the_same_bytes(tmp_path: Path) -> None:
    make_adapter(tmp_path / "x" / "same", seed=1)
    make_adapter(tmp_path / "y" / "same", seed=2)
    make_file(tmp_path / "bare.safetensors", seed=3)
    adapters = ["x/same", "y/same/adapter_model.safetensors", tmp_path / "bare.safetensors"]
    merge_adapters(adapters, alpha=8, reference="same#2", output="out")
    merge_adapters(config="out", output="again")  # the folder of the record will do
    assert files(Path("out")) == files(Path("again"))
    # A file without its namesake is called otherwise, so the labels must come from the record.
    merge_adapters(adapters, alpha=8, reference="same#2", weights=[0, 1, 1], output="fewer")
    merge_adapters(config="fewer", output="fewer-again")
    assert files(Path("fewer")) == files(Path("fewer-again"))


def test_labels_in_any_order_keep_their_weights_when_made_again(tmp_path: Path) -> None:
    for seed, name in enumerate("ab"):
        make_adapter(tmp_path / name, seed=seed)
    adapters = {name: tmp_path / name for name in "ab"}
    for number, weights in enumerate([{"b": 3.0, "a": 1.0}, {"b": [3, 1], "a": 1}]):
        first = merge_adapters(adapters, weights=weights, output=tmp_path / f"first-{number}")
        assert first.report.options["weights"][0] == 1.0
        merge_adapters(config=tmp_path / f"first-{number}", output=tmp_path / f"second-{number}")
        for name in ("adapter_model.safetensors", "gam_merge.json"):
            files = (tmp_path / f"{run}-{number}" / name for run in ("first", "second"))
            assert len({file.read_bytes() for file in files}) == 1


def test_the_record_names_no_folder_above_inputs_and_output(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    merge_adapters([tmp_path / "in" / name for name in "ab"], output="out")
    text = Path("out/gam_merge.json").read_text()
    assert str(tmp_path) not in text
    assert [entry["source"] for entry in json.loads(text)["inputs"]] == ["../in/a", "../in/b"]


def test_inputs_and_record_may_move_together(tmp_path: Path) -> None:
    make_three(tmp_path / "w" / "in")
    merge_adapters(["w/in/a", "w/in/c"], output="w/out")
    expected = files(tmp_path / "w" / "out")
    shutil.move(tmp_path / "w", tmp_path / "v")
    merge_adapters(config="v/out", output="v/out", overwrite=True)
    assert files(tmp_path / "v" / "out") == expected


def test_a_linked_output_folder_records_where_the_inputs_are(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    (tmp_path / "deep" / "down").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "deep" / "down")
    merge_adapters(["in/a", "in/b"], output="link/out")
    merge_adapters(config="link/out", output="link/again")
    assert files(Path("deep/down/out")) == files(Path("deep/down/again"))


def test_given_adapters_take_the_places_of_the_recorded_ones(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    merge_adapters(["in/a", "in/b"], reference="b", output="out")
    expected = files(Path("out"))
    shutil.copytree("in", "moved")
    shutil.rmtree("in")
    assert_refused(
        lambda: merge_adapters(config="out", output="again"),
        AdapterError,
        "out/gam_merge.json: adapter 'a' is not at ",
        "any more. Give all adapters before --config, in this order: a, b",
    )
    (tmp_path / "moved" / "a").rename("moved/z")
    again = merge_adapters(["moved/z", "moved/b"], config="out", output="again")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert files(Path("again"))[name] == expected[name]
    assert [entry.name for entry in again.report.inputs] == ["a", "b"]
    assert_refused(
        lambda: merge_adapters(["moved/b"], config="out"),
        OptionError,
        "adapters: got 1, but out/gam_merge.json merges 2: a, b. Give all of them, in this order",
    )


def test_changed_inputs_are_named(tmp_path: Path) -> None:
    first, second, _ = make_three(tmp_path / "in")
    merge_adapters([first, second], output="out")
    config = second / "adapter_config.json"
    config.write_text(config.read_text() + "\n")
    assert_refused(
        lambda: merge_adapters(config="out", output="again"),
        AdapterError,
        "changed since the recorded merge: 'b' (adapter_config.json has SHA-256 ",
        "). Restore what was merged, or pass --allow-changes to merge what is there now",
    )
    weights = first / "adapter_model.safetensors"
    tensors = load_file(weights)
    tensors[f"base_model.model.{Q}.lora_A.weight"][0, 0] += 1
    save_file(tensors, weights)
    assert_refused(
        lambda: merge_adapters(config="out", output="again"),
        AdapterError,
        "'a' (adapter_model.safetensors has SHA-256 ",
        ", recorded ",
        ", 'b' (adapter_config.json has SHA-256 ",
    )
    assert not Path("again").exists()
    changed = merge_adapters(config="out", allow_changes=True)
    assert without_places(changed) == without_places(merge_adapters([first, second]))
    # A change that could not be merged at all is still reported as a change.
    shutil.rmtree(first)
    make_adapter(first, {Q: (30, 20, 2)})
    assert_refused(lambda: merge_adapters(config="out"), AdapterError, "changed since", "'a' (")


def test_a_config_that_appears_beside_a_bare_file_is_a_change(tmp_path: Path) -> None:
    make_file(tmp_path / "in" / "x.safetensors")
    merge_adapters(["in/x.safetensors"], alpha=4, output="out")
    Path("in/adapter_config.json").write_text('{"peft_type": "LORA", "r": 4, "lora_alpha": 1}')
    assert_refused(
        lambda: merge_adapters(config="out"),
        AdapterError,
        "'x' (adapter_config.json has SHA-256 ",
        ", recorded none)",
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            {"numerics": 0, "gam_merge": "0.0.1"},
            AdapterError,
            "out/gam_merge.json: made with numerics 0 (gam-merge 0.0.1), but this gam-merge has "
            f"numerics {NUMERICS}, and the result may differ: see Numerics in the changelog. Pass "
            "--allow-changes to merge all the same.",
        ),
        (
            {"package": "other 2.0"},
            AdapterError,
            "made by other 2.0, but this is gam-merge itself, and the result may differ",
        ),
        (
            {"options": {"method": "median"}},
            OptionError,
            "out/gam_merge.json: unknown method 'median'; choose one of: ",
        ),
        (
            {"options": 3},
            OptionError,
            "out/gam_merge.json: not a complete record of a merge: options: got 3, expected an "
            "object",
        ),
        ({"numerics": "1"}, OptionError, "numerics: got '1', expected a whole number."),
        ({"numerics": True}, OptionError, "numerics: got True, expected a whole number."),
        ({"inputs": []}, OptionError, "a merge: inputs: got [], expected at least one"),
        ({"inputs": [3]}, OptionError, "a merge: inputs[0]: got 3, expected an object"),
        ({"inputs": [{}]}, OptionError, "a merge: inputs[0].name: got nothing, expected text"),
        ({"modules": [{}]}, OptionError, "modules[0].settings: got nothing, expected an object"),
        ({"modules": [{"settings": {"method": []}}]}, OptionError, "modules[0].settings.method: "),
        ({"output": 5}, OptionError, "a merge: output: got 5, expected text"),
        ({"output": None}, OptionError, "a merge: output: got None, expected text"),
        ({"package": 5}, OptionError, "a merge: package: got 5, expected text"),
        ({"options": {"method": ["gam"]}}, OptionError, "a merge: options.method: got ['gam'], "),
        (
            {"options": {"method": "gam", "expect": 5}},
            OptionError,
            "out/gam_merge.json: not a complete record of a merge: options.expect: got 5, expected "
            "no such option",
        ),
        (
            {"options": {"method": "gam", "adapters": ["a"]}},
            OptionError,
            "options.adapters: got ['a'], expected no such option",
        ),
        (
            {"options": {"method": "gam", "given": 1}},
            OptionError,
            "out/gam_merge.json: method 'gam' has no parameter 'given'",
        ),
        (
            {"modules": [{"settings": {"method": "ties", "package": "other 2.0"}}]},
            AdapterError,
            "made by other 2.0, but this is gam-merge itself, and the result may differ",
        ),
        (
            {"options": {"method": "ties", "density": 7}},
            OptionError,
            "out/gam_merge.json: density of method 'ties': got 7, expected a number from 0 to 1",
        ),
    ],
    ids=str,
)
def test_a_record_that_cannot_be_followed_is_refused(
    change: dict[str, object], error: type[gam.GamError], message: str, tmp_path: Path
) -> None:
    make_three(tmp_path / "in")
    modules = {"*.q_proj": {"method": "ties"}}
    merge_adapters(["in/a", "in/b"], modules=modules, output="out")
    record = Path("out/gam_merge.json")
    record.write_text(json.dumps({**json.loads(record.read_text()), **change}))
    assert_refused(lambda: merge_adapters(config="out"), error, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": ""}, "out/gam_merge.json: inputs[0].name: adapters: got '' as a label"),
        ({"source": 5}, "inputs[0].source: got 5, expected text or null"),
        ({"sha256": 5}, "inputs[0].sha256: got 5, expected text or null"),
        ({"config_sha256": []}, "inputs[0].config_sha256: got [], expected text or null"),
        ({"commit": 5}, "inputs[0].commit: got 5, expected text or null"),
        ({"commit": "c0"}, "inputs[0].source: got '../in/a', expected a name on the Hub"),
        (
            {"commit": "c0", "source": None},
            "inputs[0].source: got None, expected a name on the Hub",
        ),
    ],
    ids=str,
)
def test_an_input_of_a_record_that_cannot_be_followed_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    make_three(tmp_path / "in")
    merge_adapters(["in/a", "in/b"], output="out")
    file = Path("out/gam_merge.json")
    record = json.loads(file.read_text())
    record["inputs"][0].update(change)
    file.write_text(json.dumps(record))
    for allow_changes in (False, True):
        assert_refused(
            lambda allowed=allow_changes: merge_adapters(config="out", allow_changes=allowed),
            OptionError,
            "out/gam_merge.json: ",
            message,
        )


def test_another_file_in_place_of_a_recipe_is_called_what_it_is(tmp_path: Path) -> None:
    first, second, _ = make_three(tmp_path / "in")
    assert_refused(
        lambda: merge_adapters(config=first / "adapter_config.json"),
        OptionError,
        "in/a/adapter_config.json: got the config of an adapter, expected a recipe, or the "
        "gam_merge.json of a merge",
    )
    printed = CliRunner().invoke(main, [str(first), str(second), "--dry-run", "--json"])
    Path("plan.json").write_text(printed.stdout)
    assert_refused(
        lambda: merge_adapters(config="plan.json"),
        OptionError,
        "plan.json: got the plan that --dry-run --json prints, expected a recipe, or the "
        "gam_merge.json of a merge",
    )


def test_the_known_options_are_listed_once() -> None:
    with pytest.raises(OptionError) as caught:
        read_recipe(recipe("qqq: 1\nzzz: 2\nmodules: {'*': {qqq: 1}, '*.a': {zzz: 1}}\n"))
    text = str(caught.value)
    assert text.startswith("recipe.yaml: unknown options: 'qqq' (line 1), 'zzz' (line 2), 'qqq' (")
    assert text.count("; known are adapters, ") == text.count("; known in modules are ") == 1


def test_other_numerics_are_followed_where_changes_are_allowed(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    first = merge_adapters(["in/a", "in/b"], output="out")
    rewrite(Path("out/gam_merge.json"), numerics=NUMERICS + 1)
    assert_refused(lambda: merge_adapters(config="out"), AdapterError, f"numerics {NUMERICS + 1} ")
    again = merge_adapters(config="out", allow_changes=True)
    assert without_places(again) == without_places(first)


def test_another_version_of_the_same_numerics_is_no_change(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    first = merge_adapters(["in/a", "in/b"], output="out")
    rewrite(Path("out/gam_merge.json"), gam_merge="0.0.1")
    assert without_places(merge_adapters(config="out")) == without_places(first)


def test_a_record_without_numerics_counts_as_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_three(tmp_path / "in")
    merge_adapters(["in/a", "in/b"], output="out")
    rewrite(Path("out/gam_merge.json"), numerics=None)
    monkeypatch.setattr("gam.report.record.NUMERICS", 1)
    merge_adapters(config="out")
    monkeypatch.setattr("gam.report.record.NUMERICS", 2)
    assert_refused(lambda: merge_adapters(config="out"), AdapterError, "made with numerics 1 (")


def test_what_json_prints_is_a_record_too(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    merge_adapters(["in/a", "in/b"], output="out")
    record = {"output": str(tmp_path / "out"), **json.loads(Path("out/gam_merge.json").read_text())}
    (tmp_path / "far" / "away").mkdir(parents=True)
    Path("far/away/printed.json").write_text(json.dumps(record))
    merge_adapters(config="far/away/printed.json", output="again")
    assert files(Path("out")) == files(Path("again"))


def test_given_labels_must_be_those_of_the_record(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    first = merge_adapters(["in/a", "in/b"], weights=[1, 3], output="out")
    again = merge_adapters({"b": "in/b", "a": "in/a"}, config="out")
    assert without_places(again) == without_places(first)
    assert_refused(
        lambda: merge_adapters({"a": "in/a", "c": "in/c"}, config="out"),
        OptionError,
        "adapters: got a, c, but out/gam_merge.json merges a, b",
    )


def test_adapters_that_were_in_memory_must_be_given(tmp_path: Path) -> None:
    first = make_adapter(tmp_path / "in")
    other = memory_adapter(seed=5, name="other")
    merged = merge_adapters([first, other], output="out", reference="other")
    assert_refused(
        lambda: merge_adapters(config="out"),
        AdapterError,
        "out/gam_merge.json: adapter 'other' was in memory only. Give all adapters before "
        "--config, in this order: in, other",
    )
    assert merge_adapters([first, other], config="out").report == merged.report


def test_another_method_needs_none_of_the_recorded_parameters(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    merge_adapters(["in/a", "in/b"], retract=True, output="out")
    again = merge_adapters(config="out", method="ties", density=0.5)
    expected = merge_adapters(["in/a", "in/b"], method="ties", density=0.5)
    assert without_places(again) == without_places(expected)


# --- recipes --------------------------------------------------------------------------

RECIPE = """\
adapters:
- in/a
- in/b
method: ties
weights: [1, 2]
density: 0.4   # of method ties
uniform-rank: true
modules:
  "*.q_proj": {rank: 3}
"""


@pytest.mark.parametrize("as_json", [False, True])
def test_a_recipe_is_what_the_options_are(as_json: bool, tmp_path: Path) -> None:
    make_three(tmp_path / "w" / "in")
    path = recipe(RECIPE, "w")
    options = {"method": "ties", "weights": [1, 2], "density": 0.4, "uniform_rank": True}
    options["modules"] = {"*.q_proj": {"rank": 3}}
    if as_json:
        path = path.with_suffix(".json")
        path.write_text(json.dumps({"adapters": ["in/a", "in/b"], **options}, indent="\t"))
    expected = merge_adapters(["w/in/a", "w/in/b"], **options)
    assert merge_adapters(config=path).report == expected.report
    # What is given wins, with or without adapters.
    del options["density"]
    given = merge_adapters(["w/in/c", "w/in/a"], config=path, density=1.0)
    assert given.report == merge_adapters(["w/in/c", "w/in/a"], density=1.0, **options).report


def test_labels_in_a_recipe_name_the_adapters(tmp_path: Path) -> None:
    make_three(tmp_path / "in")
    path = recipe("adapters: {x: in/a, 'y': in/b}\nweights: {y: 3, x: 1}\nreference: y\n")
    merged = merge_adapters(config=path)
    weights = [(entry.name, entry.weight) for entry in merged.report.inputs]
    assert weights == [("x", 0.25), ("y", 0.75)]
    assert merged.report.options["reference"] == "y"
    other = merge_adapters(["in/c", "in/b"], config=path)
    assert [entry.source for entry in other.report.inputs] == ["in/c", "in/b"]
    assert [entry.name for entry in other.report.inputs] == ["x", "y"]


def test_null_means_not_given(tmp_path: Path) -> None:
    first, *_ = make_three(tmp_path)
    path = recipe("method: ~\nweights:\nrank: null\nreference: null\nmodules:\n")
    assert merge_adapters([first], config=path).report == merge_adapters([first]).report


def test_an_empty_recipe_is_that_of_the_options() -> None:
    adapters = [memory_adapter(seed=seed, name=str(seed)) for seed in range(2)]
    assert Recipe().inputs(adapters) is adapters
    assert Recipe().options({"scale": 2.0}) == {"scale": 2.0}
    assert Recipe().expect is None
    Recipe().check_programs({"method": "unknown"})
    assert_refused(lambda: merge_adapters(), OptionError, "adapters: got none; give at least one")


def test_adapters_in_a_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_three(tmp_path / "home")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    path = recipe("adapters: [~/a, ~/b]\n", "w")
    assert len(merge_adapters(config=path).report.inputs) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "recipe.yaml: got nothing, expected options such as method or weights"),
        ("- a\n", "recipe.yaml: got a list, expected options such as method or weights"),
        (
            "method: ties\n\nwieghts: [1, 1]\n",
            "recipe.yaml, line 3: unknown option 'wieghts'; did you mean 'weights'?",
        ),
        (
            "wieghts: [1]\nmodules:\n  '*':\n    methd: ties\n",
            "recipe.yaml: unknown options: 'wieghts' (line 1; did you mean 'weights'?), 'methd' "
            "(line 4; did you mean 'method'?)",
        ),
        (
            "modules:\n  '*':\n    dtype: float32\n",
            "recipe.yaml, line 3: unknown option 'dtype'; known in modules are method, weights, "
            "scale, size, rank, skip, ",
        ),
        ("output: x\n", "recipe.yaml, line 1: unknown option 'output'; known are adapters, "),
        ("method: ties\nmethod: gam\n", "recipe.yaml, line 2: 'method' is given twice"),
        ("rank: 4\nweights: [1, 1\n", "recipe.yaml, line 3: not YAML: expected ',' or ']'"),
        (
            "adapters: 3\n",
            "recipe.yaml, line 1: adapters: got 3, expected a list of paths or names on the Hub, "
            "or labels with one each",
        ),
        ("\nadapters: {a: 3}\n", "recipe.yaml, line 2: adapters: got {'a': 3}, expected a list"),
        (
            "\nadapters: []\n",
            "recipe.yaml, line 2: adapters: got none; give at least one to merge",
        ),
        (
            "adapters:\n  x: a\n  '': b\n",
            "recipe.yaml, line 3: adapters: got '' as a label, expected a name",
        ),
        (
            "adapters: {' ': a}\n",
            "recipe.yaml, line 1: adapters: got ' ' as a label, expected a name",
        ),
        ("method: tie\n", "recipe.yaml, line 1: unknown method 'tie'; choose one of: "),
        (
            "method: ties\nweights: [1]\n",
            "recipe.yaml, line 2: weights: got 1 for 2 adapters; give one number for each",
        ),
        (
            "method: ties\nreference: 0\n",
            "recipe.yaml, line 2: method 'ties' has no parameter 'reference'; its parameters: ",
        ),
        (
            "scale: no\n",
            "recipe.yaml, line 1: scale: got 'no', expected a finite number other than 0",
        ),
        (
            "normalize: yes\n",
            "recipe.yaml, line 1: normalize: got 'yes', expected True or False",
        ),
        (
            "missing: x\n",
            "recipe.yaml, line 1: missing: got 'x', expected one of: zero, renormalize.",
        ),
        ("dtype: int8\n", "recipe.yaml, line 1: dtype: got 'int8', expected one of: auto, float32"),
        ("dtype: []\n", "recipe.yaml, line 1: dtype: got [], expected one of: auto, float32"),
        ("alpha: 3\n", "recipe.yaml, line 1: alpha: every adapter states its own alpha"),
        (
            "modules:\n  '*.q_proj':\n    rank: 2\n    rank : 3\n",
            "recipe.yaml, line 4: 'rank' is given twice",
        ),
        (
            "modules:\n  '*.q_proj':\n    rank: 2\n  '*.q_prj':\n    rank: 2\n",
            "recipe.yaml, line 4: modules '*.q_prj': no module matches; the nearest is "
            "'model.layers.0.self_attn.q_proj'",
        ),
        (
            "modules:\n  '*.q_proj': {rank: 2,\n    weights: {c: 1}}\n",
            "recipe.yaml, line 3: modules '*.q_proj': weights: no adapter is called 'c'; they "
            "are: a, b",
        ),
        (
            "modules:\n  '*.q_proj':\n    method: ties\n    density: [0.5, x]\n",
            "recipe.yaml, line 4: modules '*.q_proj': density of method 'ties': got [0.5, 'x'], "
            "expected a number",
        ),
        (
            "x: &x {wieght: 1}\nmodules:\n  '*': *x\n",
            "recipe.yaml: unknown options: 'x' (line 1), 'wieght' (line 3; did you mean 'weights'?)"
            "; known are adapters, method, ",
        ),
        ("modules: [1]\n", "recipe.yaml, line 1: modules: got [1], expected patterns with options"),
        (
            "modules:\n  '*': 1\n",
            "recipe.yaml, line 2: modules '*': got 1, expected options such as rank or skip",
        ),
    ],
    ids=lambda text: repr(text)[:50],
)
def test_a_wrong_recipe_is_refused_with_its_line(text: str, message: str, tmp_path: Path) -> None:
    make_three(tmp_path)
    adapters = None if "adapters" in text else ["a", "b"]
    with pytest.raises(OptionError) as caught:
        merge_adapters(adapters, config=recipe(text))
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_broken_recipe_is_refused_where_the_method_is_given(tmp_path: Path) -> None:
    make_three(tmp_path)
    for text in ("modules: [1]\n", "modules: {'*': 1}\n", "modules: {'*': {method: [1]}}\n"):
        for options in ({}, {"method": "ties"}, {"method": ["ties"]}):
            with pytest.raises(OptionError):
                merge_adapters(["a", "b"], config=recipe(text), **options)


def test_errors_in_what_is_given_do_not_blame_the_recipe(tmp_path: Path) -> None:
    make_three(tmp_path)
    path = recipe("scale: 2\nmodules: {'*': {rank: 2}}\n")
    for options, message in (
        ({"scale": 0}, "scale: got 0, expected a finite number other than 0"),
        ({"modules": {"*": {"rank": 0}}}, "modules '*': rank: got 0, expected"),
        ({"missing": "x"}, "missing: got 'x', expected"),
    ):
        with pytest.raises(OptionError) as caught:
            merge_adapters(["a", "b"], config=path, **options)
        assert str(caught.value).startswith(message)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    assert_refused(
        lambda: read_recipe("nowhere.yaml"),
        OptionError,
        "config 'nowhere.yaml': cannot read: No such file or directory",
    )
    (tmp_path / "empty").mkdir()
    assert_refused(lambda: read_recipe("empty"), OptionError, "config 'empty/gam_merge.json'")
    Path("latin.yaml").write_bytes("méthode: gam".encode("latin-1"))
    assert_refused(
        lambda: read_recipe("latin.yaml"), OptionError, "config 'latin.yaml': not UTF-8 text"
    )


def test_a_missing_adapter_of_a_recipe_is_named(tmp_path: Path) -> None:
    make_three(tmp_path)
    path = recipe("adapters: [a, ./nowhere.safetensors]\n")
    assert_refused(
        lambda: merge_adapters(config=path), AdapterError, "adapter 'nowhere.safetensors': no such"
    )


def test_a_module_that_changes_nothing_changes_no_bit(tmp_path: Path) -> None:
    adapters = [memory_adapter(seed=seed, name=str(seed)) for seed in range(2)]
    plain = merge_adapters(adapters)
    same = merge_adapters(adapters, modules={"*": {"rank": "max"}})
    assert torch.equal(plain.modules[Q].lora_b, same.modules[Q].lora_b)
