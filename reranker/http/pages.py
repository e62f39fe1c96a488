"""The pages for people: the playground at `/` and Swagger UI at `/docs`. Both work without internet access.

A page is one HTML file with inline scripts and styles. One request loads it, no other route has to be open, and its
policy is strict: only scripts and styles whose hashes are in the header run, and nothing is loaded from or sent to
another host. `no-referrer` keeps `/docs?access_token=...` secret from the targets of links.

The 401 of `/docs` is a page that asks for the token, takes that of the playground which opened it, and loads the
documentation with it in a header: a token in an address would stay in histories and in logs of proxies.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.types import Scope

router = APIRouter(include_in_schema=False)


class Page:
    """A self-contained HTML page with its headers.

    Args:
        html: the page; its inline `<script>` and `<style>` elements have no attributes.
        policy: additional directives of its Content-Security-Policy, each with its semicolon.
        cache: `public` or `private`, for Cache-Control; every use of a copy is revalidated.
        becomes: HTML that the page writes into itself; its inline elements are allowed as well.
    """

    def __init__(self, html: str, policy: str, cache: str, becomes: str = "") -> None:
        self.body = html.encode()
        allowed = html + becomes
        self.headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src {_hashes('script', allowed)}; style-src {_hashes('style', allowed)}; "
                f"connect-src 'self'; img-src data:; {policy}"
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "Cache-Control": f"{cache}, no-cache",
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()[:32]}"',
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def response(self, request: Request) -> Response:
        """Return the page, or 304 if the browser has it already."""
        if self.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers, media_type="text/html")


def _hashes(element: str, html: str) -> str:
    """Return the policy sources that allow exactly the inline elements of a page."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def _read(package: str, path: str) -> str:
    return files(package).joinpath(path).read_text(encoding="utf-8")


def _docs() -> str:
    """Return docs.html with Swagger UI inlined."""
    html = _read("reranker.http", "docs.html")
    for name in ("swagger-ui.css", "swagger-ui-bundle.js"):
        html = html.replace(f"/* {name} */", _read("fastapi_offline", f"static/{name}"))
    return html


# Trusted Types: on the page with users' texts the browser refuses to parse a string as HTML.
_PLAYGROUND = Page(
    _read("reranker.http", "playground.html"), "require-trusted-types-for 'script'; trusted-types 'none'; ", "public"
)
_DOCS = Page(_docs(), "", "private")
_TOKEN = Page(_read("reranker.http", "token.html"), "", "private", becomes=_DOCS.body.decode())


@router.head("/")
@router.get("/")
async def playground(request: Request) -> Response:
    """Try a query and documents in the browser. The page is static, so it is open; it asks for the token."""
    return _PLAYGROUND.response(request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger UI; with `/docs?access_token=<token>` it uses this token."""
    return _DOCS.response(request)


def unauthorized(response: Response, scope: Scope) -> Response:
    """Return the 401 of a request; for `/docs` in a browser its body becomes the page that asks for the token."""
    accept = [value for name, value in scope["headers"] if name == b"accept"]
    if (scope["method"], scope["path"]) == ("GET", "/docs") and b"text/html" in b",".join(accept):
        response.body = _TOKEN.body
        content = {"Content-Type": "text/html; charset=utf-8", "Content-Length": str(len(_TOKEN.body))}
        response.headers.update(_TOKEN.headers | content | {"Vary": "Accept"})
        del response.headers["etag"]  # of a 401 there is no 304
    return response
