"""Counters and histograms of the API. Each application has its own registry; every label has a bounded set of values."""

from typing import Literal

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

disable_created_metrics()  # type: ignore[no-untyped-call]  # a second series for each, with its start time, which nobody reads

_SUMMED: Literal["livesum"] = "livesum"  # of a gauge, over the processes that run
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 120.0)


class HttpMetrics:
    """Requests, by the template of their route and never by their path."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "winnow_http_requests", "Requests answered", ["method", "route", "status"], registry=registry
        )
        self.seconds = Histogram(
            "winnow_http_request_seconds",
            "From the head of a request to the end of its response",
            ["method", "route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.in_flight = Gauge(
            "winnow_http_requests_in_flight", "Requests not yet answered", registry=registry, multiprocess_mode=_SUMMED
        )


class ShareMetrics:
    def __init__(self, registry: CollectorRegistry) -> None:
        self.held = Gauge(
            "winnow_shares_held",
            "What requests in progress hold of what is shared",
            ["share"],
            registry=registry,
            multiprocess_mode=_SUMMED,
        )
        self.counting_alone = Gauge(
            "winnow_counting_alone",
            "Processes that count rates and shares for themselves, since they do not reach the broker",
            registry=registry,
            multiprocess_mode=_SUMMED,
        )


class DispatchMetrics:
    """What the dispatcher of this process does; only the one that leads does anything."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.leading = Gauge(
            "winnow_dispatch_leading",
            "Whether one of these processes leads the dispatch",
            registry=registry,
            multiprocess_mode=_SUMMED,
        )
        self.leases = Counter(
            "winnow_leases_taken_back",
            "Units reclaimed from workers that stopped sending heartbeats",
            registry=registry,
        )
        self.cancels = Counter(
            "winnow_cancels_forced", "Cancellations enforced without their workers", registry=registry
        )
        self.messages = Counter("winnow_messages_sent", "Messages sent to wake workers", registry=registry)
        self.failed_passes = Counter(
            "winnow_dispatch_passes_failed", "Passes over the ledger that failed", registry=registry
        )
        self.broker_failures = Counter(
            "winnow_broker_failures", "Times that the broker did not accept messages", registry=registry
        )


class StorageMetrics:
    """What this process found in the artifact store."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.damaged = Counter(
            "winnow_artifacts_damaged", "Files that were found damaged and set aside", registry=registry
        )


class WebhookMetrics:
    """What the sender of this process does."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.attempts = Counter(
            "winnow_webhook_attempts", "Requests to webhook endpoints", ["outcome"], registry=registry
        )
        for outcome in ("delivered", "failed"):
            self.attempts.labels(outcome)
