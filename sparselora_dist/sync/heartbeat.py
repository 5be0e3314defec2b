"""Who is missing: every rank says in the job's store that it lives and what it does, and ends when another does not.

A backend's own words name nobody ("Connection closed by peer", "Timed out waiting"), and a rank that waits in a collective
cannot say anything at all. So two threads of every rank

- write its beat (a count, its phase, host and process) and read the others', through a connection of their own;
- end the process, with the reason, when there is a verdict and the main thread does not end by itself.

A beat is written as long as the process lives: while it loads, compiles or stands in a debugger. Only a rank that is
stopped, dead or cut off is silent. The first verdict of the job is the verdict of all; it is said once a host.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch.distributed as dist

from ..process import SaidElsewhere, complain, leave
from .errors import RankLostError, is_derived
from .processes import born, first_of_host, is_gone, is_stopped, place

_VERDICT, _NONE = "verdict", "-"
_DONE = "done"
# A rank reads the beats of so many that follow it, so that the store's work grows with the ranks and not their square.
_WATCHED = 32
# From a verdict until the process is ended, for a main thread that has not heard of it, and for one that has.
_GRACE, _GRACE_TO_CLOSE = 2.0, 30.0
# For a word to reach the store and come back, on a machine that has much else to do.
_TO_TELL = 10.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """Why the job ends."""

    rank: int
    text: str
    host: str
    own: bool
    """Whether the rank said it itself."""


@dataclass(slots=True)
class _Peer:
    """What was last read of another rank."""

    count: int
    phase: str
    host: str
    place: str
    pid: int
    born: int
    changed: float
    """When its count changed last, by this process's clock: hosts' clocks are never compared."""

    @property
    def is_gone(self) -> bool:
        """Whether a rank of this host has ended without saying so."""
        return self.phase != _DONE and is_gone(self.pid, self.born, self.place)


class Heartbeat:
    """This rank's beat, and its eye on the others. With one rank, or no ``timeout``, it does nothing.

    Args:
        rank: this process's.
        size: ranks of the job.
        timeout: seconds of silence after which a rank is missing; 0 turns it off.
        connect: makes a client of the job's store, each call a connection of its own.
        address: where the store is, in words, and by which jobs on one host are told apart.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        timeout: float = 0.0,
        connect: Callable[[], dist.Store] | None = None,
        address: str = "",
    ) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.remedy: Callable[[], str] = str
        """Says what lies on the disk and how to go on; ends the message that a rank is missing."""
        self.before_end: list[Callable[[], None]] = []
        """Called before the process is ended from here, such as to finish a file."""
        self._connect, self._address = connect, address
        self._tick = min(max(timeout / 12, 0.2), 2.0)
        self._phase, self._count = "starting", 0
        self._peers: dict[int, _Peer] = {}
        self._proposal: Verdict | None = None
        self._verdict: Verdict | None = None
        self._known, self._wake, self._stopping = threading.Event(), threading.Event(), threading.Event()
        self._limit = timeout
        self._answered = time.monotonic()
        self._looked = 0.0
        """When the last look at the others began that has come to its end."""
        self._main_ends = 0.0
        self._threads: list[threading.Thread] = []

    @property
    def active(self) -> bool:
        return bool(self._threads)

    def start(self) -> Heartbeat:
        """Begin to beat."""
        if self._connect is not None and self.size > 1 and self.timeout > 0:
            self._answered = time.monotonic()
            self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._judge)]
            for thread in self._threads:
                thread.start()
        return self

    def at(self, phase: str) -> None:
        """What this rank does now, as others will read it: ``"backward of step 7"``."""
        self._phase = phase
        self._wake.set()

    def stop(self) -> None:
        """This rank is through: its silence from now on is in order."""
        if self.active:
            self._phase = _DONE
            self._stopping.set()
            self._wake.set()
            self._threads[0].join(self._tick + 1)
            self._threads = []

    def explain(self, error: BaseException) -> None:
        """What an error of the main thread means for the job; waits for the others' word where the backend speaks.

        Returns where this rank is the first to fail, and has to say so.

        Raises:
            RankLostError: it comes of another rank, which is named; this rank says so for its host.
            SaidElsewhere: it comes of another rank, and another process says so.
        """
        if not self.active or isinstance(error, SaidElsewhere):
            return
        self._main_ends = time.monotonic()
        derived = is_derived(error)
        if derived:
            # Something is wrong: whoever is silent now need not be given the whole timeout.
            self._limit = min(self.timeout, max(5.0, 5 * self._tick))
            self._wake.set()
            self._wait_for_a_look(time.monotonic() + self._limit + 3 * self._tick)
        if not self._known.is_set():
            what = f"{error}{self._places()}" if derived else str(error) or type(error).__name__
            self._proposal = Verdict(self.rank, f"{what}", socket.gethostname(), True)
            if first_of_host(self._address):
                self._publish()
                if derived:
                    raise RankLostError(f"{self._name(self.rank)} failed in {self._phase}: {what}") from error
                return
            self._publish()
        verdict = self._verdict
        self._end_the_stopped()
        if verdict is not None and (verdict.rank != self.rank or not verdict.own) and first_of_host(self._address):
            raise RankLostError(self._words(verdict)) from None
        raise SaidElsewhere(1) from error

    def _publish(self) -> None:
        self._wake.set()
        self._known.wait(_TO_TELL)

    def _wait_for_a_look(self, after: float) -> None:
        """Until there is a verdict, or the others' beats were read once more after that moment."""
        talks = self._threads[0].is_alive  # Where the store does not answer, the other thread gives the verdict.
        while self._looked < after and talks() and not self._known.wait(self._tick):
            pass

    def _places(self) -> str:
        """Where the ranks are that still answer: the ones that wait for each other."""
        known = sorted(self._peers.items())
        return "".join(f"\n{self._name(rank)} answers, in {peer.phase}" for rank, peer in known if peer.phase != _DONE)

    # --- the thread that talks --------------------------------------------------------------------------------------

    def _talk(self) -> None:
        assert self._connect is not None
        store: dist.Store | None = None
        while True:
            ending, began = self._stopping.is_set(), time.monotonic()
            # Before the beats are read: a rank that ended in order has said so in its last.
            gone = [rank for rank, peer in self._peers.items() if peer.is_gone]
            try:
                if store is None:
                    store = self._connect()
                    store.compare_set(_VERDICT, "", _NONE)
                self._exchange(store)
                self._find(store, gone)
                self._answered = time.monotonic()
            except (RuntimeError, ValueError):
                # Alone; the others' silence is counted anew should the store come back.
                store = None
                self._find(None, gone)
            self._looked = began
            if ending:
                return
            # A new phase is told at once, but not more often than five times a beat.
            self._stopping.wait(self._tick / 5)
            self._wake.wait(self._tick)
            self._wake.clear()

    def _exchange(self, store: dist.Store) -> None:
        """Write this rank's beat and read the others' and the verdict."""
        self._count += 1
        beat = [self._count, self._phase, socket.gethostname(), place(), os.getpid(), born(os.getpid())]
        store.set(str(self.rank), json.dumps(beat))
        watched = [(self.rank + i) % self.size for i in range(1, min(self.size, _WATCHED + 1))]
        # One that has not begun is waited for by init_process_group, with its own timeout.
        begun = [rank for rank in watched if rank in self._peers or store.check([str(rank)])]
        found, *beats = store.multi_get([_VERDICT, *map(str, begun)])
        now = time.monotonic()
        fresh = now - self._answered > self._limit / 2
        for rank, text in zip(begun, beats):
            count, *rest = json.loads(text)
            old = self._peers.get(rank)
            changed = old.changed if old and old.count == count and not fresh else now
            phase, host, where, pid, began = rest
            self._peers[rank] = _Peer(count, phase, host, where, pid, began, changed)
        if found.decode() != _NONE:
            self._settle(Verdict(**json.loads(found)))

    def _find(self, store: dist.Store | None, gone: list[int]) -> None:
        """Look for ranks that are missing, and agree on the verdict where the store can be asked."""
        if self._known.is_set():
            return
        now, proposal = time.monotonic(), self._proposal
        lost = {rank: "gone" for rank in gone if self._peers[rank].phase != _DONE}
        if store is not None:
            quiet = {r: now - p.changed for r, p in self._peers.items() if p.phase != _DONE and r not in lost}
            if any(seconds > self._limit for seconds in quiet.values()):
                # Those that were cut off together fell silent within a beat of each other.
                lost |= {r: f"{s:.0f}" for r, s in quiet.items() if s > self._limit - 2 * self._tick}
        if proposal is None and lost:
            text = "; ".join(self._missing(rank, how) for rank, how in sorted(lost.items()))
            first = min(lost)
            proposal = Verdict(first, text, self._peers[first].host, False)
        if proposal is None:
            return
        if store is not None:
            mine = json.dumps({name: getattr(proposal, name) for name in Verdict.__slots__})
            proposal = Verdict(**json.loads(store.compare_set(_VERDICT, _NONE, mine)))
        self._settle(proposal)

    def _missing(self, rank: int, how: str) -> str:
        peer = self._peers[rank]
        if how == "gone":
            what = "is gone without a word: killed, perhaps for memory (dmesg says so)"
        else:
            what = f"has not been heard of for {how} s{' and is stopped' if is_stopped(peer.pid, peer.place) else ''}"
        return f"{self._name(rank)} {what}; last seen in {peer.phase}"

    def _name(self, rank: int) -> str:
        if rank == self.rank:
            return f"rank {rank} ({socket.gethostname()})"
        peer = self._peers[rank]
        return f"rank {rank} ({peer.host}, process {peer.pid})"

    def _settle(self, verdict: Verdict) -> None:
        if self._verdict is None:
            self._verdict, self._since = verdict, time.monotonic()
            self._known.set()

    # --- the thread that ends ---------------------------------------------------------------------------------------

    def _judge(self) -> None:
        while not self._stopping.wait(min(self._tick, 0.25)):
            now = time.monotonic()
            if self._verdict is None and (silence := now - self._answered) > self._limit + self._tick:
                text = (
                    f"the job's store at {self._address} has not answered rank {self.rank} ({socket.gethostname()}) for "
                    f"{silence:.0f} s: the host of rank 0, or the network to it, is gone"
                )
                self._settle(Verdict(-1, text, "", False))
            verdict = self._verdict
            if verdict is None:
                continue
            waits = _GRACE_TO_CLOSE if self._main_ends else _GRACE
            if now - max(self._since, self._main_ends) > waits:
                if (verdict.rank != self.rank or not verdict.own) and first_of_host(self._address):
                    complain(self._words(verdict))
                self._end_the_stopped()
                for finish in self.before_end:
                    finish()
                leave(1)

    def _words(self, verdict: Verdict) -> str:
        if verdict.rank == self.rank:
            text = f"the other ranks have gone on without rank {self.rank}: {verdict.text}"
        elif verdict.own:
            name = self._name(verdict.rank) if verdict.rank in self._peers else f"rank {verdict.rank} ({verdict.host})"
            text = f"{name} failed: {verdict.text}"
        else:
            text = f"{verdict.text} (said by rank {self.rank} in {self._phase})"
        # The disk may be what hangs: what is known is said without it.
        found: list[str] = []
        look = threading.Thread(target=lambda: found.append(self.remedy()), daemon=True)
        look.start()
        look.join(1.0)
        return "\n".join([text, *filter(None, found)])

    def _end_the_stopped(self) -> None:
        """A rank of this host that is stopped hears nothing but SIGKILL; launchers send that half a minute later."""
        if self._verdict is None or self._verdict.own:
            return
        for peer in self._peers.values():
            if time.monotonic() - peer.changed > self._limit and not peer.is_gone and is_stopped(peer.pid, peer.place):
                with contextlib.suppress(OSError):
                    os.kill(peer.pid, signal.SIGKILL)
