"""Pairs from two local models, and what a kill leaves of them."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.adapters import assert_refused
from helpers.pda import plain_greedy, read_lines, sums, write_lines, write_model

from gam.errors import OptionError
from gam.pda.files import DataError
from gam.pda.models import Generation, open_model
from gam.pda.pairs import make_pairs
from gam.pda.prompts import Prompt, load_prompts

SAMPLED = Generation(max_new_tokens=5, temperature=1.0, batch_size=4, seed=3)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return str(write_model(folder / "weak", 1)), str(write_model(folder / "weaker", 2))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[Prompt]:
    # Of two lengths, so that some batches are padded.
    path = write_lines(tmp_path_factory.mktemp("p") / "p.jsonl", sums(110)[-20:])
    return load_prompts(str(path))


def answers(model: str, prompts: list[Prompt], settings: Generation) -> dict[str, Any]:
    return {
        row["id"]: row for batch in open_model(model).answer(prompts, settings) for row in batch
    }


def test_the_pairs_are_the_models_answers(
    models: tuple[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    greedy = Generation(max_new_tokens=4, batch_size=7)
    record = make_pairs(prompts, *models, tmp_path, greedy)
    expected = [
        {"id": p.id, "prompt": p.text, "chosen": chosen, "rejected": rejected}
        for p in prompts
        for chosen, rejected in [[plain_greedy(model, str(p.text), 4) for model in models]]
        if chosen != rejected
    ]
    assert expected
    assert read_lines(tmp_path / "pairs.jsonl") == expected
    summary = record["summary"]
    assert summary["pairs"] == len(expected)
    assert summary["dropped"] == {"identical": len(prompts) - len(expected), "format": 0}
    assert record["models"]["weak"]["source"] == models[0]
    assert json.loads((tmp_path / "pairs.json").read_text()) == record


def test_an_answer_depends_on_its_prompt_and_seed_alone(
    models: tuple[str, str], prompts: list[Prompt]
) -> None:
    whole = answers(models[0], prompts, SAMPLED)
    one_by_one = Generation(max_new_tokens=5, temperature=1.0, batch_size=1, seed=3)
    assert answers(models[0], prompts[::-1], one_by_one) == whole
    other = Generation(max_new_tokens=5, temperature=1.0, batch_size=4, seed=4)
    assert answers(models[0], prompts, other) != whole


def test_samples_follow_the_distribution(models: tuple[str, str]) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count, temperature = 3000, 0.7
    prompts = [Prompt(str(i), "1+1=", {}) for i in range(count)]
    settings = Generation(max_new_tokens=1, temperature=temperature, batch_size=500)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    ids = tokenizer("1+1=", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(models[0])(ids).logits[0, -1].double()
    shares = (logits / temperature).softmax(-1)
    found = answers(models[0], prompts, settings)
    for token, share in enumerate(shares.tolist()):
        text = tokenizer.decode([token], skip_special_tokens=True)
        if not text:
            continue
        counted = sum(row["text"] == text for row in found.values())
        # Five standard deviations of a binomial count.
        assert abs(counted - count * share) <= 5 * (count * share * (1 - share)) ** 0.5 + 1


def test_top_p_leaves_the_unlikely_out(models: tuple[str, str], prompts: list[Prompt]) -> None:
    narrow = Generation(max_new_tokens=5, temperature=1.0, top_p=1e-6, batch_size=4)
    greedy = Generation(max_new_tokens=5, batch_size=4)
    assert answers(models[0], prompts, narrow) == answers(models[0], prompts, greedy)


def test_the_format_filter_sees_the_chosen_side_only(
    models: tuple[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    free = make_pairs(prompts, *models, tmp_path, SAMPLED)
    rows = read_lines(tmp_path / "pairs.jsonl")
    kept = make_pairs(prompts, *models, tmp_path, SAMPLED, keep=r"[0-4]$")
    expected = [row for row in rows if row["chosen"][-1:] in {*"01234"}]
    assert 0 < len(expected) < len(rows)
    assert any(row["rejected"][-1:] not in {*"01234"} for row in expected)
    assert read_lines(tmp_path / "pairs.jsonl") == expected
    assert kept["summary"]["dropped"]["format"] == len(rows) - len(expected)
    assert kept["summary"]["prompts"] == free["summary"]["prompts"]


def test_chats_go_through_the_template(tmp_path: Path) -> None:
    weak = write_model(tmp_path / "weak", 1, chat=True)
    weaker = write_model(tmp_path / "weaker", 2, chat=True)
    source = str(write_lines(tmp_path / "p.jsonl", sums(6)))
    prompts = load_prompts(source, chat=True, system="1")
    settings = Generation(max_new_tokens=4, chat_template={"plus": True})
    make_pairs(prompts, str(weak), str(weaker), tmp_path / "out", settings)
    row = read_lines(tmp_path / "out" / "pairs.jsonl")[0]
    assert [message["role"] for message in row["prompt"]] == ["system", "user"]
    assert row["chosen"][0]["role"] == "assistant"
    assert row["chat_template_kwargs"] == {"plus": True}  # for TRL, which applies it again
    written_out = Prompt("x", f"1={prompts[0].text[1]['content']}=+", {})  # type: ignore[index]
    assert answers(str(weak), [written_out], settings)["x"]["text"] == row["chosen"][0]["content"]


def test_two_models_draw_apart(
    models: tuple[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    record = make_pairs(prompts, models[0], models[0], tmp_path, SAMPLED)
    assert record["summary"]["agreement"] < 0.5


def test_two_equal_models_leave_no_pair(
    models: tuple[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    greedy = Generation(max_new_tokens=5, batch_size=4)
    assert_refused(
        lambda: make_pairs(prompts, models[0], models[0], tmp_path, greedy),
        DataError,
        "no pair is left of 20 prompts",
        "'identical': 20",
    )


def test_other_settings_do_not_continue_a_folder(
    models: tuple[str, str], prompts: list[Prompt], tmp_path: Path
) -> None:
    make_pairs(prompts, *models, tmp_path, SAMPLED)
    other = Generation(max_new_tokens=5, temperature=1.0, seed=4)
    assert_refused(
        lambda: make_pairs(prompts, *models, tmp_path, other),
        OptionError,
        "generation changed",
        str(tmp_path),
    )


# Imports once, then does the work in children, which can be killed within a second of each other.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import transformers.models.llama.modeling_llama
from gam.pda.models import Generation
from gam.pda.pairs import make_pairs
from gam.pda.prompts import load_prompts

prompts, weak, weaker, out = sys.argv[1:5]
settings = Generation(max_new_tokens=5, temperature=1.0, batch_size=4, seed=3)

def work():
    make_pairs(load_prompts(prompts), weak, weaker, Path(out), settings)

def written():
    return sum(p.stat().st_size for p in Path(out).glob("*.jsonl"))

stream, killed = random.Random(0), 0
for kill in range(10):
    child = os.fork()
    if child == 0:
        work()
        os._exit(0)
    goal = written() + stream.randrange(1, 400)
    while written() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
        pass
    try:
        os.kill(child, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    except (ProcessLookupError, ChildProcessError):
        pass
print(killed, (Path(out) / "pairs.jsonl").exists())
work()
"""


