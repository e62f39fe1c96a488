"""The measures of ir-measures, of every judged query.

By ir-measures: retrieval research uses it, its authors maintain it, it is small, and its wheels contain trec_eval. ranx
would add numba and pandas; pytrec_eval has no wheels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from subprocess import SubprocessError
from typing import Any

from reranker.errors import InputError
from reranker.evaluate.judgements import Grades, Ranking

Values = dict[str, dict[str, float]]
"""measure -> query id -> value"""


def parse_measures(names: str) -> list[Any]:
    """Return the measures of a list of names of ir-measures, in any case.

    Raises:
        InputError: there is no such measure.
    """
    import ir_measures

    known = {measure.casefold(): measure for measure in ir_measures.measures.registry}
    words = re.findall(r"[^\s,]+", names)
    if not words:
        raise InputError("--measures names no measure; examples: nDCG@10 RR@10 R@100 AP")
    try:
        words = [re.sub(r"^\w+", lambda stem: known.get(stem[0].casefold(), stem[0]), word) for word in words]
        measures = [ir_measures.parse_measure(word) for word in words]
        return list({str(measure): measure for measure in measures}.values())
    except (NameError, ValueError, SyntaxError) as error:
        raise InputError(f"--measures: {error}; examples: nDCG@10 RR@10 R@100 AP") from None


def measure(measures: Sequence[Any], grades: Grades, ranking: Ranking) -> Values:
    """Return each measure of every judged query; a query without documents counts as 0.

    Raises:
        InputError: a measure needs a cutoff or another parameter, a package that is missing, or other data.
    """
    import ir_measures

    # Positions instead of scores: trec_eval reads 32-bit floats, in which high scores tie, and orders ties by id.
    runs = {q: {d: float(len(found) - i) for i, d in enumerate(found)} for q, found in ranking.items() if found}
    names = {str(m): re.sub(r"^RR@", "MRR@", str(m)) for m in measures}
    values: Values = {name: dict.fromkeys(grades, 0.0) for name in names.values()}
    try:
        for metric in ir_measures.iter_calc(measures, grades, runs) if runs else ():
            values[names[str(metric.measure)]][metric.query_id] = float(metric.value)
    except (ArithmeticError, AssertionError, OSError, ValueError, SubprocessError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"ir-measures cannot compute {' '.join(names)}: {reason}; add the cutoff (P@10), or name other --measures"
        ) from None
    return values
