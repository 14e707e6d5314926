"""Reading LoRA adapters from disk, fully checked."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import mmap
import os
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gam.adapter import PREFIX, Adapter, LowRank, Source
from gam.errors import AdapterError, OptionError
from gam.files import DTYPES, PICKLE_NAME, WEIGHTS_NAME, one_line
from gam.formats.peft_config import CONFIG_NAME, check_config, facts_of, resolve_scaling

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_SUFFIXES = (".safetensors", *_PICKLE_SUFFIXES)
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.alpha")
_CONVERT = "Convert the file to PEFT's format first"
_FOREIGN = (  # first match wins
    (r"lora_(down|up)\b", "the kohya format (lora_down, lora_up)", _CONVERT),
    (r"[._]lora\.(down|up)\.", "an old diffusers format (lora.down, lora.up)", _CONVERT),
    (
        r"lora_embedding_[AB]\b",
        "LoRA on an embedding, which is not supported yet",
        "Leave the embedding out of target_modules",
    ),
    (r"lora_magnitude_vector\b", "DoRA, whose updates do not add up", "Train it without DoRA"),
    (r"lora_(E|ranknum)\b", "AdaLoRA", "Only LoRA adapters can be merged"),
    (r"\bhada_", "LoHa", "Only LoRA adapters can be merged"),
    (r"\blokr_", "LoKr", "Only LoRA adapters can be merged"),
    (r"\bvera_lambda", "VeRA", "Only LoRA adapters can be merged"),
    (r"\bia3_l\b", "IA3", "Only LoRA adapters can be merged"),
    (r"\b(oft|boft|hra|bone|miss)_", "an adapter that is not LoRA", "Only LoRA can be merged"),
    (r"\b(trainable_tokens|token_adapter)", "trained tokens", "Train it without new tokens"),
    (
        r"\.lora_[AB](\.[^.]+)?\.bias$",
        "a bias of a LoRA factor (lora_bias), which is not supported yet",
        "Train it without lora_bias",
    ),
    (
        r"\.bias$",
        "a trained bias, which is not supported yet",
        "Train it with bias='none'",
    ),
    (
        r"\.weight$",
        "a fully saved weight (modules_to_save, or a resized embedding), which is not "
        "supported yet",
        "Train it without modules_to_save, or save it with save_embedding_layers=False",
    ),
)
_BY_NAME = {name: dtype for dtype, name in DTYPES.items()}
_LARGEST = torch.finfo(torch.float32).max
_LFS_POINTER = b"version https://git-lfs"


def read_adapter(
    path: str | os.PathLike[str],
    *,
    alpha: float | None = None,
    allow_pickle: bool = False,
    name: str | None = None,
    called: str | None = None,
) -> Adapter:
    """Return the adapter in a PEFT folder or a ``.safetensors`` file, fully checked.

    The scaling of a module comes from ``adapter_config.json`` in the folder or beside the
    file; without one from ``<module>.alpha`` tensors, from the file's metadata
    (``lora_adapter_metadata``, ``lora_alpha``, ``alpha``, ``ss_network_alpha``), or else
    from ``alpha``. The factors of a ``.safetensors`` file stay memory-mapped: it must not
    change while the adapter is in use.

    Args:
        path: Folder or file.
        alpha: LoRA alpha where neither config nor file states one; it never overrides what
            they state. ``source.alpha`` tells whether it was used.
        allow_pickle: Also read ``adapter_model.bin``, with ``weights_only=True``.
        name: Label of the adapter; default the folder's name, or the file's stem.
        called: What to call it in messages; default the path.

    Returns:
        The adapter: modules sorted by name, ``lora_a`` [r, in] and ``lora_b`` [out, r] in
        the file's dtypes.

    Raises:
        AdapterError: The adapter cannot be read, holds something that cannot be merged, or
            states no scaling.
        OptionError: ``alpha`` is not a finite number.
    """
    where = called or os.fspath(path)
    if alpha is not None and not math.isfinite(alpha):
        raise OptionError(f"alpha: got {alpha!r}, expected a finite number.")
    with _reading(where):
        weights = _locate(Path(path), where, allow_pickle)
        config_path = weights.with_name(CONFIG_NAME)
        config = read_config(config_path, where) if os.path.lexists(config_path) else None
        tensors, metadata, digest = _load(weights, where)
        factors, alphas = _sort_tensors(tensors, where)
        scalings = _Scalings(config, metadata, alphas, alpha, where)
        modules = {
            module: _low_rank(module, sides, scalings, where)
            for module, sides in sorted(factors.items())
        }
        source = Source(
            name=where,
            path=weights.absolute(),
            sha256=digest,
            config_sha256=None if config is None else _sha256(config_path),
            alpha=alpha if scalings.used_given_alpha else None,
        )
    label = default_name(path) if name is None else name
    facts = facts_of(scalings.config)
    return Adapter(modules, scalings.config, label, source, facts=facts)


def check_modules(modules: Mapping[str, LowRank], where: str) -> dict[str, LowRank]:
    """Return the modules of an adapter made in memory, checked as those of a file are.

    Args:
        modules: Module path to update.
        where: What to call the adapter in messages.

    Returns:
        The same modules, their factors detached from any graph.

    Raises:
        AdapterError: There are none, or one of them could not have been read from a file.
    """
    if not modules:
        raise AdapterError(f"adapter {where!r}: it has no modules. Give one that was trained.")
    checked = {}
    for name, update in modules.items():
        label = f"adapter {where!r}, module {name!r}"
        _check_shapes(update.lora_a, update.lora_b, label)
        checked[name] = replace(
            update, lora_a=update.lora_a.detach(), lora_b=update.lora_b.detach()
        )
        _check_values(checked[name], label)
    return checked


def default_name(path: str | os.PathLike[str]) -> str:
    """Return the label of an adapter that is given none: its folder's name or file's stem.

    A file called ``adapter_model`` takes the name of the folder that it is in. Links keep
    their own name. Nothing need be there.

    Args:
        path: Folder or file, as for `read_adapter`.

    Returns:
        A name without slashes.

    Raises:
        AdapterError: A folder on the way may not be read.
    """
    place = Path(path)
    with _reading(os.fspath(path)):
        if place.suffix in _SUFFIXES and not place.is_dir():
            if place.stem != "adapter_model":
                return place.stem
            place = place.parent
        return place.name if place.name not in ("", "..") else place.resolve().name


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or one_line(error)
        file = f" {os.fspath(error.filename)!r}" if error.filename else ""
        raise AdapterError(
            f"adapter {where!r}: cannot read{file}: {reason}. Check the path and its permissions."
        ) from error


def _locate(path: Path, where: str, allow_pickle: bool) -> Path:
    """Return the weights file of a folder, or the file itself."""
    if path.is_dir():
        weights = path / WEIGHTS_NAME
        if not weights.exists():
            weights = path / PICKLE_NAME
        if not weights.exists():
            raise AdapterError(f"adapter {where!r}: {_describe_missing(path)}")
    elif path.exists():
        weights = path
    else:
        raise AdapterError(
            f"adapter {where!r}: no such folder or file. Give the path of a PEFT adapter folder "
            "or a .safetensors file, or the name of an adapter on the Hub: "
            "user/name[@revision][:folder]."
        )
    if not weights.is_file():
        raise AdapterError(
            f"adapter {where!r}: {weights.name!r} is not a regular file. "
            f"Give a folder with {WEIGHTS_NAME}, or a .safetensors file."
        )
    if weights.suffix in _PICKLE_SUFFIXES:
        if not allow_pickle:
            raise AdapterError(
                f"adapter {where!r}: {weights.name!r} is a pickle. Save it as safetensors, "
                "or pass --allow-pickle, which reads tensors and runs no code."
            )
    elif weights.suffix not in _SUFFIXES:
        raise AdapterError(
            f"adapter {where!r}: got a file that is not .safetensors. "
            "Give a PEFT adapter folder or a .safetensors file."
        )
    return weights


def _describe_missing(folder: Path) -> str:
    nested = sorted(child.parent.name for child in folder.glob(f"*/{CONFIG_NAME}"))
    if nested:
        return f"no {WEIGHTS_NAME} in the folder. Did you mean its subfolder {nested[0]!r}?"
    return f"no {WEIGHTS_NAME} in the folder. Give the folder that PEFT's save_pretrained wrote."


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_config(path: Path, where: str) -> dict[str, Any]:
    """Return an ``adapter_config.json``, refused where it describes no plain LoRA.

    Args:
        path: The file.
        where: What to call the adapter in messages.

    Returns:
        Its keys, as they are.

    Raises:
        AdapterError: It cannot be merged, or is damaged.
    """
    config = _parse_object(path.read_bytes(), CONFIG_NAME, where)
    check_config(config, where)
    return config


def _parse_object(data: str | bytes, what: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(data.decode("utf-8") if isinstance(data, bytes) else data)
    except UnicodeDecodeError:
        raise AdapterError(
            f"adapter {where!r}: {what} is not UTF-8 text. Save it again with PEFT."
        ) from None
    except (ValueError, RecursionError) as error:
        raise AdapterError(
            f"adapter {where!r}: {what} is not JSON ({one_line(error)}). Save it again with PEFT."
        ) from None
    if not isinstance(value, dict):
        raise AdapterError(
            f"adapter {where!r}: {what} holds a {type(value).__name__}, expected an object. "
            "Save it again with PEFT."
        )
    return value


def _load(weights: Path, where: str) -> tuple[dict[str, torch.Tensor], dict[str, str], str]:
    """Return the tensors of a file, its metadata, and its SHA-256."""
    if weights.suffix in _PICKLE_SUFFIXES:
        return _load_pickle(weights, where), {}, _sha256(weights)
    try:
        with safe_open(weights, framework="pt") as checked, weights.open("rb") as file:
            # One mapping for both, which reads the disk once; private, so nothing is written.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            tensors = {
                key: _mapped(data, entry) if _fits(entry) else checked.get_tensor(key)
                for key, entry in _header(data).items()
            }
            return tensors, checked.metadata() or {}, hashlib.sha256(data).hexdigest()
    except (SafetensorError, ValueError) as error:
        with weights.open("rb") as file:
            pointer = file.read(len(_LFS_POINTER)) == _LFS_POINTER
        reason = "it is a Git LFS pointer" if pointer else one_line(error)
        remedy = "Run `git lfs pull`" if pointer else "Download or save it again"
        raise AdapterError(
            f"adapter {where!r}: {weights.name!r} is not a complete safetensors file: "
            f"{reason}. {remedy}."
        ) from error


def _header(data: mmap.mmap) -> dict[str, dict[str, Any]]:
    """Return the entries of a safetensors file's header, their offsets from the file's start."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries: dict[str, dict[str, Any]] = json.loads(data[8:start])
    entries.pop("__metadata__", None)
    for entry in entries.values():
        entry["data_offsets"] = [start + offset for offset in entry["data_offsets"]]
    return entries


