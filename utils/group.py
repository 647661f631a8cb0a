"""How the processes of a launcher form a group, and wait for each other as long as they live."""

import contextlib
import datetime
import fcntl
import json
import os
import queue
import socket
import struct
import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from utils.distributed import LostPeer, environment_number
from utils.errors import UserError

BEAT = 0.5  # seconds between two signs of life
QUIET = 60.0  # seconds without one after which a process counts as dead, or DIST_TIMEOUT if less

SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: the address of an interface


@dataclass(frozen=True)
class Place:
    """This process's number of how many, and where the first one listens."""

    rank: int
    processes: int
    address: str
    port: int


def read_place() -> Place:
    """The place that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT give.

    Raises:
        UserError: one of them is missing, no number or out of range, or the host is unknown.
    """
    processes = environment_number("WORLD_SIZE", 1)
    rank = environment_number("RANK", 0, processes - 1)
    address = os.environ.get("MASTER_ADDR", "")
    if not address:
        raise UserError("MASTER_ADDR is not set: start by torchrun, or set it to the first host")
    port = environment_number("MASTER_PORT", 1, 2**16 - 1)
    try:
        socket.getaddrinfo(address, port)
    except (OSError, UnicodeError) as error:
        raise UserError(f"MASTER_ADDR is {address}: no such host ({error})") from error
    return Place(rank, processes, address, port)


