"""What ranks write for each other to read at any time, outside collectives: through the store of the process group."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as td
from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

TCPStore: Any = td.TCPStore  # type: ignore[attr-defined]

ANSWER = timedelta(seconds=5)  # of a store that lives; where its process is stopped, a read lasts until it goes on


class Board:
    """A client of its own of the process group's store, so that no other call waits for it, and it for none.

    prefix: what tells this board from others, the same on every rank. Methods raise RuntimeError where the store's
    process is gone, and may not return while it is stopped.
    """

    def __init__(self, prefix: str) -> None:
        client: Any = _get_default_store().clone()  # type: ignore[attr-defined]
        client.set_timeout(ANSWER)
        self._store = PrefixStore(prefix, client)

    def write(self, key: str, text: str) -> None:
        """Write a text for all ranks; it may return before it is there."""
        self._store.set(key, text)

    def read(self, keys: Sequence[str]) -> list[str]:
        """The texts of keys that were all written before."""
        return [found.decode() for found in self._store.multi_get(list(keys))]

    def claim(self, key: str, text: str) -> str:
        """Write a text where it is still empty, and return what stands there: the text of the rank that was first."""
        return bytes(self._store.compare_set(key, "", text)).decode()


def outlives_ranks() -> bool:
    """Whether the store is the launcher's, as torchrun has it, and not rank 0's."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"


class Pulse:
    """A server in this process that answers whoever asks whether it lives, also while a library keeps Python from
    running: it is a thread outside Python.

    address, port: where other machines reach it.
    """

    def __init__(self) -> None:
        self._server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.port = int(self._server.port)
        self.address = _address_towards(os.environ.get("MASTER_ADDR", "127.0.0.1"))

    @staticmethod
    def beats(address: str, port: int, limit_s: float) -> bool:
        """Whether the pulse at an address answers. It may last longer than `limit_s` where its process is stopped."""
        try:
            TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=limit_s))
        except RuntimeError:
            return False
        return True


def _address_towards(host: str) -> str:
    """This machine's address on the network that leads to `host`. Nothing is sent."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()
