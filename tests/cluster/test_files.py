"""cluster.yaml and its variants, against Ray's own schemas; the Kubernetes manifest by its structure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
CLOUDS = ("aws", "gcp", "azure")
# Ray's launcher looks for `ray start` and the option, and warns where it finds neither.
HEAD = "sh ~/fugu/cluster/node.sh ray start --head --autoscaling-config=~/ray_bootstrap_config.yaml"
ROLES = {
    "gpu-serve": {"serve", "egress"},
    "gpu-train": {"train"},
    "cpu-rollout": {"rollout"},
}


def for_cloud(cloud: str) -> str:
    """What the `sed` line in cluster.yaml's head makes; it is run as it stands there."""
    text = (ROOT / "cluster.yaml").read_text()
    if cloud == "aws":
        return text
    line = next(line for line in text.splitlines() if f"> {cloud}.yaml" in line)
    command = line.removeprefix("#").partition(">")[0]
    assert command.split()[0] == "sed"
    return subprocess.run(["sh", "-c", command], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def prepared(text: str) -> dict[str, Any]:
    """As `ray up` takes it: defaults filled in, checked by Ray's schema."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return config


@pytest.fixture(autouse=True)
def _in_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_every_cloud_passes_rays_own_checks(cloud: str) -> None:
    config = prepared(for_cloud(cloud))
    assert config["provider"]["type"] == cloud
    types = config["available_node_types"]
    assert set(types) == {"head", *ROLES}
    assert config["head_node_type"] == "head"
    assert types["head"]["resources"] == {"CPU": 0}, "no work on the head"
    for name, own in ROLES.items():
        assert set(types[name]["resources"]) - {"CPU", "GPU"} == own
        assert types[name]["resources"].get("GPU", 0) == {"gpu-serve": 1, "gpu-train": 4}.get(name, 0)
        assert 0 <= types[name]["min_workers"] <= types[name]["max_workers"]
    for name, node in types.items():
        assert node["node_config"], name


@pytest.mark.parametrize("cloud", CLOUDS)
def test_rollouts_alone_are_on_spot_instances(cloud: str) -> None:
    types = prepared(for_cloud(cloud))["available_node_types"]
    words = {"aws": '"MarketType": "spot"', "gcp": '"preemptible": true', "azure": '"priority": "Spot"'}
    spot = {name for name, node in types.items() if words[cloud] in json.dumps(node["node_config"])}
    assert spot == {"cpu-rollout"}


@pytest.mark.parametrize("cloud", CLOUDS)
def test_each_node_starts_through_one_script(cloud: str) -> None:
    config = prepared(for_cloud(cloud))
    assert config["head_start_ray_commands"] == [HEAD]
    assert config["worker_start_ray_commands"] == ["sh ~/fugu/cluster/node.sh ray start --address=$RAY_HEAD_IP:6379"]
    installs = [*config["setup_commands"], *config["head_setup_commands"], *config["worker_setup_commands"]]
    assert "sh ~/fugu/cluster/node.sh setup" in installs
    sdk = {"aws": "boto3", "gcp": "google-api-python-client", "azure": "azure-identity"}
    assert [name for name in sdk if any(sdk[name] in command for command in installs)] == [cloud]


def test_a_wrong_key_would_be_found() -> None:
    from jsonschema import ValidationError

    with pytest.raises(ValidationError, match="max_worker"):
        prepared(
            (ROOT / "cluster.yaml").read_text().replace("max_workers: 1000\nupscaling", "max_worker: 1\nupscaling")
        )


def test_machines_of_your_own() -> None:
    config = prepared((ROOT / "cluster" / "onprem.yaml").read_text())
    assert config["provider"]["type"] == "local"
    assert config["max_workers"] == len(config["provider"]["worker_ips"]) == 2
    assert config["head_start_ray_commands"] == [f"RAY_enable_autoscaler_v2=0 {HEAD}"]


@pytest.mark.parametrize("name", ["cluster.yaml", "cluster/onprem.yaml"])
def test_the_code_and_the_token_go_along(name: str) -> None:
    mounts = yaml.safe_load((ROOT / name).read_text())["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    for remote, local in mounts.items():
        assert remote == f"~/fugu/{local}"
        assert (ROOT / local).exists(), local
    packages = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"tests", "benchmarks"}
    assert packages <= set(mounts.values())
    copied = (ROOT / "cluster" / "Dockerfile").read_text()
    for local in mounts.values():
        assert re.search(rf"^COPY (.* )?{re.escape(local)}( |$)", copied, re.MULTILINE), local


@pytest.mark.parametrize("path", ["cluster.yaml", *(str(p.relative_to(ROOT)) for p in sorted(ROOT.glob("cluster/*")))])
def test_no_secret_stands_in_a_file(path: str) -> None:
    text = (ROOT / path).read_text()
    assert not re.search(r"(?i)(AKIA[0-9A-Z]{16}|sk-[a-z0-9]{8}|aws_secret_access_key|BEGIN [A-Z ]*PRIVATE KEY)", text)
    assert not re.search(r"(?i)(api_key|token|password)\s*[=:]\s*[\"']?[A-Za-z0-9+/]{12,}", text)


# --- Kubernetes ---


@pytest.fixture(scope="module")
def service() -> dict[str, Any]:
    documents = list(yaml.safe_load_all((ROOT / "cluster" / "kuberay.yaml").read_text()))
    assert [each["kind"] for each in documents] == ["PersistentVolumeClaim", "RayService"]
    found: dict[str, Any] = documents[1]
    return found


def groups(service: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    cluster = service["spec"]["rayClusterConfig"]
    yield "head", cluster["headGroupSpec"]
    for group in cluster["workerGroupSpecs"]:
        yield group["groupName"], group


def test_the_manifest_is_a_rayservice(service: dict[str, Any]) -> None:
    import ray

    assert service["apiVersion"] == "ray.io/v1"
    cluster = service["spec"]["rayClusterConfig"]
    assert set(service["spec"]) <= {
        "serveConfigV2",
        "rayClusterConfig",
        "upgradeStrategy",
        "excludeHeadPodFromServeSvc",
    }
    known = {"rayVersion", "authOptions", "enableInTreeAutoscaling", "autoscalerOptions", "gcsFaultToleranceOptions"}
    assert set(cluster) <= known | {"headGroupSpec", "workerGroupSpecs"}
    assert cluster["rayVersion"] == ray.__version__
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["headGroupSpec"]["rayStartParams"] == {"num-cpus": "0"}
    assert {name for name, _ in groups(service)} == {"head", *ROLES}


def test_the_manifests_nodes(service: dict[str, Any]) -> None:
    for name, group in groups(service):
        allowed = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
        assert set(group) <= allowed, name
        # Kubernetes takes strings only here.
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
        pod = group["template"]
        assert pod["metadata"]["annotations"] == {"ray.io/overwrite-container-cmd": "true"}
        (container,) = pod["spec"]["containers"]
        assert "$KUBERAY_GEN_RAY_START_CMD" in container["args"][0]
        assert "serve.environment" in container["args"][0], "HAProxy mode on every node"
        assert container["resources"]["requests"] == container["resources"]["limits"]
        volumes = {volume["name"] for volume in pod["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes
        if name != "head":
            # KubeRay hands the value to a shell: JSON within quotes, within quotes.
            resources = json.loads(json.loads(group["rayStartParams"]["resources"]))
            assert set(resources) == ROLES[name]
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
        # Keys where providers are called from, and nowhere else.
        assert ("envFrom" in container) == (name == "gpu-serve")
        assert ("nodeSelector" in pod["spec"]) == (name == "cpu-rollout")


def test_the_manifests_serve_config_is_one(service: dict[str, Any]) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    assert [app.import_path for app in config.applications] == ["serve.deploy:build"]


# --- the script that every node runs ---


def node(folder: Path, *action: str, secrets: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    (folder / "env").write_text(secrets)
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "FUGU_VENV": sys.prefix,
        "FUGU_ENV": str(folder / "env"),
        **more,
    }
    command = ["sh", str(ROOT / "cluster" / "node.sh"), *action]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def test_a_nodes_environment(tmp_path: Path) -> None:
    secrets = '# keys\nOPENAI_API_KEY=it\'s $HOME `id` "quoted"\nnot a line\nexport X=1\nFUGU_STATE=/mnt/fugu\n'
    told = node(
        tmp_path, "run", "python", "-c", "import json, os; print(json.dumps(dict(os.environ)))", secrets=secrets
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["OPENAI_API_KEY"] == 'it\'s $HOME `id` "quoted"', "a value is text, whatever stands in it"
    assert "X" not in found
    assert found["FUGU_STATE"] == "/mnt/fugu"
    assert found["RAY_AUTH_MODE"] == "token"
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == found["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"
    assert Path(found["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_relative_to(tmp_path)


def test_the_environment_within_itself(tmp_path: Path) -> None:
    """As in `ray exec`, whose shell reads the profile before it runs node.sh again: HAProxy's wrapper stays one."""
    code = "import os; from pathlib import Path; print(Path(os.environ['RAY_SERVE_HAPROXY_BINARY_PATH']).read_text())"
    once = node(tmp_path, "run", "python", "-c", code)
    again = node(tmp_path, "run", "sh", str(ROOT / "cluster" / "node.sh"), "run", "python", "-c", code)
    assert once.returncode == again.returncode == 0, again.stderr
    assert once.stdout == again.stdout
    (binary,) = {line.split("'")[1] for line in once.stdout.splitlines() if line.startswith("exec '")}
    assert Path(binary).read_bytes()[:4] == b"\x7fELF"


def test_an_unknown_action_is_refused(tmp_path: Path) -> None:
    told = node(tmp_path, "launch")
    assert told.returncode == 2
    assert "no action launch" in told.stderr
