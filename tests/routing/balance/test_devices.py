"""DeepSeek-V2's losses: by hand, at balance and collapse, against a dumb fp64 formulation, with padding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moesaic.routing import LossContext, balance_loss
from moesaic.routing.balance.devices import device_of
from tests.routing.gates import identity_router, padded, route

OPTIONS = {"v2_device": {"devices": 2}, "v2_communication": {"devices": 2, "limit": 1}}


def _values(plan: object, sequences: int = 1, **options: int) -> list[float]:
    ctx, chosen = LossContext(sequences), OPTIONS
    if options:
        chosen = {"v2_device": {"devices": options["devices"]}, "v2_communication": options}
    names = ("v2_expert", "v2_device", "v2_communication")
    return [float(balance_loss(plan, {name: 1.0}, ctx, chosen)[0]) for name in names]  # type: ignore[arg-type]


def test_by_hand() -> None:
    # Four experts on two devices, k=2, two tokens. Token 0 takes experts 0, 1 (device 0); token 1 takes 0, 2 (both devices).
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1], [0.5, 0.1, 0.3, 0.1]])
    plan = route(p.log(), 2, normalize="none")
    # f = 4 / (2 * 2) * (2, 1, 1, 0) = (2, 1, 1, 0); P = (.45, .2, .25, .1).
    expert = 2 * 0.45 + 0.2 + 0.25
    # f' = (1.5, .5), P' = (.65, .35).
    device = 1.5 * 0.65 + 0.5 * 0.35
    # Device 0 gets both tokens, device 1 one: f'' = 2 / (1 * 2) * (2, 1).
    communication = 2 * 0.65 + 1 * 0.35
    assert _values(plan) == pytest.approx([expert, device, communication])
    assert _values(plan, devices=2, limit=2)[2] == pytest.approx(communication / 2)


def test_balance_and_collapse() -> None:
    # Token t takes experts t and t + 1 (mod 4) of four devices: every expert twice, every device reached by two tokens of four.
    logits = torch.stack([torch.eye(4)[t] + torch.eye(4)[(t + 1) % 4] for t in range(4)])
    assert _values(route(logits, 2), devices=4, limit=2) == pytest.approx([1.0, 1.0, 1.0])
    # Everything to expert 0, of four devices and eight experts, k=1: E; f' = 2 of 8 / 2, so 8 / 2 = 4; D / M = 4.
    collapsed = route(torch.tensor([[60.0] + [0.0] * 7]).repeat(6, 1), 1, normalize="none")
    assert _values(collapsed, devices=4, limit=1) == pytest.approx([8.0, 4.0, 4.0])


def test_the_device_loss_is_blind_within_a_device_and_the_communication_loss_to_repeats() -> None:
    within = route(torch.tensor([[9.0, 0, 0, 0], [0, 0, 9.0, 0]]), 1, normalize="none")
    assert _values(within)[1] == pytest.approx(1.0, abs=1e-3)  # one token per device, each on its first expert
    assert _values(within)[0] == pytest.approx(2.0, abs=1e-2)
    one_each = route(torch.tensor([[2.0, 1, 0, 0], [0, 0, 2.0, 1]]), 2)  # both experts of one device: sent once
    assert _values(one_each)[2] == pytest.approx(1.0)


def _dumb(p_TE: Tensor, rows: list[list[int]], devices: int, limit: int) -> list[Tensor]:
    T, E = p_TE.shape
    K = len(rows[0])
    home = [e * devices // E for e in range(E)]
    f = [E / (K * T) * sum(row.count(e) for row in rows) for e in range(E)]
    P = [sum(p_TE[t, e] for t in range(T)) / T for e in range(E)]
    expert = sum(f[e] * P[e] for e in range(E))
    device, communication = torch.zeros(()), torch.zeros(())
    for d in range(devices):
        mine = [e for e in range(E) if home[e] == d]
        P_d = sum(P[e] for e in mine)
        device = device + sum(f[e] for e in mine) / len(mine) * P_d
        sent = sum(any(home[e] == d for e in row) for row in rows)
        communication = communication + devices / (limit * T) * sent * P_d
    return [expert, device, communication]


@pytest.mark.parametrize("devices", [1, 2, 3, 6])
def test_values_and_gradients_against_dumb_loops_per_sequence(devices: int) -> None:
    z_TE = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    valid = [1, 1, 0, 1, 1, 1, 0, 0, 1, 1]
    plan = identity_router("topk", 6, 2, normalize="none").double()(z_TE, padded(valid))
    options = {"v2_device": {"devices": devices}, "v2_communication": {"devices": devices, "limit": 1}}
    wanted: list[Tensor] = [torch.zeros(())] * 3
    for rows in (range(5), range(5, 10)):
        real = [t for t in rows if valid[t]]
        chosen = z_TE[real].topk(2, dim=1).indices.tolist()
        parts = _dumb(z_TE[real].softmax(1), chosen, devices, 1)
        wanted = [a + torch.as_tensor(b) / 2 for a, b in zip(wanted, parts, strict=True)]
    for name, want in zip(("v2_expert", "v2_device", "v2_communication"), wanted, strict=True):
        got, _ = balance_loss(plan, {name: 1.0}, LossContext(2), options)
        torch.testing.assert_close(got, want.double())
        (a,) = torch.autograd.grad(got, z_TE, retain_graph=True)
        (b,) = torch.autograd.grad(want, z_TE, retain_graph=True)
        torch.testing.assert_close(a, b)
        if devices > 1 or name == "v2_expert":
            assert float(a.abs().sum()) > 0
    # On one device there is nothing to balance: softmax scores sum to 1.
    if devices == 1:
        assert [float(w.detach()) for w in wanted[1:]] == pytest.approx([1.0, 1.0])


def test_devices_hold_contiguous_experts() -> None:
    assert device_of(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert device_of(5, 2).tolist() == [0, 0, 0, 1, 1]
