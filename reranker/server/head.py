"""Check the head of a request by RFC 9112, where the parser is more lenient."""

from __future__ import annotations

from reranker.errors import HeadersTooLargeError, MalformedRequestError, RerankError
from reranker.http.limits import MAX_HEADER_BYTES

MALFORMED = "the request is not valid HTTP"
TOO_LARGE = f"the address and headers are larger than {MAX_HEADER_BYTES} bytes"


def head_error(version: str, method: bytes, url: bytes, headers: list[tuple[bytes, bytes]]) -> RerankError | None:
    """Return the reason to refuse a head, or None. Sections are those of RFC 9112."""
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    hosts = sum(name == b"host" for name, _ in headers)
    if len(url) > MAX_HEADER_BYTES:
        return HeadersTooLargeError(TOO_LARGE)
    if version not in ("1.0", "1.1"):
        return MalformedRequestError("only versions 1.0 and 1.1 of HTTP are supported")
    if method == b"CONNECT":
        return MalformedRequestError("this is not a proxy")
    if b"#" in url:  # 3.2: no target has a fragment
        return MalformedRequestError("the address contains a #")
    if codings and (version == "1.0" or codings != [b"chunked"]):  # 6.1
        return MalformedRequestError("Transfer-Encoding may only be chunked, and only in version 1.1")
    if hosts > 1 or (hosts == 0 and version == "1.1"):  # 3.2
        return MalformedRequestError("one Host header is needed")
    return None
