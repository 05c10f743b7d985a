"""The words and numbers of the report: formatting, the verdict on sparse against dense, the glossary.

Nothing here knows HTML except ``escape``, which makes any string (model text included) safe inside a page.
"""

from __future__ import annotations

import html
import math
import re
from bisect import bisect_right
from dataclasses import dataclass

from moesaic.report.runs import Run

TIE_NATS = 0.01  # a gap this small is within what another seed does to a small run

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_UNSAFE = re.compile(r"[\ud800-\udfff\u202a-\u202e\u2066-\u2069\x80-\x9f]")


def clean(text: object) -> str:
    """``text`` with control characters made visible; lone surrogates and direction overrides become U+FFFD."""
    shown = _CONTROL.sub(lambda m: "\u2421" if m[0] == "\x7f" else chr(0x2400 + ord(m[0])), str(text))
    return _UNSAFE.sub("\ufffd", shown)


def escape(text: object) -> str:
    """``text`` for element content or a quoted attribute."""
    return html.escape(clean(text), quote=True)


def shorten(text: object, length: int) -> str:
    """At most ``length`` characters, ending in an ellipsis where something was cut."""
    text = str(text)
    return text if len(text) <= length else text[: max(1, length - 1)].rstrip() + "…"


def loss(value: float | None) -> str:
    """A loss in nats, three decimals; a dash where there is none."""
    return "–" if value is None or math.isnan(value) else f"{value:.3f}"


def signed(value: float) -> str:
    """Three decimals with a sign (a real minus)."""
    return f"{value:+.3f}".replace("-", "−")


