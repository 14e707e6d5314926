"""The data: a LoRA adapter is a set of low-rank updates with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from gam.errors import OutputError

if TYPE_CHECKING:
    import os
    from pathlib import Path

PREFIX = "base_model.model."
"""What PEFT puts before a module's path in the names of an adapter's tensors."""


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapted weight: the update ``scale * lora_b @ lora_a``.

    Compares by identity, since tensors have no single truth value.

    Attributes:
        lora_a: [r, in] float tensor, any float dtype; may be a view of a file on disk.
        lora_b: [out, r] float tensor.
        scale: The LoRA scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Number of rows of ``lora_a``."""
        return self.lora_a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in), the shape of the adapted weight."""
        return self.lora_b.shape[0], self.lora_a.shape[1]

    def delta(self) -> torch.Tensor:
        """Return the dense update, [out, in] float32 (float64 for float64 factors)."""
        dtype = torch.promote_types(self.lora_a.dtype, torch.float32)
        return (self.lora_b.to(dtype) @ self.lora_a.to(dtype)) * self.scale

    def folded(self) -> LowRank:
        """Return the same update with scale 1, the scaling multiplied into ``lora_b``.

        The product is taken in float32 (float64 for float64 factors) and rounded once to
        the dtype of ``lora_b``. Factors that need no change are shared, not copied.
        """
        if self.scale == 1.0:
            return self
        dtype = torch.promote_types(self.lora_b.dtype, torch.float32)
        scaled = (self.lora_b.to(dtype) * self.scale).to(self.lora_b.dtype)
        return LowRank(self.lora_a, scaled)

    def __repr__(self) -> str:
        """Shapes and dtype; never the values."""
        out, width = self.shape
        dtype = _dtype_name(self.lora_a.dtype, self.lora_b.dtype)
        return f"LowRank({out}x{width}, rank {self.rank}, {dtype}, scale {self.scale:g})"


@dataclass(frozen=True)
class Source:
    """Where an adapter came from.

    Attributes:
        name: A path as it was given; a name on the Hub with its commit in place of a branch.
        path: The weights file on disk.
        sha256: Hex digest of the weights file.
        config_sha256: Hex digest of ``adapter_config.json``; None for a bare file.
        alpha: The alpha that the caller gave, where the file states none and it was used;
            None where the file and its config say it all.
        commit: The commit on the Hub, 40 hex digits; None for an adapter that is not from there.
    """

    name: str
    path: Path
    sha256: str
    config_sha256: str | None = None
    alpha: float | None = None
    commit: str | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory; merging adapters gives another one.

    Compares by identity.

    Attributes:
        modules: Module path in the base model (such as
            ``model.layers.0.self_attn.q_proj``) to its update.
        config: The keys of ``adapter_config.json``.
        name: Short label, unique in a merge; used in reports and by ``reference=``.
        source: The file it was read from; None for an adapter made in memory.
        report: What the merge did; None for an adapter that was read.
        inputs: What a merged adapter was made from.
    """

    modules: Mapping[str, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"
    source: Source | None = None
    report: Any = None
    inputs: Sequence[Source] = ()

    def describe(self) -> dict[str, Any]:
        """Return what records say of an adapter that goes into something.

        Returns:
            name, source (a name on the Hub has its commit in it), sha256, config_sha256,
            commit (on the Hub), base_model, modules (how many) and ranks (those that occur,
            sorted). What is not known is None.
        """
        source = self.source
        return {
            "name": self.name,
            "source": source and source.name,
            "sha256": source and source.sha256,
            "config_sha256": source and source.config_sha256,
            "commit": source and source.commit,
            "base_model": self.config.get("base_model_name_or_path"),
            "modules": len(self.modules),
            "ranks": sorted({module.rank for module in self.modules.values()}),
        }

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors as PEFT names them, for a config with alpha = r everywhere.

        Returns:
            ``base_model.model.<module>.lora_A.weight`` [r, in] and ``.lora_B.weight``
            [out, r], modules sorted by name, dtypes as they are. A scaling other than 1 is
            multiplied into ``lora_B``; all else shares memory with the adapter.

        Raises:
            OutputError: A scaled factor does not fit its dtype.
        """
        tensors = {}
        for name, module in sorted(self.modules.items()):
            folded = module.folded()
            if folded is not module and not bool(torch.isfinite(folded.lora_b).all()):
                raise OutputError(
                    f"adapter {self.name!r}, module {name!r}: scaling {module.scale:g} takes "
                    f"lora_B out of the range of {_dtype_name(module.lora_b.dtype)}. "
                    "Write it in float32 or bfloat16."
                )
            tensors[f"{PREFIX}{name}.lora_A.weight"] = folded.lora_a
            tensors[f"{PREFIX}{name}.lora_B.weight"] = folded.lora_b
        return tensors

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> Path:
        """Write the adapter as a folder that PEFT and vLLM load.

        Args:
            path: The folder to write; its parents are created.
            overwrite: Replace an adapter folder that is already there.

        Returns:
            The folder, as an absolute path. It is complete or absent.

        Raises:
            OutputError: The folder exists, is an input of this adapter, or cannot be written.
        """
        from gam.save import write_adapter

        return write_adapter(self, path, overwrite=overwrite)

    def push_to_hub(
        self,
        repo: str,
        *,
        private: bool = False,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        allow_foreign_repo: bool = False,
    ) -> str:
        """Push the result of a merge to the Hub, in one commit; it need not be saved.

        Args:
            repo: ``user/name``; made if it is not there.
            private: Make a new repository private.
            revision: Branch, made if it is not there; None for the default branch.
            create_pr: Open a pull request in place of changing the branch.
            commit_message: None for one that names the method.
            allow_foreign_repo: Also push to a repository that holds anything but a merge.

        Returns:
            The page of the repository, its branch, or the pull request.

        Raises:
            OptionError: The name is no name of a repository, or options do not go together.
            OutputError: This is not the result of a merge, or the push was refused or failed.
        """
        from gam.hub.push import Target, push_adapter

        target = Target(repo, private, revision, create_pr, commit_message, allow_foreign_repo)
        return push_adapter(self, target).url

    def __repr__(self) -> str:
        """One line: name, modules, ranks, dtypes and base model; never the values."""
        updates = self.modules.values()
        ranks = sorted({update.rank for update in updates}) or [0]
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        dtype = _dtype_name(*(t.dtype for u in updates for t in (u.lora_a, u.lora_b)))
        base = self.config.get("base_model_name_or_path")
        suffix = f", base {base!r}" if base else ""
        return f"Adapter({self.name!r}, {len(self.modules)} modules, {span}, {dtype}{suffix})"


def _dtype_name(*dtypes: torch.dtype) -> str:
    return "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})) or "empty"
