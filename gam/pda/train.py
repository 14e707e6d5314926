"""LoRA adapters by preference optimisation, with the trainers of TRL."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gam.errors import OptionError, OutputError
from gam.pda.files import DataError, Row, read_rows, write_json
from gam.pda.libraries import library_versions, need
from gam.pda.models.local import load_model, old_names
from gam.pda.provenance import claim, content_digest
from gam.pda.settings import check_settings, setting

LIBRARIES = ("torch", "transformers", "peft", "trl", "accelerate", "datasets")
RECORD_NAME = "training.json"
CHECKPOINTS = "checkpoints"

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Training:
    """How an adapter is trained. The defaults are the settings of arXiv 2606.00357."""

    objective: str = setting("dpo", "SFT uses the chosen answers alone.", "dpo", "orpo", "sft")
    rank: int = setting(64, "Rank of the LoRA updates.", least=1)
    alpha: int = setting(128, "The updates are scaled by alpha / rank.")
    dropout: float = setting(0.05, "Dropout of the LoRA inputs.", least=0, most=1)
    target_modules: str | Sequence[str] = setting(
        "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
        "Names of the adapted layers, or all-linear.",
    )
    learning_rate: float = setting(1e-5, "Learning rate at its peak.", least=0)
    schedule: str = setting("cosine", "Of the learning rate, as transformers calls it.")
    warmup: float = setting(
        0.1, "Share of the steps over which the learning rate rises.", least=0, most=1
    )
    batch_size: int = setting(128, "Pairs for each step, over all processes.", least=1)
    device_batch_size: int = setting(
        1, "Pairs at a time on each device; the rest accumulates.", least=1
    )
    epochs: int = setting(1, "Passes over the pairs.", least=1)
    beta: float = setting(0.1, "Beta of DPO; for ORPO the weight of the odds ratio.", least=0)
    max_length: int = setting(8192, "Longest prompt and answer together, in tokens.", least=1)
    gradient_checkpointing: bool = setting(True, "Compute activations again, to save memory.")
    precision: str = setting("auto", "auto is bf16 where a GPU has it.", "auto", "bf16", "fp32")
    lora_seed: int = setting(0, "Seed of the initial LoRA weights.")
    data_seed: int = setting(0, "Seed of the order of the pairs.")
    save_steps: int = setting(0, "Steps between two checkpoints; 0 for none.", least=0)
    save_dtype: str = setting(
        "float32", "Number format of the adapter's file.", "float32", "bfloat16", "float16"
    )
    extra: Mapping[str, Any] = setting(dict, "More arguments of TRL's configuration class.")

    def __post_init__(self) -> None:
        """Check the values; `check_training` asks TRL about the rest."""
        check_settings(self)


def train_adapter(
    student: str,
    pairs: str | Path,
    output: str | Path,
    settings: Training | None = None,
    *,
    start: str | Path | None = None,
    swap: bool = False,
    progress: Progress | None = None,
) -> Row:
    """Train a LoRA adapter of a student on preference pairs.

    Runs unchanged under ``accelerate launch``: the pairs of a step are the same for any number
    of processes. Whole batches only are used: the last ``pairs % batch_size`` pairs, in the
    file's order, are left out. Called again after it was stopped, it goes on from the last
    checkpoint.

    Args:
        student: Folder or Hub id ``user/name[@revision]`` of the base model.
        pairs: JSON-lines file of ``prompt``, ``chosen`` and ``rejected``.
        output: Adapter folder to write, with ``training.json`` beside the weights.
        settings: By default those of the paper.
        start: Adapter to go on training, instead of a new one; DPO's reference is then the
            student with this adapter.
        swap: Exchange chosen and rejected, as a control.
        progress: Called with "step" and the numbers of steps done and in all.

    Returns:
        What ``training.json`` holds.

    Raises:
        DataError: The pairs are not pairs, or fewer than one batch.
        OptionError: A library is missing, or a setting does not fit the processes.
    """
    settings = settings or Training()
    check_training(settings)
    output = Path(output)
    if (output / RECORD_NAME).exists():
        raise OutputError(f"{str(output)!r} holds a finished adapter. Choose another folder.")
    inputs = {
        "student": {"source": student, "sha256": content_digest(student)},
        "pairs": {"source": str(pairs), "sha256": content_digest(pairs)},
        "start": None if start is None else {"sha256": content_digest(start)},
        "swapped": swap,
        "settings": asdict(settings),
    }
    rows = _rows(pairs, settings, swap)
    # Before torch starts its threads and before any cache is looked up.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with old_names():
        trainer = build_trainer(student, rows, output, settings, start, progress)
        checkpoints = output / CHECKPOINTS
        claim(checkpoints, inputs)
        resume = any(checkpoints.glob("checkpoint-*")) or None
        found = trainer.train(resume_from_checkpoint=resume)
    record = {**inputs, "pairs_used": len(rows), **_history(trainer, found)}
    _save(trainer, record, output)
    return record


def check_training(settings: Training) -> None:
    """Check what needs neither a model nor pairs: the libraries, and the settings with TRL.

    Raises:
        OptionError: A library is missing, or a setting is refused or does not fit the processes.
    """
    need(*LIBRARIES)
    from gam.errors import one_line

    options = _trainer_options(settings, settings.batch_size, Path())
    config_type, _ = _OBJECTIVES[settings.objective]()
    try:
        with old_names():
            config_type(**options)
    except (TypeError, ValueError, ImportError) as error:
        raise OptionError(f"trl refuses the settings of the training: {one_line(error)}.") from None


def _rows(pairs: str | Path, settings: Training, swap: bool) -> list[Row]:
    rows = read_rows(pairs)
    for index, row in enumerate(rows):
        if not {"prompt", "chosen", "rejected"} <= row.keys():
            raise DataError(
                f"{str(pairs)!r}, row {index}: expected prompt, chosen and rejected, "
                f"got {', '.join(row)}."
            )
    count = len(rows) - len(rows) % settings.batch_size
    if count == 0:
        raise DataError(
            f"{str(pairs)!r} holds {len(rows)} pairs, fewer than one batch of "
            f"{settings.batch_size}. Lower the batch size."
        )
    answers = {"chosen": "rejected", "rejected": "chosen"} if swap else {}
    columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected", **answers}
    if settings.objective == "sft":
        columns = {"prompt": "prompt", "completion": columns["chosen"]}
    if "chat_template_kwargs" in rows[0]:
        columns["chat_template_kwargs"] = "chat_template_kwargs"
    return [{new: row[old] for new, old in columns.items()} for row in rows[:count]]


def build_trainer(
    student: str,
    rows: Sequence[Row],
    output: Path,
    settings: Training,
    start: str | Path | None = None,
    progress: Progress | None = None,
) -> Any:
    """Return TRL's trainer for the objective; see `train_adapter`."""
    import datasets
    import transformers
    from peft import LoraConfig, PeftModel

    config_type, trainer_type = _OBJECTIVES[settings.objective]()
    options = _trainer_options(settings, len(rows), output)
    model, tokenizer = load_model(student, "bfloat16" if options["bf16"] else "float32")
    if start is None:
        transformers.set_seed(settings.lora_seed)
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=_targets(settings),
            task_type="CAUSAL_LM",
        )
        adapter = {"peft_config": config}
    else:
        model = PeftModel.from_pretrained(model, str(start), is_trainable=True)
        adapter = {}
    trainer = trainer_type(
        model=model,
        args=config_type(**options),
        train_dataset=datasets.Dataset.from_list([*rows]),
        processing_class=tokenizer,
        **adapter,
    )
    trainer.remove_callback(transformers.PrinterCallback)  # it writes to stdout
    if progress is not None:
        trainer.add_callback(_reporter(progress))
    return trainer


