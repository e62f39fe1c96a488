from __future__ import annotations

import pytest

from reranker.http.access import printable


@pytest.mark.parametrize("token", ["plain", "a/b", "a?b", "a;b", "a&b", "a%b", "a+b=", "a\nb", "a,b"])
def test_a_token_that_became_a_part_of_the_path_is_not_printed(token: str) -> None:
    assert printable(f"/health&access_token={token}") == "/health&access_token=***"
    assert printable(f"/health/ACCESS_TOKEN={token}/more") == "/health/ACCESS_TOKEN=***"


def test_a_path_is_one_short_line() -> None:
    assert printable("/a\r\nGET /b \x1b[31m\u2028") == r"/a\r\nGET /b \x1b[31m\u2028"
    assert len(printable("/" + "x" * 100_000)) == 200
