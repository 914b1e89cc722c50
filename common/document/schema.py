"""What the tables of a federation look like, as its document declares it.

Bounds, categories and classes are declared, never read from the data, so encoding costs no privacy and is the same
at every site. How a table that fits becomes arrays is in common/data/encoding.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Annotated, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from common.document.documents import Document, unless
from common.document.group import Group
from common.document.mistakes import Key, Problem
from common.document.numbers import Positive
from common.document.values import Labelled, Scalar, agree, by_label, problems_of_labels, spelled

Bounds = tuple[float, float]
Name = Annotated[str, Field(min_length=1)]


class Numeric(Document):
    """A column of numbers. `bounds` come from knowledge of the field, never from the data.

    `unfit` is what becomes of a cell that is no number: its row is left out, or it counts as missing.
    """

    name: Name  # of the column
    type: Literal["numeric"]  # a number
    bounds: Bounds  # values outside are clamped, and all scaled to [-1, 1]
    missing: tuple[Scalar, ...] = ()  # values that mean that there is none
    optional: bool = False  # may a cell be empty?
    unfit: Annotated[Literal["left_out", "missing"], unless("left_out")] = "left_out"  # a cell that is no number

    @property
    def inputs(self) -> int:
        return 2 if self.may_be_missing else 1

    @property
    def may_be_missing(self) -> bool:
        return bool(self.missing) or self.optional or self.unfit == "missing"

    def contradictions(self) -> Iterator[Problem]:
        yield from _bounds_problem(self.bounds)


class Categorical(Document):
    """A column of values from a short list. `unfit` is what becomes of a cell that is none of them."""

    name: Name  # of the column
    type: Literal["categorical"]  # a value from a short list
    categories: Annotated[tuple[Scalar, ...], Field(min_length=1)]  # one input each, and one for others
    missing: tuple[Scalar, ...] = ()  # values that mean that there is none
    optional: bool = False  # may a cell be empty?
    unfit: Annotated[Literal["other", "left_out", "missing"], unless("other")] = "other"  # a cell that is none of them

    @property
    def inputs(self) -> int:
        return len(self.categories) + 1

    @property
    def may_be_missing(self) -> bool:
        return bool(self.missing) or self.optional or self.unfit == "missing"

    def contradictions(self) -> Iterator[Problem]:
        for one, other in combinations(self.categories, 2):
            if agree(one, other):
                yield ("categories",), f"must all differ; {spelled(one)} and {spelled(other)} mean the same cells"


class Image(Document):
    """Columns that are the pixels of an image, for augmentation: numbers that are never missing, in the order of the
    features, row by row; of several channels one after another."""

    first: Name  # the column of the first pixel
    height: Annotated[int, Field(ge=1, le=4096)]  # pixels
    width: Annotated[int, Field(ge=1, le=4096)]  # pixels
    channels: Annotated[int, Field(ge=1, le=256)] = 1  # such as 3 for colours

    @property
    def pixels(self) -> int:
        """How many columns it is."""
        return self.channels * self.height * self.width


class Classes(Document):
    """A target that is one of at least two classes, each a list of the cell values that mean it.

    A row without it is left out; of several targets (`also`), it learns from the others.
    """

    name: Name  # of the column
    # From a class's name to the values that mean it; `[a, b]` is short for `{a: [a], b: [b]}`.
    classes: Annotated[Labelled, Field(min_length=2), BeforeValidator(by_label)]
    missing: Annotated[tuple[Scalar, ...], unless(())] = ()  # values that mean that there is none
    optional: Annotated[bool, unless(False)] = False  # may a cell be empty?
    weight: Annotated[Positive, unless(1.0)] = 1.0  # of its loss, among the targets'

    @property
    def outputs(self) -> int:
        return len(self.classes)

    @property
    def counts(self) -> int:
        """Of an evaluation (common/model/scores.py): a confusion matrix."""
        return len(self.classes) ** 2

    @property
    def may_be_missing(self) -> bool:
        return bool(self.missing) or self.optional

    def contradictions(self) -> Iterator[Problem]:
        for key, sentence in problems_of_labels(self.classes, "class"):
            yield ("classes", *key), sentence
        for label, values in self.classes.items():
            if any(agree(marker, value) for marker in self.missing for value in values):
                yield ("missing",), f"has a value of class {label}, which no row could then have"


class NumericTarget(Document):
    """A target that is a number, for regression. A row without it is treated as one without a class is."""

    name: Name  # of the column
    bounds: Bounds  # values outside are clamped
    missing: Annotated[tuple[Scalar, ...], unless(())] = ()  # values that mean that there is none
    optional: Annotated[bool, unless(False)] = False  # may a cell be empty?
    weight: Annotated[Positive, unless(1.0)] = 1.0  # of its loss, among the targets'

    @property
    def outputs(self) -> int:
        return 1

    @property
    def counts(self) -> int:
        """Of an evaluation: rows, errors, and their squares."""
        return 3

    @property
    def may_be_missing(self) -> bool:
        return bool(self.missing) or self.optional

    def contradictions(self) -> Iterator[Problem]:
        yield from _bounds_problem(self.bounds)


def _target_kind(value: object) -> str:
    numeric = "bounds" in value if isinstance(value, dict) else isinstance(value, NumericTarget)
    return "NumericTarget" if numeric else "Classes"


Target = Annotated[
    Annotated[Classes, Tag("Classes")] | Annotated[NumericTarget, Tag("NumericTarget")],
    Discriminator(_target_kind),
]


class Schema(Document):
    """What every table in the federation looks like."""

    # The columns that the model reads, each a number or a category.
    features: Annotated[tuple[Annotated[Numeric | Categorical, Field(discriminator="type")], ...], Field(min_length=1)]
    # The column that it predicts; of several, the one by which a model is judged.
    target: Target
    # Further columns that it predicts, each by a head of its own on the same body.
    also: Annotated[tuple[Target, ...], unless(())] = ()
    image: Annotated[Image | None, unless(None)] = None  # which columns are one, if any are
    group: Annotated[Group | None, unless(None)] = None  # by which evaluations say how fair the model is
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.2  # of each client's rows, dealt by a keyed hash
    columns: tuple[Name, ...] | None = None  # the order of the columns in a file without a header

    @property
    def inputs(self) -> int:
        """Width of the encoded features."""
        return sum(f.inputs for f in self.features)

    @property
    def outputs(self) -> int:
        """Number of the target's classes, or 1 for a number."""
        return self.target.outputs

    @property
    def optional(self) -> set[str]:
        """The columns that a table need not have."""
        targets = self.targets if self.also else ()
        return {column.name for column in (*self.features, *targets) if column.optional}

    @property
    def targets(self) -> tuple[Classes | NumericTarget, ...]:
        """All of them, the one by which a model is judged first."""
        return (self.target, *self.also)

    @property
    def tasks(self) -> tuple[Schema, ...]:
        """A schema for each target, which has that one alone."""
        return tuple(self.alone(target) for target in self.targets) if self.also else (self,)

    def alone(self, target: Classes | NumericTarget) -> Schema:
        """The schema with one of its targets."""
        return self.model_copy(update={"target": target.model_copy(update={"weight": 1.0}), "also": ()})

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The columns that the model reads."""
        return tuple(f.name for f in self.features)

    @property
    def names(self) -> tuple[str, ...]:
        """Every column that is read for training: the features, then the targets, then that of the groups."""
        named = (*self.feature_names, *(target.name for target in self.targets))
        return named if self.group is None or self.group.name in named else (*named, self.group.name)

    @property
    def groups(self) -> tuple[str, ...]:
        """The groups of rows by which evaluations count, or ("",) if all are one."""
        return ("",) if self.group is None else self.group.labels

    @property
    def counts(self) -> int:
        """How many numbers an evaluation sends (common/model/scores.py)."""
        calibrated = self.group is not None and self.group.calibration
        return len(self.groups) * sum(target.counts + calibrated for target in self.targets)

    @property
    def ungrouped(self) -> Schema:
        """The same without groups, for whoever counts rows all together."""
        return self if self.group is None else self.model_copy(update={"group": None})

    def contradictions(self) -> Iterator[Problem]:
        seen: set[str] = set()
        for i, feature in enumerate(self.features):
            for key, sentence in feature.contradictions():
                yield ("features", i, *key), sentence
            if feature.name in seen:
                yield ("features", i, "name"), f"stands twice (got {feature.name})"
            seen.add(feature.name)
        if self.image is not None:
            yield from self._image_problems(self.image)
        yield from self._target_problems(seen)
        if self.group is not None:
            yield from self._group_problems(self.group)
        if self.columns is not None:
            for name in self.names:
                if name not in self.columns:
                    yield ("columns",), f"lacks {name}"
            if len(set(self.columns)) < len(self.columns):
                yield ("columns",), "must all differ"

    def _target_problems(self, seen: set[str]) -> Iterator[Problem]:
        """`seen` are the features' names, to which those of the targets are added."""
        features = set(seen)
        for i, target in enumerate(self.targets):
            key: Key = ("also", i - 1) if i else ("target",)
            for inner, sentence in target.contradictions():
                yield (*key, *inner), sentence
            if target.name in features:
                yield (*key, "name"), f"is also a feature (got {target.name})"
            elif target.name in seen:
                yield (*key, "name"), f"stands twice (got {target.name})"
            seen.add(target.name)
        if self.also:
            return
        if self.target.weight != 1.0:
            yield ("target", "weight"), "is for several targets (`also`), among whose losses it weighs"

    def _group_problems(self, group: Group) -> Iterator[Problem]:
        for key, sentence in group.contradictions():
            yield ("group", *key), sentence
        if group.name in (target.name for target in self.targets):
            yield ("group", "name"), f"is a target (got {group.name}); evaluations tell each class's recall anyway"
        if self.validation_fraction == 0:
            yield ("group",), "is for evaluations, and validation_fraction is 0, so that there are none"

    def _image_problems(self, image: Image) -> Iterator[Problem]:
        names = self.feature_names
        if image.first not in names:
            yield ("image", "first"), f"is no feature (got {image.first})"
            return
        start = names.index(image.first)
        pixels = self.features[start : start + image.pixels]
        if len(pixels) < image.pixels:
            yield (
                ("image",),
                f"has {image.pixels} pixels, but from {image.first} on there are only {len(pixels)} features",
            )
        for pixel in pixels:
            if not isinstance(pixel, Numeric) or pixel.may_be_missing:
                yield ("image",), f"has pixels that are numbers and never missing, and {pixel.name} is not"
                return


def _bounds_problem(bounds: Bounds) -> Iterator[Problem]:
    if not 0 < bounds[1] - bounds[0] < math.inf:
        yield ("bounds",), f"must rise, as in [0, 100], and be a finite distance apart (got {list(bounds)})"
