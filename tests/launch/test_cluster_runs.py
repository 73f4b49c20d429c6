"""The scripts of launch/cluster/ start a job of two hosts by their own commands, in environments as bare as theirs."""

import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import sysconfig

import pytest
import yaml

pytestmark = pytest.mark.heavy

ROOT = pathlib.Path(__file__).parents[2]
CHECKOUT = ("apr_jax", "configs", "launch", "setup.py", "pyproject.toml", "README.md", "requirements.lock")
SMALL = (
    "--config=configs/grpo.py:smoke",
    "--config.mesh.data=2",
    "--config.model.num_layers=1",
    "--config.sft.num_steps=2",
    "--config.sft.checkpoint_every=2",
    "--config.sft.validate_every=2",
    "--config.grpo.num_steps=1",
    "--config.grpo.prompts_per_step=2",
    "--config.grpo.group_size=2",
    "--config.rollout.max_steps=16",
    "--config.evaluation.num_problems=2",
)


def _environment(place, venv):
    """Returns the environment of a machine: no word of this checkout, and CPU devices in place of its accelerators."""
    return {
        "PATH": f"{venv / 'bin'}:/usr/bin:/bin",
        "HOME": str(place),
        "GLIBC_TUNABLES": "",
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "JAX_CPU_COLLECTIVES_IMPLEMENTATION": "gloo",
        "JAX_COMPILATION_CACHE_DIR": str(place / "compiled"),
    }


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A copy of the checkout, and a virtual environment with the packages of the lock and without apr_jax."""
    place = tmp_path_factory.mktemp("cluster")
    checkout, venv = place / "checkout", place / "venv"
    for name in CHECKOUT:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / name, checkout / name)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)  # pip is among the packages
    packages = sysconfig.get_paths()["purelib"]
    own = subprocess.run(
        [venv / "bin/python", "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"],
        capture_output=True,
        text=True,
        check=True,
    )
    # A folder named here is searched, and its own .pth files, such as an editable apr_jax, are not read.
    (pathlib.Path(own.stdout.strip()) / "lock.pth").write_text(packages + "\n")
    environment = _environment(place, venv)
    bare = [venv / "bin/python", "-c", "import apr_jax"]
    absent = subprocess.run(bare, cwd=place, env=environment, capture_output=True, text=True, check=False)
    assert "No module named 'apr_jax'" in absent.stderr
    return place, checkout, venv


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ends_well(processes, workdir):
    """All hosts end with 0, and the job has done all that it should."""
    outputs = [process.communicate(timeout=400)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(outputs)
    phases = [json.loads(line)["phase"] for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert phases == ["sft", "sft", "grpo"]
    assert set(json.loads((workdir / "summary.json").read_text())) >= {"before", "after"}


def _start(command, checkout, environment):
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=checkout, env=environment, **how)


def _script(folder, name, body):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}")
    (folder / name).chmod(0o755)


def test_the_pods_of_the_jobset_run_in_its_image(machine):
    place, checkout, venv = machine
    environment, workdir = _environment(place, venv), place / "jobset"
    steps = [line.removeprefix("RUN ") for line in (checkout / "launch/cluster/Dockerfile").read_text().splitlines()
             if line.startswith("RUN ")]  # fmt: skip
    assert ["-r requirements.lock" in steps[0], "jax[${PLATFORM}]" in steps[1], len(steps)] == [True, True, 3]
    subprocess.run(["bash", "-c", steps[2]], cwd=checkout, env=environment, check=True, capture_output=True)
    manifest = yaml.safe_load((checkout / "launch/cluster/jobset.yaml").read_text())
    (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
    named = {entry["name"]: entry.get("value") for entry in container["env"]}
    coordinator = f"127.0.0.1:{_free_port()}"  # in place of a pod's name
    here = {"APR_HOSTS": "2", "APR_COORDINATOR": coordinator, "JAX_COMPILATION_CACHE_DIR": str(place / "compiled")}
    assert set(named) == {*here, "APR_HOST"}
    flags = [*SMALL, f"--workdir={workdir}"]
    _ends_well(
        [
            _start([*container["command"], *flags], checkout, environment | named | here | {"APR_HOST": str(host)})
            for host in range(2)
        ],
        workdir,
    )


def _slurm_task(task):
    """Returns the variables that Slurm sets for a task of a step of two, on one node."""
    values = {
        "JOB_ID": 7,
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "STEP_NUM_TASKS": 2,
        "PROCID": task,
        "LOCALID": task,
    }
    return " ".join(f"SLURM_{name}={value}" for name, value in values.items())


def test_slurms_tasks_run_by_the_batch_script(machine):
    place, checkout, venv = machine
    workdir = place / "slurm"
    tasks = "\n".join(f'{_slurm_task(task)} JAX_LOCAL_DEVICE_IDS= "${{@}}" &\npids+=($!)' for task in range(2))
    skip = 'while [[ "$1" == --* ]]; do shift; done\n'  # srun's own flags
    wait = 'for pid in "${pids[@]}"; do wait "${pid}" || exit $?; done\n'
    _script(place / "slurm_bin", "srun", f"{skip}{tasks}\n{wait}")
    environment = _environment(place, venv)
    environment |= {"PATH": f"{place / 'slurm_bin'}:{environment['PATH']}", "SLURM_SUBMIT_DIR": str(checkout)}
    script = ["bash", str(checkout / "launch/cluster/train.sbatch")]
    _ends_well([_start([*script, *SMALL, f"--workdir={workdir}"], checkout, environment)], workdir)


def test_the_hosts_of_a_pod_run_by_its_script(machine):
    place, checkout, venv = machine
    workdir, home = place / "pod", place / "home"
    home.mkdir()
    (home / "apr_jax").symlink_to(checkout)
    (checkout / ".venv").symlink_to(venv)
    take = 'for word in "$@"; do [[ "${word}" == --command=* ]] && command="${word#--command=}"; done\ncd ~\n'
    hosts = "\n".join(f'{_slurm_task(host)} bash -c "${{command}}" &\npids+=($!)' for host in range(2))
    wait = '\nfor pid in "${pids[@]}"; do wait "${pid}" || exit $?; done\n'
    _script(place / "pod_bin", "gcloud", take + hosts + wait)
    environment = _environment(place, venv) | {"HOME": str(home)}
    environment["PATH"] = f"{place / 'pod_bin'}:{environment['PATH']}"
    script = ["bash", str(checkout / "launch/cluster/tpu_pod.sh"), "pod", "zone"]
    _ends_well([_start([*script, *SMALL, f"--workdir={workdir}"], checkout, environment)], workdir)


def test_a_process_of_several_that_is_told_of_no_job_is_refused_by_name(monkeypatch):
    import jax

    from apr_jax.config import ConfigError
    from apr_jax.parallel import hosts
    from tests.engine.helpers import make_mesh

    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(
        ConfigError, match="one of 4 of a TPU pod, and APR_HOSTS is not set; start it with APR_HOSTS=auto"
    ):
        hosts.meet(make_mesh())
    assert os.environ.get("APR_HOSTS") is None
