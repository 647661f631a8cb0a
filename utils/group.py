"""How the processes of a launcher form a group, and agree for as long as all of them live."""

import contextlib
import datetime
import fcntl
import os
import socket
import struct
import threading
import time
import uuid
from concurrent import futures
from typing import Any, cast

import torch
import torch.distributed as dist

from utils.errors import LostPeer, UserError
from utils.launchers import Place, read_place

BEAT = 0.5  # seconds between two signs of life
NEVER = datetime.timedelta(days=365)

SIOCGIFADDR = 0x8915  # of <linux/sockios.h>: the address of an interface


def form_group(backend: str, timeout: float, **options: Any) -> "Peers":
    """Make torch's default group of the launcher's processes.

    Args:
        backend: nccl or gloo.
        timeout: seconds until waiting for another process is an error.
        options: for torch's ``init_process_group``.

    Raises:
        UserError: a launcher's variable is wrong, or the group cannot form.
    """
    place = read_place()
    try:
        socket.getaddrinfo(place.address, place.port)
        # gloo takes the way that leads to the store: the first interface that it finds may reach
        # no other machine
        if name := interface_to(place.address, place.port):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
        # in a thread, because torch waits for ever if some other program listens there
        store = futures.ThreadPoolExecutor(1).submit(_connect, place, timeout)
        dist.init_process_group(
            backend,
            store=store.result(3 * timeout),
            rank=place.rank,
            world_size=place.processes,
            timeout=datetime.timedelta(seconds=timeout),
            **options,
        )
    except Exception as error:  # of the system, the store or the backend
        reason = " ".join(str(error).split())[:200] or "what listens there is not torch's store"
        if "EADDRINUSE" in reason:
            reason = "another program uses this port: set another, torchrun's --master_port"
        raise UserError(
            f"the group cannot form: RANK is {place.rank}, WORLD_SIZE {place.processes}, "
            f"MASTER_ADDR {place.address}, MASTER_PORT {place.port} ({reason})"
        ) from error
    return Peers(timeout)


class Peers:
    """The processes of torch's default group, which agree for as long as all of them live.

    An agreement may wait for hours, as for a process that downloads or lists images. Its timeout
    could not tell a process that is busy from one that was stopped (SIGSTOP) or whose machine
    hangs. So a thread of each process takes part in a collective every BEAT seconds, which has the
    timeout. A process that is killed closes its connections, which ends every collective at once.

    Args:
        timeout: seconds without a sign of life after which a process counts as lost.
    """

    def __init__(self, timeout: float) -> None:
        self._agreements = _gloo(NEVER)
        self._beats = _gloo(datetime.timedelta(seconds=timeout))
        self._lost: Exception | None = None
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        self._thread.start()

    def gather(self, value: Any) -> list[Any]:
        """``value`` of each process in the order of ranks, on all.

        Raises:
            LostPeer: a process has died, or shows no sign of life.
        """
        self.wait(self.begin_maximum(torch.zeros(1)))  # until all are here
        values = [None] * dist.get_world_size()
        try:
            dist.all_gather_object(values, value, self._agreements)
        except RuntimeError as error:
            raise LostPeer(" ".join(str(error).split())) from error
        return values

    def begin_maximum(self, numbers: torch.Tensor) -> dist.Work:
        """Begin to put the maximum over all processes into ``numbers``; ``wait`` ends it."""
        return dist.all_reduce(numbers, dist.ReduceOp.MAX, self._agreements, async_op=True)

    def wait(self, work: dist.Work) -> None:
        """Wait for a collective of this group, as long as all processes live.

        Raises:
            LostPeer: a process has died, or shows no sign of life.
        """
        while not work.is_completed():
            lost = self._lost  # read before the wait: what was sent before the end still counts
            with contextlib.suppress(RuntimeError):  # the time is over, or see below
                work.wait(datetime.timedelta(seconds=BEAT))
            if lost and not work.is_completed():
                raise LostPeer(" ".join(str(lost).split())) from lost
        try:
            work.wait()  # which tells of a failure
        except RuntimeError as error:
            raise LostPeer(" ".join(str(error).split())) from error

    def leave(self) -> None:
        """Wait until every process leaves, or one is lost: the store ends with the first one."""
        self._leaving.set()
        self._thread.join()

    def _beat(self) -> None:
        try:
            while True:
                all_leave = torch.tensor(self._leaving.is_set(), dtype=torch.int32)
                dist.all_reduce(all_leave, dist.ReduceOp.MIN, self._beats)
                if all_leave:
                    return
                self._leaving.wait(BEAT)
        except RuntimeError as error:
            self._lost = error


def _gloo(timeout: datetime.timedelta) -> dist.ProcessGroup:
    return cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=timeout))


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


def _connect(place: Place, timeout: float) -> dist.Store:
    """The group's part of the store, which lives in torchrun or in the first process."""
    end = time.monotonic() + timeout
    while place.rank:  # torch would print its tries
        try:
            socket.create_connection((place.address, place.port), timeout=BEAT).close()
            break
        except OSError:
            if time.monotonic() > end:
                raise LostPeer(f"nothing listens there for {timeout:g} s") from None
        time.sleep(BEAT / 5)
    store, *_ = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=timeout)))
    return dist.PrefixStore(_agree_on_name(store, place, end), store)


def _agree_on_name(store: dist.Store, place: Place, end: float) -> str:
    """A name that no group had: torchrun's store outlives a restart, with dead addresses in it.

    Each process asks under a number of its own, and the first answers until all have come. So the
    questions of dead processes do no harm, and nobody takes an old answer. torch's number of
    restarts is no such name: it differs between machines, each of which counts its own.
    """
    own = uuid.uuid4().hex
    if place.rank:
        store.set(f"asks/{place.rank}", own)
        name = store.get(own).decode()
        store.set(f"{name}/{place.rank}", "")
        return name
    missing = list(range(1, place.processes))
    while missing:
        for other in missing:
            if store.check([f"asks/{other}"]):
                store.set(store.get(f"asks/{other}").decode(), own)
        missing = [other for other in missing if not store.check([f"{own}/{other}"])]
        if time.monotonic() > end:
            raise LostPeer(f"process {missing[0]} of {place.processes} did not come")
        time.sleep(BEAT / 10)
    return own
