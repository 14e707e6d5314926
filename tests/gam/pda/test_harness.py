"""The call of lm-evaluation-harness, on a task of our own."""

from pathlib import Path

import pytest
from helpers.adapters import assert_refused, quiet_peft
from helpers.pda import plain_greedy, sums, write_lines, write_model

from gam.errors import OptionError
from gam.pda.harness import run_harness
from gam.pda.libraries import need

TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["<end>"], max_gen_toks: 2, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def test_scores_are_those_of_the_answers(tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra `harness` is large, and not needed otherwise")
    model = str(write_model(tmp_path / "model"))
    rows = sums(40)
    said = [plain_greedy(model, row["prompt"], 2) for row in rows]
    # Answers that are right in every other question.
    rows = [
        {**row, "answer": s if i % 2 else "no"}
        for i, (row, s) in enumerate(zip(rows, said, strict=True))
    ]
    file = write_lines(tmp_path / "test.jsonl", rows)
    (tmp_path / "sums.yaml").write_text(TASK.format(file=file))
    with quiet_peft():
        (found,) = run_harness(model, ["sums"], include=tmp_path, limit=20)
    right = sum(row["answer"] == s for row, s in zip(rows[:20], said[:20], strict=True))
    assert (found["task"], found["metric"], found["questions"]) == ("sums", "exact_match", 20)
    share = right / 20
    assert found["mean"] == pytest.approx(share)
    assert found["error"] == pytest.approx((share * (1 - share) / 19) ** 0.5)


def test_it_is_an_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert_refused(
        lambda: run_harness("m", ["gsm8k"]), OptionError, "lm_eval", "'gam-merge[harness]'"
    )
    assert_refused(lambda: need("trl"), OptionError, "trl", "'gam-merge[pda]'")
