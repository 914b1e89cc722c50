"""Text files as text: their encoding, byte order marks and line ends.

Text is UTF-8 unless a mark at its beginning says UTF-16 or UTF-32, or its owner says otherwise. It is read in pieces,
so that a file may be larger than memory. Any line end becomes a line feed.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from pathlib import Path

from charset_normalizer import from_bytes

from common.errors import DataError

PIECE = 1 << 23  # bytes
SAMPLE = 1 << 16  # bytes, by which an encoding is guessed

MARKS = (  # the longest first: UTF-32's begins with UTF-16's
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# What tables are written in that are not UTF-8, the most frequent first.
LIKELY = ["cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "shift_jis", "gb18030", "big5", "euc_kr", "utf_16", "cp437"]


def known_encoding(name: str) -> str:
    """The name of an encoding of text. Raises `ValueError` if there is none."""
    try:
        info = codecs.lookup(name)
        "".encode(name)  # there are codecs from bytes to bytes, which are none of text
    except (LookupError, ValueError):
        raise ValueError(
            "must be an encoding that Python knows, such as utf-8, windows-1252, iso-8859-1 or utf-16"
        ) from None
    return info.name


def most_lines(path: Path) -> int:
    """How many lines a file has at most. Raises `DataError` if it cannot be read."""
    with _opened(path) as file:
        lines = 1
        while piece := file.read(PIECE):
            lines += piece.count(b"\n") + piece.count(b"\r")
        return lines


def pieces(path: Path, encoding: str | None = None) -> Iterator[str]:
    """A file's text in pieces, cut anywhere, with line feeds for line ends.

    Args:
        encoding: what the owner says it is; None where a mark says it, or it is UTF-8.

    Raises:
        DataError: the file cannot be read, or is in another encoding; the message has the line, and what to do.
    """
    with _opened(path) as file:
        first = file.read(PIECE)
        used = encoding or next((name for mark, name in MARKS if first.startswith(mark)), "utf-8")
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(used)(), translate=True)
        lines, piece = 1, first
        while True:
            try:
                text = decoder.decode(piece, final=not piece)
            except UnicodeError as error:
                raise _undecoded(path, used, error, piece, lines) from error
            if "\0" in text:
                raise DataError(
                    f"{path.name}: holds the character NUL, which no table has; if it is UTF-16 without its mark, say "
                    "so: `encoding: utf-16-le` below `data:` in the client file, --encoding utf-16-le for simulate and "
                    "schema draft"
                )
            lines += text.count("\n")
            yield text.removeprefix("\ufeff") if piece is first else text
            if not piece:
                return
            piece = file.read(PIECE)


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except FileNotFoundError:
        raise DataError(f"{path}: no such file") from None
    except OSError as error:
        raise DataError(f"{path.name}: cannot be read: {error.strerror}") from error


def _undecoded(path: Path, used: str, error: UnicodeError, piece: bytes, lines: int) -> DataError:
    if not piece:
        return DataError(f"{path.name}: line {lines}: the file ends in the middle of a character; is it cut off?")
    start = error.start if isinstance(error, UnicodeDecodeError) else 0
    line = lines + piece[:start].count(b"\n")
    said = f"{path.name}: line {line}: byte 0x{piece[start]:02x} is no {used} text"
    if used not in ("utf-8", "utf-8-sig"):
        return DataError(f"{said}. Without `encoding`, UTF-8 is read, and UTF-16 with its mark")
    name = _guess(piece[max(0, start - SAMPLE // 2) : start + SAMPLE // 2])
    seems = f"; it seems to be {name}" if name else ""
    name = name or "windows-1252"
    return DataError(
        f"{said}{seems}. Say so: `encoding: {name}` below `data:` in the client file, --encoding {name} for simulate "
        f"and schema draft; or convert it: iconv -f {name.upper()} -t UTF-8 {path.name} > utf8-{path.name}"
    )


def _guess(sample: bytes) -> str:
    """The likely encoding of a piece of text that is not UTF-8; "" if there is none."""
    guess = from_bytes(sample, cp_isolation=LIKELY).best()
    if guess is None:
        return ""
    # Most letters of western languages are the same bytes in several of them.
    name = LIKELY[0] if sample.decode(LIKELY[0], "replace") == str(guess) else guess.encoding
    return name.replace("cp125", "windows-125")
