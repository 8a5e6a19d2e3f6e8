"""``compass models``."""

from __future__ import annotations

import json

import click

from compass_codec.commands.common import table
from compass_codec.errors import WeightsError
from compass_codec.weights import sets


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def models(as_json: bool) -> None:
    """List the sets of weights: those installed, then those in the folders that COMPASS_MODELS names."""
    found = []
    for each in sets():
        try:
            if isinstance(each, WeightsError):
                raise each
            facts = {"profile": each.profile, "identity": each.identity, "backbone": each.backbone}
            found.append(facts | {"bytes": each.size, "purpose": each.purpose, "folder": str(each.folder)})
        except WeightsError as e:
            click.echo(f"note: {e}", err=True)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    heads = ["profile", "identity", "backbone", "bytes"]
    rows = [heads, *([str(facts[key]) for key in heads] for facts in found)]
    ends = ["purpose", *(facts["purpose"] for facts in found)]
    for line, purpose in zip(table(rows).splitlines(), ends, strict=True):
        click.echo(f"{line}  {purpose}")
