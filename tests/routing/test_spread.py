"""Which routers may be spread over parts of a batch: each refusal and each warning against what the router does."""

from __future__ import annotations

import pytest

from moesaic.errors import ConfigError
from moesaic.routing.depth import DepthRouter
from moesaic.routing.spread import CONFINED, QUIET, check_spread
from tests.peers import cut
from tests.routing.cases import CASES, DIM, Case, differs, some_input

every_router = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)


@every_router
def test_what_passes_without_a_word_routes_parts_as_the_whole(case: Case) -> None:
    """Two of four sequences are routed as among four (same memory, same biases); what looks across sequences is refused."""
    router = case.build()
    assert check_spread(router, case.name, 1) is None
    if not router.facts.batch_invariant:
        with pytest.raises(ConfigError, match="3 data-parallel ranks hold them apart"):
            check_spread(router, case.name, 3)
        return
    said = check_spread(router, case.name, 2)
    assert (said is not None) == router.facts.noisy
    if said is not None:
        assert "in distribution only" in said
        return
    batch = some_input(4)
    whole = batch.route(router)
    if not hasattr(whole, "token_N"):
        return  # groups of soft plans are sequences: test_soft
    for rows in (slice(0, 1), slice(1, 4)):
        part = batch.part(rows, slice(None)).route(router)
        tokens = slice(rows.start * 12, rows.stop * 12)
        mine = cut(whole, [tokens.start, tokens.stop - tokens.start, 48 - tokens.stop])[1]
        assert not differs(part, mine).any()


def test_messages_name_the_option_that_helps() -> None:
    refused = Case("expert_choice", {"group": "position"}).build()
    with pytest.raises(
        ConfigError, match='"expert_choice" looks at .* set its option group="sequence", or use one data'
    ):
        check_spread(refused, "expert_choice", 2)
    with pytest.raises(ConfigError, match='"base" looks at .* no option confines it'):
        check_spread(Case("base", k=1).build(), "base", 2)
    said = check_spread(Case("switch", k=1).build(), "switch", 2)
    assert said is not None
    assert said.endswith("set its option jitter=0.")
    assert check_spread(DepthRouter(DIM), "mixture_of_depths", 2) is None  # each sequence by itself


def test_the_options_named_do_help() -> None:
    helped = {
        "expert_choice": Case("expert_choice", {"group": "sequence"}),
        "product_keys": Case("product_keys", {"query_norm": "layer"}, experts=16),
        "switch": Case("switch", {"jitter": 0.0}, k=1),
        "gshard": Case("gshard", {"second": "all"}),
        "budget": Case("budget", {"sample": False}),
    }
    assert set(helped) == set(CONFINED) | set(QUIET)
    for name, case in helped.items():
        ((option, value),) = case.options.items()
        assert f"{option}={value}".lower().replace(".0", "") in {**CONFINED, **QUIET}[name].replace('"', "")
        assert check_spread(case.build(), name, 2) is None


def test_every_option_is_named_that_confines_a_router() -> None:
    """A router some of whose cases look across sequences and others do not has an option worth naming."""
    by_name: dict[str, set[bool]] = {}
    for case in CASES:
        by_name.setdefault(case.name, set()).add(case.build().facts.batch_invariant)
    assert {name for name, seen in by_name.items() if seen == {True, False}} == set(CONFINED)
