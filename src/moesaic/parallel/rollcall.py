"""Roll call: the processes of a run find each other in a store that may still hold the keys of a dead attempt.

torchrun keeps its store over restarts, so what stands in it may come from processes that are gone, and nothing in the
environment numbers the attempts alike on all nodes. So nothing is believed that has not been answered. Every process writes a
word it has just drawn; rank 0 reads all words out, in a round with a number that no attempt has used; who hears its own word
answers; when all have answered, the round begins, and whatever the run writes stands below its number.

    rank r   word/r = drawn             read/out holds it at place r?  answer/ROUND/r        go/ROUND?  begin
    rank 0   a word is new?  read/out = ROUND and all words            all have answered?  go/ROUND
"""

from __future__ import annotations

import json
import secrets
import time
from typing import TYPE_CHECKING, Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from moesaic.errors import MoesaicError

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_PAUSE_S = 0.2  # between two looks, at most


def roll_call(store: Store, rank: int, world: int, timeout_s: float) -> Store:
    """The part of ``store`` that belongs to this attempt alone; returns when all ranks are there.

    Raises ``MoesaicError`` in words, on all that are there: which ranks did not come in time, or were started for another
    number of processes, or twice.
    """
    try:
        return _RollCall(PrefixStore("moesaic", store), rank, world).hold(timeout_s)
    except RuntimeError as error:
        raise MoesaicError(
            f"Rank {rank}: the run's store went away while the ranks were called; the process that keeps it has ended."
        ) from error


class _RollCall:
    def __init__(self, store: Store, rank: int, world: int) -> None:
        self.store, self.rank, self.world = store, rank, world
        self.word = f"{secrets.token_hex(8)} of {world}"
        self.round = 0  # the one answered last
        self.words: list[str] = []  # rank 0: as read out last

    def hold(self, timeout_s: float) -> Store:
        self.store.set(f"word/{self.rank}", self.word)
        late, pause = time.monotonic() + timeout_s, 0.01
        while not self._begun():
            if self.store.get(f"word/{self.rank}").decode() != self.word:
                raise MoesaicError(
                    f"Rank {self.rank}: another process was started as rank {self.rank} too; start each node "
                    "once, with its own --node-rank."
                )
            if self.rank == 0:
                self._call()
            self._answer()
            if time.monotonic() > late + (0 if self.rank == 0 else 5):
                raise MoesaicError(self._too_late(timeout_s))
            time.sleep(pause)
            pause = min(2 * pause, _PAUSE_S)
        return PrefixStore(f"round{self.round}", self.store)

    def _begun(self) -> bool:
        """Whether the round answered has begun. Raises where rank 0 has given up."""
        if not self.round or not self.store.check([f"go/{self.round}"]):
            return False
        if failed := self.store.get(f"go/{self.round}").decode():
            self._linger()
            raise MoesaicError(f"Rank {self.rank}: {failed}")
        return True

    def _answer(self) -> None:
        if not self.store.check(["read/out"]):
            return
        read: dict[str, Any] = json.loads(self.store.get("read/out"))
        if read["round"] != self.round and self.word in read["words"][self.rank : self.rank + 1]:
            self.round = read["round"]
            self.store.set(f"answer/{self.round}/{self.rank}", "")

    def _call(self) -> None:
        words = [self._word(rank) for rank in range(self.world)]
        if words != self.words:
            self.words = words
            self.store.set("read/out", json.dumps({"round": self.store.add("rounds", 1), "words": words}))
        elif not self._absent():
            worlds = {int(word.split()[-1]) for word in words}
            failed = (
                "" if len(worlds) == 1 else f"the processes were started for different worlds, of {sorted(worlds)}."
            )
            self.store.set(f"go/{self.round}", failed)

    def _word(self, rank: int) -> str:
        return self.store.get(f"word/{rank}").decode() if self.store.check([f"word/{rank}"]) else ""

    def _absent(self) -> list[int]:
        """Rank 0: who has not answered."""
        keys = [f"answer/{self.round}/{rank}" for rank in range(self.world)]
        if not self.round or self.store.check(keys):
            return [] if self.round else list(range(self.world))
        return [rank for rank, key in enumerate(keys) if not self.store.check([key])]

    def _too_late(self, timeout_s: float) -> str:
        if self.rank:
            return f"Rank {self.rank}: rank 0 did not call the roll within {timeout_s:g} s; it did not start, or has ended."
        absent = ", ".join(map(str, self._absent()))
        failed = (
            f"of {self.world} processes, rank {absent} did not come within {timeout_s:g} s; see what their nodes say."
        )
        if self.round:
            self.store.set(f"go/{self.round}", failed)
            self._linger()
        return f"Rank 0: {failed}"

    def _linger(self) -> None:
        """Rank 0 may keep the store: the others first read why there is no run."""
        if self.rank == 0:
            time.sleep(5 * _PAUSE_S)
