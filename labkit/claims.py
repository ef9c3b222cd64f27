"""Claims: a number that an answer states, checked where it is stated.

A notebook writes ``check("KV bytes per token", predicted=131072, measured=nbytes, unit="B", rel=0)``. The cell prints one
line, fails when the claim is false, and leaves a record in its output from which the book's page of claims is made.
"""

from __future__ import annotations

import math
import operator
from typing import Any

MIME = "application/vnd.labkit.claim+json"

_OPS = {"==": operator.eq, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def check(
    claim: str,
    *,
    predicted: Any,
    measured: Any,
    unit: str = "",
    rel: float | None = None,
    abs: float | None = None,
    op: str | None = None,
) -> None:
    """Print the claim with both values, or raise if they disagree.

    Exactly one of these says what agreement means:

    - ``rel``: \\|measured − predicted\\| ≤ rel·\\|predicted\\|, dimensionless; 0 demands equality. With a predicted value of 0
      only 0 agrees: use ``abs`` there.
    - ``abs``: \\|measured − predicted\\| ≤ abs, in ``unit``.
    - ``op``: ``measured op predicted`` with one of ``== < <= > >=``. ``==`` also takes strings, lists and tuples.

    ``predicted`` and ``measured`` are numbers in ``unit`` (Python, NumPy scalars or tensors with one element). The measured
    value is printed and recorded with three significant digits, never finer than ``abs``, the predicted one with four, so
    that the line reads the same on another processor; whole numbers are printed whole.

    Raises ``AssertionError`` with both values and the unit if the claim is false (NaN never agrees), ``ValueError`` if not
    exactly one of ``rel``, ``abs``, ``op`` is given or it is not usable.
    """
    given = {name: value for name, value in (("rel", rel), ("abs", abs), ("op", op)) if value is not None}
    if len(given) != 1:
        raise ValueError(f"check({claim!r}): give exactly one of rel, abs, op; got {sorted(given) or 'none'}")
    [(kind, bound)] = given.items()
    predicted, measured = _plain(predicted), _plain(measured)
    if kind == "op":
        if bound not in _OPS:
            raise ValueError(f"check({claim!r}): op must be one of {' '.join(_OPS)}, not {bound!r}")
        agrees = bool(_OPS[bound](measured, predicted))
        condition = f"measured {bound} predicted"
    else:
        if not (_is_number(predicted) and _is_number(measured)):
            raise ValueError(f"check({claim!r}): {kind} compares numbers; use op='==' for {type(measured).__name__}")
        if not 0 <= bound < math.inf:
            raise ValueError(f"check({claim!r}): {kind} must be a finite number, at least 0")
        allowed = bound * math.fabs(predicted) if kind == "rel" else bound
        # An infinite prediction allows nothing but itself: any tolerance relative to it would be infinite.
        agrees = measured == predicted or (math.isfinite(predicted) and math.fabs(measured - predicted) <= allowed)
        condition = "equal" if bound == 0 else f"within {bound:.3g}" + (f" {unit}".rstrip() if kind == "abs" else "")
        if kind == "rel" and bound:
            condition = f"within {100 * bound:.3g} %"
    if not agrees:
        raise AssertionError(
            f"{claim}: predicted {_full(predicted, unit)}, measured {_full(measured, unit)}; demanded: {condition}"
        )
    shown = _rounded(measured, bound if kind == "abs" else 0)
    # A prediction may come from a run too (a second model's loss): a digit more than the measured value, and no further.
    if isinstance(predicted, float) and not predicted.is_integer():
        predicted = _rounded(predicted, 0, digits=4)
    line = f"✓ {claim}: predicted {_text(predicted, unit)}, measured {_text(shown, unit)} ({condition})"
    record = {
        "claim": claim,
        "predicted": _json(predicted),
        "measured": _json(shown),
        "unit": unit,
        "condition": condition,
    }
    _emit(line, record)


def _plain(value: Any) -> Any:
    """A Python number for anything with one element, everything else as it is."""
    if hasattr(value, "item") and getattr(value, "size", 1) is not None:
        try:
            return value.item()
        except (ValueError, RuntimeError):
            raise ValueError(
                f"check compares single values, got a {type(value).__name__} with several elements"
            ) from None
    return list(value) if isinstance(value, tuple) else value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _rounded(value: Any, tolerance: float, digits: int = 3) -> Any:
    """``value`` as recorded: floats to ``digits`` significant digits, and no finer than the tolerance."""
    if not isinstance(value, float) or not math.isfinite(value) or value == 0:
        return value
    decimals = digits - 1 - math.floor(math.log10(math.fabs(value)))
    if tolerance > 0:
        decimals = min(decimals, -math.floor(math.log10(tolerance)))
    return round(value, decimals) + 0.0  # + 0.0 turns −0.0 into 0.0


def _json(value: Any) -> Any:
    """JSON has no infinity: as text."""
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(value: Any, unit: str) -> str:
    if _is_number(value) and (isinstance(value, int) or 1000 <= math.fabs(value) < 1e12):
        text = f"{value:,.0f}" if isinstance(value, float) else f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.4g}"
    else:
        text = str(value)
        text = text if len(text) <= 60 else text[:57] + "…"
    return f"{text} {unit}".rstrip()


def _full(value: Any, unit: str) -> str:
    return f"{value!r} {unit}".rstrip()


def _emit(line: str, record: dict[str, Any]) -> None:
    from IPython import get_ipython

    if get_ipython() is None:
        print(line)
        return
    from IPython.display import publish_display_data

    publish_display_data({"text/plain": line, MIME: record})
