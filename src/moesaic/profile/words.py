"""What a profile says, in words: the rows of its tables and a few sentences anybody can read."""

from __future__ import annotations

from moesaic.profile.result import COMPUTING, MOVING, Row, Side
from moesaic.profile.run import Pair, Profile

# Part -> what it is, where its name does not say.
MEANING = {
    "embedding": "lookup of the tokens' vectors, rotary tables, masks",
    "attention": "projections, scores and cache",
    "router": "scores of all experts, the choice, the plan",
    "grouping": "sorting rows by expert",
    "gather": "copying tokens to their experts",
    "products": "the experts' matrix products",
    "activation": "the experts' non-linearity",
    "wait": "threads that are done with their experts waiting for the others",
    "combine": "the weighted sum of a token's experts",
    "experts": "the experts' products and non-linearity",
    "dispatch": "grouping, gather, combine, whatever else the sparse layer does",
    "head": "logits over the vocabulary",
    "loss": "cross entropy and balancing losses, forward and backward, and the step's figures",
    "clipping": "norm of the gradient, clipping",
    "optimiser": "AdamW",
    "sampling": "choosing the token, the loop around the model",
    "other": "residual sums and whatever no part claims",
}
# The same where a back end tells its phases apart.
_REST = {"experts": "what of the experts has no name above", "dispatch": "what of the sparse layer has no name above"}
BAR = 20


def meaning(part: str, side: Side) -> str:
    """What a part is, in a few words; nothing where its name says it."""
    apart = {row.part for row in side.rows} & {"grouping", "gather", "products", "combine"}
    return (_REST if apart and part in _REST else MEANING).get(part, "")


