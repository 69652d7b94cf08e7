"""scripts/ray_serve: two replicas on one host answer as one server does; the manifests name what the server has."""

from __future__ import annotations

import asyncio
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import tyro
import yaml
from served import Alone, make_core, serving

import meteora_jax as mj
from meteora_jax.cli.serve import Serve
from meteora_jax.config import InputError
from meteora_jax.serving.models import Fleet

pytestmark = pytest.mark.filterwarnings("ignore:Using extra keyword arguments")  # ray's, of pydantic, at its import

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "scripts" / "ray_serve"
PROMPTS = ("The quick brown fox jumps", "A gate", "How many apples, pears and plums")
NAMES = ("apple", "birch", "cedar", "daisy")

# Two replicas that share a host's two cores, until a line comes. Everything listens on the loopback alone.
PLAY = """
import socket, sys
import ray
from ray import serve
from scripts.ray_serve.deploy import app

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = free.getsockname()[1]
ray.init(num_cpus=2, include_dashboard=False, _node_ip_address="127.0.0.1", object_store_memory=80 << 20,
         log_to_driver=False)
try:
    serve.start(http_options={"host": "127.0.0.1", "port": port, "num_cpus": 0})
    serve.run(app({"base": sys.argv[1], "bank": sys.argv[2], "name": "tiny", "max-rows": 2, "max_tokens": 64,
                   "blocks": 64, "warm_up": [], "replicas": "2"}))
    print(f"http://127.0.0.1:{port}", flush=True)
    sys.stdin.readline()
finally:
    serve.shutdown()
    ray.shutdown()
"""


async def ask_all(url: str, asked: list[tuple[str, str]]) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:

        async def one(name: str, prompt: str) -> str:
            body = dict(model=name, prompt=prompt, temperature=0, max_tokens=12, stream=True)
            got = ""
            async with client.stream("POST", "/v1/completions", json=body) as answer:
                assert answer.status_code == 200
                lines = [line async for line in answer.aiter_lines() if line]
            assert lines[-1] == "data: [DONE]"
            for line in lines[:-1]:
                got += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
            return got

        return await asyncio.gather(*(one(*a) for a in asked))


@pytest.mark.exhaustive(
    "Ray and two replicas take two minutes of a core; app, options and manifests are tested by default"
)
def test_two_replicas_answer_as_one_server_and_leave_no_process(world):
    pytest.importorskip("ray", reason="needs the ray extra")
    import psutil

    asked = [(name, prompt) for name in NAMES for prompt in PROMPTS]
    alone = Alone(world["model"], make_core(Fleet(world["model"], None, "tiny")))
    want = [alone(prompt, mj.Fixed(name), 12).text for name, prompt in asked]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "METEORA_CACHE": "", "JAX_PLATFORMS": "cpu"}
    environment |= {"RAY_USAGE_STATS_ENABLED": "0", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, "-c", PLAY, str(world["base"]), str(world["bank"])]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as process:
        children: list[psutil.Process] = []
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            url = process.stdout.readline().strip()
            assert url, "Ray Serve did not start"
            children = psutil.Process(process.pid).children(recursive=True)
            assert asyncio.run(ask_all(url, asked)) == want
            unknown = httpx.post(f"{url}/v1/completions", json={"model": "nobody", "prompt": "a"}, timeout=60)
            assert unknown.status_code == 404
            assert unknown.json()["error"]["code"] == "model_not_found"
            assert "<title>" in httpx.get(url, follow_redirects=True).text
            # each replica has figures of its own, and Ray sends a scrape to either
            scrapes = [httpx.get(f"{url}/metrics").text for _ in range(30)]
            waited = "meteora_time_to_first_token_seconds_sum"
            sums = {float(line.split()[1]) for text in scrapes for line in text.splitlines() if line.startswith(waited)}
            assert len(sums) == 2
            assert min(sums) > 0
            process.stdin.write("\n")
            process.stdin.close()
            assert process.wait(60) == 0
        finally:
            process.kill()
            for child in children:
                if process.returncode != 0 and child.is_running():
                    child.kill()
        _, left = psutil.wait_procs(children, timeout=20)
        assert not left


def documents(name: str) -> dict[str, Any]:
    """A file's objects by their kinds."""
    return {one["kind"]: one for one in yaml.safe_load_all((FOLDER / "kubernetes" / name).read_text())}


