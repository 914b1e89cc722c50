"""Turns memory that runs out while a model is made, trained or sent into an error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from common.document.federation import BYTES_A_PARAMETER, Federation
from common.errors import OutOfMemory

# torch says it with an error of many uses; these are its words for the processor's memory and for a GPU's.
_OF_TORCH = ("can't allocate memory", "not enough memory", "out of memory", "alloc_cpu")


@contextmanager
def room_for(federation: Federation) -> Iterator[None]:
    """Put it around work whose memory grows with the federation's model.

    Raises:
        OutOfMemory: the work needed more memory than there was; any other error passes unchanged.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_of_memory(error):
            raise
        told = _told(federation)
        raise OutOfMemory(told, public=told if federation.privacy.row is None else None) from error


def _is_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(words in str(error) for words in _OF_TORCH)


def _told(federation: Federation) -> str:
    count = federation.parameters
    once, training = federation.model_bytes / 2**30, count * BYTES_A_PARAMETER / 2**30
    return (
        f"this machine has too little memory for a model of {count:,} parameters: {once:.2g} GiB as it is sent, and "
        f"up to {training:.2g} GiB where it is trained; make model.hidden smaller, or use a machine with more memory"
    )