def _fits(entry: Mapping[str, Any]) -> bool:
    """Tell whether a tensor of an adapter can lie where it is in the file."""
    start, stop = entry["data_offsets"]
    dtype = _BY_NAME.get(entry["dtype"])
    return dtype is not None and start < stop and start % dtype.itemsize == 0


def _mapped(data: mmap.mmap, entry: Mapping[str, Any]) -> torch.Tensor:
    start, stop = entry["data_offsets"]
    dtype = _BY_NAME[entry["dtype"]]
    count = (stop - start) // dtype.itemsize
    flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start)
    return flat.view(entry["shape"])


def _load_pickle(weights: Path, where: str) -> dict[str, torch.Tensor]:
    try:
        value = torch.load(weights, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise AdapterError(
            f"adapter {where!r}: {weights.name!r} cannot be loaded as plain tensors "
            f"({type(error).__name__}). Save the adapter as safetensors."
        ) from error
    if not isinstance(value, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in value.items()
    ):
        raise AdapterError(
            f"adapter {where!r}: {weights.name!r} holds something other than named tensors. "
            "Save the adapter as safetensors."
        )
    return {key: tensor.detach() for key, tensor in value.items()}


def _sort_tensors(
    tensors: Mapping[str, torch.Tensor], where: str
) -> tuple[dict[str, dict[str, tuple[str, torch.Tensor]]], dict[str, torch.Tensor]]:
    """Return module -> side -> (key, factor), and module -> alpha; refuse all else."""
    factors: dict[str, dict[str, tuple[str, torch.Tensor]]] = {}
    alphas: dict[str, torch.Tensor] = {}
    adapters = set()
    others = []
    for key, tensor in tensors.items():
        plain = key.removeprefix(PREFIX)
        if found := _FACTOR.fullmatch(plain):
            sides = factors.setdefault(found["module"], {})
            if found["side"] in sides:
                raise AdapterError(
                    f"adapter {where!r}: tensors {sides[found['side']][0]!r} and {key!r} are both "
                    f"lora_{found['side']} of one module. Save one adapter per file."
                )
            sides[found["side"]] = (key, tensor)
            adapters.add(found["adapter"])
        elif found := _ALPHA.fullmatch(plain):
            alphas[found["module"]] = tensor
        else:
            others.append(key)
    others += [f"{module}.alpha" for module in sorted(alphas.keys() - factors.keys())]
    if others:
        raise AdapterError(f"adapter {where!r}: {_describe_others(others)}")
    if not factors:
        raise AdapterError(
            f"adapter {where!r}: no LoRA tensors in the file. Give a file with lora_A and lora_B."
        )
    if len(adapters) > 1:
        listed = ", ".join(sorted(map(repr, adapters)))
        raise AdapterError(
            f"adapter {where!r}: the file holds several adapters ({listed}). "
            "Save one adapter per file."
        )
    return factors, alphas


def _describe_others(keys: Sequence[str]) -> str:
    """Return what tensors that are not LoRA factors are, by the one that tells most."""
    more = f" (and {len(keys) - 1} more)" if len(keys) > 1 else ""
    for pattern, what, remedy in _FOREIGN:
        for key in keys:
            if re.search(pattern, key):
                return f"tensor {key!r}{more} belongs to {what}. {remedy}."
    return (
        f"tensor {keys[0]!r}{more} is not a LoRA factor that gam-merge knows. "
        "Leave the adapter out, or remove the tensor if it has no effect."
    )


def _low_rank(
    module: str,
    sides: Mapping[str, tuple[str, torch.Tensor]],
    scalings: _Scalings,
    where: str,
) -> LowRank:
    label = f"adapter {where!r}, module {module!r}"
    if "base_layer" in module.split("."):
        raise AdapterError(
            f"{label}: LoRA on several parameters of one module (target_parameters) is not "
            "supported yet. Leave this adapter out."
        )
    for side in "AB":
        if side not in sides:
            other = "lora_B" if side == "A" else "lora_A"
            raise AdapterError(f"{label}: {other} without lora_{side}. Save the adapter again.")
    lora_a, lora_b = sides["A"][1].detach(), sides["B"][1].detach()
    _check_shapes(lora_a, lora_b, label)
    update = LowRank(lora_a, lora_b, scalings.resolve(module, lora_a.shape[0]))
    _check_values(update, label)
    return update


def _check_shapes(lora_a: torch.Tensor, lora_b: torch.Tensor, label: str) -> None:
    _check_factor("lora_A", lora_a, label)
    _check_factor("lora_B", lora_b, label)
    if lora_a.shape[0] != lora_b.shape[1]:
        raise AdapterError(
            f"{label}: lora_A is {list(lora_a.shape)} but lora_B is {list(lora_b.shape)}, so "
            f"their ranks {lora_a.shape[0]} and {lora_b.shape[1]} differ. Save the adapter again."
        )


def _check_values(update: LowRank, label: str) -> None:
    for side, tensor in (("lora_A", update.lora_a), ("lora_B", update.lora_b)):
        if not _all_finite(tensor):
            raise AdapterError(
                f"{label}: {side} holds NaN or infinity, so the training diverged or the file "
                "is damaged. Use an earlier checkpoint."
            )
        if tensor.dtype == torch.float64 and float(tensor.abs().max()) > _LARGEST:
            raise AdapterError(
                f"{label}: {side} holds values beyond the range of float32. Scale them down."
            )
    if not abs(update.scale) <= _LARGEST:
        raise AdapterError(
            f"{label}: the scaling is {update.scale!r}, expected a number in the range of "
            "float32. Correct lora_alpha."
        )


def _check_factor(side: str, tensor: torch.Tensor, label: str) -> None:
    shape = list(tensor.shape)
    if tensor.ndim > 2:
        raise AdapterError(
            f"{label}: {side} is {shape}, so it belongs to a convolution, which is not supported "
            "yet. Leave convolutions out of target_modules."
        )
    if tensor.ndim < 2 or 0 in shape:
        raise AdapterError(
            f"{label}: {side} is {shape}, expected a matrix. Save it again: under DeepSpeed or "
            "FSDP, gather the parameters first."
        )
    if tensor.dtype not in DTYPES:
        dtype = str(tensor.dtype).removeprefix("torch.")
        raise AdapterError(
            f"{label}: {side} has dtype {dtype}, expected float32, bfloat16, float16 or float64. "
            "Save the adapter in one of them."
        )


def _all_finite(tensor: torch.Tensor) -> bool:
    """Tell whether all values are finite, reading them once (ten times isfinite's speed).

    NaN and infinity survive a sum. Finite values may overflow it, hence the second look.
    """
    if math.isfinite(float(tensor.sum())):
        return True
    return all(math.isfinite(float(bound)) for bound in torch.aminmax(tensor))


class _Scalings:
    """Where the scaling of each module comes from, in the order of `read_adapter`.

    Attributes:
        config: What became of ``adapter_config.json``; for a bare file, what its metadata
            or the caller states for the whole adapter.
        used_given_alpha: Whether the caller's alpha decided any module, so far.
    """

    def __init__(
        self,
        config: Mapping[str, Any] | None,
        metadata: Mapping[str, str],
        alphas: Mapping[str, torch.Tensor],
        alpha: float | None,
        where: str,
    ) -> None:
        self._where = where
        self._alphas = {module: self._number(value, module) for module, value in alphas.items()}
        self._has_config = config is not None
        # Component of a pipeline ("" for the whole) -> config.
        components = {"": config} if config is not None else _metadata_configs(metadata, where)
        whole = components.get("", {})
        self._given = alpha is not None and "lora_alpha" not in whole
        if self._given:
            components[""] = {**whole, "lora_alpha": alpha}
        self._components = components
        self.config: Mapping[str, Any] = components.get("", {})
        self.used_given_alpha = False

    def resolve(self, module: str, rank: int) -> float:
        """Return the scaling of one module, a finite float."""
        tensor_scale = self._alphas[module] / rank if module in self._alphas else None
        if tensor_scale is not None and not self._has_config:
            return tensor_scale
        stated = self._from_config(module, rank)
        if stated is None:
            raise AdapterError(
                f"adapter {self._where!r}, module {module!r}: nothing states its scaling: no "
                f"{CONFIG_NAME} beside the file, no alpha tensor, none in the metadata. "
                f"Put the {CONFIG_NAME} there, or pass --alpha."
            )
        if tensor_scale is not None and not math.isclose(tensor_scale, stated, rel_tol=1e-6):
            raise AdapterError(
                f"adapter {self._where!r}, module {module!r}: the alpha tensor gives a scaling of "
                f"{tensor_scale:g} but {CONFIG_NAME} gives {stated:g}. Remove the wrong one."
            )
        return stated

    def _from_config(self, module: str, rank: int) -> float | None:
        matching = (p for p in self._components if not p or module.startswith(f"{p}."))
        prefix = max(matching, key=len, default=None)
        if prefix is None:
            return None
        if not prefix and self._given:
            self.used_given_alpha = True
        inner = module.removeprefix(f"{prefix}.") if prefix else module
        return resolve_scaling(self._components[prefix], inner, rank, self._where)

    def _number(self, value: torch.Tensor, module: str) -> float:
        number = float(value) if value.numel() == 1 else math.nan
        if not math.isfinite(number):
            raise AdapterError(
                f"adapter {self._where!r}, module {module!r}: its alpha tensor holds no finite "
                "number. Save the adapter again."
            )
        return number


def _metadata_configs(metadata: Mapping[str, str], where: str) -> dict[str, Mapping[str, Any]]:
    """Return the configs in a file's header by component; empty if it states no scaling."""
    packed = metadata.get("lora_adapter_metadata")
    if packed is not None:
        configs: dict[str, dict[str, Any]] = {}
        for key, value in _parse_object(packed, "lora_adapter_metadata", where).items():
            component, _, name = key.rpartition(".")
            configs.setdefault(component, {})[name] = value
        for config in configs.values():
            check_config(config, where)
        return dict(configs)
    for key in ("lora_alpha", "alpha", "ss_network_alpha"):
        if key in metadata:
            try:
                number = float(metadata[key])
            except ValueError:
                number = math.nan
            if not math.isfinite(number):
                raise AdapterError(
                    f"adapter {where!r}: {key}={metadata[key]!r} in the file's metadata, expected "
                    f"a number. Put an {CONFIG_NAME} beside the file."
                )
            return {"": {"lora_alpha": number}}
    return {}