def times(ratio: float) -> str:
    """``1.57×``, ``12×``."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.0f}×"


def big(value: float | None) -> str:
    """1234567 -> ``1.23M``: three significant digits with k, M, B, T."""
    if value is None or math.isnan(value):
        return "–"
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}" if value != int(value) else f"{int(value)}"


def duration(seconds: float | None) -> str:
    """Seconds in the two largest useful units: ``42 s``, ``3 min 20 s``, ``5 h 12 min``, ``2 d 3 h``."""
    if seconds is None or math.isnan(seconds):
        return "–"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for size, unit, small, small_unit in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // small
            return f"{whole // size} {unit}" + (f" {rest} {small_unit}" if rest else "")
    return f"{whole} s"


def plural(count: float, word: str) -> str:
    """``1 step``, ``1,200 steps``."""
    return f"{count:,.0f} {word}" + ("" if count == 1 else "s")


@dataclass(frozen=True)
class Curve:
    """A loss curve to compare by: validation where there is any, else the training loss."""

    kind: str
    tokens: list[float]
    time_s: list[float]
    loss: list[float]

    def at(self, tokens: float) -> float:
        return _interpolate(self.tokens, self.loss, tokens)

    def clock(self, tokens: float) -> float:
        return _interpolate(self.tokens, self.time_s, tokens)

    def reaches(self, target: float) -> float | None:
        """Tokens at which the loss first comes down to ``target``; None if it never does."""
        for i, value in enumerate(self.loss):
            if value <= target:
                if i == 0 or value == target:
                    return self.tokens[i]
                share = (self.loss[i - 1] - target) / (self.loss[i - 1] - value)
                return self.tokens[i - 1] + share * (self.tokens[i] - self.tokens[i - 1])
        return None


def _interpolate(xs: list[float], ys: list[float], x: float) -> float:
    i = bisect_right(xs, x)
    if i == 0 or i == len(xs) or xs[i - 1] == x:
        return ys[max(0, i - 1)]
    share = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + share * (ys[i] - ys[i - 1])


def validation_curve(run: Run) -> Curve | None:
    """The validation losses of a run; None if there are none."""
    points = [(v.tokens, v.loss, v.time_s) for v in run.vals if v.loss is not None]
    if not points:
        return None
    clock = Curve("", list(run.tokens), list(run.time_s), [0.0] * len(run.tokens))
    times_s = [t if t is not None else clock.clock(n) if run.tokens else 0.0 for n, _, t in points]
    return Curve("validation", [n for n, _, _ in points], times_s, [x for _, x, _ in points])


def training_curve(run: Run) -> Curve | None:
    """Training loss as a running mean over the last twentieth of the steps seen so far."""
    points = [(n, x, t) for n, x, t in zip(run.tokens, run.loss, run.time_s, strict=True) if not math.isnan(x)]
    if not points:
        return None
    sums = [0.0]
    for _, value, _ in points:
        sums.append(sums[-1] + value)
    span = [max(1, i // 20) for i in range(1, len(sums))]
    mean = [(sums[i] - sums[i - n]) / n for i, n in enumerate(span, 1)]
    return Curve("training", [n for n, _, _ in points], [t for _, _, t in points], mean)


@dataclass(frozen=True)
class Verdict:
    """``headline`` is the one sentence; ``details`` the sentences that keep it honest; the rest are its numbers."""

    headline: str
    details: tuple[str, ...]
    kind: str  # which loss was compared: "validation" or "training"
    tokens: float
    sparse: float
    dense: float
    token_ratio: float | None  # tokens the loser used / tokens the winner needed for the loser's loss
    time_ratio: float | None  # the same in wall-clock time
    cost_ratio: float | None  # seconds of the sparse run / seconds of the dense run, for the same tokens
    winner: str  # "sparse", "dense" or "tie"

    @property
    def gap(self) -> float:
        return self.sparse - self.dense


def compare(sparse: Run, dense: Run) -> Verdict | None:
    """The verdict at equal tokens; None if either run has no loss to compare."""
    pair = validation_curve(sparse), validation_curve(dense)
    if pair[0] is None or pair[1] is None:
        pair = training_curve(sparse), training_curve(dense)
    s, d = pair
    if s is None or d is None:
        return None
    tokens = min(s.tokens[-1], d.tokens[-1])
    loss_s, loss_d = s.at(tokens), d.at(tokens)
    gap = loss_s - loss_d
    winner = "tie" if abs(gap) < TIE_NATS else "sparse" if gap < 0 else "dense"
    same = f"after the same {big(tokens)} tokens"
    numbers = f"{loss(loss_s)} against {loss(loss_d)}"
    headline = {
        "sparse": f"The sparse model is ahead: {s.kind} loss {numbers} {same}.",
        "dense": f"The sparse model lost to its dense twin: {s.kind} loss {numbers} {same}.",
        "tie": f"Too close to call: {s.kind} loss {numbers} {same}.",
    }[winner]
    ahead, behind = (s, d) if gap <= 0 else (d, s)
    first, second = ("sparse", "dense") if gap <= 0 else ("dense", "sparse")
    target = max(loss_s, loss_d)
    reached = ahead.reaches(target) if winner != "tie" else None
    token_ratio = tokens / reached if reached else None
    time_ratio = None
    if reached and ahead.clock(reached) > 0:
        time_ratio = behind.clock(tokens) / ahead.clock(reached)
    cost = s.clock(tokens) / d.clock(tokens) if d.clock(tokens) > 0 else None
    details = [_active_sentence(sparse, dense)]
    if token_ratio and reached:
        sentence = f"The {first} model was down to {loss(target)} after {big(reached)} tokens; the {second} one needed "
        sentence += f"{big(tokens)}, {times(token_ratio)} as many"
        if time_ratio:
            sentence += f"{', but only' if time_ratio < 1 else ' and'} {times(time_ratio)} the time"
        details.append(sentence + ".")
    if cost:
        details.append(f"For the same tokens the sparse run took {times(cost)} the wall-clock time of the dense run.")
        details.append(_same_time_sentence(s, d, winner))
    if s.kind == "training":
        details.append("No validation loss was logged for both, so this compares training loss, a weaker measure.")
    for name, run, curve in (("sparse", sparse, s), ("dense", dense, d)):
        if run.end_reason != "done":
            details.append(f"The {name} run did not finish: its curve stops at {big(curve.tokens[-1])} tokens.")
    details.append("One run of each: another seed can move a small gap either way.")
    return Verdict(
        headline, tuple(x for x in details if x), s.kind, tokens, loss_s, loss_d, token_ratio, time_ratio, cost, winner
    )


def _active_sentence(sparse: Run, dense: Run) -> str:
    a, b = sparse.params_active, dense.params_active
    if not a or not b:
        return ""
    if abs(a / b - 1) <= 0.02:
        return (
            f"Both use about {big(a)} parameters per token; the sparse model holds {big(sparse.params_total)} in all."
        )
    more = f"{abs(a / b - 1):.0%} {'more' if a > b else 'fewer'}"
    return f"Not an even match: the sparse model uses {more} parameters per token ({big(a)} against {big(b)})."


def _same_time_sentence(s: Curve, d: Curve, winner: str) -> str:
    """What the curves say when both are stopped at the same second, not the same token."""

    def at_time(curve: Curve, seconds: float) -> float:
        return _interpolate(curve.time_s, curve.loss, seconds)

    seconds = min(s.time_s[-1], d.time_s[-1])
    if seconds <= max(s.time_s[0], d.time_s[0]):
        return ""
    loss_s, loss_d = at_time(s, seconds), at_time(d, seconds)
    numbers = f"{loss(loss_s)} against {loss(loss_d)}"
    then = "tie" if abs(loss_s - loss_d) < TIE_NATS else "sparse" if loss_s < loss_d else "dense"
    words = {"sparse": "the sparse model leads", "dense": "the dense model leads", "tie": "neither leads"}[then]
    turn = "still " if then == winner and then != "tie" else ""
    return f"At equal wall-clock time ({duration(seconds)}) {words.replace('leads', turn + 'leads')}: {numbers}."


def single_headline(run: Run) -> str:
    """The one sentence for a run without a twin."""
    val, train = validation_curve(run), training_curve(run)
    if val:
        return f"Validation loss {loss(val.loss[-1])} after {big(val.tokens[-1])} tokens."
    if train:
        return f"Training loss {loss(train.loss[-1])} after {big(train.tokens[-1])} tokens; nothing was validated."
    return "No step has been recorded yet."


def status(run: Run) -> str:
    """How the run ended, in words."""
    if run.end_reason == "done":
        return "finished"
    if run.end_reason is None:
        return "still running, or killed: the log has no end record"
    return f"ended early ({run.end_reason})"


GLOSSARY = (
    ("Loss", "Mean negative log-probability of the next token, in nats; lower is better, exp(loss) is perplexity."),
    ("Perplexity", "exp(loss): as unsure as if choosing evenly among that many tokens."),
    ("Total and active parameters", "All weights stored, and those that one token's computation uses."),
    ("Expert", "One of several small networks in a layer; each token is sent to a few of them only."),
    ("Router", "The small layer that scores the experts for each token and so decides where it goes."),
    ("Load", "How many token assignments an expert received; its fair share is 1/E of its layer's total."),
    ("MaxVio", "Load of the busiest expert over the mean load, minus 1; 0 is perfect balance, 1 means twice the mean."),
    ("Router entropy", "How spread out the router's probabilities are for one token, in nats; ln E means undecided."),
    ("Margin", "Probability of the best expert minus that of the second best; near 0, tiny changes flip the choice."),
    ("Dead experts", "Experts that received no token in a step; they cost memory and learn nothing."),
    ("Effective experts", "exp(entropy of load): the number of equally busy experts that would be as evenly loaded."),
    ("Drop rate", "Share of assignments refused because the expert was over its capacity; 0 for dropless layers."),
    (
        "Specialisation",
        "Mutual information between a token's domain and its expert, in bits; 0 means routing ignores it.",
    ),
    ("Domain", "A named part of the data, such as code or prose; validation is measured on each separately."),
    ("Dense twin", "A model without experts, trained on the same tokens with about as many active parameters."),
    ("Tokens, steps", "A step is one weight update; tokens counts all the text read since the start."),
)
PROCESS_TERMS = (
    (
        "Process, rank",
        "One of the programs that train together, and its number; dp, ep, tp and pp say what they share.",
    ),
    ("Rows", "Token assignments that a process's experts compute; those of all its experts together are its load."),
    ("All-to-all", "Every process sends rows to the processes with their experts and later gets the outputs back."),
)
