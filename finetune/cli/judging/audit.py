"""``finetune audit``: find shortcuts in images, and what the predictions of a run depend on."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetune.cli.options import JsonOption, OutputOption, takes_source
from finetune.cli.output import print_json, print_line, print_table
from finetune.errors import count

if TYPE_CHECKING:
    from finetune.recipe import Recipe
    from finetune.shortcuts.audit import Audit
    from finetune.shortcuts.find import Shortcut


@takes_source
def audit_command(
    recipe: Recipe,
    run: Annotated[
        Path | None, typer.Argument(help="A finished run, instead of --data.", metavar="[RUN]")
    ] = None,
    group_by: Annotated[
        str | None,
        typer.Option(
            help="Images of one group (a patient, a video): a column of the CSV, or a pattern in the path.",
            metavar="COLUMN|REGEX",
        ),
    ] = None,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Find shortcuts: is the label predicted by border, background, JPEG quality, size, EXIF or name order?

    Each is compared with permuted labels; over all tests together, 5 % of audits give a false alarm.
    """
    from finetune import api

    found = api.audit(run, recipe=recipe, group_by=group_by, output=output)
    if as_json:
        print_json(found.to_dict())
    else:
        _print(found)


def _print(found: Audit) -> None:
    from finetune.shortcuts.audit import RECORD, SHEET
    from finetune.shortcuts.meaning import MEANINGS

    _print_independence(found)
    rows = [_describe(one, MEANINGS[one.name].title) for one in found.shortcuts if one.number]
    print_table(("", "the label from", "accuracy", "chance", "of whole image", "p, Holm"), rows)
    for name, reason in found.untested.items():
        print_line(f"not tested: {MEANINGS[name].title} ({reason})")
    _print_background(found)
    for alarm in found.alarms:
        print_line("ALARM", colour="red", bold=True, end=f": {MEANINGS[alarm.name].title}\n")
        print_line(f"  {MEANINGS[alarm.name].means}\n  {MEANINGS[alarm.name].fix}")
    files = f"{RECORD} and {SHEET} are" if found.alarms else f"{RECORD} is"
    print_line(
        f"{count(len(found.alarms), 'alarm')} in {len(found.shortcuts)} tests; {files} in {found.output}"
    )


def _print_independence(found: Audit) -> None:
    own = found.independence
    low, high = own.interval
    print_line(
        f"{count(own.num_images, 'training image')}, {own.num_groups:,} of them independent "
        f"(the largest group has {own.largest:,})"
    )
    print_line(
        f"whole images: accuracy {own.accuracy_images:.3f} leaving out single images, "
        f"{own.accuracy_groups:.3f} leaving out groups (95 % interval {low:.3f} to {high:.3f})"
    )


def _describe(one: Shortcut, title: str) -> list[str]:
    share = "-" if one.share is None else f"{100 * one.share:.0f} %"
    low, high = one.interval
    accuracy = f"{one.accuracy:.3f} ({low:.3f} to {high:.3f})"
    return ["ALARM" if one.is_alarm else "", title, accuracy, f"{one.chance:.3f}", share, f"{one.p_holm:.3f}"]


def _print_background(found: Audit) -> None:
    if found.background is None or found.background.shortcut is None:
        return
    own, test = found.background, found.background.shortcut
    p = next(one.p_holm for one in found.shortcuts if one.name == test.name)
    print_line(
        f"{count(len(own.without_middle), f'{own.split} image')}: the answer changes in {test.accuracy:.0%} "
        f"without the surroundings, in {test.chance:.0%} without the middle (p, Holm: {p:.3f})"
    )
    if own.evidence_outside is not None:
        print_line(f"{own.evidence_outside:.0%} of the evidence of the heat maps lies outside of the middle")
