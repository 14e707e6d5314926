"""Training: losses worked by hand, adapters that load and merge, resumption, two processes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.adapters import assert_refused, quiet_peft
from helpers.pda import CHARACTERS, read_lines, sums, write_lines, write_model
from safetensors.torch import load_file, save_file

import gam
from gam.errors import OptionError, OutputError
from gam.pda.files import DataError
from gam.pda.train import Training, build_trainer, train_adapter

SMALL = Training(
    rank=2,
    alpha=4,
    dropout=0.0,
    learning_rate=1e-2,
    batch_size=4,
    device_batch_size=2,
    max_length=16,
)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_model(tmp_path_factory.mktemp("student") / "model"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [
        {"prompt": row["prompt"], "chosen": row["answer"], "rejected": row["answer"] + "0"}
        for row in sums(17)
    ]
    return write_lines(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def written_distributions(folder: Path, base: dict[str, float], adapted: dict[str, float]) -> None:
    """Make the student of a folder predict `base` at every position, and `adapted` with LoRA on.

    The hidden state is h = (1, 1, 1, 1) at every position, whatever the text, since attention
    and MLP add zero. An update of the MLP's last matrix makes it (1, 1, -1, -1), of the same
    norm. With columns u, 0, v, 0 of the output layer the logits are u + v and u - v.
    """
    state = load_file(folder / "model.safetensors")
    tokens = ["<pad>", "<end>", *CHARACTERS]
    logs = [
        torch.tensor([math.log(shares.get(token, 1e-12)) for token in tokens])
        for shares in (base, adapted)
    ]
    for name, value in state.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
        elif name.endswith(("embed_tokens.weight", "gate_proj.weight", "up_proj.weight")):
            value.fill_(1.0)
        elif name == "lm_head.weight":
            value.zero_()
            value[:, 0], value[:, 2] = (logs[0] + logs[1]) / 2, (logs[0] - logs[1]) / 2
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def loss_of(student: str, objective: str, beta: float, out: Path) -> float:
    """Return TRL's loss of preferring "a" to "b" after "=", with the LoRA update switched on."""
    settings = Training(
        objective=objective,
        beta=beta,
        rank=1,
        alpha=1,
        dropout=0.0,
        target_modules="down_proj",
        batch_size=1,
        max_length=8,
        gradient_checkpointing=False,
    )
    rows = [{"prompt": "=", "chosen": "a", "rejected": "b"}]
    with quiet_peft():
        trainer = build_trainer(student, rows, out, settings)
        for name, parameter in trainer.model.named_parameters():
            if "lora_A" in name:  # the MLP's inner state is silu(4) * 4 in each of its 8 channels
                parameter.data.fill_(1 / (8 * 16 / (1 + math.exp(-4))))
            elif "lora_B" in name:
                parameter.data[:, 0] = torch.tensor([0.0, 0.0, -2.0, -2.0])
        batch = next(iter(trainer.get_train_dataloader()))
        return float(trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch)))


@pytest.mark.parametrize(("beta", "loss"), [(1.0, math.log(5 / 4)), (0.5, math.log(3 / 2))])
def test_the_dpo_loss_is_the_one_worked_by_hand(beta: float, loss: float, tmp_path: Path) -> None:
    """Work it out.

    Student: a, b, end each 1/4. With the update: a 1/2, b 1/8, end 1/4. Log ratios: chosen
    log(1/2 * 1/4) - log(1/4 * 1/4) = log 2, rejected log(1/8) - log(1/4) = -log 2. The loss is
    -log sigmoid(beta * 2 log 2) = log(1 + 4^-beta).
    """
    student = write_model(tmp_path / "student", width=4)
    written_distributions(
        student,
        {"a": 1 / 4, "b": 1 / 4, "<end>": 1 / 4, "c": 1 / 4},
        {"a": 1 / 2, "b": 1 / 8, "<end>": 1 / 4, "c": 1 / 8},
    )
    assert loss_of(str(student), "dpo", beta, tmp_path / "out") == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_the_orpo_loss_is_the_one_worked_by_hand(beta: float, tmp_path: Path) -> None:
    """Work it out.

    With the update: a 1/8, b 1/32, end 1/2. Mean probabilities, geometric, of an answer's
    tokens: chosen sqrt(1/8 * 1/2) = 1/4, rejected sqrt(1/32 * 1/2) = 1/8; odds 1/3 and 1/7; the
    ratio's term is -log sigmoid(log(7/3)) = log(10/7). The likelihood's term is log 4.
    """
    student = write_model(tmp_path / "student", width=4)
    written_distributions(
        student,
        {"a": 1 / 4, "b": 1 / 4, "<end>": 1 / 4, "c": 1 / 4},
        {"a": 1 / 8, "b": 1 / 32, "<end>": 1 / 2, "c": 11 / 32},
    )
    loss = math.log(4) + beta * math.log(10 / 7)
    assert loss_of(str(student), "orpo", beta, tmp_path / "out") == pytest.approx(loss, rel=1e-5)


