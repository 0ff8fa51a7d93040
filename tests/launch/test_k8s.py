"""The Kubernetes manifests: their schema, and that what they say in several places agrees."""

from __future__ import annotations

import json
import shutil
import subprocess
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.cluster.manifests import DIRECTORY, FILES, SIDECAR, TRAINER, Job, documents, named
from trainer.cli import USER_ERROR
from trainer.config import ReplayConfig
from trainer.container import UNFINISHED
from trainer.settings import load_config

OLDEST, NEWEST = "1.31", "1.37"  # podFailurePolicy is stable since the former; what kubernetes-validate knows
JOBS = pytest.mark.parametrize("job", [TRAINER, SIDECAR], ids=lambda job: job.name)


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("content", documents(), ids=lambda content: content["metadata"]["name"])
def test_each_object_is_what_the_schema_says(content: dict[str, Any], version: str) -> None:
    kubernetes_validate.validate(content, version, strict=True)


def test_the_schema_refuses_a_key_that_is_not_known() -> None:
    wrong = json.loads(json.dumps(named("Job", TRAINER.name)))
    wrong["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def test_kustomize_takes_every_file() -> None:
    listed = yaml.safe_load((DIRECTORY / "kustomization.yaml").read_text())["resources"]
    assert sorted(listed) == [path.name for path in FILES]
    if shutil.which("kubectl") is None:
        pytest.skip("needs kubectl")
    built = subprocess.run(["kubectl", "kustomize", str(DIRECTORY)], capture_output=True, text=True, check=True).stdout
    assert len(list(yaml.safe_load_all(built))) == len(documents())
    assert built.count("image: palimpsest:latest") == 2, "the image's name and tag are set in one place"


@JOBS
def test_exit_codes_mean_what_the_program_means(job: Job) -> None:
    rules = job.spec["podFailurePolicy"]["rules"]
    by_code = {
        code: rule["action"] for rule in rules if "onExitCodes" in rule for code in rule["onExitCodes"]["values"]
    }
    assert by_code == {USER_ERROR: "FailJob", UNFINISHED: "Ignore"}
    assert all(rule["onExitCodes"]["containerName"] == job.container["name"] for rule in rules if "onExitCodes" in rule)
    conditions = [rule for rule in rules if "onPodConditions" in rule]
    assert [(rule["action"], rule["onPodConditions"][0]["type"]) for rule in conditions] == [
        ("Ignore", "DisruptionTarget")
    ]


def test_trainers_hosts_and_service_agree() -> None:
    lines = named("ConfigMap", "palimpsest-hosts")["data"]["hostfile"].splitlines()
    gpus = TRAINER.container["resources"]["limits"]["nvidia.com/gpu"]
    assert lines == [f"{TRAINER.name}-{index} slots={gpus}" for index in range(TRAINER.spec["completions"])]
    service = named("Service", TRAINER.pod["subdomain"])
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= TRAINER.spec["template"]["metadata"]["labels"].items()
    port = service["spec"]["ports"][0]["port"]
    for index in range(2):
        words = TRAINER.command(index)
        assert f"--master_addr={TRAINER.name}-0.{service['metadata']['name']}" in words
        assert f"--master_port={port}" in words
        assert f"--node_rank={index}" in words
    assert TRAINER.container["ports"][0]["containerPort"] == port


def test_sidecars_serve_the_trainers_run_between_them() -> None:
    count = SIDECAR.spec["completions"]
    for index in range(count):
        words = SIDECAR.command(index)
        run = SIDECAR.environment(index)["PALIMPSEST_RUN"]
        assert {f"--worker={index}", f"--workers={count}", f"--run={run}"} <= set(words)
    assert run == TRAINER.environment(0)["PALIMPSEST_RUN"]
    (name,) = [word.removeprefix("run.name=") for word in TRAINER.command(0) if word.startswith("run.name=")]
    mounts = {mount["name"]: mount["mountPath"] for mount in TRAINER.container["volumeMounts"]}
    assert run == f"{mounts['runs']}/{name}"


@JOBS
def test_pods_run_all_at_once_and_never_two_of_one_index(job: Job) -> None:
    spec = job.spec
    assert spec["completionMode"] == "Indexed"
    assert spec["completions"] == spec["parallelism"]
    assert spec["podReplacementPolicy"] == "Failed"
    assert job.pod["restartPolicy"] == "Never"


@JOBS
def test_nothing_runs_as_root_and_nothing_is_written_but_volumes(job: Job) -> None:
    pod, own = job.pod["securityContext"], job.container["securityContext"]
    assert pod["runAsNonRoot"] and pod["runAsUser"] > 0
    assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not own["allowPrivilegeEscalation"] and own["readOnlyRootFilesystem"]
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert not job.pod["automountServiceAccountToken"]
    assert {mount["name"] for mount in job.container["volumeMounts"]} == {v["name"] for v in job.pod["volumes"]}


def test_no_secret_stands_in_clear() -> None:
    assert {content["kind"] for content in documents()} == {"ConfigMap", "Job", "PersistentVolumeClaim", "Service"}
    for job in (TRAINER, SIDECAR):
        names = {entry["name"] for entry in job.container["env"]}
        assert names == {"PALIMPSEST_RUN", "HOME"}
        assert job.container["envFrom"] == [{"secretRef": {"name": "palimpsest", "optional": True}}]


def test_the_trainers_settings_are_taken() -> None:
    words = TRAINER.command(0)
    start = words.index("launch/train.py") + 1
    config = load_config(words[start].removeprefix("--config="), words[start + 1 :])
    assert config.run.name == "imagenet100"
    ranks = TRAINER.spec["completions"] * int(TRAINER.container["resources"]["limits"]["nvidia.com/gpu"])
    assert config.train.global_batch % ranks == 0
    within = int(TRAINER.container["livenessProbe"]["exec"]["command"][-1])
    assert ReplayConfig().timeout < config.replay.timeout < within, "waiting for a sidecar is no reason to be killed"