@pytest.mark.parametrize("name", ["server.yaml", "autoscaler.yaml"])
def test_manifests_are_what_kubernetes_takes(name):
    """By the schemas of Kubernetes' own kinds, without a cluster; those of the extensions are not among them."""
    import kubernetes_validate

    own = [one for one in documents(name).values() if one["kind"] != "PodMonitor"]
    assert len(own) == 2
    for one in own:
        kubernetes_validate.validate(one, kubernetes_validate.latest_version(), strict=True)


def test_the_pods_run_a_server_that_the_command_line_knows(world):
    deployment = documents("server.yaml")["Deployment"]
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    assert container["command"] == ["meteora", "serve"]
    command = tyro.cli(Serve, args=container["args"])
    (port,) = container["ports"]
    assert command.port == port["containerPort"]
    assert command.host == "0.0.0.0"
    (mounted,) = [m["mountPath"] for m in container["volumeMounts"] if m["name"] == "models"]
    assert all(folder.is_relative_to(mounted) for folder in (command.base, command.bank, command.gates))
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] > pause + command.grace
    service = documents("server.yaml")["Service"]["spec"]
    assert service["ports"][0]["targetPort"] == port["name"]
    pool = documents("pool.yaml")["InferencePool"]["spec"]
    assert [p["number"] for p in pool["targetPorts"]] == [command.port]
    for selector in (
        deployment["spec"]["selector"],
        pool["selector"],
        documents("server.yaml")["PodMonitor"]["spec"]["selector"],
    ):
        assert selector["matchLabels"].items() <= pod["metadata"]["labels"].items()
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "readiness", "liveness")]
    (scraped,) = documents("server.yaml")["PodMonitor"]["spec"]["podMetricsEndpoints"]
    rules = yaml.safe_load(documents("autoscaler.yaml")["ConfigMap"]["data"]["config.yaml"])["rules"]
    scaler = documents("autoscaler.yaml")["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert [m["pods"]["metric"]["name"] for m in scaler["metrics"]] == [rule["name"]["as"] for rule in rules]
    with serving(world["model"]) as served:
        for probe in probes:
            assert probe["port"] == scraped["port"] == port["name"]
            assert httpx.get(served.url + probe["path"]).status_code == 200
        metrics = httpx.get(served.url + scraped["path"]).text
    read = [rule["seriesQuery"].partition("{")[0] for rule in rules]
    gateways = ["num_requests_running", "kv_cache_usage_perc", "lora_requests_info", "cache_config_info"]
    for name in (*read, *(f"vllm:{gauge}" for gauge in gateways)):
        assert f"# TYPE {name} gauge" in metrics
        assert f"`{name}`" in (FOLDER / "README.md").read_text()


def test_rays_own_file_is_one_that_ray_reads_and_has_the_servers_options():
    pytest.importorskip("ray", reason="needs the ray extra")
    from ray.serve.schema import ServeDeploySchema

    deploy = importlib.import_module("scripts.ray_serve.deploy")

    raw = yaml.safe_load((FOLDER / "config.yaml").read_text())
    (application,) = ServeDeploySchema.model_validate(raw).applications
    module, _, name = application.import_path.partition(":")
    assert (module, name) == ("scripts.ray_serve.deploy", "app")
    command = deploy.read_command(application.args)
    assert command.base == Path("runs/base")
    assert command.warm_up == (1, 8)
    (deployment,) = application.deployments
    assert deployment.name == deploy.Meteora.name
    assert deployment.max_ongoing_requests == command.max_rows
    scaling: Any = deployment.autoscaling_config
    assert scaling["target_ongoing_requests"] < command.max_rows


@pytest.mark.parametrize(
    ("given", "said"), [({"port": 80}, "^port: expected"), ({"allow-adapter-updates": True}, "reaches one replica")]
)
def test_options_that_replicas_cannot_have_are_refused(given, said):
    pytest.importorskip("ray", reason="needs the ray extra")
    deploy = importlib.import_module("scripts.ray_serve.deploy")

    with pytest.raises(InputError, match=said):
        deploy.read_command({"base": "runs/base", **given})


def test_an_option_of_one_or_none_is_a_number():
    pytest.importorskip("ray", reason="needs the ray extra")
    deploy = importlib.import_module("scripts.ray_serve.deploy")

    command = deploy.read_command(
        {"base": "runs/base", "max-rows": 1, "adapter_slots": 1, "max_waiting": 0, "log-prompts": True}
    )
    assert (command.max_rows, command.adapter_slots, command.max_waiting, command.log_prompts) == (1, 1, 0, True)
