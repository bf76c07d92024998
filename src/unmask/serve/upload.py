"""Forms with a file (`multipart/form-data`), whose file is written to the disk while it arrives.

Owns the form's bounds. Knows neither the fields' meaning nor where files are kept.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header

from unmask.files import disk_errors
from unmask.serve.errors import ApiError, bad_request

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

OVERHEAD = 2**16
"""Bytes of a form beside its file."""
_BROKEN = "the body is not a whole form (multipart/form-data); send it as a client library does"
_MAX_PARTS = 16
_MAX_FIELD = 2**12


@dataclass
class UploadedForm:
    """A form.

    Attributes:
        fields: values by name.
        filename: of the file, as the client calls it; None: the form had no file.
        num_bytes: of the file.
    """

    fields: dict[str, str] = field(default_factory=dict)
    filename: str | None = None
    num_bytes: int = 0


async def read_form(content_type: str, chunks: AsyncIterator[bytes], path: Path, *, name: str, max_bytes: int) -> UploadedForm:
    """Read a form, and write the one file that it holds.

    Args:
        content_type: header of the request.
        chunks: its body.
        path: where the file is written.
        name: of the file's part.
        max_bytes: of the file.

    Raises:
        ApiError: a form that is broken or without a file, or a file that is too large.
        CheckpointError: the disk is full.
    """
    boundary = parse_options_header(content_type)[1].get(b"boundary", b"")
    try:
        with disk_errors(path), path.open("xb") as file:
            receiver = _Receiver(file, name, max_bytes)
            parser = MultipartParser(boundary, receiver.callbacks())
            async for chunk in chunks:
                parser.write(chunk)
            parser.finalize()
        if not receiver.is_complete:
            raise bad_request(_BROKEN)
        if receiver.form.filename is None:
            raise bad_request(f"{name}: it is missing", name)
    except FormParserError as error:
        raise bad_request(_BROKEN) from error
    return receiver.form


class _Receiver:
    """Takes the parts of a form from the parser."""

    def __init__(self, file: BinaryIO, name: str, max_bytes: int) -> None:
        self.form, self.is_complete = UploadedForm(), False
        self._file, self._name, self._max_bytes = file, name, max_bytes
        self._header, self._value, self._disposition = b"", b"", b""
        self._num_parts = 0
        self._part: str | None = None  # None: the file
        self._data = bytearray()

    def callbacks(self) -> MultipartCallbacks:
        """As the parser calls them."""
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_name,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._part_data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def _begin(self) -> None:
        self._num_parts += 1
        if self._num_parts > _MAX_PARTS:
            raise bad_request(f"the form has more than {_MAX_PARTS} parts; send a file and a purpose")
        self._disposition = b""
        self._data.clear()

    def _header_name(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = self._value
        self._header = self._value = b""

    def _headers_finished(self) -> None:
        options = parse_options_header(self._disposition)[1]
        name = options.get(b"name", b"").decode(errors="replace")
        self._part = name
        if name == self._name:
            if b"filename" not in options or self.form.filename is not None:
                raise bad_request(f"{name}: it must be one file", name)
            self._part, self.form.filename = None, options[b"filename"].decode(errors="replace")[:255]

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part is not None:
            self._data += data[start:end]
            if len(self._data) > _MAX_FIELD:
                raise bad_request(
                    f"{self._part[:80]!r} is longer than {_MAX_FIELD} bytes; only the part {self._name} is a file"
                )
            return
        self.form.num_bytes += end - start
        if self.form.num_bytes > self._max_bytes:
            raise ApiError(413, f"the file is larger than {self._max_bytes} bytes; send less, or raise the server's max_file")
        self._file.write(data[start:end])

    def _part_end(self) -> None:
        if self._part is not None:
            self.form.fields[self._part] = self._data.decode(errors="replace")

    def _end(self) -> None:
        self.is_complete = True
