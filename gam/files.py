"""What an adapter's files are called and hold, for reading and writing alike."""

from __future__ import annotations

import torch

from gam.formats.peft_config import CONFIG_NAME

WEIGHTS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
REPORT_NAME = "gam_merge.json"
CARD_NAME = "README.md"
OWN_FILES = frozenset({WEIGHTS_NAME, PICKLE_NAME, CONFIG_NAME, REPORT_NAME, CARD_NAME})

DTYPES = {  # the dtypes of an adapter, as safetensors calls them
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}


def one_line(error: BaseException) -> str:
    """Return the text of an error without line breaks."""
    return " ".join(str(error).split())