@pytest.mark.parametrize("objective", ["dpo", "orpo", "sft"])
def test_an_adapter_loads_in_peft_and_merges(
    objective: str, student: str, pairs: Path, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = Training(**{**SMALL.__dict__, "objective": objective})
    record = train_adapter(student, pairs, tmp_path / "a", settings)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "training.json",
        "README.md",
    }
    assert json.loads((tmp_path / "a" / "training.json").read_text()) == record
    assert record["steps"] == 4
    assert record["pairs_used"] == 16
    assert record["settings"]["lora_seed"] == 0
    (tmp_path / "b").mkdir()
    other = Training(**{**SMALL.__dict__, "lora_seed": 1, "objective": objective})
    train_adapter(student, pairs, tmp_path / "b", other)
    merged = gam.merge_adapters([tmp_path / "a", tmp_path / "b"])
    assert len(merged.modules) == 7
    adapter = gam.load_adapter(tmp_path / "a")
    with quiet_peft():
        base = AutoModelForCausalLM.from_pretrained(student)
        before = {name: value.clone() for name, value in base.state_dict().items()}
        baked = PeftModel.from_pretrained(base, tmp_path / "a").merge_and_unload().state_dict()
    for name, module in adapter.modules.items():
        moved = baked[f"{name}.weight"] - before[f"{name}.weight"]
        assert moved.norm() > 1e-3
        torch.testing.assert_close(moved, module.delta(), atol=1e-6, rtol=1e-4)


def test_training_prefers_the_chosen(student: str, pairs: Path, tmp_path: Path) -> None:
    longer = Training(**{**SMALL.__dict__, "epochs": 5})
    log = train_adapter(student, pairs, tmp_path / "a", longer)["log"]
    assert log[-1]["loss"] < 0.9 * math.log(2)
    swapped = train_adapter(student, pairs, tmp_path / "b", longer, swap=True)
    assert swapped["swapped"]
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    # The loss falls either way; the updates point away from each other.
    products = [float((a[name] * b[name]).sum()) for name in a if "lora_B" in name]
    assert sum(products) < 0


