"""Uses an exported model with onnxruntime alone, without Cloister: python THIS_FILE model.onnx table.csv

What a cell means is settled here, as the schema in the file says it; the rest is in the file.
"""

import csv
import json
import math
import re
import sys
from typing import Any

import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
held = session.get_modelmeta().custom_metadata_map
CODE = re.compile("[-+]?0[0-9]")
schema, inputs = json.loads(held["schema"]), json.loads(held["inputs"])


def number(text: str) -> float:
    """The number that a text spells; NaN if it is none."""
    try:
        return {"true": 1.0, "false": 0.0}[text.lower()] if text.lower() in ("true", "false") else float(text)
    except ValueError:
        return math.nan


def spelled(value: object) -> str:
    """A value of the schema as text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def means(text: str, value: object) -> bool:
    """Is this cell what a value of the schema stands for? A text such as 01 is a code, and no number."""
    if isinstance(value, str) and (CODE.match(text) or CODE.match(value)):
        return text == value
    return text == spelled(value) or number(text) == number(spelled(value))


def cell(text: str, feature: dict[str, Any]) -> object:
    """A number, NaN if it is missing; or a category in its spelling, "" if it is missing."""
    missing = not text or text.lower() == "nan" or any(means(text, marker) for marker in feature["missing"])
    if feature["type"] == "numeric":
        return math.nan if missing else number(text)
    if missing:
        return ""
    known = [spelled(category) for category in feature["categories"] if means(text, category)]
    return known[0] if known else "" if feature.get("unfit") == "missing" else "(other)"


with open(sys.argv[2], newline="", encoding="utf-8-sig") as file:
    reader = csv.DictReader(file)
    absent = [f["name"] for f in schema["features"] if not f["optional"] and f["name"] not in (reader.fieldnames or ())]
    if absent:
        sys.exit(
            f"{sys.argv[2]}: lacks the columns {', '.join(absent)}; this program reads CSV with commas and a header"
        )
    rows = list(reader)
fed = {}
for feature in schema["features"]:
    column = [cell((row.get(feature["name"]) or "").strip(), feature) for row in rows]
    kind = float if feature["type"] == "numeric" else object
    fed[inputs[feature["name"]]] = np.array(column, kind).reshape(-1, 1)

names = [output.name for output in session.get_outputs()]
made = dict(zip(names, session.run(names, fed), strict=True))
for i in range(len(rows)):
    print(made["prediction"][i], *([made["probabilities"][i].tolist()] if "probabilities" in made else []))
