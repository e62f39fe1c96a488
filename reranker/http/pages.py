"""The two pages for people: the playground at `/` and Swagger UI at `/docs`. Both work without internet access.

A page is one HTML file with everything in it, so one request loads it, no asset route has to be open beside it, and
its policy can be strict: only the scripts and styles whose hashes stand in the header run, and nothing is loaded from
or sent to another host. `no-referrer` keeps `/docs?access_token=...` out of whatever is opened from that page.
"""

from __future__ import annotations

import base64
import hashlib
import re
from importlib.resources import files

from fastapi import APIRouter, Request
from starlette.responses import Response

router = APIRouter(include_in_schema=False)


class Page:
    """A self-contained HTML page and the headers that go with it.

    Args:
        html: the page; its inline `<script>` and `<style>` elements have no attributes.
        policy: what its Content-Security-Policy allows beyond them.
        cache: who may keep a copy; every use asks whether it is still the same.
    """

    def __init__(self, html: str, policy: str, cache: str) -> None:
        self.body = html.encode()
        self.headers = {
            "Content-Security-Policy": (
                f"default-src 'none'; script-src {_hashes('script', html)}; style-src {_hashes('style', html)}; "
                f"connect-src 'self'; img-src data:; {policy}"
                "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
            ),
            "Cache-Control": f"{cache}, no-cache",
            "ETag": f'"{hashlib.sha256(self.body).hexdigest()[:32]}"',
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }

    def answer(self, request: Request) -> Response:
        """The page, or 304 when the browser has it already."""
        if self.headers["ETag"] in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=self.headers)
        return Response(self.body, headers=self.headers, media_type="text/html")


def _hashes(element: str, html: str) -> str:
    """The sources of a policy that let exactly these inline elements through."""
    texts = re.findall(rf"<{element}>(.*?)</{element}>", html, re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in texts)


def _read(package: str, path: str) -> str:
    return files(package).joinpath(path).read_text(encoding="utf-8")


def _docs() -> str:
    """docs.html with Swagger UI put in."""
    html = _read("reranker.http", "docs.html")
    for name in ("swagger-ui.css", "swagger-ui-bundle.js"):
        html = html.replace(f"/* {name} */", _read("fastapi_offline", f"static/{name}"))
    return html


# Trusted Types: the browser itself refuses to turn a string into HTML on the page that shows users' texts.
_PLAYGROUND = Page(
    _read("reranker.http", "playground.html"), "require-trusted-types-for 'script'; trusted-types 'none'; ", "public"
)
_DOCS = Page(_docs(), "", "private")


@router.head("/")
@router.get("/")
async def playground(request: Request) -> Response:
    """Try a query and documents in the browser. Open to everybody: the page is static and asks for the token itself."""
    return _PLAYGROUND.answer(request)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger UI; where tokens are set, open it as `/docs?access_token=<token>`."""
    return _DOCS.answer(request)
