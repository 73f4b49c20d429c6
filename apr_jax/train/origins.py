"""The policies that a run's phases began with: a run never goes on with one of them and reports another.

WORKDIR/checkpoints/origins.json: by phase the folder that was named (null: SFT from fresh weights, GRPO from the run's
own SFT), and digests of its weights and its tokenizer.
"""

import dataclasses
import pathlib
from typing import Any

from jax.sharding import Mesh

from apr_jax.checkpoints.identity import (
    agreed_tokenizer,
    check_meaning,
    check_model,
    note_context,
    note_task,
    own_tokenizer,
)
from apr_jax.checkpoints.phases import PhaseName
from apr_jax.checkpoints.policy import load_policy
from apr_jax.config import Config, ConfigError
from apr_jax.config_dict import to_dict
from apr_jax.data.tokenizer import Spelling, Tokenizer, config_tokenizer, load_tokenizer, tokenizer_digest
from apr_jax.files import read_json, reading, write_json
from apr_jax.model.params import Params, weights_digest, with_new_ids
from apr_jax.model.placement import place_params
from apr_jax.parallel import hosts

_FLAGS: dict[PhaseName, str] = {"sft": "--start", "grpo": "--checkpoint"}
_KEYS = ("policy", "weights", "tokenizer")
_ADVICE = "put it back as it was, or choose another --workdir"


@dataclasses.dataclass(frozen=True, eq=False)
class Given:
    """A policy that the user named for a phase to begin with."""

    phase: PhaseName
    path: pathlib.Path
    params: Params  # on one device
    weights: str  # their digest

    def placed(self, mesh: Mesh, config: Config) -> Params:
        """Return the parameters on a mesh."""
        return place_params(self.params, mesh, config.model)


def load_given(phase: PhaseName, path: pathlib.Path, config: Config) -> Given:
    """Load the policy at `path` for a phase to begin with.

    Both phases take its weights, so model and tokenizer must be those of `config`, but for the tokens of markers that
    `config` adds, whose embeddings are new. GRPO goes on with what the policy was trained for, and SFT may teach it
    something else.

    Raises: ConfigError for what does not agree, and as `load_policy`.
    """
    model, params, saved = load_policy(path)
    grows = config.data.add_marker_tokens
    check_model(path, dataclasses.asdict(model), dataclasses.asdict(config.model), grows=grows)
    note_context(path, model.max_seq_len, config.model.max_seq_len)
    own = agreed_tokenizer(path, own_tokenizer(path, saved), config.data.tokenizer, Spelling.of(config))
    known = load_tokenizer(own).vocab_size
    if known < config_tokenizer(config).vocab_size:  # the policy's lacks markers
        if config.lora.rank:
            raise ConfigError(
                f"data.add_marker_tokens=True: {path} has no embeddings of the marks, and with lora.rank="
                f"{config.lora.rank} new ones would never be trained; set one of them to 0 or False"
            )
        params = with_new_ids(params, known, config.model.vocab_size)
    now = to_dict(config)
    if phase == "grpo":
        check_meaning(
            f"the policy of {path}",
            saved,
            now,
            "GRPO goes on with what a policy was trained for (=auto takes it); SFT from it, with --start, may differ.",
        )
    note_task(path, saved, now)  # after what is refused, so that nothing is said twice
    return Given(phase, path, params, weights_digest(params))


class Origins:
    """The record of a run's folder."""

    def __init__(self, workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
        self._workdir, self._path = workdir, workdir / "checkpoints" / "origins.json"
        self._tokenizer = tokenizer_digest(tokenizer)

    def check(self, given: Given) -> None:
        """Raise ConfigError unless the phase, which has begun, did so with the policy that is named now."""
        noted, flag = self._read().get(given.phase), f"{_FLAGS[given.phase]}={given.path}"
        if not self._is(noted, given.weights):
            raise ConfigError(
                f"{self._workdir} began with {_describe(noted)}, and {flag} holds {given.weights}; leave the flag out "
                "to go on with what there is, or choose another --workdir"
            )

    def note(self, phase: PhaseName, path: pathlib.Path | None, weights: str | None, *, has_begun: bool) -> None:
        """Keep what a phase begins with. Raise ConfigError where it has begun with something else.

        Args:
          path: the folder that the user named.
          weights: the digest of its weights; None: fresh ones.
        """
        origins = hosts.from_first(self._read)
        noted = origins.get(phase)
        if self._is(noted, weights) or (noted is None and has_begun):  # by a version that kept no record
            return
        if has_begun:
            raise ConfigError(
                f"{self._workdir}: {phase.upper()} began with {_describe(noted)}, and would go on from {weights}; put "
                "checkpoints/reference back as it was, or choose another --workdir"
            )
        named = None if path is None else str(path)
        origins[phase] = {"policy": named, "weights": weights, "tokenizer": self._tokenizer}
        if hosts.is_first():
            write_json(self._path, origins)

    def _is(self, noted: dict[str, Any] | None, weights: str | None) -> bool:
        return noted is not None and (noted["weights"], noted["tokenizer"]) == (weights, self._tokenizer)

    def _read(self) -> dict[str, Any]:
        try:
            origins = read_json(self._path, _ADVICE)
        except FileNotFoundError:
            return {}
        with reading(self._path, _ADVICE):
            return {phase: {key: noted[key] for key in _KEYS} for phase, noted in origins.items()}


def _describe(noted: dict[str, Any] | None) -> str:
    if noted is None:
        return "a policy that was not noted"
    if noted["weights"] is None:
        return "fresh weights"
    return f"the policy {noted['weights']} of {noted['policy'] or 'its own SFT'}"
