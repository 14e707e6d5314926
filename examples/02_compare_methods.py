"""Which method and scale does a merge need? Measure it on the tasks.

Merges the three adapters by every method, and by some with options, loads each result with PEFT
and scores it on the tasks. No method is best everywhere: these adapters learned unrelated tasks,
and keep most of them in a plain sum. Needs `transformers` and `peft`, and a minute.
"""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from tasks import TASKS, accuracy
from transformers import LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

from gam import merge_adapters
from gam.strategies import STRATEGIES

HERE = Path(__file__).resolve().parent
ADAPTERS = [HERE / "adapters" / name for name in ("reverse", "sort", "rotate")]
RECIPES: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in STRATEGIES},
    "linear, scale 3": {"method": "linear", "scale": 3.0},
    "ties, scale 2": {"method": "ties", "scale": 2.0},
    "gam, scale 3": {"method": "gam", "scale": 3.0},
    "gam, retract": {"method": "gam", "retract": True},
    "gam, match_norm": {"method": "gam", "match_norm": True},
}

warnings.simplefilter("ignore")  # those of the libraries
disable_progress_bar()
torch.set_num_threads(1)  # the model is too small to share out


def score(title: str, adapter: Path | None) -> None:
    """Print the accuracy of the base model with an adapter on every task."""
    model = LlamaForCausalLM.from_pretrained(HERE / "tiny-base", dtype=torch.float32)
    tuned = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    tuned.eval()
    print(f"{title:18}" + "".join(f"{accuracy(tuned, task):9.2f}" for task in TASKS))


print(f"{'accuracy':18}" + "".join(f"{task:>9}" for task in TASKS))
score("base model", None)
for path in ADAPTERS:
    score(f"adapter {path.name}", path)
with tempfile.TemporaryDirectory() as scratch:
    for title, options in RECIPES.items():
        output = Path(scratch) / title
        merge_adapters(ADAPTERS, output=output, **options)
        score(title, output)
