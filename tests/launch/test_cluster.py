"""The scripts of launch/cluster/: they say what schedulers take, and what a host reads (parallel/hosts.py)."""

import dataclasses
import os
import pathlib
import re
import shlex
import subprocess

import pytest
import yaml

from apr_jax.config_dict import from_config_dict
from apr_jax.parallel.fit import fit
from configs.grpo import get_config

CLUSTER = pathlib.Path(__file__).parents[2] / "launch" / "cluster"

# The fields of a JobSet, v1alpha2 (kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go), with what they hold:
# a type, a set of allowed values, a list of one kind, or fields. Of Job and Pod (batch/v1, core/v1), those used here.
_STRINGS = {"*": str}
_CONTAINER = {
    "name": str,
    "image": str,
    "workingDir": str,
    "command": [str],
    "args": [str],
    "env": [{"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}],
    "ports": [{"containerPort": int}],
    "resources": {"limits": {"*": (int, str)}, "requests": {"*": (int, str)}},
    "volumeMounts": [{"name": str, "mountPath": str}],
}
_POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "terminationGracePeriodSeconds": int,
    "nodeSelector": _STRINGS,
    "containers": [_CONTAINER],
    "volumes": [{"name": str, "persistentVolumeClaim": {"claimName": str}}],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "template": {"metadata": {"annotations": _STRINGS, "labels": _STRINGS}, "spec": _POD},
}
_JOBSET = {
    "apiVersion": {"jobset.x-k8s.io/v1alpha2"},
    "kind": {"JobSet"},
    "metadata": {"name": str, "namespace": str, "annotations": _STRINGS, "labels": _STRINGS},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str, "publishNotReadyAddresses": bool},
        "successPolicy": {"operator": {"All", "Any"}, "targetReplicatedJobs": [str]},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": {"Recreate", "BlockingRecreate", "InPlaceRestart"}},
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "replicatedJobs": [{"name": str, "groupName": str, "replicas": int, "template": {"spec": _JOB}}],
    },
}


def _check(value, schema, where="jobset"):
    if isinstance(schema, dict):
        assert isinstance(value, dict), where
        for name, inner in value.items():
            assert name in schema or "*" in schema, f"{where}.{name}: no such field"
            _check(inner, schema.get(name, schema.get("*")), f"{where}.{name}")
    elif isinstance(schema, list):
        assert isinstance(value, list), where
        for index, item in enumerate(value):
            _check(item, schema[0], f"{where}[{index}]")
    elif isinstance(schema, set):
        assert value in schema, f"{where}: {value}"
    else:
        assert isinstance(value, schema), f"{where}: {value!r}"
        assert schema is bool or not isinstance(value, bool), f"{where}: {value!r}"


@pytest.fixture
def jobset():
    return yaml.safe_load((CLUSTER / "jobset.yaml").read_text())


def test_the_jobset_has_only_fields_that_there_are(jobset):
    _check(jobset, _JOBSET)


@pytest.mark.parametrize(("field", "value"), [("maxRestart", 3), ("maxRestarts", "3"), ("restartStrategy", "Again")])
def test_a_wrong_field_of_a_jobset_is_found(jobset, field, value):
    jobset["spec"]["failurePolicy"] = {field: value}
    with pytest.raises(AssertionError, match="failurePolicy"):
        _check(jobset, _JOBSET)


