"""The pages in a real browser: visible results, users' texts as text only, no request to another host."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Page, Route, expect

from reranker.rows import columns
from tests.conftest import GUNICORN, Server, Start
from tests.rows import test_inputs

FAKE = [*GUNICORN[:-1], "tests.fake_app:app"]
TOKEN = "s3cret-of-the-page"
MARKUP = "<img src=x onerror=alert(1)><script>alert(2)</script>{{7*7}}\"'><b id=injected>"

expect.set_options(timeout=30_000)

Open = Callable[..., Page]


@pytest.fixture
def visit(browser: Browser) -> Iterator[Open]:
    """Open a page: `visit(server, "/docs", locale="zh-CN")`.

    Afterwards: no script failed, no dialog opened, no policy was violated and nothing was asked of another host.
    """
    contexts = []
    said: list[str] = []
    asked: list[str] = []

    def refuse(dialog: Dialog) -> None:
        said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def run(server: Server, path: str = "/", **options: object) -> Page:
        context = browser.new_context(**{"locale": "en-US", **options})  # type: ignore[arg-type]
        contexts.append(context)
        context.set_default_timeout(30_000)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(f"uncaught: {error}"))
        page.on("dialog", refuse)
        page.on("request", lambda request: asked.append(request.url))
        page.goto(f"http://127.0.0.1:{server.port}{path}")
        return page

    yield run
    for context in contexts:
        context.close()
    assert [line for line in said if re.search("uncaught|dialog|Security Policy|Trusted", line)] == []
    assert [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.fixture(scope="module")
def guarded(start: Start) -> Server:
    return start(command=FAKE, ACCESS_TOKEN=TOKEN, token=TOKEN, LOG_LEVEL="DEBUG")


def fill(page: Page, query: str, documents: list[str], **fields: str) -> None:
    page.fill("#query", query)
    page.fill("#documents", "\n".join(documents))
    for name, value in fields.items():
        page.fill(f"#{name}", value)


def ranking(page: Page) -> list[tuple[str, float]]:
    """Return the visible (document, score) pairs, from top to bottom."""
    page.locator("#ranking li").first.wait_for()
    texts = page.locator("#ranking p").all_inner_texts()
    return list(zip(texts, map(float, page.locator("#ranking .score").all_inner_texts()), strict=True))


# Without a browser


def test_the_page_is_open_and_strict(guarded: Server) -> None:
    answer = guarded.client.get("/", headers={"Authorization": ""})
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().partition(" ")[::2] for part in answer.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["frame-ancestors"] == policy["form-action"] == policy["base-uri"] == "'none'"
    assert "unsafe" not in answer.headers["content-security-policy"]
    assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy["script-src"])
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"
    again = guarded.client.get("/", headers={"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert TOKEN not in answer.text


def test_the_docs_are_strict_too(guarded: Server) -> None:
    answer = guarded.client.get("/docs")
    policy = answer.headers["content-security-policy"]
    assert re.search(r"script-src 'sha256-[\w+/]{43}=' 'sha256-[\w+/]{43}=';", policy)
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_without_a_token_the_docs_are_a_401_that_asks_for_it(guarded: Server) -> None:
    browser = {"Authorization": "", "Accept": "text/html,*/*;q=0.8"}
    answer = guarded.client.get("/docs", headers=browser)
    assert (answer.status_code, answer.headers["content-type"]) == (401, "text/html; charset=utf-8")
    assert answer.headers["www-authenticate"] == "Bearer"
    assert "etag" not in answer.headers
    assert "swagger" not in answer.text.lower()
    policy = answer.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert set(re.findall("'sha256-.*?'", guarded.client.get("/docs").headers["content-security-policy"])) < set(
        re.findall("'sha256-.*?'", policy)
    )
    for path, accept in (("/docs", "*/*"), ("/openapi.json", "text/html")):
        answer = guarded.client.get(path, headers={"Authorization": "", "Accept": accept})
        assert (answer.status_code, answer.json()["error_type"]) == (401, "unauthorized")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH"])
def test_the_page_can_only_be_read(guarded: Server, method: str) -> None:
    assert guarded.client.request(method, "/", headers={"Authorization": ""}).status_code == 405


@pytest.mark.parametrize(
    "path", ["/docs", "/docs/", "/openapi.json", "/redoc", "//", "/index.html", "/playground.html"]
)
def test_nothing_beside_the_page_is_open(guarded: Server, path: str) -> None:
    assert (
        guarded.client.get(f"http://127.0.0.1:{guarded.port}{path}", headers={"Authorization": ""}).status_code == 401
    )


# The playground


def test_the_example_is_ranked_as_the_service_ranks_it(server: Server, visit: Open) -> None:
    page = visit(server)
    for language in ("en", "zh"):
        page.click(f"[data-example={language}]")
        with page.expect_response("**/v1/rerank") as caught:
            page.click("#rank")
        expect(page.locator("#status")).to_be_hidden()
        documents = page.input_value("#documents").split("\n")
        results = caught.value.json()
        assert ranking(page) == [(documents[r["index"]], float(f"{r['score']:.4f}")) for r in results]
        scores = [score for _, score in ranking(page)]
        assert scores == sorted(scores, reverse=True)
        assert len(scores) == len(documents)
        widths = [box["width"] for bar in page.locator(".bar i").all() if (box := bar.bounding_box())]
        assert widths == sorted(widths, reverse=True)
        times = page.locator("#times").inner_text()
        assert f"{caught.value.headers['x-total-time']} ms" in times
        assert caught.value.headers["x-prompt-tokens"] in times


def test_instruction_and_top_k_are_sent_only_when_given(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    fill(page, "a b", ["a", "a b", "c", "", "  "])
    with page.expect_request("**/v1/rerank") as plain:
        page.keyboard.press("Control+Enter")
    assert plain.value.post_data_json == {"query": "a b", "documents": ["a", "a b", "c"]}
    assert len(ranking(page)) == 3  # until then another request would not be sent
    fill(page, "a b", ["a", "a b", "c"], instruction="find letters", top_k="2")
    with page.expect_request("**/v1/rerank") as full:
        page.press("#top_k", "Enter")
    extra = {"top_k": 2, "instruction": "find letters"}
    assert full.value.post_data_json == {"query": "a b", "documents": ["a", "a b", "c"], **extra}
    expect(page.locator("#ranking p")).to_have_text(["a b", "a"])
    expect(page.locator("#summary")).to_have_text("2 of 3 documents")


def test_markup_stays_text(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    page.click("#code summary")
    fill(page, MARKUP, [MARKUP, "</script><svg onload=alert(3)>"], instruction=MARKUP, token=MARKUP.replace(" ", ""))
    page.click("#rank")
    expect(page.locator("#ranking p")).to_have_text([MARKUP, "</script><svg onload=alert(3)>"])
    for tab in ("python", "curl"):
        page.click(f"[data-language={tab}]")
        assert json.dumps(MARKUP) in page.locator("#snippet").inner_text()
    assert page.locator("#injected, main img, main svg, main script").count() == 0


def test_the_token_is_asked_for_sent_and_kept_nowhere(guarded: Server, visit: Open) -> None:
    page = visit(guarded)
    fill(page, "a", ["a", "b"])
    page.click("#rank")
    expect(page.locator("#status")).to_have_text("This service requires an access token. Enter it and try again.")
    expect(page.locator("#token")).to_be_focused()
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    expect(page.locator("#status")).to_have_text("The access token is wrong. Enter a valid one and try again.")
    page.fill("#token", TOKEN)
    with page.expect_request("**/v1/rerank") as sent:
        page.click("#rank")
    assert sent.value.headers["authorization"] == f"Bearer {TOKEN}"
    expect(page.locator("#ranking p")).to_have_text(["a", "b"])
    expect(page.locator("#token")).not_to_have_attribute("aria-invalid", "true")
    page.click("#code summary")
    for tab in ("python", "curl"):
        page.click(f"[data-language={tab}]")
        assert TOKEN not in page.content()
        assert "ACCESS_TOKEN" in page.locator("#snippet").inner_text()
    kept = (
        "[location.href, document.cookie, JSON.stringify({...localStorage, ...sessionStorage}), history.length].join()"
    )
    assert TOKEN not in page.evaluate(kept)
    page.reload()
    assert page.input_value("#token") == ""
    assert TOKEN not in guarded.log


def test_the_code_to_copy_gives_the_ranking_that_is_shown(guarded: Server, visit: Open) -> None:
    page = visit(guarded, permissions=["clipboard-read", "clipboard-write"])
    awkward = ["it's $HOME `id` \\n a", 'a "b" \\ 中文 😀', "JSON", "null"]
    fill(page, "a b 中文 it's", awkward, instruction="don't $(exit 1)", top_k="3", token=TOKEN)
    page.click("#rank")
    shown = ranking(page)
    page.click("#code summary")
    page.click("#copy")
    expect(page.locator("#copy")).to_have_text("Copied")
    curl = page.evaluate("navigator.clipboard.readText()")
    page.click("[data-language=python]")
    python = page.locator("#snippet").inner_text()
    environment = os.environ | {"ACCESS_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1"}

    if shutil.which("curl") is None or shutil.which("bash") is None:
        pytest.skip("no curl or no bash on this machine")
    done = subprocess.run(["bash", "-c", curl], env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert [(awkward[r["index"]], round(r["score"], 4)) for r in json.loads(done.stdout)] == shown

    # The same calls of httpx, which the tests have; the page shows requests, which more people have.
    script = python.replace("import requests", "import httpx as requests")
    assert script != python
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [(awkward[int(index)], round(float(score), 4)) for index, score in rows] == shown


DROP = """([name, bytes]) => {
    const data = new DataTransfer();
    data.items.add(new File([new Uint8Array(bytes)], name));
    document.querySelector("#documents").dispatchEvent(
        new DragEvent("drop", {dataTransfer: data, bubbles: true, cancelable: true}));
}"""


def test_files_are_dropped_and_chosen(fake_server: Server, visit: Open, tmp_path: Path) -> None:
    page = visit(fake_server)
    files = {
        "lines.txt": "one of a text\r\n\n  two of a text\n".encode("utf-8-sig"),
        "rows.jsonl": b'"one of rows"\n\n{"id": 1, "text": "two of\\nrows"}\n',
        "table.CSV": b'id,Text\r\n1,"one, ""of"" a\r\ntable"\r\n2,two of a table\r\n',
        "excel.csv": "编号,内容\n1,第一个\n2,第二个\n".encode("gb18030"),
        "array.json.gz": gzip.compress(b'["one of an array"]'),
    }
    page.click("#clear")
    for name, content in files.items():
        page.evaluate(DROP, [name, list(content)])
    captions = page.locator("#files li span")
    expect(captions).to_have_text(
        ["lines.txt · 2", "rows.jsonl · 2", "table.CSV · 2", "excel.csv · 2 · GB18030", "array.json.gz · 1"]
    )
    shown = page.locator("#files select").evaluate_all("(all) => all.map((one) => one.selectedOptions[0].textContent)")
    assert shown == ["text", "Text", "内容"]
    fill(page, "text", ["typed"])
    with page.expect_request("**/v1/rerank") as sent:
        page.click("#rank")
    assert json.loads(sent.value.post_data or "")["documents"] == [
        *["typed", "one of a text", "  two of a text", "one of rows", "two of\nrows"],
        *['one, "of" a\r\ntable', "two of a table", "第一个", "第二个", "one of an array"],
    ]
    expect(page.locator("#count")).to_have_text("10")

    page.click("[aria-label='Remove rows.jsonl']")
    expect(page.locator("#count")).to_have_text("8")
    for name, content, message in (
        (
            "broken.jsonl",
            b'"fine"\n{"text": 3}',
            "broken.jsonl, line or item 2: expected a JSON string, or an object with the text field of the first one.",
        ),
        ("picture.png", b"x", "picture.png: unknown file type. Supported: .txt, .jsonl, .ndjson,"),
        ("a.parquet", b"PAR1", "a.parquet: Parquet is supported on the command line only. Save it as .jsonl or .csv."),
        ("a.txt", b'[{"text": "x"}]', "a.txt looks like a JSON array. Rename it to end in .json, or paste its lines."),
    ):
        page.evaluate(DROP, [name, list(content)])
        expect(page.locator("#status")).to_contain_text(message)
    expect(page.locator("#count")).to_have_text("8")
    page.click("#language")
    expect(page.locator("#status")).to_have_text(
        "a.txt 看起来是 JSON 数组，请让文件名以 .json 结尾，或直接粘贴其中的各行。"
    )
    page.click("#language")

    (tmp_path / "chosen.txt").write_text("chosen")
    (tmp_path / "one.pdf").write_text("x")
    (tmp_path / "two.md").write_text("x")
    page.set_input_files("#file", [tmp_path / "one.pdf", tmp_path / "chosen.txt", tmp_path / "two.md"])
    expect(page.locator("#count")).to_have_text("9")
    expect(page.locator("#status")).to_contain_text("one.pdf: unknown file type")
    expect(page.locator("#status")).to_contain_text("two.md: unknown file type")


def test_a_ranking_leaves_the_error_of_a_file_that_was_dropped_meanwhile(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    held: list[Route] = []
    page.route("**/v1/rerank", lambda route: held.append(route))
    fill(page, "a b", ["a", "a b"])
    page.click("#rank")
    page.evaluate(DROP, ["picture.png", [1]])
    expect(page.locator("#status")).to_contain_text("picture.png: unknown file type")
    while not held:
        page.wait_for_timeout(10)
    held[0].continue_()
    expect(page.locator("#ranking p")).to_have_text(["a b", "a"])
    expect(page.locator("#status")).to_be_visible()
    expect(page.locator("#status")).to_contain_text("picture.png: unknown file type")


def test_the_column_is_chosen_by_the_user_where_it_cannot_be_told(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server, locale="zh-CN")
    fill(page, "text", [])
    page.evaluate(DROP, ["t.csv", list("编号,标题,摘要\n1,甲,乙\n2,丙,丁\n".encode())])
    choice = page.get_by_label("t.csv 中文档所在的列")
    expect(choice.locator("option")).to_have_text(["选择列", "编号", "标题", "摘要"])
    expect(page.locator("#files li span")).to_have_text("t.csv · 0")
    page.click("#rank")
    expect(page.locator("#status")).to_have_text("请选择 t.csv 中文档所在的列。")
    expect(choice).to_be_focused()
    choice.select_option("摘要")
    expect(page.locator("#count")).to_have_text("2")
    expect(choice).to_be_focused()
    with page.expect_request("**/v1/rerank") as sent:
        page.click("#rank")
    assert (sent.value.post_data_json or {})["documents"] == ["乙", "丁"]
    page.click("[aria-label='移除 t.csv']")

    page.evaluate(DROP, ["one.csv", list("第一个\n第二个\n".encode())])
    choice = page.get_by_label("one.csv 中文档所在的列")
    expect(choice.locator("option")).to_have_text(["选择列", "第一个", "没有标题行：每行都是文档"])
    for option, count in (("第一个", "1"), ("没有标题行：每行都是文档", "2"), ("选择列", "")):
        choice.select_option(option)
        expect(page.locator("#count")).to_have_text(count)
    page.click("[aria-label='移除 one.csv']")

    page.evaluate(DROP, ["keys.jsonl", list(b'{"a": "x", "b": "y"}\n{"a": 1, "b": "z"}\n')])
    choice = page.get_by_label("keys.jsonl 中文档所在的列")
    choice.select_option("a")
    expect(page.locator("#status")).to_contain_text("keys.jsonl 第 2 行")
    choice.select_option("b")
    expect(page.locator("#status")).to_be_hidden()
    expect(page.locator("#count")).to_have_text("2")


READ = """async (files) => {
    const results = [];
    for (const [name, bytes] of files) {
        try {
            const file = await readFile(new File([new Uint8Array(bytes)], name));
            const undecided = file.columns.length > 0 && file.column === null;
            results.push(undecided ? {undecided} : {documents: file.documents, encoding: file.encoding});
        } catch (problem) {
            results.push({error: problem.said ? say(...problem.said) : String(problem)});
        }
    }
    return results;
}"""


def test_files_are_read_as_on_the_command_line(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    assert page.evaluate("TEXT_NAMES") == list(columns.TEXT_NAMES)
    encodings = ["utf-8", "utf-8-sig", "gb18030", "utf-16"]
    cases = [(name, encoding) for name in test_inputs.GOOD for encoding in encodings]
    contents = [test_inputs.GOOD[name][0].encode(encoding) for name, encoding in cases]
    files = [[name, list(content)] for (name, _), content in zip(cases, contents, strict=True)]
    packed = [[f"{name}.gz", list(gzip.compress(content))] for (name, _), content in zip(cases, contents, strict=True)]
    results = page.evaluate(READ, files + packed)
    for (name, encoding), content, result in zip(cases * 2, contents * 2, results, strict=True):
        assert result.get("documents") == test_inputs.GOOD[name][1], (name, encoding, result)
        told = {"utf-8-sig": "UTF-8", "utf-16": "UTF-16LE"}.get(encoding, encoding.upper())
        assert result["encoding"] == ("UTF-8" if encoding == "gb18030" and content.isascii() else told)
    tables = [(name, *test_inputs.awkward(name, columns)) for name in ("x.csv", "x.tsv") for columns in (2, 3)]
    results = page.evaluate(READ, [[name, list(content)] for name, content, _ in tables])
    assert [result.get("documents") for result in results] == [texts for _, _, texts in tables]


def test_files_are_refused_as_on_the_command_line(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    contents = [content if isinstance(content, bytes) else content.encode() for _, content, _ in test_inputs.REFUSED]
    files = [[case[0], list(content)] for case, content in zip(test_inputs.REFUSED, contents, strict=True)]
    for (name, content, says), result in zip(test_inputs.REFUSED, page.evaluate(READ, files), strict=True):
        if "GBK" in says or "save it as UTF-8" in says:  # the page tries GB18030 itself
            continue
        assert result.get("undecided") or name in result.get("error", ""), (name, content, result)
        assert "TypeError" not in result.get("error", "")


def test_it_says_that_no_instruction_is_read(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)

    warnings = "topk is not read | instruction is not read: the prompt of the served model has none"

    def unread(route: Route) -> None:
        response = route.fetch()
        route.fulfill(response=response, headers=response.headers | {"x-warnings": warnings})

    page.route("**/v1/rerank", unread)
    fill(page, "cats", ["a cat"], instruction="Find code")
    page.click("#rank")
    said = "topk is not read\nThe served model reads no instruction, so it was ignored."
    expect(page.locator("#warnings")).to_have_text(said)
    page.unroute("**/v1/rerank")
    page.click("#rank")
    expect(page.locator("#warnings")).to_be_hidden()


def test_it_says_what_was_cut(server: Server, visit: Open) -> None:
    page = visit(server)
    page.click("#options summary")
    fill(page, "cats", ["a cat", "cats and dogs " * 30], max_tokens_per_doc="20")
    with page.expect_response("**/v1/rerank") as caught:
        page.click("#rank")
    assert caught.value.headers["x-truncated-documents"] == "1"
    expect(page.locator("#warnings")).to_be_visible()
    expect(page.locator("#warnings")).to_contain_text("Truncated documents: 1. Only the beginning of each was scored;")
    fill(page, "cats", ["a cat"])
    page.click("#rank")
    expect(page.locator("#warnings")).to_be_hidden()


def test_what_is_missing_is_said_before_anything_is_sent(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url))
    page.click("#clear")
    for field, message in (("query", "Enter a query."), ("documents", "Enter at least one document.")):
        page.click("#rank")
        expect(page.locator("#status")).to_have_text(message)
        expect(page.locator(f"#{field}")).to_be_focused()
        page.fill(f"#{field}", "a")
    for top in ("0", "1.5", "x"):
        page.fill("#top_k", top)
        page.click("#rank")
        expect(page.locator("#status")).to_contain_text("top_k")
    page.fill("#top_k", "")
    page.fill("#token", "schlüssel")
    page.click("#rank")
    expect(page.locator("#status")).to_contain_text("access token is wrong")
    assert [url for url in sent if url.endswith("rerank")] == []


def test_errors_are_shown_with_their_request_id(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    fill(page, "a", ["a"])
    page.click("#rank")
    assert len(ranking(page)) == 1
    fill(page, "too long", ["a"])
    with page.expect_response("**/v1/rerank") as caught:
        page.click("#rank")
    expect(page.locator("#status")).to_have_text(
        "The service cannot rank this request. Correct it and try again.\n"
        f"Error 422: {caught.value.json()['detail']} (request {caught.value.headers['x-request-id']})"
    )
    expect(page.locator("#ranking li")).to_have_count(0)  # nothing stale beside an error
    body = json.dumps({"detail": "too busy"})
    answers: list[tuple[dict[str, Any], str]] = [
        ({"status": 429, "body": body, "headers": {"retry-after": "7"}}, "The service is busy. Try again in 7 s."),
        ({"status": 500, "body": body}, "The service failed. Try again;"),
        ({"status": 413, "body": "<html>"}, "The response (status 413) is not from the service."),
        ({"status": 200, "body": "{}"}, "The response (status 200) is not from the service."),
    ]
    page.route("**/v1/rerank", lambda route: route.fulfill(**answers[0][0]))
    while answers:
        page.click("#rank")
        expect(page.locator("#status")).to_contain_text(answers[0][1])
        del answers[0]


def test_it_waits_for_the_model_and_sends_then(start: Start, visit: Open) -> None:
    server = start(command=FAKE, FAKE_LOAD_SECONDS="6", wait="loading")
    page = visit(server)
    expect(page.locator("#status")).to_contain_text("its model may still be loading")
    fill(page, "a b", ["a", "a b"])
    page.click("#rank")
    expect(page.locator("#status")).to_contain_text("sent as soon as it is")
    expect(page.locator("#ranking p")).to_have_text(["a b", "a"])
    expect(page.locator("#status")).to_be_hidden()


def test_a_request_can_be_stopped_and_a_silent_service_is_noticed(start: Start, visit: Open) -> None:
    server = start(command=FAKE, FAKE_SECONDS="2")
    page = visit(server)
    expect(page.locator("#stop")).to_be_hidden()
    fill(page, "a", ["a"])
    page.click("#rank")
    page.click("#stop")
    expect(page.locator("#status")).to_have_text("Stopped.")
    server.stop(signal.SIGINT)  # which keeps the browser's connection open for a shorter time than SIGTERM
    page.click("#rank")
    expect(page.locator("#status")).to_have_text("The service does not respond. Is it running?")


def test_it_names_the_model_and_marks_the_demo(server: Server, guarded: Server, visit: Open) -> None:
    page = visit(server)
    info = server.client.get("/info").json()
    facts = [info["model_id"], info["device"], info["model_dtype"], f"{info['max_input_length']} tokens per prompt"]
    expect(page.locator("#model span")).to_have_text([*facts, re.compile("Demo model: for trying the API only")])
    page = visit(guarded)
    expect(page.locator("#model")).to_have_text("Enter the access token to see the model.")
    page.fill("#token", TOKEN)
    page.press("#token", "Tab")
    expect(page.locator("#model span").first).to_have_text("fake")
    expect(page.locator("#model .warn")).to_have_count(0)


def test_two_queries_are_compared_and_exported(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    fill(page, "a b c", ["c", "b c", "a b c", "=d"], top_k="3")
    page.check("#compare")
    fill(page, "a b c", ["c", "b c", "a b c", "=d"], query2="a b c", instruction2="")
    page.click("#rank")
    expect(page.locator("#status")).to_contain_text("Query B and instruction B are the same")
    fill(page, "a b c", ["c", "b c", "a b c", "=d"], query2="=d c", instruction2="other")
    page.click("#rank")
    expect(page.locator("#ranking p")).to_have_text(["a b c", "b c", "c"])
    expect(page.locator("#ranking .moved")).to_have_count(0)
    expect(page.locator("#ranking2 p")).to_have_text(["c", "b c", "a b c"])
    expect(page.locator("#ranking2 .moved")).to_have_text(["▲ 2", "=", "▼ 2"])
    expect(page.locator("#ranking2 .moved").first).to_have_attribute("title", "up by 2 from ranking A")
    expect(page.locator("#summary")).to_have_text("2 of 3 documents moved")
    expect(page.locator("#title2")).to_have_text("B · =d c\nother")

    page.uncheck("#compare")
    expect(page.locator("#stale")).to_have_text("The inputs have changed since this ranking. Rank again.")
    exported = {}
    for name in ("csv", "json"):
        with page.expect_download() as download:
            page.click(f"#{name}")
        exported[name] = download.value.path().read_bytes()
    rankings = json.loads(exported["json"])["rankings"]
    assert [[r["document"] for r in one["results"]] for one in rankings] == [
        ["a b c", "b c", "c"],
        ["c", "b c", "a b c"],
    ]
    assert rankings[1]["request"] == {"query": "=d c", "top_k": 3, "instruction": "other"}
    table = list(csv.DictReader(io.StringIO(exported["csv"].decode("utf-8-sig"))))
    assert [(row["ranking"], row["rank"], row["document"]) for row in table[3:]] == [
        ("B", "1", "c"), ("B", "2", "b c"), ("B", "3", "a b c")
    ]  # fmt: skip
    page.check("#compare")
    expect(page.locator("#stale")).to_be_hidden()
    page.uncheck("#compare")
    page.fill("#top_k", "")
    page.click("#rank")
    expect(page.locator("#ranking .moved")).to_have_text(["▲ 2", "=", "▼ 2", "="])
    assert "'=d" in page.evaluate("toCsv()")  # no spreadsheet takes it for a formula


def test_the_best_chunk_is_marked(server: Server, visit: Open) -> None:
    page = visit(server)
    parts = ["The harbour was quiet. " * 8, "Plants make food from sunlight. " * 6, "The harbour was quiet. " * 8]
    fill(page, "How do plants make food from sunlight?", ["".join(parts).strip(), "short"])
    page.click("#options summary")
    fields = {"max_chunks_per_doc": "8", "max_tokens_per_doc": "40"}
    for name, value in fields.items():
        page.fill(f"#{name}", value)
    page.check("#raw_scores")
    page.click("#code summary")
    with page.expect_response("**/v1/rerank") as caught:
        page.click("#rank")
    best = next(result for result in caught.value.json()["results"] if "best_chunk" in result)
    assert "Plants make" in best["best_chunk"]["text"]
    expect(page.locator("#ranking mark")).to_have_count(1)
    assert page.locator("#ranking mark").text_content() == best["best_chunk"]["text"]
    assert page.locator("#ranking .score").all_inner_texts() == [
        f"{result['relevance_score']:.4f}" for result in caught.value.json()["results"]
    ]
    page.click("[data-language=python]")
    assert '"raw_scores": True' in page.locator("#snippet").inner_text()
    more = page.get_by_text("Show all")
    before = page.locator("#ranking p", has=page.locator("mark")).bounding_box()
    more.click()
    after = page.locator("#ranking p", has=page.locator("mark")).bounding_box()
    assert before
    assert after
    assert after["height"] > before["height"]


def test_paragraphs_are_documents(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    fill(page, "a", ["one", "of two", "", " \t", "second"])
    page.evaluate(DROP, ["a.txt", list(b"three\r\nlines\r\n\r\nfour\r\n")])
    expect(page.locator("#count")).to_have_text("6")
    page.select_option("#split", "paragraphs")
    expect(page.locator("#count")).to_have_text("4")
    expect(page.locator("#files li span")).to_have_text("a.txt · 2")
    with page.expect_request("**/v1/rerank") as sent:
        page.click("#rank")
    assert (sent.value.post_data_json or {})["documents"] == ["one\nof two", "second", "three\nlines", "four"]


def test_a_link_restores_the_inputs_without_the_token(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server, permissions=["clipboard-read", "clipboard-write"])
    fill(page, MARKUP, ["甲 & 乙 +", "b"], instruction="find #1", token=TOKEN)
    page.evaluate(DROP, ["rows.jsonl", list(b'"two\\nlines"')])
    page.click("#options summary")
    page.select_option("#truncate", "true")
    page.check("#raw_scores")
    expect(page.locator("#count")).to_have_text("3")
    page.click("#share")
    expect(page.locator("#status")).to_contain_text("the token is not in it")
    link = page.evaluate("navigator.clipboard.readText()")
    assert TOKEN not in link
    body = page.evaluate("requests()[0]")

    page = visit(fake_server)
    page.evaluate("added = [{name: 'a', encoding: 'UTF-8', columns: [], documents: ['w'.repeat(MAX_ADDRESS)]}]")
    page.click("#share")
    expect(page.locator("#status")).to_contain_text("too long for a link")
    assert page.evaluate("location.hash") == ""
    fill(page, "my own", ["text"])
    page.goto("about:blank")  # the files of a page are not remembered
    page.goto(link)
    expect(page.locator("#status")).to_contain_text("come from the link")
    assert page.evaluate("requests()[0]") == body
    assert page.input_value("#token") == ""
    assert page.locator("#injected, main img").count() == 0
    page.goto(f"http://127.0.0.1:{fake_server.port}/")  # a link that was not edited replaces nothing
    assert page.input_value("#query") == "my own"
    hash_of = "location.hash = new URLSearchParams({query: 'x', truncate: 'no', token: 'y', files: '[[1,[{}]]]'})"
    page.evaluate(hash_of)
    expect(page.locator("#status")).to_contain_text("The files in this link cannot be read.")
    assert page.evaluate("requests()[0]") == {"query": "x", "documents": []}
    assert page.input_value("#token") == ""
    page.fill("#documents", "edited")
    assert page.evaluate("location.hash") == ""
    page.reload()
    assert (page.input_value("#query"), page.input_value("#documents")) == ("x", "edited")
    page.click("#clear")
    page.reload()
    assert page.input_value("#query") == "How do plants make food from sunlight?"  # the example of a first visit


def test_a_phone_shows_the_ranking_after_a_request(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server, viewport={"width": 390, "height": 800}, reduced_motion="reduce")
    page.click("#rank")
    page.locator("#ranking li").first.wait_for()
    expect(page.locator("#heading")).to_be_in_viewport()
    fill(page, "", ["a"])
    page.click("#rank")
    expect(page.locator("#query")).to_be_in_viewport()
    expect(page.locator("#status")).to_be_in_viewport()
    expect(page.locator("#status")).to_have_text("Enter a query.")


def background(page: Page) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


def test_light_and_dark(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server, color_scheme="dark")
    light, dark = "rgb(245, 246, 248)", "rgb(15, 18, 22)"
    assert background(page) == dark
    for theme, colour in (("light", light), ("dark", dark), ("", dark), ("light", light)):
        page.select_option("#theme", theme)
        assert background(page) == colour
    page.reload()
    assert (background(page), page.input_value("#theme")) == (light, "light")
    page.select_option("#theme", "")
    page.emulate_media(color_scheme="light")
    assert background(page) == light


def test_english_and_chinese(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server, locale="zh-CN")
    assert page.evaluate("document.documentElement.lang") == "zh-CN"
    expect(page.locator("#rank")).to_have_text("排序")
    page.click("#language")
    assert page.input_value("#query") == "How do plants make food from sunlight?"  # the example, while it is untouched
    page.fill("#query", "")
    page.click("#rank")
    expect(page.locator("#status")).to_have_text("Enter a query.")
    page.click("#language")
    expect(page.locator("#status")).to_have_text("请输入查询。")
    page.click("#language")
    page.reload()
    assert page.evaluate("document.documentElement.lang") == "en"
    expect(page.locator("#rank")).to_have_text("Rank")
    keys = page.evaluate("Object.values(TEXTS).map((texts) => Object.keys(texts))")
    assert keys[0] == keys[1]
    holes = "Object.values(TEXTS).map((t) => Object.values(t).map((s) => (s.match(/\\{\\d\\}/g) ?? []).sort().join()))"
    in_english, in_chinese = page.evaluate(holes)
    assert in_english == in_chinese


def test_everything_has_a_name_and_is_reached_by_keyboard(fake_server: Server, visit: Open) -> None:
    page = visit(fake_server)
    nameless = """[...document.querySelectorAll("input, textarea, select, button")].filter(
        (node) => !(node.labels?.[0] ?? node).textContent.trim() && !node.ariaLabel).map((n) => n.id)"""
    assert page.evaluate(nameless) == []
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id"))
    fields = [
        "query",
        "split",
        "documents",
        "file",
        "instruction",
        "top_k",
        "compare",
        "token",
        "rank",
        "clear",
        "share",
    ]
    assert [name for name in reached if name in fields] == fields


@pytest.mark.parametrize("width", [320, pytest.param(768, marks=pytest.mark.slow), 1440])
def test_it_fits_the_screen(fake_server: Server, visit: Open, width: int) -> None:
    page = visit(fake_server, viewport={"width": width, "height": 800})
    fill(page, "a", ["a" * 300, "b c " * 300, MARKUP], instruction="i" * 200)
    page.click("#options summary")
    page.check("#compare")
    page.click("#rank")
    page.click("#code summary")
    assert len(ranking(page)) == 3
    assert page.evaluate("document.documentElement.scrollWidth") <= width


# The description of the API


def test_the_docs_need_no_internet_and_work_with_a_token_in_the_address(guarded: Server, visit: Open) -> None:
    page = visit(guarded, f"/docs?access_token={TOKEN}")
    operation = page.locator(".opblock", has_text="/v1/rerank").first
    operation.locator(".opblock-summary").click()
    operation.get_by_text("Try it out").click()
    operation.locator("textarea").fill('{"query": "a", "documents": ["b", "a"]}')
    with page.expect_response("**/v1/rerank") as caught:
        operation.get_by_text("Execute").click()
    assert caught.value.status == 200
    assert page.evaluate("location.pathname + location.search") == "/docs"  # no token in the address bar
    assert [result["index"] for result in caught.value.json()] == [1, 0]
    assert "referer" not in caught.value.request.all_headers()
    operation.locator(".live-responses-table").wait_for()
    assert TOKEN not in page.content()
    assert TOKEN not in guarded.log


def test_the_docs_ask_for_the_token_or_take_that_of_the_page(guarded: Server, visit: Open) -> None:
    page = visit(guarded)
    with page.context.expect_page() as opened:
        page.click("nav a")
    docs = opened.value
    docs.fill("#token", "wrong")
    docs.keyboard.press("Enter")
    expect(docs.locator("#status")).to_contain_text("The access token is wrong.")
    docs.close()
    page.fill("#token", TOKEN)
    with page.context.expect_page() as opened:
        page.click("nav a")
    docs = opened.value
    operation = docs.locator(".opblock", has_text="/health").first
    operation.locator(".opblock-summary").click()
    operation.get_by_text("Try it out").click()
    with docs.expect_response("**/health") as caught:
        operation.get_by_text("Execute").click()
    assert caught.value.status == 200
    assert TOKEN not in docs.evaluate("location.href")
    kept = "[document.cookie, JSON.stringify({...localStorage, ...sessionStorage, ...history.state})].join()"
    assert TOKEN not in docs.evaluate(kept)
    assert TOKEN not in docs.content()

    docs.locator(".auth-wrapper .authorize").click()
    dialog = docs.locator(".auth-container", has_text="bearer")
    dialog.locator("input").fill("another-one")
    dialog.locator("button.authorize").click()
    docs.locator("button.btn-done").first.click()
    with docs.expect_response("**/health") as caught:
        operation.get_by_text("Execute").click()
    assert caught.value.request.all_headers()["authorization"] == "Bearer another-one"
    assert caught.value.status == 401
    assert TOKEN not in guarded.log


@pytest.mark.slow
def test_the_docs_without_a_token(server: Server, visit: Open) -> None:
    page = visit(server, "/docs")
    routes = server.client.get("/openapi.json").json()["paths"]
    expect(page.locator(".opblock")).to_have_count(sum(map(len, routes.values())))
    assert "/" not in routes
    assert "/docs" not in routes
