"""Optimised HLO taken apart: made texts in the forms that XLA writes, and programs compiled here."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from apr_jax.aot.hlo import Collective, Program, group_size, groups, sent_bytes
from apr_jax.config import MeshConfig
from apr_jax.parallel.mesh import make_mesh

# A loop of 12 whose body gathers over 4 of 8 devices (twice named by one channel, as a TPU's fusions do) and slices a
# large array; a kernel whose text runs over lines; a prefetch into vector memory; and a condition.
TEXT = """HloModule jit_step, is_scheduled=true

%fused.1 (param_0: bf16[4,8], param_1: s32[]) -> bf16[16,8] {
  %param_0 = bf16[4,8]{1,0} parameter(0)
  ROOT %all-gather.9 = bf16[16,8]{1,0} all-gather(%param_0), channel_id=3, GROUPS1
}

%fused.2 (param_0: f32[64,8], param_1: s32[]) -> f32[1,8] {
  %param_0 = f32[64,8]{1,0} parameter(0)
  %param_1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %part = f32[1,8]{1,0} dynamic-slice(%param_0, %param_1, %zero), dynamic_slice_sizes={1,8}
}

%body (state: (s32[], f32[64,8], bf16[4,8])) -> (s32[], f32[64,8], bf16[4,8]) {
  %state = (s32[]{:T(128)}, f32[64,8]{1,0:T(8,128)}, bf16[4,8]{1,0}) parameter(0)
  %step = s32[] get-tuple-element(%state), index=0
  %large = f32[64,8]{1,0:T(8,128)} get-tuple-element(%state), index=1
  %small = bf16[4,8]{1,0} get-tuple-element(%state), index=2
  %gathered = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} fusion(%small, %step), kind=kCustom, calls=%fused.1
  %again = bf16[16,8]{1,0:T(8,128)(2,1)S(1)} all-gather(%small), channel_id=3, GROUPS2
  %sliced = f32[1,8]{1,0} fusion(%large, %step), kind=kLoop, calls=%fused.2
  ROOT %next = (s32[], f32[64,8]{1,0}, bf16[4,8]{1,0}) tuple(%step, %large, %small)
}

