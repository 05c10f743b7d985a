"""Claim: at equal extra compute, a dense model made sparse and trained on beats the dense model trained on.

    python bench/upcycling.py                                        # this Python's own text, 3 seeds
    python bench/upcycling.py --data books/ a.txt --steps 1000       # your text

For each seed a dense model (four layers of width 96 on the quickstart's corpus: the recipe "compare" without experts) trains
for ``--steps`` at a constant learning rate. Then every arm gets ``--extra`` times the FLOPs that took: the dense model goes on,
or it is upcycled and the sparse one goes on, all on the same rows in the same order, with the same peak learning rate, 5 steps
of warm-up and linear decay over the last 30% of their own steps. FLOPs are counted by ``cost/flops.py`` (forward times three,
routers included, attention over the keys a query may see), so arms with dearer steps take fewer of them. Optimiser state starts
anew for all but "dense, optimiser kept". "btx" spends half of the extra compute on four branches, each on a share of the
domains, and the rest on the mixture; what looking at text for clusters and routers costs (32 rows) is not counted.

Reported per arm: validation loss before the first step and after the last as mean and 95% interval (Student's t) over seeds,
and the paired difference to the dense model going on (below 0: upcycling won). Each (arm, seed) is a file in ``--out``: what is
there is not run again. The last line of standard output is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moesaic.checkpoint.atomic import atomic_file
from moesaic.checkpoint.native import load_model
from moesaic.compare.stats import Estimate, estimate, paired
from moesaic.config import apply_overrides, from_dict, to_dict
from moesaic.cost.count import count_parameters
from moesaic.cost.flops import part_flops
from moesaic.data.corpus import Corpus, load_corpus
from moesaic.data.packing import PackedRows, RowSampler
from moesaic.models.config import ModelConfig, RouterConfig
from moesaic.models.decoder import Decoder
from moesaic.train.config import TrainConfig
from moesaic.train.evaluate import evaluate, evenly
from moesaic.train.loop import fit_vocabulary, run_training
from moesaic.train.optim import learning_rate, make_optimizer
from moesaic.train.recipes import compare
from moesaic.train.snapshot import latest_snapshot, restore_snapshot
from moesaic.train.step import train_step
from moesaic.upcycle import UpcycleConfig, assemble, difference, upcycle

KEPT, FRESH = "dense, optimiser kept", "dense"
BRANCHES = 4
ORDER_A = RouterConfig("topk", {"normalize": "none"})
ARMS: dict[str, UpcycleConfig | None] = {
    KEPT: None,
    FRESH: None,
    "copy E8 k2": UpcycleConfig(method="copy", experts=8, k=2),
    "copy E8 k1, order A": UpcycleConfig(method="copy", experts=8, k=1, router=ORDER_A),
    "noise E8 k2": UpcycleConfig(method="noise", experts=8, k=2),
    "granular E16 k2 G2": UpcycleConfig(method="granular", experts=16, k=2, shards=2),
    "drop E8 k2 r0.5": UpcycleConfig(method="drop", experts=8, k=2, drop=0.5),
    "split E8 k4": UpcycleConfig(method="split", experts=8, k=4, split_by="activations", router_init="activations"),
    "btx E4 k2": UpcycleConfig(method="btx", k=2, router_init="prompts"),
}


@dataclass
class Ground:
    """What all arms of a seed share."""

    config: TrainConfig
    corpus: Corpus
    dense_folder: Path
    budget: float  # FLOPs every arm may spend

    def __post_init__(self) -> None:
        self.rows = PackedRows(self.corpus.train, self.config.seq_len)
        self.val_rows = PackedRows(self.corpus.val, self.config.seq_len)
        self.val = evenly(self.val_rows, self.config.eval_rows)

    def dense(self) -> Decoder:
        """A fresh copy of the dense model."""
        return self.ready(load_model(self.dense_folder))

    def ready(self, model: Decoder) -> Decoder:
        """With the activations' dtype of the run."""
        model.compute_dtype = torch.bfloat16 if self.config.dtype == "bf16" else None
        return model

    def loss(self, model: Decoder) -> float:
        """Validation loss."""
        return evaluate(model, self.val_rows, self.val, self.config.batch_size).loss

    def step_flops(self, model: ModelConfig) -> float:
        """FLOPs of one training step: forward times three."""
        tokens = self.config.batch_size * self.config.seq_len
        return 3 * tokens * sum(part_flops(model, tokens, self.config.batch_size).values())


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["stdlib"], help="text, one domain per file")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=400, help="of the dense model, before")
    parser.add_argument(
        "--extra", type=float, default=0.6, help="compute of every arm, as a share of the dense model's"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--out", type=Path, default=Path("runs/upcycling"))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="settings by dotted name")
    args = parser.parse_args()
    settings = to_dict(compare())
    settings["optim"] |= {"schedule": "constant"}
    settings["data"] |= {"sources": args.data, "label_by": "stem"}
    settings |= {"steps": args.steps, "checkpoint_every": 0, "eval_every": 0, "sample_tokens": 0, "tensorboard": False}
    base = from_dict(TrainConfig, apply_overrides(settings, args.set))
    rows: list[dict[str, Any]] = []
    for seed in range(args.seeds):  # every seed in full before the next, so that an interrupted run has whole seeds
        ground = prepare(replace(base, seed=seed), args.out / f"seed{seed}", args.extra)
        for arm in args.arms:
            rows.append(_kept(args.out / f"seed{seed}" / f"{arm.replace(' ', '_')}.json", ground, arm, args.extra))
            print(
                f"seed {seed}  {arm:<24} {rows[-1]['before']:.4f} -> {rows[-1]['after']:.4f}",
                file=sys.stderr,
                flush=True,
            )
    table = summarise(rows, args.arms)
    print(layout(table, base, args))
    machine = {"torch": torch.__version__, "threads": torch.get_num_threads(), "dtype": base.dtype}
    print(
        json.dumps(
            {"data": args.data, "steps": base.steps, "extra": args.extra, "rows": rows, "arms": table, **machine}
        )
    )


def prepare(config: TrainConfig, folder: Path, extra: float) -> Ground:
    """Train the dense model of this seed, or take the one that is there."""

    def say(sentence: str) -> None:
        print(sentence, file=sys.stderr)

    corpus = load_corpus(config.data, config.seed, say)
    config = fit_vocabulary(config, corpus)
    config = replace(config, model=replace(config.model, moe=None))
    run_training(config, corpus, folder / "dense", name="dense", resume=True, say=say)
    found = latest_snapshot(folder / "dense")
    assert found is not None
    ground = Ground(config, corpus, found, 0.0)
    ground.budget = extra * config.steps * ground.step_flops(config.model)
    return ground


def _kept(path: Path, ground: Ground, arm: str, extra: float) -> dict[str, Any]:
    """The result in this file, or the one of running the arm, which is then kept there."""
    key = {"arm": arm, "seed": ground.config.seed, "extra": extra, "steps_before": ground.config.steps}
    if path.exists():
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if {name: row[name] for name in key} != key:
            raise SystemExit(f"{path} is of other settings ({row}); choose another --out.")
        return row
    row = {**key, **run_arm(ground, arm)}
    atomic_file(path, json.dumps(row, indent=1) + "\n")
    return row


def run_arm(ground: Ground, arm: str) -> dict[str, Any]:
    """Upcycle (or not) and train on until the budget is spent."""
    started = time.perf_counter()
    config, position = ARMS[arm], ground.config.steps * ground.config.batch_size
    spent, apart = 0.0, None
    dense = ground.dense()
    probe_BS = ground.val_rows.batch(ground.val[:4]).ids_BS
    if config is None:
        model = dense
    elif config.method == "btx":
        parts = domains(ground)
        share = 0.5 * ground.budget / BRANCHES
        branches = []
        for part_R in parts:
            branch = ground.dense()
            spent += continue_training(ground, branch, share, pool_R=part_R, schedule="constant")["flops"]
            branches.append(branch)
        texts = [ground.rows.batch(part_R[:16]).ids_BS for part_R in parts]
        model = ground.ready(assemble(branches, config, texts))
    else:
        text_BS = ground.rows.batch(torch.arange(0, len(ground.rows), max(1, len(ground.rows) // 32))[:32]).ids_BS
        model = ground.ready(upcycle(dense, config, text_BS if config.needs_text else None))
    if config is not None:
        # Compared in fp32, whatever training computes in.
        exact = [load_model(ground.dense_folder), model]
        kept, model.compute_dtype = model.compute_dtype, None
        apart = difference(exact[0], exact[1], probe_BS).record()
        model.compute_dtype = kept
    before = ground.loss(model)
    trained = continue_training(
        ground,
        model,
        ground.budget - spent,
        position=position,
        optimiser_from=ground.dense_folder if arm == KEPT else None,
    )
    counts = count_parameters(model)
    return {
        "before": before,
        "after": ground.loss(model),
        "steps": trained["steps"],
        "flops": spent + trained["flops"],
        "budget": ground.budget,
        "params_total": counts.total,
        "params_active": counts.active,
        "max_vio": trained["max_vio"],
        "step0": apart,
        "seconds": time.perf_counter() - started,
    }


def continue_training(
    ground: Ground,
    model: Decoder,
    budget: float,
    *,
    position: int = 0,
    pool_R: Tensor | None = None,
    optimiser_from: Path | None = None,
    schedule: str = "wsd",
) -> dict[str, Any]:
    """As many steps as the budget allows, on rows that follow those already read (or on those of ``pool_R``)."""
    config, per_step = ground.config, ground.step_flops(model.config)
    steps = max(1, int(budget / per_step))
    optim = replace(config.optim, schedule=schedule, warmup=0 if optimiser_from else 5)  # type: ignore[arg-type]
    optimiser = make_optimizer(model, optim)
    if optimiser_from is not None:
        restore_snapshot(optimiser_from, model, optimiser)
    sampler = RowSampler(len(ground.rows) if pool_R is None else len(pool_R), config.batch_size, config.seed)
    sampler.load_state_dict({"position": position})
    torch.manual_seed(config.seed + 1)
    last: list[float] = []
    for step in range(steps):
        index_B = sampler.next()
        batch = ground.rows.batch(index_B if pool_R is None else pool_R[index_B])
        reading, _ = train_step(
            model, optimiser, [batch], lr=learning_rate(optim, step, steps), clip=optim.clip, step=step + 1
        )
        last = reading.record()["max_vio"]  # type: ignore[assignment]
    return {"steps": steps, "flops": steps * per_step, "max_vio": max(last, default=None)}


def domains(ground: Ground) -> list[Tensor]:
    """Row numbers of each branch: domains dealt out by size, the largest first to the branch with the fewest rows."""
    label_R = torch.cat([_majority(ground.rows, part) for part in torch.arange(len(ground.rows)).split(256)])
    sizes = torch.bincount(label_R, minlength=len(ground.rows.labels))
    mine: list[list[int]] = [[] for _ in range(BRANCHES)]
    for label in sizes.argsort(descending=True, stable=True).tolist():
        fewest = min(range(BRANCHES), key=lambda b: sum(int(sizes[i]) for i in mine[b]))
        mine[fewest].append(label)
    parts = [torch.isin(label_R, torch.tensor(labels)).nonzero()[:, 0] for labels in mine]
    if not all(len(part) for part in parts):
        raise SystemExit(f'"btx" needs text of at least {BRANCHES} domains, not {len(sizes)}; leave that arm out.')
    return parts


def _majority(rows: PackedRows, index_B: Tensor) -> Tensor:
    return rows.batch(index_B).label_BS.mode(dim=1).values.clamp(min=0)


def summarise(rows: list[dict[str, Any]], arms: list[str]) -> dict[str, dict[str, Any]]:
    """Arm -> means over seeds, and paired differences to both dense models going on."""
    by_arm = {arm: [row for row in rows if row["arm"] == arm] for arm in arms}
    table: dict[str, dict[str, Any]] = {}
    for arm, mine in by_arm.items():
        table[arm] = {
            "before": _record(estimate([row["before"] for row in mine])),
            "after": _record(estimate([row["after"] for row in mine])),
            **{name: mine[0][name] for name in ("steps", "params_total", "params_active")},
            "flops_share": mine[0]["flops"] / mine[0]["budget"],
            "step0_max_abs": max((row["step0"]["max_abs"] for row in mine if row["step0"]), default=None),
        }
        for name, other in (("against_dense", FRESH), ("against_kept", KEPT)):
            if other in by_arm and arm != other:
                gap = paired([row["after"] for row in mine], [row["after"] for row in by_arm[other]])
                table[arm][name] = _record(gap)
    return table


def _record(value: Estimate | None) -> dict[str, Any] | None:
    return None if value is None else value.record()


def layout(table: dict[str, dict[str, Any]], base: TrainConfig, args: argparse.Namespace) -> str:
    """The table as text."""
    lines = [
        f"dense model of {base.steps} steps, then {args.extra:g} times its compute for everyone; {args.seeds} seeds, "
        "mean and 95% interval",
        f"{'arm':<24}{'params (M)':>11}{'active':>8}{'steps':>7}{'step 0: logits':>16}{'loss before':>17}{'loss after':>17}"
        f"{'to dense':>17}{'to kept':>17}",
    ]
    for arm, row in table.items():
        apart = "-" if row["step0_max_abs"] is None else f"{row['step0_max_abs']:.1e}"
        cells = [_cell(row.get(name)) for name in ("before", "after", "against_dense", "against_kept")]
        lines.append(
            f"{arm:<24}{row['params_total'] / 1e6:>11.2f}{row['params_active'] / 1e6:>8.2f}{row['steps']:>7}{apart:>16}"
            + "".join(f"{cell:>17}" for cell in cells)
        )
    return "\n".join(lines)


def _cell(value: dict[str, Any] | None) -> str:
    if value is None:
        return "-"
    half = "" if value["interval"] is None else f" ±{value['interval']:.3f}"
    return f"{value['mean']:.3f}{half}"


if __name__ == "__main__":
    main()