def test_the_seed_of_the_first_weights_is_explicit(
    student: str, pairs: Path, tmp_path: Path
) -> None:
    still = {**SMALL.__dict__, "learning_rate": 0.0}
    for name, more in (
        ("one", {"lora_seed": 5}),
        ("order", {"lora_seed": 5, "data_seed": 9}),
        ("other", {"lora_seed": 6}),
    ):
        train_adapter(student, pairs, tmp_path / name, Training(**{**still, **more}))
    first, order, other = (weights(tmp_path / name) for name in ("one", "order", "other"))
    assert all(torch.equal(first[name], order[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "lora_A" in name)


def test_it_goes_on_from_its_checkpoint(student: str, pairs: Path, tmp_path: Path) -> None:
    settings = Training(**{**SMALL.__dict__, "save_steps": 1})
    train_adapter(student, pairs, tmp_path / "whole", settings)

    class StopError(Exception):
        pass

    def stop(_: str, step: int, __: int) -> None:
        if step == 3:  # the checkpoint of step 2 is written, that of step 3 is not
            raise StopError

    out = tmp_path / "stopped"
    with pytest.raises(StopError):
        train_adapter(student, pairs, out, settings, progress=stop)
    assert [path.name for path in out.glob("checkpoints/checkpoint-*")] == ["checkpoint-2"]
    other = Training(**{**SMALL.__dict__, "save_steps": 1, "beta": 0.2})
    assert_refused(
        lambda: train_adapter(student, pairs, out, other), OptionError, "settings changed"
    )
    steps: list[int] = []
    train_adapter(student, pairs, out, settings, progress=lambda _, step, __: steps.append(step))
    assert steps == [3, 4]
    assert not (out / "checkpoints").exists()
    whole, resumed = weights(tmp_path / "whole"), weights(out)
    for name, value in whole.items():
        torch.testing.assert_close(resumed[name], value, atol=1e-7, rtol=1e-6)
    assert_refused(
        lambda: train_adapter(student, pairs, out, settings), OutputError, "finished adapter"
    )


def test_sequential_training_starts_where_the_first_ended(
    student: str, pairs: Path, tmp_path: Path
) -> None:
    train_adapter(student, pairs, tmp_path / "first", SMALL)
    still = Training(**{**SMALL.__dict__, "learning_rate": 0.0})
    record = train_adapter(student, pairs, tmp_path / "next", still, start=tmp_path / "first")
    assert record["log"][0]["loss"] == pytest.approx(math.log(2))  # its start is the reference
    first, after = weights(tmp_path / "first"), weights(tmp_path / "next")
    assert all(torch.equal(first[name], after[name]) for name in first)


def command(*words: str | Path, processes: int = 1) -> Sequence[str]:
    # With --cpu accelerate starts one process alone, or several through MPI; its other launcher
    # starts several here, which find no GPU and compute on the CPU.
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    launch += ["--num_processes", str(processes), "--mixed_precision", "no"]
    launch += ["--dynamo_backend", "no", "--main_process_port", "0"]
    return [sys.executable, *(launch if processes > 1 else []), *map(str, words)]


def test_two_processes_make_the_adapter_of_one(student: str, pairs: Path, tmp_path: Path) -> None:
    options = ["--rank", "2", "--dropout", "0", "--learning-rate", "0.01", "--batch-size", "4"]
    options += ["--max-length", "16", "--json"]
    records = []
    for processes in (1, 2):
        out = tmp_path / str(processes)
        module = ["-m", "gam.pda"]
        words = command(*module, "train", student, pairs, "-o", out, *options, processes=processes)
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(words, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        records.append(json.loads(done.stdout))
    assert [record["processes"] for record in records] == [1, 2]
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    moved = max(float(value.abs().max()) for name, value in one.items() if "lora_B" in name)
    for name, value in one.items():
        # Measured: 2e-6 of the longest way that a weight goes.
        assert float((two[name] - value).abs().max()) < 1e-5 * moved


@pytest.mark.parametrize(
    ("rows", "settings", "error", "parts"),
    [
        ([{"prompt": "=", "chosen": "a"}], {}, DataError, ("row 0", "rejected")),
        (
            [{"prompt": "=", "chosen": "a", "rejected": "b"}],
            {},
            DataError,
            ("holds 1 pairs", "fewer than one batch of 4"),
        ),
        (
            [{"prompt": "=", "chosen": "a", "rejected": "b"}] * 4,
            {"device_batch_size": 3},
            OptionError,
            ("batch of 4", "multiple of 3"),
        ),
    ],
    ids=["fields", "few", "batch"],
)
def test_what_does_not_fit_is_named(
    rows: list[dict[str, str]],
    settings: dict[str, Any],
    error: type,
    parts: tuple[str, ...],
    student: str,
    tmp_path: Path,
) -> None:
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    chosen = Training(**{**SMALL.__dict__, **settings})
    assert_refused(lambda: train_adapter(student, path, tmp_path / "o", chosen), error, *parts)
    assert read_lines(path) == rows


def test_unknown_choices_are_named() -> None:
    assert_refused(lambda: Training(objective="ppo"), OptionError, "'ppo'", "dpo, orpo, sft")
    assert_refused(lambda: Training(save_dtype="int8"), OptionError, "'int8'", "bfloat16")


def test_a_trl_without_orpo_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import trl

    from gam.pda import train

    monkeypatch.setitem(sys.modules, "trl.experimental.orpo", None)
    monkeypatch.delattr(trl, "ORPOTrainer", raising=False)
    assert_refused(train._orpo, OptionError, "has no ORPO trainer", trl.__version__)
