"""The Kubernetes manifest against what the operator and Kubernetes accept, and its command against our flags.

No API server is at hand: the schema below is the part of ``PyTorchJob`` (kubeflow.org/v1, as its published Go types
have it) and of Kubernetes' ``PodSpec`` that the manifest uses, written down by hand. Unknown keys are errors, as
they are with ``kubectl create --validate=strict``.
"""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from launching import ROOT

MANIFEST = ROOT / "docs" / "pytorchjob.yaml"

_CONTAINER = {
    "name": str, "image": str, "workingDir": str, "command": [str], "env": [{"name": str, "value": str}],
    "resources": {"limits": {"*": (int, str)}, "requests": {"*": (int, str)}},
    "volumeMounts": [{"name": str, "mountPath": str, "readOnly": bool}],
}  # fmt: skip
_VOLUME = {
    "name": str, "emptyDir": {"medium": {"", "Memory"}, "sizeLimit": str},
    "persistentVolumeClaim": {"claimName": str, "readOnly": bool},
}  # fmt: skip
_POD = {
    "terminationGracePeriodSeconds": int,
    "containers": [_CONTAINER],
    "volumes": [_VOLUME],
    "nodeSelector": {"*": str},
}
_REPLICAS = {
    "replicas": int, "restartPolicy": {"Always", "OnFailure", "Never", "ExitCode"},
    "template": {"metadata": {"labels": {"*": str}}, "spec": _POD},
}  # fmt: skip
SCHEMA: dict[str, Any] = {
    "apiVersion": {"kubeflow.org/v1"},
    "kind": {"PyTorchJob"},
    "metadata": {"name": str, "namespace": str, "labels": {"*": str}},
    "spec": {
        "nprocPerNode": str,  # a number in quotes: auto, cpu and gpu are others
        "runPolicy": {
            "backoffLimit": int, "cleanPodPolicy": {"All", "Running", "None"}, "ttlSecondsAfterFinished": int,
            "activeDeadlineSeconds": int, "suspend": bool,
        },
        "pytorchReplicaSpecs": {"Master": _REPLICAS, "Worker": _REPLICAS},
    },
}  # fmt: skip


def problems(value: Any, schema: Any, where: str = "") -> Iterator[str]:
    """Yield what does not follow the schema: a dict of keys (``*`` for any), a list of one item, a type, or a set."""
    if isinstance(schema, dict):
        if not isinstance(value, dict):
            yield f"{where}: not a mapping"
            return
        for key, item in value.items():
            if key in schema or "*" in schema:
                yield from problems(item, schema.get(key, schema.get("*")), f"{where}.{key}")
            else:
                yield f"{where}.{key}: unknown"
    elif isinstance(schema, list):
        for number, item in enumerate(value if isinstance(value, list) else [value]):
            yield from problems(item, schema[0], f"{where}[{number}]")
        if not isinstance(value, list):
            yield f"{where}: not a list"
    elif isinstance(schema, set):
        if value not in schema:
            yield f"{where}: {value!r} is not one of {schema}"
    elif not isinstance(value, schema) or (isinstance(value, bool) and schema is not bool):
        yield f"{where}: {value!r} is no {schema}"


@pytest.fixture
def job() -> dict[str, Any]:
    read: dict[str, Any] = yaml.safe_load(MANIFEST.read_text(encoding="utf-8"))
    return copy.deepcopy(read)


def container_of(job: dict[str, Any], role: str = "Master") -> dict[str, Any]:
    (container,) = job["spec"]["pytorchReplicaSpecs"][role]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def test_the_manifest_follows_the_schema(job: dict[str, Any]) -> None:
    assert list(problems(job, SCHEMA)) == []


def test_a_mistake_is_seen(job: dict[str, Any]) -> None:
    job["spec"]["nprocPerNode"] = 8
    job["spec"]["pytorchReplicaSpecs"]["Worker"]["restartPolicy"] = "Sometimes"
    container_of(job)["comand"] = []
    found = "\n".join(problems(job, SCHEMA))
    for part in (".spec.nprocPerNode: 8 is no", "'Sometimes' is not one of", "containers[0].comand: unknown"):
        assert part in found


def test_what_belongs_together(job: dict[str, Any]) -> None:
    specs = job["spec"]["pytorchReplicaSpecs"]
    assert specs["Master"]["replicas"] == 1
    ranks = int(job["spec"]["nprocPerNode"])
    for role in specs:
        container, pod = container_of(job, role), specs[role]["template"]["spec"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == ranks
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        (expected,) = [word.partition("=")[2] for word in container["command"] if "--expected_world_size" in word]
        assert int(expected) == ranks * sum(spec["replicas"] for spec in specs.values())


def test_the_command_is_one_of_ours(job: dict[str, Any]) -> None:
    from torch.distributed.run import parse_args

    from taso_ds.config import parse_run_config

    program, *words = container_of(job)["command"]
    assert program == "torchrun"
    launched = parse_args([word.replace("$(MASTER_PORT)", "23456") for word in words])
    assert (ROOT / launched.training_script).is_file()
    config = parse_run_config(launched.training_script_args)
    mounts = [mount["mountPath"] for mount in container_of(job)["volumeMounts"]]
    for path in (config.model.model_name_or_path, config.run.output_dir):
        assert path is not None
        assert any(path.startswith(f"{mount}/") for mount in mounts)
    assert (ROOT / "ds_configs" / config.run.ds_config).is_file()
