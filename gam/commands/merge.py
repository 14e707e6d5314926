"""The command `gam-merge`; imports torch inside only."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from gam.commands.flags import flag
from gam.commands.merge_text import plan_text, pushed_text, result_text
from gam.commands.terminal import SETTINGS, Command, Option, bar, settle_client, warn
from gam.commands.text import shown
from gam.errors import OptionError, PluginError
from gam.merging.options import MIXING, OPTIONS
from gam.strategies import Param, get, names, parameters
from gam.version import __version__

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.hub.push import Target

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


# --- what is given --------------------------------------------------------------------


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


def _options_of_a_merge(command: _Function) -> _Function:
    """Add a flag for every option of a merge that has one, and for some parameters."""
    for name in reversed([name for name, option in OPTIONS.items() if option.flag]):
        if name == "missing":  # after what all methods have
            command = _with_parameter_flags(command)
        command = flag(name)(command)
    return command


def _with_parameter_flags(command: _Function) -> _Function:
    command = click.option(
        "-p",
        "assigned",
        cls=Option,
        heading=MIXING,
        metavar="NAME=VALUE",
        multiple=True,
        callback=_assignments,
        help="Any other parameter of the method; may be given more than once.",
    )(command)
    for name in reversed(_PARAMETER_FLAGS):
        found = [(param, owners) for param, owners in parameters() if param.name == name]
        texts = (f"{', '.join(owners)}: {param.help}{_default(param)}" for param, owners in found)
        command = click.option(
            f"--{name}",
            cls=Option,
            heading=MIXING,
            metavar=found[0][0].values,
            help=" ".join(texts),
        )(command)
    return command


def _is_given(ctx: click.Context, name: str) -> bool:
    return ctx.get_parameter_source(name) is not click.core.ParameterSource.DEFAULT


def _parameters(
    flags: dict[str, Any], assigned: Sequence[tuple[str, str]], taken: dict[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the method that were given, by flag or by -p."""
    params = {name: value for name, value in flags.items() if value is not None}
    for name, value in assigned:
        if name == "adapters":
            raise OptionError("-p adapters: adapters are given by themselves, before the options.")
        if name in ("modules", "expect"):
            raise OptionError(f"-p {name}: this is no parameter of a method. See --config.")
        if name in taken:
            words = name.replace("_", "-")
            raise OptionError(f"-p {name}: this is an option. Give --{words}.")
        if name in params:
            raise OptionError(f"-p {name}: the parameter is given twice.")
        params[name] = value
    return params


def _target(ctx: click.Context, repo: str | None, hub: dict[str, Any]) -> Target | None:
    """Return where to push, if anywhere."""
    wanted = [name for name in _HUB_FLAGS if _is_given(ctx, name)]
    if wanted and repo is None:
        first = f"--{wanted[0].replace('_', '-')}"
        raise click.UsageError(f"{first}: this is for pushing. Give --push-to-hub too.", ctx)
    if repo is None:
        return None
    from gam.hub.push import Target

    return Target(repo, **hub)


# --- the list of methods --------------------------------------------------------------


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
            usual = "" if strategy.normalize else " --no-normalize"
            usual += "" if strategy.rank == "max" else f" --rank {strategy.rank}"
            usual += "" if strategy.size == "exact" else f" --size {strategy.size}"
            if usual:
                formatter.write_text(f"Unless you say otherwise:{usual}")
            if strategy.params:
                formatter.write_dl([_parameter_help(param) for param in strategy.params])
    click.echo(formatter.getvalue().strip("\n"))
    ctx.exit()


def _parameter_help(param: Param) -> tuple[str, str]:
    own = param.name in _PARAMETER_FLAGS
    words = f"--{param.name} {param.values}" if own else f"-p {param.name}={param.values}"
    return words, param.help + _default(param)


def _default(param: Param) -> str:
    return "" if param.default is None else f"  [default: {str(param.default).lower()}]"


# --- the command ----------------------------------------------------------------------

_output = partial(click.option, cls=Option, heading="Output")
_mixing = partial(click.option, cls=Option, heading=MIXING)
_input = partial(click.option, cls=Option, heading="What to accept")
_hub = partial(click.option, cls=Option, heading="The Hub")
_show = partial(click.option, cls=Option, heading="What to show")


@click.command(cls=Command, epilog=_EPILOG, context_settings=SETTINGS)
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
@_options_of_a_merge
@_input(
    "--allow-changes",
    is_flag=True,
    help="Merge what is there now where it is not what the gam_merge.json of --config recorded.",
)
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
    settle_client(quiet)
    target = _target(ctx, repo, {name: options.pop(name) for name in _HUB_FLAGS})
    others = [name for name in ctx.params.keys() - _PUSHING if _is_given(ctx, name)]
    merging = bool(adapters) or config is not None
    if not merging and (repo is None or others):
        raise click.MissingParameter(ctx=ctx, param=ctx.command.params[0])
    if output is None and not (dry_run and merging):
        raise click.UsageError("Missing option '-o' / '--output' (or --dry-run).", ctx)
    flags = {name: options.pop(name) for name in _PARAMETER_FLAGS}
    params = _parameters(flags, assigned, taken=options)
    given = {name: value for name, value in options.items() if _is_given(ctx, name)}
    if not merging and target is not None and output is not None:
        _push(output, target, as_json, quiet)
        return
    from gam.api import run_merge

    def saved(merged: Adapter, folder: Path) -> None:
        assert merged.report is not None
        assert output is not None
        if not (as_json or quiet):
            click.echo("\n".join(result_text(merged, output)))
        for warning in merged.report.warnings:
            warn(shown(warning))

    with bar("Merging", hidden=quiet or as_json or dry_run) as progress:
        done = run_merge(
            adapters,
            {**given, **params},
            config=config,
            allow_changes=allow_changes,
            output=output,
            overwrite=overwrite,
            target=target,
            dry_run=dry_run,
            progress=progress,
            saved=saved,
        )
    if as_json:
        click.echo(json.dumps(done.as_dict(output), indent=2))
    elif dry_run and not quiet:
        click.echo("\n".join(plan_text(done.plan)))
    elif done.pushed is not None and not quiet:
        click.echo(f"\n{pushed_text(done.pushed)}")


def _push(output: str, target: Target, as_json: bool, quiet: bool) -> None:
    """Push the folder of an earlier merge."""
    from gam.hub.push import push_folder

    pushed = push_folder(output, target)
    if as_json:
        record = {"output": str(Path(output).resolve()), "pushed": asdict(pushed)}
        click.echo(json.dumps(record, indent=2))
    elif not quiet:
        click.echo(pushed_text(pushed))
