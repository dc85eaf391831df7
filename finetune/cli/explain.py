"""``finetune explain``: pictures of what a network computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import typer

from finetune.cli.explaining import evidence, networks, units
from finetune.cli.options import takes_model
from finetune.cli.unknown import RecipeCommand

app = typer.Typer(
    help="See inside a network: where it looks, and what its layers compute.", no_args_is_help=True
)

_COMMANDS: dict[str, Callable[..., dict[str, Any]]] = {
    "cam": evidence.cam_command,
    "saliency": evidence.saliency_command,
    "localise": evidence.localise_command,
    "filters": units.filters_command,
    "maps": units.maps_command,
    "top": units.top_command,
    "deconv": units.deconv_command,
    "evolution": units.evolution_command,
    "receptive-field": units.receptive_field_command,
    "class": networks.class_command,
    "invariance": networks.invariance_command,
    "ablate": networks.ablate_command,
    "influence": networks.influence_command,
}

for _name, _command in _COMMANDS.items():
    app.command(_name, cls=RecipeCommand)(takes_model(_command))
