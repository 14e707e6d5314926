"""The command line; the only place that prints or exits. Imports torch inside commands only."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gam.commands.terminal import (
    Command,
    Option,
    byte_size,
    counted,
    number,
    percent,
    settle_client,
    shown,
    span,
    table,
)
from gam.errors import OptionError, PluginError
from gam.strategies import STRATEGIES, Param, get, names, parameters
from gam.version import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.hub.push import Pushed
    from gam.merging.plan import Plan

# Parameters of methods that have a flag of their own; the others go through -p.
_PARAMETER_FLAGS = ("reference", "density", "seed")

# Flags that say how to push, and all that may be given to push without a merge.
_HUB_FLAGS = ("private", "revision", "create_pr", "commit_message", "allow_foreign_repo")
_PUSHING = {"adapters", "output", "repo", "as_json", "quiet", *_HUB_FLAGS}

_Function = TypeVar("_Function", bound=Callable[..., Any])

_EPILOG = """\b
Examples:
  gam-merge math-lora code-lora -o merged
  gam-merge math-lora code-lora -o merged --weights 0.7,0.3 --rank 32
  gam-merge math-lora code-lora -o merged --method ties --density 0.3
  gam-merge math-lora user/code-lora@v2 -o merged
  gam-merge math-lora code-lora --dry-run
  gam-merge --config merged/gam_merge.json -o again
  gam-merge math-lora code-lora -o merged --push-to-hub user/merged --private
  gam-merge -o merged --push-to-hub user/merged