def _trainer_options(settings: Training, pairs: int, output: Path) -> dict[str, Any]:
    """Return the arguments of TRL's configuration class for a number of pairs."""
    import torch

    cuda = torch.cuda.is_available()
    bf16 = settings.precision == "bf16" or (
        settings.precision == "auto" and cuda and torch.cuda.is_bf16_supported()
    )
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    share = settings.device_batch_size * processes
    if settings.batch_size % share:
        raise OptionError(
            f"batch_size: got a batch of {settings.batch_size}, expected a multiple of {share}: "
            f"{settings.device_batch_size} pairs (device_batch_size) on each of {processes} "
            "processes."
        )
    steps = settings.epochs * pairs // settings.batch_size
    options: dict[str, Any] = {
        "output_dir": str(output / CHECKPOINTS),
        "per_device_train_batch_size": settings.device_batch_size,
        "gradient_accumulation_steps": settings.batch_size // share,
        "num_train_epochs": settings.epochs,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": settings.schedule,
        "warmup_steps": round(settings.warmup * steps),
        "max_length": settings.max_length,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "bf16": bf16,
        "seed": settings.lora_seed,
        "data_seed": settings.data_seed,
        "use_cpu": not cuda,
        "save_strategy": "steps" if settings.save_steps else "no",
        "save_steps": settings.save_steps or 500,
        "save_total_limit": 1,
        "logging_steps": max(1, steps // 20),
        "report_to": "none",
        "disable_tqdm": True,
        **settings.extra,
    }
    if settings.objective != "sft":
        # TRL would switch off the dropout of the LoRA layers as well.
        options.update(beta=settings.beta, disable_dropout=settings.dropout == 0)
    return options


def _reporter(progress: Progress) -> Any:
    """Return a callback of transformers that tells the steps done."""
    import transformers

    class Reporter(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            progress("step", state.global_step, state.max_steps)

    return Reporter()


def _history(trainer: Any, found: Any) -> Row:
    return {
        "processes": trainer.args.world_size,
        "precision": "bf16" if trainer.args.bf16 else "fp32",
        "steps": trainer.state.global_step,
        "seconds": round(found.metrics["train_runtime"], 2),
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "versions": library_versions(),
    }


def _save(trainer: Any, record: Row, output: Path) -> None:
    """Write the adapter and its record, in one process; take the checkpoints away."""
    import torch

    # Of every process, since each may hold only a part.
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.accelerator.is_main_process:
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.peft_config["default"].base_model_name_or_path = record["student"]["source"]
        dtype = getattr(torch, record["settings"]["save_dtype"])
        weights = {name: value.to(dtype) for name, value in weights.items() if "lora_" in name}
        model.save_pretrained(str(output), selected_adapters=["default"], state_dict=weights)
        write_json(output / RECORD_NAME, record)
        shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()


def _targets(settings: Training) -> str | list[str]:
    names = settings.target_modules
    if names == "all-linear":
        return "all-linear"
    return names.split(",") if isinstance(names, str) else list(names)


def _dpo() -> tuple[Any, Any]:
    from trl import DPOConfig, DPOTrainer

    return DPOConfig, DPOTrainer


def _orpo() -> tuple[Any, Any]:
    """Return ORPO's classes: TRL 0.29 moved them, and calls the new place experimental."""
    from importlib import import_module

    for module in ("trl.experimental.orpo", "trl"):
        try:
            found = import_module(module)
            return found.ORPOConfig, found.ORPOTrainer
        except (ImportError, AttributeError):
            continue
    raise OptionError(
        f"the installed trl {library_versions()['trl']} has no ORPO trainer, neither in trl nor in "
        "trl.experimental.orpo. Install one that has, such as trl 1.16, or use objective dpo."
    )


def _sft() -> tuple[Any, Any]:
    from trl import SFTConfig, SFTTrainer

    return SFTConfig, SFTTrainer


_OBJECTIVES = {"dpo": _dpo, "orpo": _orpo, "sft": _sft}
