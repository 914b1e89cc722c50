"""What Flower's Message needs of a process. If one of these fails, a Flower release has changed it."""

from __future__ import annotations

import subprocess
import sys

from flwr.app import Message, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from common.wire.identity import SERVER_NODE, identify_process, number
from tests.support import ROOT

MAKES_A_MESSAGE = """
import sys
from flwr.app import Message, RecordDict
from common.wire.identity import identify_process
if "identify" in sys.argv:
    identify_process("heart")
Message(RecordDict(), dst_node_id=7, message_type="train")
print("made")
"""


def makes_a_message(*arguments: str) -> subprocess.CompletedProcess[str]:
    """In a fresh process, since an identity, once given, stays."""
    return subprocess.run(
        [sys.executable, "-c", MAKES_A_MESSAGE, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


def test_a_process_without_identity_cannot_make_a_message():
    done = makes_a_message()
    assert done.returncode != 0
    assert "TaskIdentity" in done.stderr


def test_a_process_with_identity_can():
    done = makes_a_message("identify")
    assert done.stdout == "made\n", done.stderr


def test_messages_come_from_the_server_of_the_run():
    run = identify_process("heart")
    metadata = Message(RecordDict(), dst_node_id=7, message_type="train").metadata
    assert (metadata.run_id, metadata.src_node_id, metadata.dst_node_id) == (run, SERVER_NODE, 7)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_number_is_one_that_flower_can_carry(name):
    assert 0 <= number(name) < 2**63


def test_a_number_is_the_same_in_every_process_and_release():
    assert number("heart") == 0x3CB968A982080BE1 >> 1  # `printf heart | sha256sum` begins so
    assert number("hearts") != number("heart")