An ADAPTER is a folder that PEFT saved, a .safetensors file, or an adapter on the Hub:
user/name[@revision][:folder], with hf:// before it where a local path has that name. The
result is a folder that PEFT and vLLM load like any other adapter.
"""


def _numbers(ctx: click.Context, param: click.Parameter, value: str | None) -> list[float] | None:
    try:
        return None if value is None else [float(part) for part in value.split(",")]
    except ValueError:
        raise click.BadParameter(
            f"{value!r} is not a list of numbers such as 0.5,0.3,0.2.", ctx, param
        ) from None


def _assignments(
    ctx: click.Context, param: click.Parameter, values: Sequence[str]
) -> list[tuple[str, str]]:
    pairs = []
    for value in values:
        name, sign, text = value.partition("=")
        if not name or not sign:
            raise click.BadParameter(f"{value!r} is not of the form NAME=VALUE.", ctx, param)
        pairs.append((name.replace("-", "_"), text))
    return pairs


def _list_methods(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if not wanted or ctx.resilient_parsing:
        return
    formatter = ctx.make_formatter()
    for name in names():
        with formatter.section(name):
            try:
                strategy = get(name)
            except PluginError as error:
                formatter.write_text(f"Broken: {error}")
                continue
            formatter.write_text(strategy.summary)
            if strategy.package:
                formatter.write_text(f"From {strategy.package}")
            if strategy.paper:
                formatter.write_text(f"Paper: {strategy.paper}")
            if not strategy.normalize or strategy.rank != "max":
                normalize = "" if strategy.normalize else " --no-normalize"
                rank = "" if strategy.rank == "max" else f" --rank {strategy.rank}"
                formatter.write_text(f"Unless you say otherwise:{normalize}{rank}")
            if strategy.params:
                formatter.write_dl([_parameter_help(param) for param in strategy.params])
    click.echo(formatter.getvalue().strip("\n"))
    ctx.exit()


def _parameter_help(param: Param) -> tuple[str, str]:
    own = param.name in _PARAMETER_FLAGS
    flag = f"--{param.name} {param.values}" if own else f"-p {param.name}={param.values}"
    return flag, param.help + _default(param)


def _default(param: Param) -> str:
    return "" if param.default is None else f"  [default: {str(param.default).lower()}]"


def _having(field: str, value: Any) -> str:
    """Return the names of the methods that differ from the others in a default."""
    return ", ".join(name for name, s in STRATEGIES.items() if getattr(s, field) == value)


def _flag(name: str) -> Callable[[_Function], _Function]:
    """Return the option of a parameter; its help says which methods have it."""
    found = [(param, owners) for param, owners in parameters() if param.name == name]
    texts = (f"{', '.join(owners)}: {param.help}{_default(param)}" for param, owners in found)
    return _mixing(f"--{name}", metavar=found[0][0].values, help=" ".join(texts))


_output = partial(click.option, cls=Option, heading="Output")
_mixing = partial(click.option, cls=Option, heading="How to merge")
_size = partial(click.option, cls=Option, heading="Size and precision of the result")
_input = partial(click.option, cls=Option, heading="What to accept")
_hub = partial(click.option, cls=Option, heading="The Hub")
_show = partial(click.option, cls=Option, heading="What to show")


@click.command(
    cls=Command,
    epilog=_EPILOG,
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, type=click.Path())
@_output("-o", "--output", metavar="OUT", type=click.Path(), help="Folder to write.")
@_output("--overwrite", is_flag=True, help="Replace the adapter that is in OUT.")
@_output("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
@_mixing(
    "--config",
    metavar="FILE",
    type=click.Path(),
    help="Recipe with adapters and options by name, in YAML or JSON, or the gam_merge.json of an "
    "earlier merge; what is given here wins.",
)
@_mixing(
    "--method",
    metavar="NAME",
    default="gam",
    help=f"Merging method: {', '.join(STRATEGIES)}, or one that an installed package brings; "
    "see --list-methods.",
)
@_mixing(
    "--weights",
    metavar="W,W,...",
    callback=_numbers,
    help="One number for each adapter; 0 leaves one out, negative ones subtract.  [default: equal]",
)
@_mixing(
    "--normalize/--no-normalize",
    default=None,
    help="Divide the weights by the sum of their absolute values.  [default: --normalize; "
    f"--no-normalize for {_having('normalize', False)}]",
)
@_mixing("--scale", metavar="X", type=float, default=1.0, help="Factor on the merged update.")
@_mixing(
    "--missing",
    type=click.Choice(["zero", "renormalize"]),
    default="zero",
    help="Count a module that an adapter lacks as a zero update, or share its weight out "
    "among the adapters that have it.",
)
@_mixing(
    "--calibrate",
    type=click.Choice(["none", "pico"]),
    default="none",
    help="A step before the method: pico makes output directions that many adapters use "
    "shorter, and the result as large as its inputs on average.",
)
@_flag("reference")
@_flag("density")
@_flag("seed")
@_mixing(
    "-p",
    "assigned",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_assignments,
    help="Any other parameter of the method; may be given more than once.",
)
@_size(
    "--rank",
    metavar="N|max|sum|energy=X",
    help="Rank of the result: a number, the largest or the sum of the input ranks, or the "
    "smallest that keeps the share X of the energy.  [default: max; sum for "
    f"{_having('rank', 'sum')}]",
)
@_size("--uniform-rank", is_flag=True, help="Pad all modules with zeros to one rank.")
@_size(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Number format of the result; auto is the widest of the inputs.",
)
@_mixing(
    "--device",
    metavar="auto|cpu|cuda[:N]",
    default="auto",
    help="Device to compute on; auto is the CPU for adapters from files.",
)
@_input(
    "--alpha",
    metavar="X",
    type=float,
    help="LoRA alpha for .safetensors files that do not state one.",
)
@_input("--allow-base-mismatch", is_flag=True, help="Merge adapters of different base models.")
@_input(
    "--allow-changes",
    is_flag=True,
    help="Merge what is there now where it is not what the gam_merge.json of --config recorded.",
)
@_input("--allow-pickle", is_flag=True, help="Read .bin files (tensors only; no code is run).")
@_hub(
    "--push-to-hub",
    "repo",
    metavar="USER/NAME",
    help="Push OUT to this repository on the Hub; without an ADAPTER, the merge that is in OUT.",
)
@_hub("--private", is_flag=True, help="Make a new repository private.")
@_hub("--revision", metavar="BRANCH", help="Push to this branch; it is made if it is not there.")
@_hub("--create-pr", is_flag=True, help="Open a pull request in place of changing the branch.")
@_hub(
    "--commit-message",
    metavar="TEXT",
    help="What the commit is called.  [default: what was merged and how]",
)
@_hub(
    "--allow-foreign-repo",
    is_flag=True,
    help="Also push to a repository that holds anything but the result of a merge.",
)
@_show("--json", "as_json", is_flag=True, help="Print one JSON object in place of text.")
@_show("--quiet", is_flag=True, help="Print only warnings and errors.")
@_show(
    "--list-methods",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_list_methods,
    help="Show the merging methods with their parameters, and exit.",
)
@click.version_option(
    __version__,
    message="gam-merge %(version)s",
    help="Show the version and exit.",
)
@click.pass_context
def main(
    ctx: click.Context,
    /,
    adapters: tuple[str, ...],
    output: str | None,
    overwrite: bool,
    dry_run: bool,
    config: str | None,
    allow_changes: bool,
    assigned: list[tuple[str, str]],
    repo: str | None,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge LoRA adapters of one base model into a single LoRA adapter."""
    hub = {name: options.pop(name) for name in _HUB_FLAGS}
    wanted = [name for name in _HUB_FLAGS if _is_given(ctx, name)]
    if wanted and repo is None:
        flag = f"--{wanted[0].replace('_', '-')}"
        raise click.UsageError(f"{flag}: this is for pushing; give --push-to-hub too.", ctx)
    others = [name for name in ctx.params.keys() - _PUSHING if _is_given(ctx, name)]
    merging = bool(adapters) or config is not None
    if not merging and (repo is None or others):
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    if output is None and not (dry_run and merging):
        raise click.UsageError("Missing option '-o' / '--output' (or --dry-run).", ctx)
    flags = {name: options.pop(name) for name in _PARAMETER_FLAGS}
    params = _parameters(flags, assigned, taken=options)
    given = {name: value for name, value in options.items() if _is_given(ctx, name)}

    settle_client(quiet)
    from gam.hub.push import Target, check_target, push_folder

    target = Target(repo, **hub) if repo is not None else None
    if not merging and target is not None and output is not None:
        pushed = push_folder(output, target)
        if as_json:
            record = {"output": str(Path(output).resolve()), "pushed": asdict(pushed)}
            click.echo(json.dumps(record, indent=2))
        elif not quiet:
            click.echo(_pushed_text(pushed))
        return
    from gam.files import REPORT_NAME
    from gam.load import local_paths, settle_all
    from gam.merging.execute import execute
    from gam.recipes.recipe import Recipe, read_recipe
    from gam.save import check_output

    recipe = Recipe() if config is None else read_recipe(config)
    inputs = settle_all(recipe.inputs(adapters))
    if output is not None:
        check_output(output, overwrite=overwrite, inputs=local_paths(inputs))
    if target is not None:
        check_target(target)
    plan = recipe.plan(inputs, allow_changes=allow_changes, **given, **params)
    if dry_run:
        if as_json:
            click.echo(json.dumps(_plan_record(plan, output), indent=2))
        elif not quiet:
            click.echo("\n".join(_plan_text(plan)))
        return
    hidden = quiet or as_json or sys.stderr is None or not sys.stderr.isatty()
    length = len(plan.modules)
    with click.progressbar(length=length, label="Merging", file=sys.stderr, hidden=hidden) as bar:
        merged = execute(plan, lambda done, _: bar.update(done - bar.pos))
    assert output is not None
    folder = merged.save(output, overwrite=overwrite)
    assert merged.report is not None
    for warning in merged.report.warnings:
        click.echo(f"Warning: {shown(warning)}", err=True)
    if not (as_json or quiet):
        click.echo("\n".join(_result_text(merged, output)))
    record = json.loads((folder / REPORT_NAME).read_text("utf-8")) if as_json else {}
    if target is not None:
        pushed = push_folder(output, target)
        record = {"pushed": asdict(pushed), **record}
        if not (as_json or quiet):
            click.echo(f"\n{_pushed_text(pushed)}")
    if as_json:
        click.echo(json.dumps({"output": str(folder), **record}, indent=2))


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _parameters(
    flags: dict[str, Any], assigned: Sequence[tuple[str, str]], taken: dict[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the method that were given, by flag or by -p."""
    params = {name: value for name, value in flags.items() if value is not None}
    for name, value in assigned:
        if name == "adapters":
            raise OptionError("-p adapters: adapters are given by themselves, before the options")
        if name in ("modules", "expect"):
            raise OptionError(f"-p {name}: this is no parameter of a method; see --config")
        if name in taken:
            raise OptionError(f"-p {name}: this is an option, --{name.replace('_', '-')}")
        if name in params:
            raise OptionError(f"-p {name}: the parameter is given twice")
        params[name] = value
    return params


# --- text -----------------------------------------------------------------------------


def _result_text(merged: Adapter, output: str) -> Iterator[str]:
    report = merged.report
    assert report is not None
    ranks = [module.rank for module in merged.modules.values()]
    size = (Path(output) / "adapter_model.safetensors").stat().st_size
    yield (
        f"Wrote {shown(output)}: {report.method}, {counted(ranks, 'module')}, "
        f"rank {span(ranks)}, {report.dtype}, {byte_size(size)}"
    )
    yield ""
    rows = [
        (
            shown(entry.name),
            _weight(entry.weight),
            str(entry.modules),
            span(entry.ranks),
            number(report.cosines[entry.name]),
        )
        for entry in report.inputs
    ]
    yield from table(("adapter", "weight", "modules", "rank", "cosine with result"), rows)
    yield ""
    yield f"size           {number(report.norm_ratio)} of the mean size of the adapters"
    yield f"energy kept    {percent(report.energy_kept)} of the exact merge, at this rank"
    yield f"rounding       {percent(report.rounding_error)} change from writing {report.dtype}"


def _pushed_text(pushed: Pushed) -> str:
    if not pushed.changed:
        return f"Nothing to push: {pushed.url} holds these files (commit {pushed.commit[:8]})"
    return f"Pushed to {pushed.url} (commit {pushed.commit[:8]})"


def _plan_text(plan: Plan) -> Iterator[str]:
    size = "size decided by the energy"
    if plan.output_bytes is not None:
        size = f"about {byte_size(plan.output_bytes)}"
    yield (
        f"Plan: {plan.strategy.name}, {counted(plan.modules, 'module')}, {_dtype(plan)}, {size}; "
        "nothing written"
    )
    yield ""
    rows = [
        (
            shown(adapter.name),
            _weight(weight),
            str(len(adapter.modules)),
            span([module.rank for module in adapter.modules.values()]),
        )
        for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
    ]
    yield from table(("adapter", "weight", "modules", "rank"), rows)
    yield ""
    names = [adapter.name for adapter in plan.adapters]
    known = [module.rank for module in plan.modules if module.rank is not None]
    widest = max(known) if known and plan.options["uniform_rank"] else 0
    own = [module.settings.differences(plan.options) for module in plan.modules]
    alike = Counter(
        (
            _kind(module.name),
            f"{module.shape[0]} x {module.shape[1]}",
            *(str(module.ranks.get(name, "-")) for name in names),
            "by energy" if module.rank is None else str(max(module.rank, widest)),
            *([", ".join(_settings_text(settings)) or "-"] if any(own) else []),
        )
        for module, settings in zip(plan.modules, own, strict=True)
    )
    head = ["modules", "shape", *map(shown, names), "result", "count"]
    if any(own):
        head.insert(-1, "settings")
    yield from table(head, [(*row, str(count)) for row, count in sorted(alike.items())])

    if plan.skipped:
        kinds = sorted({_kind(name) for name in plan.skipped})
        yield ""
        yield f"skipped: {counted(plan.skipped, 'module')} ({', '.join(map(shown, kinds))})"


def _kind(module: str) -> str:
    """Return a module's path with stars for the numbers."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", module)


def _settings_text(settings: Mapping[str, Any]) -> Iterator[str]:
    for name, value in settings.items():
        if name == "weights":
            yield "weights " + "/".join(f"{weight:.3g}" for weight in value.values())
        elif name == "method":
            yield str(value)
        elif value is not None:
            text = f"{value:.3g}" if isinstance(value, float) else str(value).lower()
            yield f"{name} {shown(text)}"


def _plan_record(plan: Plan, output: str | None) -> dict[str, Any]:
    return {
        "output": output and str(Path(output).resolve()),
        "method": plan.strategy.name,
        "options": dict(plan.options),
        "dtype": _dtype(plan),
        "output_bytes": plan.output_bytes,
        "inputs": [
            {**asdict(adapter.describe()), "weight": weight}
            for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
        ],
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "ranks": dict(module.ranks),
                "rank": module.rank,
                "settings": module.settings.differences(plan.options),
            }
            for module in plan.modules
        ],
        "skipped": list(plan.skipped),
    }


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")


def _weight(value: float | None) -> str:
    return "varies" if value is None else f"{value:.3f}"
