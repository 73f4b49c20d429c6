"""Make one environment a peer, `.venv-peers/NAME`, from `requirements-NAME.txt`: `make peers`, or

    python launch/peers/install.py [NAME ...]

The lists are complete and installed as they stand, without pip's resolver. If a peer cannot be installed, the
installer's last lines go to `.venv-peers/NAME.failed`, which the benchmark quotes, and the next peer is tried. An
environment that is up to date stays as it is. The exit code is 0 even if peers failed: the benchmark reports what is
missing. Only the standard library is used.
"""

import pathlib
import subprocess
import sys
import venv

HERE = pathlib.Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / ".venv-peers"
TORCH_CPU = "https://download.pytorch.org/whl/cpu"
LAST_LINES = 15


def install(name: str) -> str:
    """Make one environment. Return "" or the reason of a failure."""
    requirements = HERE / f"requirements-{name}.txt"
    folder = ENVIRONMENTS / name
    done, failed = folder / ".installed", ENVIRONMENTS / f"{name}.failed"
    if done.exists() and done.read_text() == requirements.read_text():
        return ""
    done.unlink(missing_ok=True)
    failed.unlink(missing_ok=True)
    venv.create(folder, with_pip=True, clear=True)
    lines = requirements.read_text().splitlines()
    cpu_builds = [line for line in lines if "+cpu" in line and not line.startswith("#")]
    reason = _install_cpu_builds(folder, cpu_builds) if cpu_builds else ""
    reason = reason or _pip(folder, "--no-deps", "--requirement", str(requirements))
    if reason:
        failed.write_text(reason)
    else:
        done.write_text(requirements.read_text())
    return reason


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


def main(names: list[str]) -> None:
    known = sorted(path.stem.removeprefix("requirements-") for path in HERE.glob("requirements-*.txt"))
    unknown = [name for name in names if name not in known]
    if unknown:
        sys.exit(f"there is no peer {unknown[0]!r}; choose of {', '.join(known)}")
    for name in names or known:
        print(f"{name}: installing", flush=True)
        reason = install(name)
        print(f"{name}: {'not installed: ' + reason.strip().splitlines()[-1] if reason else 'installed'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
