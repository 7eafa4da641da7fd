"""Agreement of all ranks before they start: on equal settings, or on one rank's error message.

It uses the store in which the ranks meet, not a collective: nothing that differs between ranks (a
mesh, a back-end, a version) can make this hang, and a rank that finds a mistake reports it and
exits, whatever the others are doing. Each rank writes one digest and reads one verdict, so on
thousands of ranks it costs no more than meeting in the store; only settings that differ are sent
whole.
"""

import hashlib
import itertools
import json
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from torchtitan.tools.errors import UserError
from torchtitan.tools.node_names import nodes_of

Settings = Mapping[str, Any]  # by name; values that JSON holds


class RefusedElsewhere(UserError):
    """The error message of another rank, which reports it, too."""


# Rank 0, where it serves the store, stays after a failure until all ranks have read of it, at most
# so long.
LINGER_SECONDS = 20.0
# Rank 0 reports which ranks are missing; the others wait this much longer, to read its report.
_LATER = 15.0
# Number of different settings that are compared; more would have the same cause.
_MOST_KINDS = 64


@dataclass(frozen=True)
class Meeting:
    """All ranks of a run, at the store in which they met.

    store: used by this run alone. All ranks call `agree` and `refuse` in the same order.
    seconds: how long to wait for the last rank.
    keeps_store: whether this process serves the store, which the others lose when it ends.
    """

    store: dist.Store
    rank: int
    world_size: int
    seconds: float
    keeps_store: bool
    _topics: Iterator[int] = field(default_factory=itertools.count)

    def agree(self, find: Callable[[], Settings]) -> None:
        """Call `find` on every rank and compare the settings that it returns.

        Raises `UserError` on every rank: where settings differ, with the first one that does; where
        `find` raised one on some rank, with that rank's message (on that rank, unchanged); and
        where a rank doesn't join.
        """
        store = dist.PrefixStore(f"agreement_{next(self._topics)}", self.store)
        try:
            settings = find()
        except UserError as error:
            self._refuse(store, str(error))
            raise
        if self.world_size == 1:
            return
        try:
            sentence = self._compare(store, settings)
        except UserError:
            raise
        except (dist.DistError, RuntimeError) as error:
            raise UserError(
                f"the {self.world_size} processes lost contact before the first step "
                f"({_first_line(error)}): read the error of another rank, and start again."
            ) from None
        if sentence is not None:
            raise UserError(sentence)

    def refuse(self, sentence: str) -> bool:
        """Take part in the next agreement with an error message.

        Returns whether rank 0 reports it: on rank 0 always, elsewhere where rank 0 refuses with the
        same message.
        """
        store = dist.PrefixStore(f"agreement_{next(self._topics)}", self.store)
        self._refuse(store, sentence)
        if self.rank == 0:
            return True
        try:
            store.wait(["word/0"], timedelta(seconds=self.seconds))
            return store.get("word/0").decode() == sentence
        except (dist.DistError, RuntimeError):
            return False

    def _refuse(self, store: dist.Store, sentence: str) -> None:
        if self.world_size == 1:
            return
        try:
            store.set(f"word/{self.rank}", sentence)
            store.set("verdict", json.dumps({"refused": f"rank {self.rank}: {sentence}"}))
            self._acknowledge(store)
        except (dist.DistError, RuntimeError):  # the others have exited: nobody reads it
            return

    def _compare(self, store: dist.Store, settings: Settings) -> str | None:
        """Compare digests; return the message with which all ranks end, None where they agree."""
        text = json.dumps(settings, default=str)
        digest = hashlib.sha256(text.encode()).hexdigest()
        store.set(f"word/{self.rank}", digest)
        store.add("arrived", 1)
        if self.rank == 0:
            self._wait_for_words(store)
            if not store.check(["verdict"]):
                store.set("verdict", json.dumps(self._judge(store)))
        verdict = self._read(store, "verdict")
        if "look_at" in verdict:
            if self.rank in verdict["look_at"].values():
                packed: Any = zlib.compress(text.encode())  # torch's stub knows text only
                store.set(f"settings/{self.rank}", packed)
            if self.rank == 0:
                sentence = self._explain(store, verdict["look_at"])
                store.set("explained", json.dumps({"sentence": sentence}))
            verdict = self._read(store, "explained")
        if "digest" not in verdict:
            self._acknowledge(store)
        if "refused" in verdict:
            raise RefusedElsewhere(verdict["refused"])
        if "sentence" in verdict:
            return verdict["sentence"]
        if verdict["digest"] != digest:
            return (
                f"rank {self.rank} is not one of the ranks that met, or met those of another run: "
                f"set WORLD_SIZE ({self.world_size} here) to the same value on all ranks of a run, "
                "and MASTER_PORT to a port of its own."
            )
        return None

    def _wait_for_words(self, store: dist.Store) -> None:
        """Wait until all ranks have joined or one has refused; in the end, name the missing ones
        in a verdict."""
        deadline, pause = time.monotonic() + self.seconds, 0.002
        while store.add("arrived", 0) < self.world_size and not store.check(["verdict"]):
            if time.monotonic() > deadline:
                ranks = range(self.world_size)
                missing = [rank for rank in ranks if not store.check([f"word/{rank}"])]
                sentence = (
                    f"{ranks_text(missing)} of {self.world_size} did not join within "
                    f"comm.init_timeout_seconds ({self.seconds:g}): check that all processes were "
                    "started, with the same address (torchrun: --rdzv-endpoint) of a machine that "
                    "all reach."
                )
                store.set("verdict", json.dumps({"sentence": sentence}))
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.1)

    def _judge(self, store: dist.Store) -> dict[str, Any]:
        """Accept a single digest, or ask one rank for each digest to send its settings."""
        digests = store.multi_get([f"word/{rank}" for rank in range(self.world_size)])
        first_of: dict[str, int] = {}
        for rank, digest in enumerate(digests):
            first_of.setdefault(digest.decode(), rank)
        if len(first_of) == 1:
            return {"digest": digests[0].decode()}
        return {"look_at": dict(list(first_of.items())[:_MOST_KINDS])}

    def _explain(self, store: dist.Store, look_at: dict[str, int]) -> str:
        """Read the settings that differ, and describe the difference.

        look_at: by digest, a rank that has these settings.
        """
        digests = store.multi_get([f"word/{rank}" for rank in range(self.world_size)])
        ranks_of: dict[str, list[int]] = {digest: [] for digest in look_at}
        for rank, digest in enumerate(digests):
            ranks_of.get(digest.decode(), []).append(rank)
        kinds = []
        for digest, rank in look_at.items():
            key = f"settings/{rank}"
            store.wait([key], timedelta(seconds=self.seconds))
            kinds.append((ranks_of[digest], json.loads(zlib.decompress(store.get(key)))))
        return explain(kinds)

    def _read(self, store: dist.Store, key: str) -> dict[str, Any]:
        store.wait([key], timedelta(seconds=self.seconds + _LATER))
        return json.loads(store.get(key))

    def _acknowledge(self, store: dist.Store) -> None:
        """Note that this rank knows the outcome; the rank that serves the store waits for all."""
        informed = store.add("informed", 1)
        deadline = time.monotonic() + LINGER_SECONDS
        while self.keeps_store and informed < self.world_size and time.monotonic() < deadline:
            time.sleep(0.05)
            informed = store.add("informed", 0)


