"""One merge from end to end: recipe, plan, execution, folder, Hub.

The commands and `gam.merge_adapters` both call `run_merge`; nothing else puts these together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

from gam.adapter import Adapter
from gam.errors import OptionError
from gam.formats import PEFT
from gam.hub.push import Pushed, Target, check_target, push_folder
from gam.load import local_paths, settle_all
from gam.merging.execute import Progress, execute
from gam.merging.options import documented
from gam.merging.plan import Given, Plan, plan_merge
from gam.recipes.recipe import Recipe, read_recipe
from gam.report.record import Record
from gam.save import check_output

_Adapters = Sequence[Given] | Mapping[str, Given]


@dataclass(frozen=True)
class Outcome:
    """What became of a merge.

    Attributes:
        plan: What was planned.
        merged: The result; None after a dry run.
        folder: Where it is, as an absolute path; None where nothing was written.
        pushed: Where it is on the Hub; None where it was not pushed.
    """

    plan: Plan
    merged: Adapter | None = None
    folder: Path | None = None
    pushed: Pushed | None = None

    def as_dict(self, output: str | PathLike[str] | None = None) -> dict[str, Any]:
        """Return it in plain Python types, as `--json` prints it; ``output`` is as given."""
        where = None if output is None else str(Path(output).resolve())
        if self.merged is None or self.folder is None:
            return {"output": where, **self.plan.as_dict()}
        pushed = {} if self.pushed is None else {"pushed": asdict(self.pushed)}
        record = Record.of(self.merged, self.folder)
        return {"output": str(self.folder), **pushed, **record.values}


@documented
def merge_adapters(
    adapters: _Adapters | None = None,
    *,
    config: str | PathLike[str] | None = None,
    allow_changes: bool = False,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool | Progress = False,
    **options: Any,
) -> Adapter:
    """Merge LoRA adapters into one.

    Args:
        adapters: Paths of adapter folders or `.safetensors` files, names on the Hub
            (``user/name[@revision][:folder]``), or adapters in memory; in a mapping, by the
            labels that they are to have. May be left out where ``config`` names them.
        config: A recipe, or the `gam_merge.json` of an earlier merge: see `gam.recipes.recipe`.
            What is given here wins over what it says.
        allow_changes: Go on where the adapters, or how gam-merge computes, are not those that
            ``config`` has recorded.
        output: Folder to write; None only returns the result.
        overwrite: Replace ``output`` where it exists.
        progress: True shows a bar, in a terminal or a notebook. A function is called with the
            number of modules done and the number in all, from the threads that work, one at
            a time.
        **options: Those of a merge and the parameters of its method, listed at the end; the
            names are those of the flags.

    Returns:
        The merged adapter, its factors in the output dtype and with scaling 1; its
        ``report`` says what the merge did.

    Raises:
        GamError: An input, an option or the output is refused; nothing has been written.

    Example:
        >>> merged = merge_adapters(["math-lora", "code-lora"], weights=[0.6, 0.4])
        ... # doctest: +SKIP
    """
    with _watched(progress) as watch:
        outcome = run_merge(
            adapters,
            options,
            config=config,
            allow_changes=allow_changes,
            output=output,
            overwrite=overwrite,
            progress=watch,
        )
    assert outcome.merged is not None
    return outcome.merged


def run_merge(
    adapters: _Adapters | None,
    options: Mapping[str, Any],
    *,
    config: str | PathLike[str] | None = None,
    allow_changes: bool = False,
    output: str | PathLike[str] | None = None,
    overwrite: bool = False,
    target: Target | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
    saved: Callable[[Adapter, Path], None] | None = None,
) -> Outcome:
    """Do a merge as `merge_adapters` does, and push its folder.

    Everything that can be refused is looked at before anything is computed.

    Args:
        adapters: As for `merge_adapters`.
        options: Those of a merge, by name.
        config: As for `merge_adapters`.
        allow_changes: As for `merge_adapters`.
        output: As for `merge_adapters`; must be there for ``target``.
        overwrite: As for `merge_adapters`.
        target: Where to push the folder on the Hub.
        dry_run: Only plan.
        progress: As for `execute`.
        saved: Called with the result and its folder before it is pushed.

    Returns:
        What became of it.

    Raises:
        GamError: Something is refused; or the folder is complete and the push failed.
    """
    recipe = Recipe() if config is None else read_recipe(config)
    given = None if adapters is None else settle_all(adapters)
    inputs = settle_all(recipe.inputs(given))
    if output is not None:
        check_output(output, overwrite, local_paths(inputs))
    if target is not None:
        check_target(target)
    plan = _planned(recipe, inputs, options, allow_changes)
    if dry_run:
        return Outcome(plan)
    merged = _described(execute(plan, progress), plan)
    if output is None:
        return Outcome(plan, merged)
    folder = merged.save(output, overwrite=overwrite)
    if saved is not None:
        saved(merged, folder)
    pushed = None if target is None else push_folder(output, target)
    return Outcome(plan, merged, folder, pushed)


def _planned(
    recipe: Recipe, inputs: _Adapters, given: Mapping[str, Any], allow_changes: bool
) -> Plan:
    """Plan a merge by a recipe and what is given besides, which wins."""
    if "expect" in given:
        raise OptionError("expect: got a value, but this is no option of a merge. Leave it out.")
    with recipe.located(given):
        options = recipe.options(given)
        if allow_changes:
            return plan_merge(inputs, **options)
        recipe.check_programs(options)
        return plan_merge(inputs, expect=recipe.expect, **options)


def _described(merged: Adapter, plan: Plan) -> Adapter:
    """Return the result of a merge with the config of its format."""
    ranks = {name: module.rank for name, module in merged.modules.items()}
    config = PEFT.config(ranks, [adapter.config for adapter in plan.adapters])
    return replace(merged, config=config)


@contextlib.contextmanager
def _watched(progress: bool | Progress) -> Iterator[Progress | None]:
    """Give what is called as a merge goes on: the caller's function, or one that moves a bar."""
    if callable(progress) or progress is False:
        yield progress or None
        return
    if progress is not True:
        raise OptionError(f"progress: got {progress!r}, expected True, False or a function.")
    from tqdm.auto import tqdm

    with tqdm(desc="Merging", unit="module") as bar:

        def watch(done: int, count: int) -> None:
            bar.total = count
            bar.update(done - bar.n)

        yield watch