def bar(share: float, width: int = BAR) -> str:
    """A bar of eighths of a character: a full one is ``width`` characters."""
    eighths = round(max(0.0, min(1.0, share)) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def digits(seconds: float) -> str:
    """Milliseconds in about three digits: ``312``, ``84.1``, ``8.41``, ``0.052``."""
    ms = seconds * 1e3
    return f"{ms:,.{0 if ms >= 100 else 1 if ms >= 10 else 2 if ms >= 0.1 else 3}f}"


def milliseconds(seconds: float) -> str:
    """The same with its unit."""
    return f"{digits(seconds)} ms"


def percent(share: float) -> str:
    """``62%``; below 1 with a decimal, ``0.4%``."""
    return f"{share:.0%}" if share >= 0.0095 or share <= 0 else f"{share:.1%}" if share >= 0.0005 else "<0.1%"


def scaled(amount: float, unit: str) -> str:
    """``1.23 GFLOP``, ``432 MB``: decimal prefixes, three digits."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if amount >= size * 0.9995:
            return f"{amount / size:.3g} {prefix}{unit}"
    return f"{amount:.3g} {unit}"


def sentences(profile: Profile) -> list[str]:
    """The plain reading: what takes the time, how near the limits that is, and what sparsity costs."""
    said = []
    if profile.training is not None:
        said += _training(profile, profile.training)
    if profile.token is not None and profile.prompt is not None:
        said += _decoding(profile, profile.token, profile.prompt)
    return said


def _training(profile: Profile, pair: Pair) -> list[str]:
    work, side = profile.work, pair.model
    tokens = work.batch * work.seq * work.accumulate
    said = [
        f"A training step of {tokens:,} tokens takes {milliseconds(side.seconds)} ({tokens / side.seconds:,.0f} tokens/s)"
        + _against(pair, "step")
    ]
    experts = side.group(COMPUTING)
    if pair.tax is not None:
        said.append(
            f"{percent(experts)} of it is in experts{_at(side, COMPUTING, 'arithmetic')}; the router takes "
            f"{percent(side.group('router'))}, grouping, gather and combine {percent(side.group(MOVING))}."
        )
        said.append(
            f"The sparse layers alone take {pair.tax.layers:.2f} times as long as the dense layers in their place; the model's "
            f"arithmetic is {pair.tax.work:.2f} times its twin's."
        )
    else:
        said.append(f"{percent(experts)} of it is in feed-forward layers{_at(side, COMPUTING, 'arithmetic')}.")
    said.append(
        f"The whole step needs {scaled(side.work, 'FLOP')}, {milliseconds(side.limit_seconds)} at the measured "
        f"{profile.gflops:,.0f} GFLOP/s: {percent(side.of_limit)} of the limit. {_largest(side)}"
    )
    return said


def _decoding(profile: Profile, pair: Pair, prompt: Pair) -> list[str]:
    side = pair.model
    rate = profile.work.prompt / prompt.model.seconds
    read = (
        f"It reads {scaled(side.work, 'B')} of weights, {milliseconds(side.limit_seconds)} at the measured "
        f"{profile.read_gb_per_s:.1f} GB/s: {percent(side.of_limit)} of the limit. {_largest(side)}"
    )
    if side.of_limit > 1:
        read += " More than all of it: weights this small stay in the processor's cache."
    moved = ""
    if pair.tax is not None:
        moved = (
            f"{percent(side.group(COMPUTING))} of a token is in experts{_at(side, COMPUTING, 'bandwidth')}; the router takes "
            f"{percent(side.group('router'))}, grouping, gather and combine {percent(side.group(MOVING))}."
        )
    said = [
        f"A decoded token takes {milliseconds(side.seconds)} ({1 / side.seconds:,.0f} tokens/s)"
        + _against(pair, "token"),
        moved,
        read,
        f"A prompt of {profile.work.prompt} tokens is read at {rate:,.0f} tokens/s, {percent(prompt.model.of_limit)} of the "
        "measured arithmetic.",
    ]
    return [sentence for sentence in said if sentence]


def _against(pair: Pair, what: str) -> str:
    if pair.tax is None or pair.twin is None:
        return "."
    low, high = pair.tax.least, pair.tax.most
    return (
        f", its dense twin's {what} {milliseconds(pair.twin.seconds)}: a sparsity tax of {pair.tax.ratio:.2f} "
        f"({low:.2f} to {high:.2f})."
    )


def _at(side: Side, group: str, limit: str) -> str:
    reached = side.limit_of(group)
    return "" if reached is None else f", at {percent(reached)} of the measured {limit}"


def _largest(side: Side) -> str:
    rest = [row for row in side.rows if row.group not in (COMPUTING, MOVING, "router")]
    if not rest:
        return ""
    most = max(rest, key=lambda row: row.share)
    return f"Outside the sparse layers, {most.part} takes most: {percent(most.share)}."


def notes(profile: Profile) -> list[str]:
    """How it was measured, and what to mind."""
    work = profile.work
    where = "one GPU" if work.device.startswith("cuda") else f"{profile.threads} thread{'s' * (profile.threads != 1)}"
    times = "One round" if work.rounds == 1 else f"{work.rounds} rounds"
    said = [
        f"{times} on {where}, {work.dtype}, random tokens; the model and its twin in turns, medians.",
        "Parts are those of the traced run of median length, so they add up to it; the lines below them are plain runs.",
    ]
    for what, pair in (("step", profile.training), ("token", profile.token)):
        if pair is not None:
            side = pair.model
            more = f"{percent(abs(side.overhead))} {'longer' if side.overhead >= 0 else 'shorter'}"
            own = f"; {milliseconds(side.own)} of bookkeeping are left out" if side.own else ""
            said.append(f"The traced {what} took {milliseconds(side.traced)}, {more} than the plain one{own}.")
    if profile.token is not None:
        said.append(
            f"Keys and values add {scaled(profile.cache_bytes, 'B')} to what a token reads; its limit counts weights."
        )
    if profile.kernel:
        said.append(f"C kernel of the experts: {profile.kernel}.")
    if work.device.startswith("cuda"):
        said.append("Every part waits for the GPU when it ends, so parts that could overlap do not.")
    return said


def table(side: Side) -> list[tuple[str, str, str, str, str, str, str]]:
    """One line per part: name, forward, backward, together, share, bar, share of the limit."""
    longest = max(row.share for row in side.rows)
    return [(*_cells(row), bar(row.share / longest if longest else 0.0), _limit(row)) for row in side.rows]


def _cells(row: Row) -> tuple[str, str, str, str, str]:
    forward, backward = (digits(seconds) if seconds else "" for seconds in (row.forward, row.backward))
    return row.part, forward, backward, digits(row.seconds), percent(row.share)


def _limit(row: Row) -> str:
    return "" if row.of_limit is None else percent(row.of_limit)
