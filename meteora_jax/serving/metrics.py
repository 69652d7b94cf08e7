"""What Prometheus reads. The gauges that inference gateways steer by have vLLM's names, the others this project's."""

from __future__ import annotations

import collections
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest

from meteora_jax.routing.fixed import Fixed

if TYPE_CHECKING:
    from meteora_jax.serving.server import Server

FIRST = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
BETWEEN = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
MOST_NAMES = 64  # adapters that a label lists


class Metrics:
    """The metrics of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labelled: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter(
            "meteora_requests", "Requests by what became of them", ["route", "model", "status"], **labelled
        )
        self.finished = Counter("meteora_responses", "Responses by what ended them", ["reason"], **labelled)
        self.first = Histogram(
            "meteora_time_to_first_token_seconds", "From a request's arrival to its first token",
            buckets=FIRST, **labelled,
        )  # fmt: skip
        self.between = Histogram(
            "meteora_inter_token_latency_seconds", "Between tokens; those that arrive together share the time",
            buckets=BETWEEN, **labelled,
        )  # fmt: skip
        self.seconds = Histogram("meteora_request_seconds", "Of whole requests", buckets=FIRST, **labelled)
        self.led = Counter(
            "meteora_routed_tokens", "Traced tokens by the adapter that led them", ["adapter"], **labelled
        )

    def watch(self, server: Server) -> None:
        """Adds what is read from the engine at every scrape."""
        self.registry.register(EngineState(server))

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)


class EngineState:
    """A collector of what the engine knows by itself."""

    def __init__(self, server: Server):
        self._server = server

    def describe(self) -> Iterable[Metric]:
        """Nothing is known before a scrape."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """The values as they are now."""
        driver, fleet = self._server.driver, self._server.fleet
        core = driver.core
        if core is None or driver.dead:  # between two engines, or after the last
            return
        scheduler, pool, counters = core.scheduler, core.scheduler.cache.pool, core.counters
        running, live = len(scheduler.running), len(driver.live)
        used = pool.count - pool.available
        gauges = (
            ("vllm:num_requests_running", "Requests that have a row", running),
            ("vllm:num_requests_waiting", "Requests that wait for one", max(0, live - running - len(scheduler.ending))),
            (
                "vllm:kv_cache_usage_perc",
                "Share of the cache's blocks that requests hold, from 0 to 1",
                used / pool.count,
            ),
            ("meteora_kv_blocks_used", "Blocks that requests hold", used),
            ("meteora_kv_blocks_cached", "Free blocks whose content may be found again", pool.idle),
            ("meteora_kv_blocks", "Blocks of the cache", pool.count),
            ("meteora_adapters", "Adapters in memory", len(fleet.model.adapter_names)),
            ("meteora_rows", "Requests that decode at once", core.size.rows),
        )
        if (slots := fleet.model.pool) is not None:
            resident = ("meteora_adapters_resident", "Adapters in slots of the device", len(slots.resident()))
            gauges = (*gauges, resident)
        for name, text, value in gauges:
            yield GaugeMetricFamily(name, text, value=value)
        counts = (
            ("meteora_prompt_tokens", "Prompt tokens read", counters.prompt_tokens),
            ("meteora_generation_tokens", "Tokens drawn", counters.new_tokens),
            ("meteora_prefix_cache_hit_tokens", "Prompt tokens found in the cache", driver.skipped),
            ("meteora_dispatches", "Programs given to the device", counters.dispatches),
            ("meteora_steps", "Steps given to the device", counters.steps),
            ("meteora_preemptions", "Requests that gave their blocks back", scheduler.preemptions),
            ("meteora_engine_restarts", "Engines that were replaced after a failure", driver.restarts),
        )
        for name, text, value in counts:
            yield CounterMetricFamily(name, text, value=value)
        sizes = GaugeMetricFamily("vllm:cache_config_info", "Of the cache", labels=["block_size", "num_gpu_blocks"])
        sizes.add_metric([str(core.size.block_size), str(core.size.blocks)], 1)
        yield sizes
        yield self._adapters()

    def _adapters(self) -> Metric:
        """Which adapters are at work, as gateways read it: names in labels, the time as the value."""
        driver, fleet = self._server.driver, self._server.fleet
        running, waiting = collections.Counter[str](), collections.Counter[str]()
        for stream in list(driver.live):
            if isinstance(stream.router, Fixed):
                where = waiting if stream.progress is None or stream.progress.row is None else running
                where.update(stream.router.weights())
        family = GaugeMetricFamily(
            "vllm:lora_requests_info", "Adapters that requests name",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )  # fmt: skip
        listed = [",".join(name for name, _ in names.most_common(MOST_NAMES)) for names in (running, waiting)]
        family.add_metric([str(len(fleet.model.adapter_names)), *listed], time.time())
        return family
