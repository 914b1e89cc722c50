"""What the data owner permits. A federation that asks for more is refused, with the rule, what was asked and
what is allowed."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from common.documents import Document
from common.errors import Refusal
from common.federation import Federation


class Policy(Document):
    """`policy:` of client.yaml.

    `epsilon` and `delta` bound what all federations together may ever cost one row of this dataset.
    """

    epsilon: Annotated[float, Field(gt=0)]
    delta: Annotated[float, Field(gt=0, lt=1)]
    without_privacy: bool = False  # may a federation train on this table with no differential privacy?
    approved: Literal["any-within-policy"] | tuple[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")], ...] = (
        "any-within-policy"
    )

    def check(self, federation: Federation) -> None:
        """Raises `Refusal` if the federation asks for what the policy does not allow."""
        if self.approved != "any-within-policy" and federation.fingerprint not in self.approved:
            raise Refusal(
                f"policy.approved: federation {federation.fingerprint} is not among the {len(self.approved)} "
                "approved fingerprints; compare the document with `cloister check` and add it, or leave"
            )
        row = federation.privacy.row
        if row is None:
            if not self.without_privacy:
                raise Refusal(
                    "policy.without_privacy is false, and the federation trains without differential privacy "
                    "(privacy.row is null)"
                )
            return
        if row.delta > self.delta:
            raise Refusal(f"policy.delta: asked {row.delta:g}, allowed {self.delta:g}")
