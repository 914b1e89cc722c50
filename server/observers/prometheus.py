"""A run's events as Prometheus metrics, on a port of this machine alone."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, start_http_server

from common.errors import ConnectionFailed
from server.rounds.events import Event, RoundEnded, Standing, after

ADDRESS = "127.0.0.1"
SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)


class Prometheus:
    """Give it every event of a run."""

    def __init__(self, *, connected: Callable[[], int]) -> None:
        """`connected` counts the clients that can be asked now."""
        self._standing = Standing()
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when each counter was made is nobody's question
        self._registry = registry = CollectorRegistry()
        Gauge("cloister_clients_connected", "Clients that can be asked.", registry=registry).set_function(connected)
        self._round = Gauge("cloister_round", "The last complete round.", registry=registry)
        self._rounds = Gauge("cloister_rounds", "Rounds that the run is to have.", registry=registry)
        self._failed = Counter("cloister_rounds_failed", "Rounds that failed.", registry=registry)
        self._clients = Gauge("cloister_round_clients", "Clients whose replies counted.", registry=registry)
        self._seconds = Histogram("cloister_round_seconds", "A round.", buckets=SECONDS, registry=registry)
        self._waiting = Counter("cloister_waiting_seconds", "Waiting for enough clients.", registry=registry)
        self._rejected = Counter(
            "cloister_replies_rejected", "Replies that did not count.", ["kind"], registry=registry
        )
        self._metric = Gauge("cloister_metric", "The last evaluation.", ["name"], registry=registry)
        self._epsilon = Gauge("cloister_epsilon", "Privacy spent by a unit: row, client.", ["unit"], registry=registry)

    def serve(self, port: int) -> int:
        """Answers on this port, 0 for a free one, while the process lives. Returns the port.

        Raises:
            ConnectionFailed: the port is in use.
        """
        try:
            server, _ = start_http_server(port, addr=ADDRESS, registry=self._registry)
        except OSError as error:
            raise ConnectionFailed(f"{ADDRESS}:{port}: metrics cannot be served: {error.strerror}") from error
        return int(server.server_port)

    def __call__(self, event: Event) -> None:
        self._standing = after(self._standing, event)
        if isinstance(event, RoundEnded):
            self._seconds.observe(event.seconds)
            self._waiting.inc(event.waiting)
            for rejection in event.rejected:
                self._rejected.labels(rejection.kind).inc()
            if event.failed:
                self._failed.inc()
        self._show()

    def _show(self) -> None:
        standing = self._standing
        self._round.set(standing.round)
        self._rounds.set(standing.rounds)
        self._clients.set(standing.clients)
        for unit, spent in standing.privacy.items():
            self._epsilon.labels(unit).set(spent["epsilon"])
        for name, value in (standing.evaluation or {}).items():
            if isinstance(value, float):
                self._metric.labels(name).set(value)
