"""What encoding met in a table, and the sentences in which its owner is told."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class EncodingReport:
    """What encoding met, for the owner's eyes only: exact counts never leave a client."""

    rows: int = 0
    missing: dict[str, int] = field(default_factory=dict)
    clamped: dict[str, int] = field(default_factory=dict)
    other: dict[str, int] = field(default_factory=dict)
    targets_clamped: int = 0  # of a target that is a number
    unfit_missing: dict[str, int] = field(default_factory=dict)  # also among the missing
    absent: list[str] = field(default_factory=list)
    targets_missing: tuple[str, ...] = ()  # targets, beside others, that rows may lack
    classes: dict[str, int] = field(default_factory=dict)
    in_no_group: int = 0  # rows that are in none of the groups that evaluations count by
    nobody: int = 0  # rows that do not say whom they are about
    left_out: int = 0  # rows with a cell that does not fit
    unfit: list[str] = field(default_factory=list)  # the first of those cells, quoted

    def warnings(self, of: str = "") -> list[str]:
        """What is hardly meant: a column of which more than half is not what the schema says, and clamped targets."""
        half = self.rows / 2
        said = [
            f"warning: column {name}: {n} of {self.rows} cells are outside its bounds, and are clamped; does the "
            "schema mean another unit?"
            for name, n in self.clamped.items()
            if n > half
        ]
        said += [
            f"warning: column {name}: {n} of {self.rows} cells are none of its categories, and count as other; are "
            "they spelled in another way?"
            for name, n in self.other.items()
            if n > half
        ]
        said += [
            f"warning: target {name}: no row has one, so its head will learn nothing here"
            for name in self.targets_missing
            if self.missing.get(name, 0) == self.rows > 0 or name in self.absent
        ]
        if self.in_no_group > half:
            said.append(
                f"warning: {self.in_no_group} of {self.rows} rows are in none of the groups of schema.group; are they "
                "spelled in another way?"
            )
        if self.targets_clamped:
            prefix = "warning: " if self.targets_clamped > half else ""
            said.append(
                f"{prefix}{self.targets_clamped} of {self.rows} targets are outside their bounds and are clamped: to "
                "train on, and where an error is measured"
            )
        return [_named(line, of) for line in said] if of else said

    def _few(self, counts: dict[str, int]) -> dict[str, int]:
        """Those that no warning tells."""
        return {name: n for name, n in counts.items() if n <= self.rows / 2}

    def lines(self, of: str = "", *, use: str = "left out") -> list[str]:
        """The report as sentences, the least expected first. `of` names the table, if it is one of several; `use` says
        what became of rows that do not fit."""
        said = self.warnings()
        said += [f"column {name} is absent; it is optional and counts as missing" for name in self.absent]
        if sum(1 for n in self.classes.values() if n) == 1:
            said.append(f"all rows are of one class: {next(c for c, n in self.classes.items() if n)}")
        if 0 < self.in_no_group <= self.rows / 2:
            said.append(f"rows in none of the groups: {self.in_no_group}")
        if self.nobody:
            said.append(f"rows whose data.id is empty: {self.nobody}; they are dealt as one person's")
        if self.left_out:
            rows = "1 row that does" if self.left_out == 1 else f"{self.left_out} rows that do"
            said.append(f"{use}: {rows} not fit the schema: {'; '.join(self.unfit)}")
        for what, counts in [
            ("outside their bounds, clamped", self._few(self.clamped)),
            ("outside their categories, counted as other", self._few(self.other)),
            ("that do not fit, counted as missing", self.unfit_missing),
            ("missing", self.missing),
        ]:
            if counts:
                said.append(f"cells {what}: " + ", ".join(f"{name} {n}" for name, n in counts.items()))
        if self.classes:
            said.append("classes: " + ", ".join(f"{label} {n}" for label, n in self.classes.items()))
        return [_named(line, of) for line in said] if of else said


def _named(line: str, of: str) -> str:
    warning = "warning: " if line.startswith("warning: ") else ""
    return f"{warning}{of}: {line.removeprefix('warning: ')}"