def interface_to(address: str, port: int) -> str | None:
    """The network interface by which this machine reaches ``address``, None if that is unknown.

    It is unknown for IPv6, and where a machine resolves its own name to its loopback.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((address, port))  # chooses a way, and sends nothing
        own = probe.getsockname()[0]
        if own.startswith("127.") and not (address == "localhost" or address.startswith("127.")):
            return None
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    return None


class Peers:
    """The processes of a group, which wait for each other as long as they live.

    A thread of each process adds to a number in the group's store. A process lives as long as its
    number changes while another one watches, so that no clocks are compared. What takes long is
    waited for here rather than in a collective, which has a timeout.

    Args:
        place: this process in the group.
        timeout: seconds until a group that does not form is an error.

    Attributes:
        store: for the group alone.

    Raises:
        UserError: the group cannot form.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place, self.timeout, self._calls = place, timeout, 0
        self._patience = min(timeout, QUIET)
        self._stop = threading.Event()
        try:
            store, heart = _connect(place, timeout)
            # torchrun's store outlives a restart, with the addresses of the dead processes
            name = self._living_group(store, timeout) if place.rank else uuid.uuid4().hex
            self.store = dist.PrefixStore(name, store)
            self._thread = _start(self._beat, dist.PrefixStore(name, heart))
            if not place.rank:
                store.set("group", name)
        except RuntimeError as error:
            raise _cannot_form(place, error) from error

    def init_collectives(self, backend: str, **options: Any) -> None:
        """Make torch's default group of these processes.

        Args:
            backend: nccl or gloo.
            options: for torch's ``init_process_group``.

        Raises:
            UserError: it cannot form.
        """
        # gloo, which also agrees on stopping, takes the way that leads to the store: the first
        # interface that it finds may reach no other machine
        if name := interface_to(self.place.address, self.place.port):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        try:
            dist.init_process_group(
                backend,
                store=self.store,
                rank=self.place.rank,
                world_size=self.place.processes,
                timeout=datetime.timedelta(seconds=self.timeout),
                **options,
            )
        except RuntimeError as error:
            raise _cannot_form(self.place, error) from error

    def call_on_first(self, function: Callable[[], Any]) -> Any:
        """Call ``function`` on the first process, and return its result on all.

        Raises:
            UserError: on every process, if ``function`` raises it.
            LostPeer: a process that is waited for has died.
        """
        key = self._next_key()
        if self.place.rank:
            self._wait(key, 0)
            result, error = json.loads(self.store.get(key))
            self.store.set(f"{key}/{self.place.rank}", "read")
        else:
            result, error = None, None
            try:
                result = function()
            except UserError as raised:
                error = str(raised)
            self._put(key, (result, error))
            # the store may end with this process
            for other in range(1, self.place.processes):
                self._wait(f"{key}/{other}", other)
                self.store.delete_key(f"{key}/{other}")
            self.store.delete_key(key)
        if error is not None:
            raise UserError(error)
        return result

    def gather(self, value: Any) -> list[Any]:
        """``value`` of each process in the order of ranks, on all.

        Raises:
            LostPeer: a process that is waited for has died.
        """
        key = self._next_key()
        if self.place.rank:
            self._put(f"{key}/{self.place.rank}", value)

        def collect() -> list[Any]:
            values = [value]
            for other in range(1, self.place.processes):
                self._wait(f"{key}/{other}", other)
                values.append(json.loads(self.store.get(f"{key}/{other}")))
                self.store.delete_key(f"{key}/{other}")
            return values

        return self.call_on_first(collect)

    def say_goodbye(self) -> None:
        """Tell the others that this process ends, so that none waits for it."""
        self._stop.set()

        def tell() -> None:
            with contextlib.suppress(RuntimeError):  # the store has ended before
                self.store.set(f"gone/{self.place.rank}", "")

        _start(tell).join(BEAT)  # not longer: the store may hang

    def leave(self) -> None:
        """Say goodbye; the first process waits for the others, since the store may end with it."""
        self.say_goodbye()
        self._thread.join(QUIET)  # Python must not end while it is inside the store
        if not self.place.rank:
            with contextlib.suppress(RuntimeError):  # one has died
                for other in range(1, self.place.processes):
                    self._wait(f"gone/{other}", other)

    def _next_key(self) -> str:
        self._calls += 1
        return f"call/{self._calls}"

    def _put(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def _wait(self, key: str, process: int) -> None:
        """Wait for ``key``, which ``process`` sets, as long as that lives and the store answers."""
        answers: queue.Queue[bool | Exception] = queue.Queue()
        # in a thread, because the store's calls never end if its machine hangs
        _start(self._poll, key, process, answers)
        # counted, because this process may be suspended together with the other
        quiet = 0.0
        while quiet < self._patience:
            try:
                answer = answers.get(timeout=BEAT)
            except queue.Empty:
                quiet += BEAT
                continue
            if isinstance(answer, Exception):
                raise answer
            if answer:
                return
            quiet = 0.0
        raise LostPeer(f"process {process} showed no sign of life for {quiet:g} s")

    def _poll(self, key: str, process: int, answers: queue.Queue) -> None:
        """Answer each sign of life with False, and ``key`` with True."""
        beats, nap = -1, 0.001
        try:
            while True:
                gone = self.store.check([f"gone/{process}"])  # before the key, which it set earlier
                if self.store.check([key]):  # to wait in the store would print at each timeout
                    return answers.put(True)
                if gone:
                    raise LostPeer(f"process {process} has ended")
                before, beats = beats, self.store.add(f"beat/{process}", 0)
                if beats != before:
                    answers.put(False)
                time.sleep(nap)
                nap = min(2 * nap, BEAT / 5)
        except RuntimeError as error:
            answers.put(error)

    def _beat(self, store: dist.Store) -> None:
        with contextlib.suppress(RuntimeError):  # the store's process has ended
            while True:
                store.add(f"beat/{self.place.rank}", 1)
                if self._stop.wait(BEAT):
                    return

    @staticmethod
    def _living_group(store: dist.Store, timeout: float) -> str:
        """The name of the group whose first process lives."""
        seen: dict[str, int] = {}
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            name = store.get("group").decode()
            beats = store.add(f"{name}/beat/0", 0)
            if beats > seen.setdefault(name, beats):
                return name
            time.sleep(BEAT / 5)
        raise LostPeer(f"the first process did not come in {timeout:g} s")


def _connect(place: Place, timeout: float) -> tuple[dist.Store, dist.Store]:
    """Two clients of the group's store; it lives in torchrun or in the first process.

    One client does one thing at a time, and signs of life must not wait for an answer.

    Raises:
        RuntimeError: the store does not answer in time.
    """
    answers: queue.Queue[Any] = queue.Queue()
    wait = datetime.timedelta(seconds=timeout)
    end = time.monotonic() + timeout

    def connect() -> None:
        try:
            while place.rank and not _listens(place):  # torch would print its tries
                if time.monotonic() > end:
                    raise LostPeer(f"nothing listens there for {timeout:g} s")
                time.sleep(BEAT / 5)
            store, *_ = next(dist.rendezvous("env://", timeout=wait))
            heart = dist.TCPStore(place.address, place.port, timeout=wait, wait_for_workers=False)
            answers.put((store, heart))
        except Exception as error:
            answers.put(error)

    # torch waits for ever if some other program listens there
    _start(connect)
    try:
        answer = answers.get(timeout=2 * timeout)
    except queue.Empty:
        raise LostPeer("what listens there does not answer as the group's store") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _start(function: Callable, *arguments: Any) -> threading.Thread:
    thread = threading.Thread(target=function, args=arguments, daemon=True)
    thread.start()
    return thread


def _listens(place: Place) -> bool:
    try:
        socket.create_connection((place.address, place.port), timeout=BEAT).close()
    except OSError:
        return False
    return True


def _cannot_form(place: Place, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    if "EADDRINUSE" in reason:
        return UserError(
            f"MASTER_PORT is {place.port}: another program uses this port of {place.address}: "
            "set another (torchrun: --master_port)"
        )
    return UserError(
        f"the group cannot form: RANK is {place.rank}, WORLD_SIZE {place.processes}, MASTER_ADDR "
        f"{place.address}, MASTER_PORT {place.port} ({reason})"
    )
