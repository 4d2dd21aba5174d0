"""A remote file read once from front to back, whatever happens on the way.

An interrupted transfer goes on where it stopped: by a Range request if the server shows that its file is still the
same, else from the start again, past the bytes that were delivered before, whose hash must agree. So no byte is lost,
doubled or taken from another version of the file.
"""

from __future__ import annotations

import email.utils
import hashlib
import http
import random
import re
import time
from typing import NoReturn

from longclip_teacher.errors import InputError
from training.data.http_answer import Answer, Interrupted, Patience, get

__all__ = ["ChangedFile", "Download", "MissingFile", "TriesExhausted"]

_MISSING = (403, 404, 410)  # S3 answers 403 if the bucket may not be listed
_TRY_AGAIN = (408, 429, 500, 502, 503, 504)
_ADVICE = {
    206: "a part of it, though all was asked for",
    **dict.fromkeys((401, 403, 407), "the server wants a login, or does not let you have it"),
    **dict.fromkeys((404, 410), "check its name"),
}
_CHANGED = "it changed on the server while it was read"
_SKIP_BYTES = 256 << 10
_PROGRESS_BYTES = 1 << 20
_RANGE = re.compile(r"bytes (?:(\d+)-\d+|\*)/(\d+)")


class MissingFile(InputError):
    """A file that the server does not have, or does not admit to have."""


class ChangedFile(InputError):
    """A file whose bytes are not those that were read of it before."""


class TriesExhausted(InputError):
    """A server that gave nothing more however often it was asked."""


class Download:
    """A file at an http or https URL, of which `read` gives one piece after the other."""

    def __init__(
        self, url: str, ending: bytes = b"", patience: Patience | None = None, num_bytes: int | None = None
    ) -> None:
        """Nothing is requested before the first `read`.

        url        see `get` for redirects and credentials
        ending     last bytes of every complete file of this kind. A file that ends otherwise is asked for more, once
        num_bytes  size that the file should have. One that ends before is asked for more, once
        """
        self._url, self._ending, self._patience = url, ending, patience or Patience()
        self._least = num_bytes or 0
        self._answer: Answer | None = None
        self._position = 0  # bytes delivered
        self._hash = hashlib.blake2b()  # of these bytes
        self._tail = b""  # the last of them
        self._size: int | None = None  # of the file, as far as the last answer tells it
        self._validators: dict[str, str] = {}
        self._can_resume = True
        self._ended_at = -1
        self._shorter: int | None = None  # size of the last entire answer that was shorter than what was delivered
        self._failures, self._failed_at = 0, 0
        self._random = random.Random()  # not the global one, which belongs to the experiment

    def read(self, size: int) -> bytes:
        """Return some of the next bytes, at most `size`; b"" at the end of the file.

        Raise InputError with the cause for an answer that will not change, and TriesExhausted if the server gives
        nothing more.
        """
        while True:
            try:
                if self._answer is None:
                    self._answer = self._opened()
                return self._next(self._answer, size)
            except Interrupted as error:
                self.close()
                self._wait(error)

    def close(self) -> None:
        """End the connection."""
        if self._answer is not None:
            self._answer.close()
        self._answer = None

    def _next(self, answer: Answer, size: int) -> bytes:
        """Return the next bytes of an answer, or b"" if the file ends here."""
        left = size if self._size is None else min(size, self._size - self._position)
        data = answer.read(left) if left else b""
        if data:
            if not self._position:
                _check_no_page(answer, data)
            self._position += len(data)
            self._hash.update(data)
            self._tail = (self._tail + data)[-len(self._ending) :] if self._ending else b""
            return data
        if left and self._size is not None:
            raise Interrupted(f"cut short at byte {self._position} of {self._size}")
        is_short = self._position < self._least
        if (is_short or self._tail != self._ending) and self._ended_at != self._position:
            self._ended_at = self._position
            what = f"less than its {self._least} bytes" if is_short else "no end mark"
            raise Interrupted(f"{what} at byte {self._position}, its end")
        self._size = self._position
        return b""

    def _opened(self) -> Answer:
        """Return an answer whose next byte is the next one to deliver."""
        headers = {"User-Agent": "compact-longclip", "Accept": "*/*"}
        is_range = bool(self._position and self._can_resume and self._validators)
        if is_range:
            headers["Range"] = f"bytes={self._position}-"
            headers["If-Range"] = next(iter(self._validators.values()))
        answer = get(self._url, headers, self._patience)
        try:
            if answer.status == 200:
                self._start_again(answer)
            elif is_range and answer.status in (206, 416):
                self._go_on(answer)
            else:
                _refuse(answer)
        except BaseException:
            answer.close()
            raise
        return answer

    def _start_again(self, answer: Answer) -> None:
        """Read an answer with the entire file up to the next byte to deliver."""
        _check_plain(answer)
        size = _length(answer)
        if size is not None and size < self._position:
            if size == self._shorter:
                raise ChangedFile(_CHANGED)
            self._shorter = size
            raise Interrupted(f"{size} bytes, of which {self._position} were read before")
        again, left = hashlib.blake2b(), self._position
        while left:
            data = answer.read(min(left, _SKIP_BYTES))
            if not data:
                raise Interrupted(f"cut short at byte {self._position - left}")
            if left == self._position:
                _check_no_page(answer, data)
            again.update(data)
            left -= len(data)
        if again.digest() != self._hash.digest():
            raise ChangedFile(_CHANGED)
        self._size, self._validators = size, _validators(answer)

    def _go_on(self, answer: Answer) -> None:
        """Check that an answer with the rest of the file begins at the next byte to deliver of the same file."""
        content_range = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
        start, size = content_range.groups() if content_range else (None, None)
        if answer.status == 416 and size == str(self._position):
            self._size = self._ended_at = self._position
            return
        _check_plain(answer)
        same_size = self._size is None or size == str(self._size)
        same_file = all(
            answer.headers.get(name, "" if name == "ETag" else value) == value
            for name, value in self._validators.items()
        )
        if answer.status != 206 or start != str(self._position) or size is None or not same_size or not same_file:
            self._can_resume = False  # from now on only from the start, where the bytes themselves are compared
            raise Interrupted(f"HTTP {answer.status} with another part than was asked for")
        self._size = int(size)

    def _wait(self, error: Interrupted) -> None:
        """Wait before the next try. Raise TriesExhausted if there have been enough."""
        if self._position - self._failed_at >= _PROGRESS_BYTES:
            self._failures = 0
        self._failures, self._failed_at = self._failures + 1, self._position
        patience = self._patience
        if self._failures >= patience.tries:
            raise TriesExhausted(f"{error}, after {self._failures} tries") from None
        longest = min(patience.longest_wait, patience.first_wait * 2 ** (self._failures - 1))
        asked = min(patience.longest_retry_after, _seconds(error.retry_after))
        time.sleep(max(asked, longest * self._random.uniform(0.5, 1)))


