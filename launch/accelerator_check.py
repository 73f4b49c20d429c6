"""Check a TPU's or a GPU's decoding and training against the CPU's, and measure its speed, in under eight minutes.

    make accelerator-check PLATFORM=cuda12                                # makes the environment, then this; or tpu
    python launch/accelerator_check.py --json=check.json --page=check.html
    python launch/accelerator_check.py --config=configs/grpo.py:7b --config.mesh.tensor=8 --minutes=20

Prefill, decode, attention forward and backward, a step of SFT and one of GRPO are compared with the same programs on
the host's CPU, in models as wide as the configuration's and four layers deep. Then decoding and training of the whole
model are measured, as much of that as the time allows. A check that fails stops nothing, and what is there already is
written after each part. Where there are only CPUs it checks these, with configs/grpo.py:smoke unless --config names
another. docs/accelerators.md says what a machine without network needs.
Exit codes: 0 all agree, 1 something does not, 2 bad arguments or config, 75 stopped by a signal.
"""

import time
from typing import Any

from absl import flags

from apr_jax import entry
from apr_jax.config_dict import from_config_dict

_CONFIG = entry.define_config("grpo.py:paper")
_MINUTES = entry.define_number("minutes", 8.0, "Begin no measurement of speed after so long.", low=0.0)
_JSON = entry.JsonFlag("what was found")
_PAGE = entry.define_output("page", "Write a page for people here.", (".html",))
_SPEED = flags.DEFINE_bool("speed", True, "Measure speed, too.")


def main() -> int:
    from configs import grpo

    began = time.perf_counter()
    config = _CONFIG.config()
    import jax

    from apr_jax.bench import accelerator, accelerator_report
    from apr_jax.parallel.mesh import make_mesh, offer_cpu_devices

    offer_cpu_devices(2)  # before JAX starts, which tells what there is
    if jax.default_backend() == "cpu" and not _CONFIG.is_given:
        smaller = grpo.get_config("smoke")
        smaller.update_from_flattened_dict(_CONFIG.overrides)
        config = from_config_dict(smaller)
    mesh = make_mesh(config.mesh)
    subject = accelerator.Subject.of(config, mesh)
    figures: dict[str, Any] = accelerator_report.about(config, mesh) | {"checks": {}, "speed": {}}
    print(accelerator_report.heading(figures), flush=True)
    to_standard_output = flags.FLAGS["json"].value == "-"

    def note(part: str, name: str, row: dict[str, Any]) -> None:
        figures[part][name] = row
        figures["seconds"] = time.perf_counter() - began
        print(accelerator_report.line(name, row), flush=True)
        if not to_standard_output:
            _JSON.write(figures)
        if _PAGE.value:
            accelerator_report.write_page(_PAGE.value, figures)

    for check in accelerator.checks(subject):
        note("checks", check.name, check.row())
    for name, measure in accelerator_report.measurements(config, mesh).items() if _SPEED.value else ():
        if time.perf_counter() - began > 60 * _MINUTES.value:
            note("speed", name, {"left_out": f"--minutes={_MINUTES.value:g} are over"})
        else:
            note("speed", name, accelerator_report.measured(measure))
    if to_standard_output:
        _JSON.write(figures)
    if failed := accelerator_report.failures(figures):
        raise entry.FailedError(f"not all is as it should be: {', '.join(failed)}")
    return 0


if __name__ == "__main__":
    entry.run(main)