%condition (state.1: (s32[], f32[64,8], bf16[4,8])) -> pred[] {
  %state.1 = (s32[], f32[64,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %limit = s32[]{:T(128)} constant(12)
  %counter = s32[] get-tuple-element(%state.1), index=0
  ROOT %lt = pred[] compare(%counter, %limit), direction=LT
}

%cheap (x: f32[64,8]) -> f32[64,8] {
  ROOT %x = f32[64,8]{1,0} parameter(0)
}

%dear (y: f32[64,8]) -> f32[64,8] {
  %y = f32[64,8]{1,0} parameter(0)
  ROOT %sum = f32[64,8]{1,0} add(%y, %y)
}

ENTRY %main (start: (s32[], f32[64,8], bf16[4,8]), which: s32[]) -> f32[64,8] {
  %start = (s32[], f32[64,8]{1,0}, bf16[4,8]{1,0}) parameter(0)
  %which = s32[] parameter(1)
  %loop = (s32[], f32[64,8]{1,0}, bf16[4,8]{1,0}) while(%start), condition=%condition, body=%body
  %out = f32[64,8]{1,0} get-tuple-element(%loop), index=1
  %kernel = f32[64,8]{1,0} custom-call(%out), custom_call_target="kernel", frontend_attributes={kernel_metadata={
}}, metadata={op_name="a kernel"}
  %writer = (f32[], f32[64,8]{1,0}) custom-call(%kernel), output_to_operand_aliasing={{1}: (0, {})}
  %prefetch = (f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]) copy-start(%kernel)
  %fetched = f32[64,8]{1,0:S(1)} copy-done(%prefetch)
  ROOT %chosen = f32[64,8]{1,0} conditional(%which, %kernel, %kernel), branch_computations={%cheap, %dear}
}
"""
TEXT = TEXT.replace("GROUPS1", "replica_groups=mesh['axis_0'=2,'axis_1'=4], device_ids=([2,4]T(1,0)) {'axis_1'}")
TEXT = TEXT.replace("GROUPS2", "replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_1'}")
LARGE, SMALL = 64 * 8 * 4, 4 * 8 * 2


def test_bytes_count_loops_slices_branches_and_leave_out_vector_memory():
    body = 2 * SMALL + 2 * 8 * 4 + 4  # two gathers read; a slice is read and written, by an index
    kernel, prefetch, branch = 2 * LARGE, LARGE, 3 * LARGE
    in_place = LARGE + 4  # what it takes for an output is read alone
    assert Program(TEXT).bytes_moved() == 12 * body + kernel + in_place + prefetch + branch


def test_collectives_count_loops_and_each_channel_once():
    gathered = 16 * 8 * 2
    assert Program(TEXT).collectives(8) == [Collective("all-gather", 12, 12 * gathered, 12 * gathered * 3 / 4)]


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("x all-reduce(y), replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add", 4),
        ("x all-reduce(y), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add", 2),
        ("x all-reduce(y), replica_groups=mesh['axis_0'=2,'axis_1'=1,'axis_2'=4] {'axis_0','axis_2'}, metadata={}", 8),
        ("x collective-permute(y), source_target_pairs={{0,1},{1,2},{2,3},{3,0}}", 2),
        ("x all-reduce(y), replica_groups={}, to_apply=%add", 8),
    ],
)
def test_group_sizes_in_every_notation(line, size):
    assert group_size(line, 8) == size


def test_groups_in_transposed_order():
    assert groups("replica_groups=[4,2]<=[2,4]T(1,0)", 8) == [[0, 4], [1, 5], [2, 6], [3, 7]]


@pytest.mark.parametrize(
    ("kind", "sent"),
    [("all-gather", 75), ("reduce-scatter", 75), ("all-reduce", 150), ("all-to-all", 75), ("collective-permute", 100)],
)
def test_bytes_sent_on_a_ring_of_four(kind, sent):
    assert sent_bytes(kind, 100, 4) == sent
    assert sent_bytes(kind, 100, 1) == 0


def compiled(function, *arguments):
    return jax.jit(function).lower(*arguments).compile()


def test_a_program_without_loops_moves_what_xla_says():
    a, b = jax.ShapeDtypeStruct((64, 128), jnp.float32), jax.ShapeDtypeStruct((128, 32), jnp.float32)
    program = compiled(lambda a, b: jnp.tanh(a @ b), a, b)
    moved, theirs = Program(program.as_text()).bytes_moved(), program.cost_analysis()["bytes accessed"]
    assert moved == pytest.approx(theirs, rel=0.05)


def test_a_scan_moves_its_body_so_often():
    def scanned(length):
        def body(carry, _):
            return jnp.tanh(carry @ carry), None

        return lambda x: jax.lax.scan(body, x, length=length)[0]

    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    few, many = (Program(compiled(scanned(n), x).as_text()).bytes_moved() for n in (10, 30))
    assert (many - few) % 20 == 0
    assert (many - few) // 20 >= 4 * 64 * 64 * 4  # reads and writes of product and tanh


def test_collectives_of_a_compiled_program():
    mesh = make_mesh(MeshConfig(data=4, fsdp=1, tensor=2))
    x = jax.ShapeDtypeStruct((8, 64), jnp.float32, sharding=NamedSharding(mesh, P("data")))

    def summed(x):
        def body(carry, _):
            return carry + jnp.sum(jnp.tanh(x + carry[None]), axis=0), None

        return jax.lax.scan(body, jnp.zeros(64), length=7)[0]

    (found,) = Program(compiled(summed, x).as_text()).collectives(8)
    assert (found.kind, found.count, found.payload) == ("all-reduce", 7, 7 * 64 * 4)
    assert found.sent == 7 * 64 * 4 * 2 * 3 / 4


def test_scratch_memory_of_libraries_is_not_moved():
    call = """HloModule m
ENTRY %main (x: f32[64,64]) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %gemm = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%x, %x), custom_call_target="TARGET"
  ROOT %out = f32[64,64]{1,0} get-tuple-element(%gemm), index=0
}
"""
    matrix = 4 * 64 * 64
    for target in ("__cublas$gemm", "__cublas$lt$matmul", "__cudnn$fmhaSoftmax"):
        assert Program(call.replace("TARGET", target)).bytes_moved() == 3 * matrix
    assert Program(call.replace("TARGET", "my_kernel")).bytes_moved() == 3 * matrix + 4_194_304