def test_killed_ten_times_equals_uninterrupted(models: tuple[str, str], tmp_path: Path) -> None:
    source = write_lines(tmp_path / "p.jsonl", sums(100))
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(source), *models, str(tmp_path / "killed")],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["10", "False"]  # every kill hit work that was not done
    make_pairs(load_prompts(str(source)), *models, tmp_path / "whole", SAMPLED)
    for name in ("weak.jsonl", "weaker.jsonl"):
        rows = read_lines(tmp_path / "killed" / name)
        assert len(rows) == 100
        assert sorted(map(str, rows)) == sorted(map(str, read_lines(tmp_path / "whole" / name)))
    for name in ("pairs.jsonl", "pairs.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    ("rows", "options", "error", "parts"),
    [
        ([{"prompt": ""}], {}, DataError, ("row 0", "'prompt' is ''")),
        ([{"question": "x"}], {}, DataError, ("row 0", "'prompt' is None")),
        ([{"prompt": [{"role": "user"}]}], {}, DataError, ("list of messages",)),
        ([{"id": 1, "prompt": "a"}, {"id": 1, "prompt": "b"}], {}, DataError, ("row 1", "'1'")),
        ([{"prompt": "a"}], {"system": "s"}, OptionError, ("--chat",)),
        ([], {}, DataError, ("no prompts",)),
    ],
    ids=["empty", "column", "message", "same id", "system", "none"],
)
def test_bad_prompts_are_named(
    rows: list[dict[str, Any]],
    options: dict[str, Any],
    error: type,
    parts: tuple[str, ...],
    tmp_path: Path,
) -> None:
    path = str(write_lines(tmp_path / "p.jsonl", rows))
    assert_refused(lambda: load_prompts(path, **options), error, *parts)


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    path = str(write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b"}] * 2))
    assert [p.text for p in load_prompts(path)] == ["a", "b"]
    assert [p.text for p in load_prompts(path, limit=1)] == ["a"]


def test_a_missing_model_is_named(prompts: list[Prompt], tmp_path: Path) -> None:
    assert_refused(
        lambda: make_pairs(prompts, str(tmp_path / "no"), "x", tmp_path / "o", SAMPLED),
        DataError,
        "weak: got",
        "no'",
        "expected the folder of a model",
    )
