"""The command line; the only place that prints or exits. Imports torch inside commands only."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from gam import __version__
from gam.errors import GamError, OptionError

if TYPE_CHECKING:
    from gam.adapter import Adapter
    from gam.plan import Plan
    from gam.strategies.base import Param

# Parameters of methods that have a flag of their own; the others go through -p.
_PARAMETER_FLAGS = ("reference", "density")

_EPILOG = """\b
Examples:
  gam-merge math-lora code-lora -o merged
  gam-merge math-lora code-lora -o merged --weights 0.7,0.3 --rank 32
  gam-merge math-lora code-lora -o merged --method ties --density 0.3
  gam-merge math-lora code-lora --dry-run

An ADAPTER is a folder that PEFT saved, or a .safetensors file. The result is a folder
that PEFT and vLLM load like any other adapter.
"""


class _Option(click.Option):
    """An option that `--help` lists under a heading."""

    def __init__(self, *args: Any, heading: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heading = heading


class _Command(click.Command):
    """A command with headings in its help, and `GamError` as one line and an exit code."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options, grouped by heading."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if record is not None and isinstance(param, click.Option):
                groups.setdefault(getattr(param, "heading", "What to show"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records, col_max=34)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command: exit 2 on wrong usage, 1 on anything else that is refused."""
        try:
            return super().invoke(ctx)
        except OptionError as error:
            raise click.UsageError(str(error), ctx) from error
        except GamError as error:
            raise click.ClickException(str(error)) from error
        except BrokenPipeError:
            raise
        except OSError as error:  # only printing is left: files have errors of their own
            raise click.ClickException(f"cannot print the result: {error.strerror}") from error
        except MemoryError as error:
            raise click.ClickException(_OUT_OF_MEMORY) from error
        except RuntimeError as error:
            if "allocate memory" not in str(error):  # how torch says it on a CPU
                raise
            raise click.ClickException(_OUT_OF_MEMORY) from error


_OUT_OF_MEMORY = "not enough memory for this merge; free some, or merge fewer adapters at a time"


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
    from gam.strategies import STRATEGIES

    formatter = ctx.make_formatter()
    for strategy in STRATEGIES.values():
        with formatter.section(strategy.name):
            formatter.write_text(strategy.summary)
            if strategy.paper:
                formatter.write_text(f"Paper: {strategy.paper}")
            if strategy.params:
                formatter.write_dl([_parameter_help(param) for param in strategy.params])
    click.echo(formatter.getvalue().strip("\n"))
    ctx.exit()


def _parameter_help(param: Param) -> tuple[str, str]:
    values = "true|false" if param.kind == "bool" else param.kind.upper()
    own = param.name in _PARAMETER_FLAGS
    flag = f"--{param.name} {values}" if own else f"-p {param.name}={values}"
    if param.default is None:
        return flag, param.help
    return flag, f"{param.help}  [default: {str(param.default).lower()}]"


_output = partial(click.option, cls=_Option, heading="Output")
_mixing = partial(click.option, cls=_Option, heading="How to merge")
_size = partial(click.option, cls=_Option, heading="Size and precision of the result")
_input = partial(click.option, cls=_Option, heading="What to accept")
_show = partial(click.option, cls=_Option, heading="What to show")


@click.command(
    cls=_Command,
    epilog=_EPILOG,
    context_settings={"show_default": True, "max_content_width": 100},
)
@click.argument("adapters", metavar="ADAPTER...", nargs=-1, required=True, type=click.Path())
@_output("-o", "--output", metavar="OUT", type=click.Path(), help="Folder to write.")
@_output("--overwrite", is_flag=True, help="Replace the adapter that is in OUT.")
@_output("--dry-run", is_flag=True, help="Check everything and show the plan; write nothing.")
@_mixing(
    "--method",
    metavar="NAME",
    default="gam",
    help="Merging method: gam, linear or ties; see --list-methods.",
)
@_mixing(
    "--weights",
    metavar="W,W,...",
    callback=_numbers,
    help="One number for each adapter; 0 leaves one out, negative ones subtract.  [default: equal]",
)
@_mixing(
    "--normalize/--no-normalize",
    default=True,
    help="Divide the weights by the sum of their absolute values.",
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
    "--reference",
    metavar="NAME|INDEX|consensus",
    help="gam: adapter whose frame the others are rotated onto, by name or by position from "
    "0, or the mean of all.  [default: the first of the largest rank]",
)
@_mixing(
    "--density",
    metavar="X",
    type=float,
    help="ties: share of the entries of each update to keep.  [default: 0.2]",
)
@_mixing(
    "-p",
    "parameters",
    metavar="NAME=VALUE",
    multiple=True,
    callback=_assignments,
    help="Any other parameter of the method; may be given more than once.",
)
@_size(
    "--rank",
    metavar="N|max|sum|energy=X",
    default="max",
    help="Rank of the result: a number, the largest or the sum of the input ranks, or the "
    "smallest that keeps the share X of the energy.",
)
@_size("--uniform-rank", is_flag=True, help="Pad all modules with zeros to one rank.")
@_size(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16", "float16"]),
    default="auto",
    help="Number format of the result; auto is the widest of the inputs.",
)
@_input(
    "--alpha",
    metavar="X",
    type=float,
    help="LoRA alpha for .safetensors files that do not state one.",
)
@_input("--allow-base-mismatch", is_flag=True, help="Merge adapters of different base models.")
@_input("--allow-pickle", is_flag=True, help="Read .bin files (tensors only; no code is run).")
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
    reference: str | None,
    density: float | None,
    parameters: list[tuple[str, str]],
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Merge LoRA adapters of one base model into a single LoRA adapter."""
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o' / '--output' (or --dry-run).", ctx)
    flags = {"reference": reference, "density": density}
    params = _parameters(flags, parameters, taken=options)

    from gam.files import REPORT_NAME
    from gam.merge import execute
    from gam.plan import plan_merge
    from gam.write import check_output

    if output is not None:
        check_output(output, overwrite=overwrite, inputs=adapters)
    plan = plan_merge(adapters, **options, **params)
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
    for warning in merged.report.warnings:
        click.echo(f"Warning: {_shown(warning)}", err=True)
    if as_json:
        record = json.loads((folder / REPORT_NAME).read_text("utf-8"))
        click.echo(json.dumps({"output": str(folder), **record}, indent=2))
    elif not quiet:
        click.echo("\n".join(_result_text(merged, output)))


def _parameters(
    flags: dict[str, Any], assigned: Sequence[tuple[str, str]], taken: dict[str, Any]
) -> dict[str, Any]:
    """Return the parameters of the method that were given, by flag or by -p."""
    params = {name: value for name, value in flags.items() if value is not None}
    for name, value in assigned:
        if name == "adapters":
            raise OptionError("-p adapters: adapters are given by themselves, before the options")
        if name in taken:
            raise OptionError(f"-p {name}: this is an option, --{name.replace('_', '-')}")
        if name in params:
            raise OptionError(f"-p {name}: the parameter is given twice")
        params[name] = value
    return params


# --- text -----------------------------------------------------------------------------


def _result_text(merged: Adapter, output: str) -> Iterator[str]:
    report = merged.report
    ranks = [module.rank for module in merged.modules.values()]
    size = (Path(output) / "adapter_model.safetensors").stat().st_size
    yield (
        f"Wrote {_shown(output)}: {report.method}, {_count(ranks, 'module')}, "
        f"rank {_span(ranks)}, {report.dtype}, {_bytes(size)}"
    )
    yield ""
    rows = [
        (
            _shown(entry["name"]),
            f"{entry['weight']:.3f}",
            str(entry["modules"]),
            _span(entry["ranks"]),
            _number(report.cosines[entry["name"]]),
        )
        for entry in report.inputs
    ]
    yield from _table(("adapter", "weight", "modules", "rank", "cosine with result"), rows)
    yield ""
    yield f"size           {_number(report.norm_ratio)} of the mean size of the adapters"
    yield f"energy kept    {_percent(report.energy_kept)} of the exact merge, at this rank"
    yield f"rounding       {_percent(report.rounding_error)} change from writing {report.dtype}"


def _plan_text(plan: Plan) -> Iterator[str]:
    size = "size decided by the energy"
    if plan.output_bytes is not None:
        size = f"about {_bytes(plan.output_bytes)}"
    yield (
        f"Plan: {plan.strategy.name}, {_count(plan.modules, 'module')}, {_dtype(plan)}, {size}; "
        "nothing written"
    )
    yield ""
    rows = [
        (
            _shown(adapter.name),
            f"{weight:.3f}",
            str(len(adapter.modules)),
            _span([module.rank for module in adapter.modules.values()]),
        )
        for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
    ]
    yield from _table(("adapter", "weight", "modules", "rank"), rows)
    yield ""
    names = [adapter.name for adapter in plan.adapters]
    known = [module.rank for module in plan.modules if module.rank is not None]
    widest = max(known) if known and plan.options["uniform_rank"] else 0
    alike = Counter(
        (
            re.sub(r"(?<![^.])\d+(?![^.])", "*", module.name),
            f"{module.shape[0]} x {module.shape[1]}",
            *(str(module.ranks.get(name, "-")) for name in names),
            "by energy" if module.rank is None else str(max(module.rank, widest)),
        )
        for module in plan.modules
    )
    head = ("modules", "shape", *map(_shown, names), "result", "count")
    yield from _table(head, [(*row, str(count)) for row, count in sorted(alike.items())])


def _plan_record(plan: Plan, output: str | None) -> dict[str, Any]:
    return {
        "output": output and str(Path(output).resolve()),
        "method": plan.strategy.name,
        "options": dict(plan.options),
        "dtype": _dtype(plan),
        "output_bytes": plan.output_bytes,
        "inputs": [
            {
                "name": adapter.name,
                "source": adapter.source and adapter.source.name,
                "sha256": adapter.source and adapter.source.sha256,
                "base_model": adapter.config.get("base_model_name_or_path"),
                "weight": weight,
                "modules": len(adapter.modules),
                "ranks": sorted({module.rank for module in adapter.modules.values()}),
            }
            for adapter, weight in zip(plan.adapters, plan.applied, strict=True)
        ],
        "modules": [
            {
                "name": module.name,
                "shape": list(module.shape),
                "ranks": dict(module.ranks),
                "rank": module.rank,
            }
            for module in plan.modules
        ],
    }


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield lines in columns: the first to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for first, *rest in (head, *rows):
        cells = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells])


def _shown(name: str) -> str:
    """Return a name as it is, or escaped where it would disturb the terminal."""
    return name if name.isprintable() else repr(name)


def _dtype(plan: Plan) -> str:
    return str(plan.dtype).removeprefix("torch.")


def _count(items: Sequence[Any], noun: str) -> str:
    return f"{len(items)} {noun}" + ("" if len(items) == 1 else "s")


def _span(ranks: Sequence[int]) -> str:
    low, high = min(ranks), max(ranks)
    return str(low) if low == high else f"{low}-{high}"


def _number(value: float) -> str:
    return "undefined" if value != value else f"{value:.3f}"


def _percent(value: float) -> str:
    if 0 < value < 1e-5:
        return "below 0.001 %"
    return "undefined" if value != value else f"{100 * value:.4g} %"


def _bytes(size: int) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} GB"