def _refuse(answer: Answer) -> NoReturn:
    phrases = {status.value: status.phrase for status in http.HTTPStatus}
    cause = f"HTTP {answer.status} ({phrases.get(answer.status, 'unknown')})"
    if answer.status in _TRY_AGAIN:
        raise Interrupted(cause, answer.headers.get("Retry-After"))
    kind = MissingFile if answer.status in _MISSING else InputError
    raise kind(f"{cause}: {_ADVICE[answer.status]}" if answer.status in _ADVICE else cause)


def _check_plain(answer: Answer) -> None:
    """Raise InputError for a body that is not the file as it is."""
    for name, plain in (("Content-Encoding", "identity"), ("Transfer-Encoding", "chunked")):
        value = ", ".join(answer.headers.get_all(name, []))
        if value.strip().lower() not in ("", plain):
            shown = "".join(character if character.isprintable() else "?" for character in value[:50])
            raise InputError(f"the server changes it on the way ({name}: {shown}): let it send files as they are")


def _check_no_page(answer: Answer, start: bytes) -> None:
    """Raise InputError for a web page in place of a file. Some servers call any file one, so its start decides too."""
    is_called_page = answer.headers.get_content_subtype() in ("html", "xhtml+xml")
    if is_called_page and start.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"<"):
        raise MissingFile("a web page in its place: perhaps the server wants a login, or the URL is that of a page")


def _length(answer: Answer) -> int | None:
    """Return the size of an answer's body, None if the server does not tell it."""
    values = set(answer.headers.get_all("Content-Length", []))
    if not values or answer.headers.get("Transfer-Encoding"):
        return None
    value = values.pop().strip()
    if values or not re.fullmatch("[0-9]{1,18}", value):
        raise Interrupted("a Content-Length that is no number, or several")
    return int(value)


def _validators(answer: Answer) -> dict[str, str]:
    """Return the headers that identify this version of the file, the one for If-Range first. A weak ETag is none."""
    found = {name: answer.headers.get(name, "") for name in ("ETag", "Last-Modified")}
    return {name: value for name, value in found.items() if value and not value.startswith("W/")}


def _seconds(retry_after: str | None) -> float:
    """Return the time that a Retry-After header asks for, 0 if none can be read."""
    text = (retry_after or "").strip()
    if re.fullmatch("[0-9]{1,9}", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0
