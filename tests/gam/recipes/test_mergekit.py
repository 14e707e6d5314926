"""Recipes of mergekit: refused in one line that says what they are called here."""

import re
from pathlib import Path
from typing import Any

import pytest

from gam.errors import OptionError
from gam.recipes.document import parse
from gam.recipes.mergekit import METHODS
from gam.recipes.recipe import read_recipe
from gam.strategies import STRATEGIES

TIES = """\
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: OpenPipe/mistral-ft-optimized-1218
    parameters:
      density: 0.5
      weight: 0.5
  - model: mlabonne/NeuralHermes-2.5-Mistral-7B
    parameters:
      density: 0.5
      weight: 0.3
merge_method: ties
base_model: mistralai/Mistral-7B-v0.1
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

SLERP = """\
slices:
  - sources:
      - model: OpenPipe/mistral-ft-optimized-1218
        layer_range: [0, 32]
      - model: mlabonne/NeuralHermes-2.5-Mistral-7B
        layer_range: [0, 32]
merge_method: slerp
base_model: OpenPipe/mistral-ft-optimized-1218
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.4
dtype: bfloat16
tokenizer_source: union
"""

DARE = """\
models:
  - model: meta-llama/Llama-3.1-8B+./loras/math
    parameters: {weight: [0.2, 0.8], density: 0.4}
  - model: {model: {path: meta-llama/Llama-3.1-8B}, lora: {path: me/code-lora}}
    parameters: {weight: 1, density: 0.6}
merge_method: dare_ties
base_model: meta-llama/Llama-3.1-8B
parameters: {lambda: 1.5}
dtype: float32
out_dtype: bfloat16
chat_template: auto
"""

STACK = """\
slices:
  - sources:
    - model: psmathur/orca_mini_v3_13b
      layer_range: [0, 24]
  - sources:
    - model: garage-bAInd/Platypus2-13B
      layer_range: [20, 40]
merge_method: linear
dtype: float16
"""


def refusal(text: str, folder: Path) -> str:
    path = folder / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(OptionError) as caught:
        read_recipe(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: this is a recipe of mergekit, which merges models; ")
    assert "\n" not in message
    assert message.endswith(".")
    return message


def written(message: str) -> dict[str, Any]:
    found = re.search(r"Write: (\{.*?\})(?:, with|\.)", message)
    assert found is not None
    return parse(found[1], "message")[0]


def test_ties(tmp_path: Path) -> None:
    message = refusal(TIES, tmp_path)
    assert "merge_method -> method, parameters: weight -> weights, lambda -> scale" in message
    assert message.endswith(
        "Write: {adapters: [OpenPipe/mistral-ft-optimized-1218, "
        "mlabonne/NeuralHermes-2.5-Mistral-7B], method: ties, weights: [0.5, 0.3], density: 0.5, "
        "dtype: float16}, with an adapter in place of each model."
    )


def test_slerp_by_slices_and_filters(tmp_path: Path) -> None:
    message = refusal(SLERP, tmp_path)
    names = ["OpenPipe/mistral-ft-optimized-1218", "mlabonne/NeuralHermes-2.5-Mistral-7B"]
    weights = [0.6, 0.4]
    expected = {"adapters": names, "method": "karcher", "weights": weights, "dtype": "bfloat16"}
    assert written(message) == expected
    assert "merge_method -> method (slerp -> karcher), parameters: " in message
    assert message.endswith(
        ' Values of t by filter go under modules, such as modules: {"*.mlp.*": {weights: [1, 2]}}.'
    )


def test_adapters_and_their_own_parameters(tmp_path: Path) -> None:
    message = refusal(DARE, tmp_path)
    assert written(message) == {
        "adapters": ["./loras/math", "me/code-lora"],
        "method": "dare_ties",
        "weights": [[0.2, 0.8], 1],
        "normalize": False,
        "scale": 1.5,
        "dtype": "bfloat16",
    }
    assert "in place of each model" not in message
    assert message.endswith("}. density: give one, the same for all adapters.")


@pytest.mark.parametrize("text", [TIES, SLERP, DARE])
def test_what_it_says_is_a_recipe(text: str, tmp_path: Path) -> None:
    found = re.search(r"Write: (\{.*?\})(?:, with|\.)", refusal(text, tmp_path))
    assert found is not None
    (tmp_path / "written.yaml").write_text(found[1])
    recipe = read_recipe(tmp_path / "written.yaml")
    assert len(recipe.adapters) == 2


def test_stacked_layers_have_no_counterpart(tmp_path: Path) -> None:
    message = refusal(STACK, tmp_path)
    assert message.endswith("Layers cannot be stacked here: list each adapter once.")


@pytest.mark.parametrize("method", ["passthrough", "model_stock", "sce", "3"])
def test_methods_that_are_not_here(method: str, tmp_path: Path) -> None:
    message = refusal(f"merge_method: {method}\nmodels: [{{model: a}}]\n", tmp_path)
    assert message.endswith(f"No method here is '{method}': see gam-merge --list-methods.")


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: ties\n",
        "merge_method: ties\nmodels: 3\n",
        "merge_method: [ties]\nslices: [1]\n",
        "models: [{model: a}, {model: null, parameters: 4}]\n",
        "slices: [{sources: 3}]\nparameters: [1]\n",
        "merge_method: slerp\nmodels: [{model: a}]\nbase_model: b\nparameters: {t: x}\n",
        "merge_method: slerp\nmodels: [{model: a}]\nbase_model: a\nparameters: {t: [0, 1]}\n",
        'merge_method: linear\nmodels: [{model: "a\\nb: c"}, {model: "null"}]\n',
    ],
)
def test_broken_ones_are_refused_in_a_line_too(text: str, tmp_path: Path) -> None:
    refusal(text, tmp_path)


def test_every_counterpart_is_a_method() -> None:
    assert set(METHODS.values()) <= set(STRATEGIES)
