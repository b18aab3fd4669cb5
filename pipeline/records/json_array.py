"""Read the elements of a JSON array one after the other, without the whole file in memory."""

import re
from collections.abc import Iterator
from io import BufferedReader

_BLANKS = b" \t\r\n"
_BLOCK_BYTES = 1 << 16
#: What decides where an element ends; a string that the text ends in has an empty group.
_MARK = re.compile(rb'"(?:[^"\\]++|\\.)*+("?)|[\[\]{},]', re.DOTALL)


class BrokenArray(ValueError):
    """The array cannot be read on from `line`, for the reason that the message has."""

    def __init__(self, line: int, message: str) -> None:
        """Store the line, from 1, and the message."""
        super().__init__(message)
        self.line = line


class _Scanner:
    """Finds where elements end in a text that grows."""

    def __init__(self) -> None:
        """Begin behind the bracket that opens the array."""
        self.depth, self.scanned = 1, 0

    def ends(self, held: bytes) -> Iterator[re.Match[bytes]]:
        """Yield the commas between the elements in `held`, of which `scanned` bytes were seen, and the last bracket."""
        for mark in _MARK.finditer(held, self.scanned):
            self.scanned, sign = mark.end(), mark[0]
            if sign.startswith(b'"'):
                if not mark[1]:  # it goes on in the next block
                    self.scanned = mark.start()
                    return
                continue
            self.depth += (sign in b"[{") - (sign in b"]}")
            if self.depth == 0 or (self.depth == 1 and sign == b","):
                yield mark
            if self.depth == 0:
                return


def elements(file: BufferedReader, most: int) -> Iterator[tuple[int, bytes]]:
    """
    Yield the line, from 1, and the bytes of each element of the array that the rest of `file` is.

    Elements end where quotes, brackets and commas say so; they may be empty or no JSON. Raises `BrokenArray` if an
    element has more than `most` bytes, or if the file ends before the array, or goes on after it.
    """
    block, scan = file.read(_BLOCK_BYTES), _Scanner()
    held = block.partition(b"[")[2]
    line, is_first = 1 + block[: -len(held) or None].count(b"\n"), True
    while True:
        begin = 0
        for mark in scan.ends(held):
            text, begin = held[begin : mark.start()], mark.end()
            element = text.lstrip(_BLANKS)
            at = line + text.count(b"\n", 0, len(text) - len(element))
            if len(element) > most:
                raise BrokenArray(at, f"a row has more than {most:,} bytes")
            if element or mark[0] == b"," or not is_first:
                yield at, element.rstrip(_BLANKS)
            line, is_first = line + text.count(b"\n"), False
        held, scan.scanned = held[begin:], scan.scanned - begin
        if not scan.depth:
            break
        if len(held) > most:
            at = line + held.count(b"\n", 0, len(held) - len(held.lstrip(_BLANKS)))
            raise BrokenArray(at, f"a row has more than {most:,} bytes")
        more = file.read(max(_BLOCK_BYTES, len(held)))
        if not more:
            raise BrokenArray(line, "the file ends before its array does")
        held += more
    while held:
        if held.strip(_BLANKS):
            raise BrokenArray(line, "more follows the end of the array")
        held = file.read(_BLOCK_BYTES)
