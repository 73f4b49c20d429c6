"""Every way of reasoning, by the name that `config.data.method` and --method choose."""

from apr_jax.reasoning.adaptive import ADAPTIVE
from apr_jax.reasoning.base import Method
from apr_jax.reasoning.direct import DIRECT
from apr_jax.reasoning.hogwild import HOGWILD
from apr_jax.reasoning.pasta import PASTA
from apr_jax.reasoning.serial import SERIAL
from apr_jax.reasoning.tree_of_thoughts import TREE_OF_THOUGHTS

METHODS: dict[str, Method] = {
    method.name: method for method in (ADAPTIVE, DIRECT, HOGWILD, PASTA, SERIAL, TREE_OF_THOUGHTS)
}
