"""Make `tiny-base` and the three adapters of the examples from nothing, with PEFT.

A two-layer Llama with 90 thousand weights learns a little of four string tasks, such as
reversing eight letters. Then a LoRA adapter is trained on each of three of them; on the other
tasks it is asked to stay near the base model. The adapters differ in rank, scaling, targets and
dtype on purpose, as adapters from different people do.

The results are in the repository: this is here to show where they come from; values differ a
little between machines and versions. It needs `transformers` and `peft`, and takes two minutes on
one CPU core: `python examples/make_adapters.py FOLDER`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tasks import TASKS, accuracy, sample
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

BASE_NAME = "gam-merge/tiny-llama"
BATCH = 256
LEARNING_RATE = 3e-3
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ADAPTERS = {
    "reverse": (
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        torch.float32,
    ),
    "sort": (
        LoraConfig(
            r=16,
            lora_alpha=16,
            use_rslora=True,
            target_modules=ATTENTION,
            task_type="CAUSAL_LM",
        ),
        torch.bfloat16,
    ),
    "rotate": (
        LoraConfig(
            r=8,
            lora_alpha=8,
            target_modules=[*ATTENTION, "up_proj", "down_proj"],
            rank_pattern={"v_proj": 4, "layers.1.mlp.down_proj": 12},
            task_type="CAUSAL_LM",
        ),
        torch.bfloat16,
    ),
}


def fit(
    model: LlamaForCausalLM | PeftModel, tasks: list[str], keep: list[str], steps: int, seed: int
) -> None:
    """Train in place on fresh random strings of `tasks`; on `keep`, stay near the base model."""
    generator = torch.Generator().manual_seed(seed)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for step in range(steps):
        tokens, answer = batch(tasks, generator)
        logits = model(input_ids=tokens).logits[:, -answer.shape[1] - 1 : -1]
        loss = cross_entropy(logits.mT, answer)
        if keep:
            tokens, _ = batch(keep, generator)
            with torch.no_grad(), model.disable_adapter():
                wanted = model(input_ids=tokens).logits.log_softmax(-1)
            found = model(input_ids=tokens).logits.log_softmax(-1)
            loss += (wanted.exp() * (wanted - found)).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"  step {step:4d}  loss {loss.item():.3f}")


def batch(tasks: list[str], generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return questions with their answers, [b, n], and the answers alone."""
    parts = [sample(task, BATCH // len(tasks), generator) for task in tasks]
    questions, answers = (torch.cat(side) for side in zip(*parts, strict=True))
    return torch.cat([questions, answers], dim=1), answers


def report(title: str, model: torch.nn.Module) -> None:
    """Print the accuracy on every task."""
    scores = "  ".join(f"{task} {accuracy(model, task):.2f}" for task in TASKS)
    print(f"{title}: {scores}")


def main() -> None:
    """Train and save the base model and the adapters."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write; must not exist yet")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=32,
        bos_token_id=None,
        eos_token_id=None,
    )
    base = LlamaForCausalLM(config)
    fit(base, list(TASKS), [], steps=190, seed=1)
    base.to(torch.bfloat16).save_pretrained(folder / "tiny-base")

    for seed, (task, (lora, dtype)) in enumerate(ADAPTERS.items(), start=2):
        torch.manual_seed(seed)
        model = LlamaForCausalLM.from_pretrained(folder / "tiny-base", dtype=torch.float32)
        # PEFT copies this into adapter_config.json; it must not be a path of this machine.
        model.name_or_path = BASE_NAME
        report("base", model)
        adapted = get_peft_model(model, lora)
        fit(adapted, [task], [other for other in TASKS if other != task], steps=200, seed=seed)
        report(task, adapted)
        place = folder / "adapters" / task
        adapted.to(dtype).save_pretrained(place, save_embedding_layers=False)
        (place / "README.md").unlink()  # PEFT's empty form


if __name__ == "__main__":
    main()
