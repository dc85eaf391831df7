"""``finetune backbones``: list the networks that can be fine-tuned, and show the stages of one."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetune.cli.output import handled_errors, print_json, print_line, print_table, say
from finetune.strategies import assign_groups, find_strategy, join_names, lay_phases

if TYPE_CHECKING:
    from pretrained.catalog import Card

app = typer.Typer(help="List backbones, and show one stage by stage.", invoke_without_command=True)
COLUMNS = ("name", "parameters", "input_size", "license", "weights")


@app.callback()
def list_backbones(
    context: typer.Context,
    search: Annotated[str, typer.Option(help="Only names that contain this text.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array to stdout.")] = False,
) -> None:
    """List every name that can be fine-tuned: parameters, input size, licence, where its weights are."""
    if context.invoked_subcommand is not None:
        return
    with handled_errors():
        with _busy():
            from pretrained.catalog import find_card, list_names

            rows = [_facts(find_card(name)) for name in list_names(search)]
        if as_json:
            print_json(rows, indent=1)
        elif rows:
            print_table(COLUMNS, ([_cell(row[column]) for column in COLUMNS] for row in rows))
        else:
            say(f"no backbone's name contains {search!r}")


def _busy() -> AbstractContextManager[None]:
    from finetune.system.display import Display

    return Display().busy("loading timm and torchvision")


def _facts(card: Card) -> dict[str, Any]:
    from pretrained.sizes import num_parameters
    from pretrained.weights import find_cached

    place = {"none": "none", "package": "installed"}.get(card.place)
    place = place or ("here" if find_cached(card) else "download")
    return {
        "name": card.name,
        "source": card.source,
        "parameters": num_parameters(card),
        "input_size": card.preprocessing.img_size,
        "license": card.license,
        "weights": place,
    }


@app.command("show")
def show_backbone(
    name: Annotated[str, typer.Argument(help="A backbone's name, or a finished run.")],
    strategy: Annotated[str, typer.Option("--strategy", "-s", help=f"{join_names()}.")] = "top",
    top_stages: Annotated[int, typer.Option(help="Stages that count as the top.")] = 1,
    layers: Annotated[
        bool, typer.Option("--layers", help="Show every layer instead, with sizes, operations and memory.")
    ] = False,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Images whose memory --layers shows.")
    ] = 1,
    graph: Annotated[
        Path | None, typer.Option("--graph", help="Draw the layers as a graph, into a new .svg file.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object to stdout.")] = False,
) -> None:
    """Show a backbone's stages in order, and which of them a strategy would train, at which factor."""
    with handled_errors(as_json):
        if graph is not None:
            _draw_graph(name, graph)
        if layers:
            _show_layers(name, batch_size, as_json)
        if layers or graph is not None:
            return
        with _busy():
            facts = _describe(name, strategy, top_stages)
        if as_json:
            print_json(facts, indent=1)
            return
        for key in ("name", "parameters", "input_size", "license", "weights", "origin"):
            print_line(f"{key:<11} {_cell(facts[key])}")
        print_line()
        columns = ("stage", "role", "parameters", "layers", "group", "factor")
        print_table(columns, ([_cell(row[column]) for column in columns] for row in facts["stages"]))


@app.command("chart")
def chart_backbones(
    names: Annotated[
        list[str], typer.Argument(help="Backbones with a published accuracy, or finished runs.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="A new folder.")],
    device: Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON object to stdout.")] = False,
) -> None:
    """Draw the accuracy of networks against their operations, and against their speed on this machine."""
    with handled_errors(as_json):
        with _busy():
            from finetune.explain.backbone_chart import write_chart
            from finetune.system.display import Display
        chart = write_chart(names, output, device, Display())
        if as_json:
            print_json(chart, indent=1)


def _draw_graph(name: str, path: Path) -> None:
    with _busy():
        from finetune.explain.network_tables import draw_graph
        from pretrained.catalog import find_card

        draw_graph(find_card(name), path)
    say(f"graph {path}", bold=True)


def _show_layers(name: str, batch_size: int, as_json: bool) -> None:
    with _busy():
        from finetune.explain.network_tables import LAYER_COLUMNS, describe_layers, list_cells
        from pretrained.catalog import find_card

        facts = describe_layers(find_card(name), batch_size)
    if as_json:
        print_json(facts, indent=1)
        return
    print_line(
        f"{facts['name']} at {_cell(facts['input_size'][1:])} pixels, memory of {batch_size} in float32 (MB)"
    )
    print_table(LAYER_COLUMNS, list_cells(facts))


def _describe(name: str, strategy: str, top_stages: int) -> dict[str, Any]:
    from finetune.recipe import load_recipe
    from pretrained.backbone import describe_stages
    from pretrained.catalog import find_card

    settings = load_recipe(None, {"strategy.name": strategy, "strategy.top_stages": top_stages}).strategy
    card = find_card(name)
    stages, sizes = describe_stages(card)
    phases = lay_phases(find_strategy(strategy), stages, settings)
    rows = [
        {
            "stage": stage.name,
            "role": stage.role,
            "parameters": sum(sizes[parameter] for parameter in stage.parameters),
            "layers": _layers(stage.parameters),
            "group": group,
            "factor": max(phase.factors[stage.name] for phase in phases) or "frozen",
        }
        for stage, group in zip(stages, assign_groups(stages, settings.top_stages), strict=True)
    ]
    return _facts(card) | {"parameters": sum(sizes.values()), "origin": card.origin, "stages": rows}


def _layers(parameters: Iterable[str]) -> str:
    """Return the first and the last layer of a stage, which may have hundreds."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] or name for name in parameters))
    return layers[0] if len(layers) == 1 else f"{layers[0]} ... {layers[-1]}"


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):  # height and width
        return "x".join(map(str, value))
    return "-" if value in (None, "") else f"{value:,}" if isinstance(value, int) else str(value)
