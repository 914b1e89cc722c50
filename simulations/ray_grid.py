"""RayGrid: the clients' app, run by Flower's own simulation backend on Ray, on this machine or on a cluster of them.

Tables travel once to each machine, into Ray's shared memory. Any worker may answer for any client: what a client has
been charged travels with its Flower context.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import pickle
import socket
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from flwr.app import ConfigRecord, Context, Message
from flwr.clientapp import ClientApp

from client.account.memory_ledger import MemoryLedger
from client.app import client_app
from client.site import Site
from common.errors import ConfigError, WorkerLost
from simulations.inline import SimulatedGrid
from simulations.sites import Sites

if TYPE_CHECKING:
    from ray import ObjectRef

PATIENCE_S = 5.0
PARTITION = "partition-id"  # Flower's backend wants each node to have one
LEDGER = "ledger"  # a record of a client's context, and what is in it


class RayGrid(SimulatedGrid):
    """The grid of one run over simulated sites. Its answers are `InlineGrid`'s, in the same order."""

    def __init__(self, sites: Sites, *, run: str, address: str | None = None, workers: int | None = None) -> None:
        """
        Args:
            address: of a Ray cluster, all of whose cores (or GPUs, if the sites are on one) are used; by default one is
                started on this machine, and ended with the grid.
            workers: of a cluster that is started here: so many, by default one a core.

        Raises:
            ConfigError: Ray is not installed, or there is no cluster at `address` with room for a worker.
        """
        if importlib.util.find_spec("ray") is None:
            raise ConfigError(["--engine ray needs Ray: pip install 'cloister[ray]'"])
        if ":" in str(sites.device):
            raise ConfigError([f"--engine ray gives each worker a GPU of its own: --device cuda, not {sites.device}"])
        import ray
        from flwr.server.superlink.fleet.vce.backend.raybackend import RayBackend

        self._sites, self._name = sites, run
        resources: dict[str, Any] = {"num_cpus": 1, "num_gpus": 1.0 if sites.device.type == "cuda" else 0.0}
        self._opened = ExitStack()
        try:
            if not ray.is_initialized():
                _start(address, workers)
                self._opened.callback(ray.shutdown)
            self._backend = RayBackend({"client_resources": resources})
            self._backend.build(partial(_app, ray.put(sites), run))
            assert self._backend.pool is not None
            self._opened.callback(self._backend.pool.terminate_all_actors)
            if not self._backend.num_workers:
                raise ConfigError([f"no machine of the Ray cluster has room for a worker, which takes {resources}"])
        except BaseException:
            self._opened.close()
            raise
        self._threads = ThreadPoolExecutor(self._backend.num_workers, "ray")  # each waits for one worker
        self._opened.callback(self._threads.shutdown, wait=False, cancel_futures=True)
        super().__init__(sites.nodes, run=run)

    def close(self) -> None:
        """Ends the workers, and Ray if it was started here."""
        self._opened.close()

    def stream(self, messages: Iterable[Message], *, timeout: float | None = None) -> Generator[Message]:
        """The replies in the order of the messages. Some are answered ahead of whoever asks for replies: what those
        that are never asked for have charged is forgotten, as they were not sent."""
        deadline = None if timeout is None else time.monotonic() + timeout
        left, ahead = iter(messages), deque[tuple[int, Future[tuple[Message, Context]]]]()

        def begin() -> None:
            if (message := next(left, None)) is not None and (deadline is None or time.monotonic() <= deadline):
                node = message.metadata.dst_node_id
                self._sites.asked(node, run=self._name)  # for whoever is told of refusals
                ahead.append((node, self._threads.submit(self._answer, message, self._context(node))))

        try:
            for _ in range(self._backend.num_workers):
                begin()
            while ahead:
                node, answer = ahead.popleft()
                reply, self._contexts[node] = answer.result()
                begin()
                yield reply
        finally:
            for _, answer in ahead:
                answer.cancel()

    def _answer(self, message: Message, context: Context) -> tuple[Message, Context]:
        """The reply, and the context as it is then. The one that was given stays as it is."""
        from ray.exceptions import RayTaskError

        try:
            return self._backend.process_message(message, context)
        except RayTaskError as error:  # not of a client, whose app answers with an error of its own
            raise WorkerLost(f"a worker on Ray could not begin: {_lines(error)[-1]}") from error
        except Exception as error:
            raise WorkerLost(f"a worker on Ray has ended: {_lines(error)[0]}") from error

    def _context(self, node: int) -> Context:
        context = super()._context(node)
        context.node_config.setdefault(PARTITION, node)
        return context


def _start(address: str | None, workers: int | None) -> None:
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # what will be the default, without a warning
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "num_cpus": workers, "include_dashboard": False}
    try:
        if address is not None:
            _find(address)
        ray.init(
            **where,
            logging_level=logging.WARNING,
            log_to_driver=False,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "FLWR_TELEMETRY_ENABLED": "0"}},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ConfigError([f"no Ray {f'cluster at {address}' if address else 'here'}: {_lines(error)[0]}"]) from error


def _find(address: str) -> None:
    """Is there anybody at HOST:PORT? Ray itself would try for five minutes, and then end this process."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    if host and port.isdecimal():
        socket.create_connection((host, int(port)), PATIENCE_S).close()


def _lines(error: Exception) -> list[str]:
    return str(error).strip().splitlines() or [type(error).__name__]


# In a worker


def _app(sites: ObjectRef[Sites], run: str) -> ClientApp:
    return client_app(partial(_site, _here(sites), run))


@lru_cache(1)
def _here(sites: ObjectRef[Sites]) -> Sites:
    import ray

    torch.set_num_threads(1)
    return ray.get(sites)


@contextmanager
def _site(sites: Sites, run: str, context: Context) -> Iterator[Site]:
    record = context.state.config_records.get(LEDGER)
    ledger = pickle.loads(record[LEDGER]) if record is not None else MemoryLedger()  # type: ignore[arg-type]  # bytes
    try:
        yield sites.opened(context.node_id, ledger)
    finally:
        context.state[LEDGER] = ConfigRecord({LEDGER: pickle.dumps(ledger)})
