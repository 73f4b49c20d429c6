"""The one door: which kernels a platform, a dtype and a configuration get."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from apr_jax.config import ConfigError
from apr_jax.kernels import cpu_kernels, for_decoding, for_training, products
from apr_jax.kernels.gpu import paged_attention as gpu
from apr_jax.kernels.gpu.cudnn import cudnn_attention
from apr_jax.kernels.pairs import KernelPagedAttention
from apr_jax.kernels.tpu import paged_attention as tpu
from apr_jax.kernels.tpu.splash import splash_attention
from apr_jax.model.attention import xla_attention
from apr_jax.model.head_tile import HeadTile
from apr_jax.model.ops import XLA
from apr_jax.model.paged_attention import PagedAttention
from apr_jax.model.quantised_tile import QuantisedTile
from tests.engine.helpers import MODEL, SIZES, make_mesh

HAS_CPU_KERNELS = cpu_kernels("cpu") is not None
HALF = dataclasses.replace(MODEL, compute_dtype="bfloat16")


def training(platform, dtype="float32", head_dim=64, attention="auto"):
    return for_training(
        dataclasses.replace(MODEL, compute_dtype=dtype, head_dim=head_dim, attention=attention), platform
    )


def decoding(config, platform="tpu", mesh=None, **sizes):
    changes = {"decode_attention": "auto", "page_size": 16} | sizes
    return for_decoding(config, dataclasses.replace(SIZES, **changes), mesh or Devices(platform))


class Devices:
    """A mesh of devices that are not there."""

    def __init__(self, platform, tensor=1):
        device = type("Device", (), {"platform": platform})
        self.devices, self.shape = type("Array", (), {"flat": [device]}), {"tensor": tensor}


def test_what_auto_means_in_training():
    assert training("tpu").attention is splash_attention
    assert training("gpu", "bfloat16").attention is training("cuda", "bfloat16").attention is cudnn_attention
    assert training("gpu").attention is training("gpu", "bfloat16", 60).attention is xla_attention
    assert training("cpu", "bfloat16").attention is training("cpu", head_dim=8).attention is xla_attention
    assert (training("cpu").attention is not xla_attention) == HAS_CPU_KERNELS
    assert training("cpu", attention="xla").attention is xla_attention


def test_all_but_splash_take_branches():
    assert not training("tpu").takes_branches
    assert training("tpu", attention="xla").takes_branches
    assert training("cpu").takes_branches
    assert training("gpu", "bfloat16").takes_branches


def test_only_a_cpu_in_float32_trains_with_ops_of_its_own():
    assert (training("cpu").ops.matmul is not XLA.matmul) == HAS_CPU_KERNELS
    for other in (training("cpu", "bfloat16"), training("tpu"), training("gpu", "bfloat16")):
        assert other.ops.matmul is XLA.matmul


def test_only_a_tpu_loops_over_layers_and_only_in_training():
    assert training("tpu").ops.loops
    assert not any(training(platform).ops.loops for platform in ("cpu", "gpu", "cuda"))
    assert not decoding(HALF).ops.loops


def test_what_cannot_be_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"model\.head_dim=8\. Choose 'auto'"):
        training("cpu", head_dim=8, attention="cpu")
    with pytest.raises(ConfigError, match=r"model\.attention='cpu'"):
        training("tpu", attention="cpu")
    with pytest.raises(ConfigError, match=r"takes bfloat16; here are model\.compute_dtype='float32'"):
        training("gpu", attention="cudnn")


def test_what_auto_means_in_decoding():
    on_tpu = decoding(HALF)
    assert on_tpu.attention == tpu.TpuPagedAttention(HeadTile(2, 96))
    assert on_tpu.prefill.attention == tpu.TpuUnitAttention(HeadTile(2, 96))
    for platform in ("gpu", "cuda"):
        on_gpu = decoding(HALF, platform=platform)
        assert on_gpu.attention == on_gpu.prefill.attention == KernelPagedAttention(kernel=gpu.attend)
    for config, requested, platform in ((MODEL, "auto", "tpu"), (MODEL, "auto", "gpu"), (HALF, "xla", "tpu")):
        chosen = decoding(config, platform=platform, decode_attention=requested)
        assert (chosen.attention, chosen.ops) == (PagedAttention(), XLA)
        assert chosen.prefill is None
    for config in (MODEL, HALF):
        assert (decoding(config, mesh=make_mesh()).attention != PagedAttention()) == HAS_CPU_KERNELS
        assert decoding(config, mesh=make_mesh(), decode_attention="xla").attention == PagedAttention()


def test_heads_that_a_mesh_splits_are_multiplied_by_xla():
    chosen = decoding(MODEL, mesh=make_mesh(data=2, tensor=2))
    assert chosen.ops is XLA
    assert (chosen.prefill is not None) == HAS_CPU_KERNELS


def test_pages_that_a_kernel_cannot_take_are_refused():
    for platform, page_size in (("tpu", 48), ("gpu", 32)):
        decoding(HALF, platform=platform, page_size=page_size)
    for platform, page_size in (("tpu", 24), ("gpu", 48), ("gpu", 8)):
        decoding(MODEL, platform=platform, page_size=page_size)
        with pytest.raises(ConfigError, match=f"engine.page_size={page_size}"):
            decoding(HALF, platform=platform, page_size=page_size)


def test_pages_of_8_bits_are_xlas_alone():
    for config, platform, requested in ((HALF, "tpu", "xla"), (HALF, "gpu", "xla"), (MODEL, "gpu", "auto")):
        chosen = decoding(config, platform, page_dtype="int8", decode_attention=requested)
        assert chosen.attention == PagedAttention(QuantisedTile(dtype=config.compute_dtype))
    for platform in ("tpu", "gpu"):
        with pytest.raises(ConfigError, match=r"page_dtype='int8'.*set engine\.decode_attention='xla'"):
            decoding(HALF, platform, page_dtype="int8")


def test_without_the_cpus_folder_there_is_plain_xla(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert cpu_kernels("cpu") is None
    assert training("cpu").attention is xla_attention
    assert decoding(MODEL, mesh=make_mesh()).attention == PagedAttention()


def test_a_program_for_other_devices_has_no_kernel_of_the_cpus():
    x = jax.ShapeDtypeStruct((2, 4, 16), jnp.float32)

    def text(platform):
        return jax.jit(training(platform).ops.swiglu).lower(x, x).as_text()

    assert ("apr_swiglu" in text("cpu")) == HAS_CPU_KERNELS
    assert "apr_" not in text("tpu")


def test_where_float32_is_asked_for_an_accelerator_multiplies_float32():
    def traced(config, platform):
        with products(config, platform):
            return str(jax.make_jaxpr(lambda x: XLA.matmul(x, [jnp.ones((4, 8))], [8]))(jnp.ones((2, 4))))

    for platform in ("gpu", "cuda", "tpu"):
        assert "HIGHEST" in traced(MODEL, platform)
        assert "HIGHEST" not in traced(HALF, platform)
    assert "HIGHEST" not in traced(MODEL, "cpu")
