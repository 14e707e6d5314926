"""The data: a LoRA adapter is a set of low-rank updates with names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import os
    from pathlib import Path

    from gam.report.types import MergeReport


@dataclass(frozen=True)
class Layout:
    """How the matrices of an update lie in the tensors that a format writes.

    Two updates of one module can be merged only where their layouts are equal.

    Attributes:
        name: What a format knows it by; "matrix" needs no restoring.
        shape: Numbers that restoring needs, such as those of a kernel.
    """

    name: str = "matrix"
    shape: tuple[int, ...] = ()


MATRIX = Layout()


@dataclass(frozen=True, eq=False)
class LowRank:
    """One adapted weight: the update ``scale * lora_b @ lora_a``.

    Compares by identity, since tensors have no single truth value.

    Attributes:
        lora_a: [r, in] float tensor, any float dtype; may be a view of a file on disk.
        lora_b: [out, r] float tensor.
        scale: The LoRA scaling: alpha / r, or alpha / sqrt(r) under rsLoRA.
        layout: How the two lie in a file.
    """

    lora_a: torch.Tensor
    lora_b: torch.Tensor
    scale: float = 1.0
    layout: Layout = MATRIX

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
        return replace(self, lora_b=scaled, scale=1.0)

    def padded(self, rank: int) -> LowRank:
        """Return the same update at a larger rank, filled with zeros."""
        extra = rank - self.rank
        pad = torch.nn.functional.pad
        return replace(
            self, lora_a=pad(self.lora_a, (0, 0, 0, extra)), lora_b=pad(self.lora_b, (0, extra))
        )

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


@dataclass(frozen=True)
class Facts:
    """What a format says of an adapter that decides what it may be merged with.

    Attributes:
        base: Name of the base model; None where nothing states it.
        revision: Of the base model.
        task: What the adapter is for, such as "CAUSAL_LM".
    """

    base: str | None = None
    revision: str | None = None
    task: str | None = None


@dataclass(frozen=True)
class Description:
    """What records say of an adapter that goes into something; None where it is not known.

    Attributes:
        name: Its label.
        source: Where it is from; a name on the Hub has its commit in it.
        sha256: Of the weights file.
        config_sha256: Of its config.
        commit: On the Hub.
        base_model: Name of the base model.
        modules: How many.
        ranks: Those that occur, sorted.
    """

    name: str
    source: str | None
    sha256: str | None
    config_sha256: str | None
    commit: str | None
    base_model: str | None
    modules: int
    ranks: Sequence[int]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A LoRA adapter in memory; merging adapters gives another one.

    Compares by identity.

    Attributes:
        modules: Module path in the base model (such as
            ``model.layers.0.self_attn.q_proj``) to its update.
        config: The keys of ``adapter_config.json``, which only its format reads.
        name: Short label, unique in a merge; used in reports and by ``reference=``.
        source: The file it was read from; None for an adapter made in memory.
        report: What the merge did; None for an adapter that was read.
        inputs: What a merged adapter was made from.
    """

    modules: Mapping[str, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)
    name: str = "adapter"
    source: Source | None = None
    report: MergeReport | None = None
    inputs: Sequence[Source] = ()

    @property
    def facts(self) -> Facts:
        """What its config says that decides what it may be merged with."""
        from gam.formats import PEFT

        return PEFT.facts(self.config)

    def describe(self) -> Description:
        """Return what records say of it."""
        source = self.source
        return Description(
            name=self.name,
            source=None if source is None else source.name,
            sha256=None if source is None else source.sha256,
            config_sha256=None if source is None else source.config_sha256,
            commit=None if source is None else source.commit,
            base_model=self.facts.base,
            modules=len(self.modules),
            ranks=sorted({module.rank for module in self.modules.values()}),
        )

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the tensors as PEFT names them, for a config with alpha = r everywhere.

        Returns:
            For each module ``lora_A.weight`` [r, in] and ``lora_B.weight`` [out, r], sorted by
            module, dtypes as they are. A scaling other than 1 is multiplied into ``lora_B``;
            all else shares memory with the adapter.

        Raises:
            OutputError: A scaled factor does not fit its dtype.
        """
        from gam.formats import PEFT

        return PEFT.tensors(self.modules, self.name)

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
        from gam.hub.push import Target
        from gam.save import push_adapter

        target = Target(repo, private, revision, create_pr, commit_message, allow_foreign_repo)
        return push_adapter(self, target).url

    def __repr__(self) -> str:
        """One line: name, modules, ranks, dtypes and base model; never the values."""
        updates = self.modules.values()
        ranks = sorted({update.rank for update in updates}) or [0]
        span = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]}-{ranks[-1]}"
        dtype = _dtype_name(*(t.dtype for u in updates for t in (u.lora_a, u.lora_b)))
        base = self.facts.base
        suffix = f", base {base!r}" if base else ""
        return f"Adapter({self.name!r}, {len(self.modules)} modules, {span}, {dtype}{suffix})"

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        from gam.report.html import adapter_html

        return adapter_html(self)


def _dtype_name(*dtypes: torch.dtype) -> str:
    return "/".join(sorted({str(dtype).removeprefix("torch.") for dtype in dtypes})) or "empty"