def explain(kinds: list[tuple[list[int], Settings]]) -> str:
    """Describe the first setting that differs, with its values.

    kinds: for each version of the settings, the ranks that have it.
    """
    names = dict.fromkeys(name for _, settings in kinds for name in settings)
    values = {name: _by_value(kinds, name) for name in names}
    differing = [name for name in names if len(values[name]) > 1]
    first = differing[0]
    shown = sorted(values[first].items(), key=lambda item: (len(item[1]), -item[1][0]))
    text = ", ".join(f"{value} on {ranks_text(ranks)}" for value, ranks in shown)
    others = f" ({len(differing) - 1} more settings differ)" if len(differing) > 1 else ""
    return (
        f"the ranks of this run differ in {first}: {text}{others}; start all of them with the same "
        "command, files and versions."
    )


def _by_value(kinds: list[tuple[list[int], Settings]], name: str) -> dict[str, list[int]]:
    ranks_of: dict[str, list[int]] = {}
    for ranks, settings in kinds:
        value = json.dumps(settings[name], ensure_ascii=False) if name in settings else "absent"
        value = value if len(value) <= 80 else f"{value[:60]}... ({_short(value)})"
        ranks_of.setdefault(value, []).extend(ranks)
    return {value: sorted(ranks) for value, ranks in ranks_of.items()}


def _short(text: str) -> str:
    """Digest that tells apart long values that begin alike."""
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def ranks_text(ranks: list[int]) -> str:
    """Sorted ranks in few words, "rank 3" or "ranks 0-2, 5", and the nodes of a run on several."""
    spans: list[list[int]] = []
    for rank in ranks:
        if spans and spans[-1][1] == rank - 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    shown = [f"{a}" if a == b else f"{a}-{b}" for a, b in spans[:8]]
    more = ", ..." if len(spans) > 8 else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(shown)}{more}{nodes_of(ranks)}"


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200]
