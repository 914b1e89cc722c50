"""The report: one HTML file with all in it, which asks no network for anything when it is opened."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
import yaml
from markupsafe import Markup

from common.errors import OutputError
from common.files import write_out
from common.model.energy import amount
from common.text import duration
from server.folder.folder import RunRecord
from server.folder.start import in_words
from server.report import facts, look
from server.report.drawing import Figure
from server.report.figures import figures

MOST_LINES = 200  # of a table
PNG_SCALE = 2.0
WIDTH = 560  # of a picture, in points


def report(record: RunRecord) -> str:
    """The page of one run, as HTML. Raises `RunFolderError` where a file of its folder holds something else."""
    with facts.readable(record):
        return _report(record)


def _report(record: RunRecord) -> str:
    federation = record.federation
    drawn = figures(record)
    scores = [scores for _, scores in facts.last_scores(record)]
    return rendered(
        "report.html.jinja",
        drawn,
        title=f"{federation.name}: report of a run",
        record=record,
        federation=federation,
        task=facts.task(federation),
        ended=facts.ended(record, why=record.standing.state != "failed"),
        cards=_cards(record),
        failed=record.standing.state == "failed",
        problem=record.standing.problem,
        epsilons=facts.epsilons(record),
        row=record.privacy.get("row"),
        client=record.privacy.get("client"),
        start=in_words(record.start) if record.start else "",
        software=record.privacy.get("software", {}),
        stated=list(facts.per_client(record).items())[:MOST_LINES],
        refusals=facts.refusals(record)[:MOST_LINES],
        other_targets=facts.other_targets(scores[0], federation) if scores else [],
        scored_on=facts.last_scores(record)[0][0] if scores else "",
        groups=facts.groups(scores[0], federation) if scores else [],
        figures_of_classes=scores[0].get("per_class", {}) if scores else {},
        document=yaml.safe_dump(json.loads(federation.canonical), sort_keys=False, allow_unicode=True),
        began=facts.began(record),
    )


def write_pictures(folder: Path, drawn: Sequence[Figure]) -> list[Path]:
    """Each chart as a PNG for a paper, in a folder that is made if need be. Raises `OutputError`."""
    made = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be made: {error.strerror}") from error
    for figure in drawn:
        path = folder / f"{figure.key}.png"
        write_out(path, picture(figure))
        made.append(path)
    return made


def picture(figure: Figure) -> bytes:
    """A chart as PNG, on white, without a browser."""
    spec = figure.spec | {"width": WIDTH, "config": look.on_paper()}
    png: bytes = vl_convert.vegalite_to_png(spec, vl_version=_version(), scale=PNG_SCALE)
    return png


def rendered(template: str, drawn: Sequence[Figure], **values: Any) -> str:
    """A page of a template, with its charts."""
    loader = jinja2.DictLoader({name: _resource(name) for name in ("base.html.jinja", "parts.html.jinja", template)})
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"duration": duration, "percent": lambda share: f"{100 * share:.1f} %"}
    specs = {figure.key: figure.spec for figure in drawn}
    return environment.get_template(template).render(
        figures={figure.key: figure for figure in drawn},
        specs=Markup(_as_script(specs)),
        look=Markup(_as_script(look.in_page())),
        vega=Markup(_bundle().replace("</script", "<\\/script")),
        **values,
    )


def _as_script(value: Any) -> str:
    """JSON that ends no script element, whatever texts are in it."""
    return json.dumps(value).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


@functools.cache
def _bundle() -> str:
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=_version())
    return bundle


def _version() -> str:
    return ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])


def _resource(name: str) -> str:
    return files("server.report").joinpath(name).read_text(encoding="utf-8")


def _cards(record: RunRecord) -> list[dict[str, str]]:
    """The headline: a few figures, each with what it is."""
    federation, standing = record.federation, record.standing
    cards = [
        {
            "name": "rounds",
            "value": f"{standing.round} of {standing.rounds or federation.training.rounds}",
            "more": f"{standing.failures} failed" if standing.failures else "",
        }
    ]
    names = facts.participants(record)
    told = ", ".join(names) if 0 < len(names) <= 5 else ""
    cards.append({"name": "participants", "value": f"{len(names) or standing.clients:,}", "more": told})
    held_out = facts.score_of(facts.held_out(record), federation)
    evaluated = facts.score_of(standing.evaluation, federation)
    if held_out is not None:
        cards.append({"name": facts.label(held_out.name), "value": str(held_out), "more": f"on {facts.EXACT}"})
    if evaluated is not None:
        more = evaluated.band or "on the clients' validation rows"
        name = facts.label(evaluated.name) + (", noisy" if evaluated.band else "")
        cards.append({"name": name, "value": str(evaluated), "more": more})
    for each in facts.epsilons(record):
        paid = each["epsilon"]
        cards.append(
            {
                "name": f"epsilon of a {each['unit']}",
                "value": "0" if paid is None else f"{paid:.2f}",
                "more": f"at most {each['limit']:g}, at delta {each['delta']:g}",
            }
        )
    if not federation.privacy.limits:
        cards.append({"name": "privacy", "value": "none", "more": "updates were exact, and can reveal rows"})
    if (energy := facts.energy(record)) is not None:
        total, more = energy
        grams = amount(total.grams, "g")
        cards.append(
            {"name": "energy of clients", "value": amount(total.joules, "J"), "more": f"about; {grams} CO2e; {more}"}
        )
    seconds = record.result.get("seconds")
    if seconds is not None:
        cards.append({"name": "time", "value": duration(seconds), "more": facts.began(record)})
    return cards