def test_every_pod_of_the_jobset_is_a_host_that_finds_host_0(jobset):
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    environment = {entry["name"]: entry for entry in container["env"]}
    assert int(environment["APR_HOSTS"]["value"]) == job["completions"] == job["parallelism"]
    assert job["completionMode"] == "Indexed"  # which gives pods their number
    index = environment["APR_HOST"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    port = container["ports"][0]["containerPort"]
    first = f"{jobset['metadata']['name']}-{replicated['name']}-0-0.{jobset['metadata']['name']}"  # <pod>.<subdomain>
    assert environment["APR_COORDINATOR"]["value"] == f"{first}:{port}"
    assert jobset["spec"]["network"]["enableDNSHostnames"]


def test_the_jobset_asks_for_the_devices_of_its_mesh(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    config = get_config(re.search(r"configs/grpo.py:(\w+)", container["args"][0])[1])
    for argument in container["args"]:
        if argument.startswith("--config."):
            name, _, value = argument.removeprefix("--config.").partition("=")
            config.update_from_flattened_dict({name: int(value)})
    config = from_config_dict(config)
    topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
    chips = [int(side) for side in topology.split("x")]
    assert job["completions"] * container["resources"]["limits"]["google.com/tpu"] == chips[0] * chips[1]
    shards, rest = divmod(chips[0] * chips[1], config.mesh.fsdp * config.mesh.tensor)
    assert (config.mesh.data, rest) in ((-1, 0), (shards, 0))
    fit(config, dataclasses.replace(config.mesh, data=shards), devices_per_host=4)


@pytest.mark.parametrize("script", ["train.sbatch", "tpu_pod.sh"])
def test_scripts_are_shell(script):
    assert subprocess.run(["bash", "-n", CLUSTER / script], check=False).returncode == 0


def _run(script, folder, commands, arguments, **environment):
    """Runs a script with made-up `commands` (name -> shell) before all others. Returns its exit code and output."""
    for name, body in commands.items():
        (folder / name).write_text("#!/bin/bash\n" + body)
        (folder / name).chmod(0o755)
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", **environment}
    done = subprocess.run(
        ["bash", CLUSTER / script, *arguments], env=paths, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"), [(0, 0, False), (1, 0, False), (75, 0, True), (137, 3, True), (75, 20, False)]
)
def test_slurm_runs_one_process_a_node_and_requeues_what_can_go_on(tmp_path, code, restarts, requeued):
    tell = 'echo "$(basename $0) $@ / $APR_HOSTS / $JAX_LOCAL_DEVICE_IDS"\n'
    slurm = {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "PYTHON": "python"}
    commands = {"srun": f"{tell}exit {code}", "scontrol": tell}
    ended, output = _run(
        "train.sbatch", tmp_path, commands, ["--workdir=a b"], SLURM_RESTART_COUNT=str(restarts), **slurm
    )
    assert ended == code
    assert "python launch/train.py --workdir=a b / auto / 0,1,2,3" in output
    assert ("scontrol requeue 7" in output) == requeued


def test_slurms_directives_are_known_and_leave_time_to_save():
    lines = (CLUSTER / "train.sbatch").read_text().splitlines()
    directives = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2] for line in lines if line.startswith("#SBATCH")
    )
    assert set(directives) == {
        "job-name", "nodes", "ntasks-per-node", "time", "signal", "requeue", "open-mode", "output"
    }  # fmt: skip
    assert directives["ntasks-per-node"] == "1"
    assert re.fullmatch(r"TERM@\d+", directives["signal"])
    last = max(index for index, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") for line in lines[:last])  # sbatch stops reading at the first command


def test_the_tpu_script_passes_flags_on_unharmed(tmp_path):
    commands = {"gcloud": 'printf "%s\\n" "$@"'}
    code, output = _run(
        "tpu_pod.sh", tmp_path, commands, ["pod", "zone-a", "--config.name=it's a name", "--workdir=/x"]
    )
    assert code == 0
    assert output.splitlines()[:6] == ["compute", "tpus", "tpu-vm", "ssh", "pod", "--zone=zone-a"]
    assert "--worker=all" in output
    command = output.partition("--command=")[2]
    assert "APR_HOSTS=auto" in command
    assert shlex.split(command)[-2:] == ["--config.name=it's a name", "--workdir=/x"]
    assert _run("tpu_pod.sh", tmp_path, commands, ["pod"])[0] == 2
