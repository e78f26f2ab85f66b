"""Operators and kernels find their class: by name, by what they ran inside of, by what launched them."""

from __future__ import annotations

import pytest

from bigtrain.planner.by_class import (
    ATTENTION,
    CALLS,
    COMMUNICATION,
    COPIES,
    DATA,
    ELEMENTWISE,
    EMBEDDING,
    FUSED,
    LOSS,
    MATRIX,
    MEMORY,
    NORMALIZATION,
    OPTIMIZER,
    OTHER,
)  # fmt: skip
from bigtrain.profiling.kernels import class_of_kernel, class_of_operator

FORWARD = ("bigtrain::forward", "bigtrain::step")
BACKWARD = ("bigtrain::backward", "bigtrain::step")
UPDATE = ("Optimizer.step#AdamW.step", "bigtrain::update", "bigtrain::step")
NODE = "autograd::engine::evaluate_function: "

OPERATORS = {
    ("aten::addmm", "aten::linear", *FORWARD): MATRIX,
    ("aten::linear", *FORWARD): CALLS,
    ("aten::mm", "AddmmBackward0", NODE + "AddmmBackward0", *BACKWARD): MATRIX,
    ("aten::mm", "_LinearCrossEntropy", *FORWARD): MATRIX,
    ("aten::exp_", "_LinearCrossEntropy", *FORWARD): LOSS,
    ("aten::zero_", "aten::zeros_like", "_LinearCrossEntropy", *FORWARD): LOSS,
    ("aten::mul_", "_LinearCrossEntropyBackward", NODE + "_LinearCrossEntropyBackward", *BACKWARD): LOSS,
    ("_LinearCrossEntropy", *FORWARD): CALLS,
    ("aten::_scaled_dot_product_flash_attention_for_cpu", "_InPlace", *FORWARD): ATTENTION,
    ("aten::copy_", "_InPlace", *FORWARD): ATTENTION,
    ("aten::bmm", "aten::matmul", "aten::_scaled_dot_product_attention_math", *FORWARD): ATTENTION,
    ("aten::native_layer_norm", "aten::layer_norm", *FORWARD): NORMALIZATION,
    ("aten::native_layer_norm_backward", "NativeLayerNormBackward0", *BACKWARD): NORMALIZATION,
    ("aten::rsqrt_", "_RMSNorm", *FORWARD): NORMALIZATION,
    ("aten::index_select", "_Rows", *FORWARD): EMBEDDING,
    ("aten::index_add_", "_RowsBackward", NODE + "_RowsBackward", *BACKWARD): EMBEDDING,
    ("aten::embedding", *FORWARD): EMBEDDING,
    ("aten::gelu", *FORWARD): ELEMENTWISE,
    ("aten::gelu_backward", "GeluBackward0", *BACKWARD): ELEMENTWISE,
    ("aten::sum", "AddmmBackward0", *BACKWARD): ELEMENTWISE,
    ("aten::bernoulli_", "aten::native_dropout", *FORWARD): ELEMENTWISE,
    ("aten::empty", *FORWARD): MEMORY,
    ("aten::_fused_adamw_", *UPDATE): OPTIMIZER,
    ("aten::mm", *UPDATE): OPTIMIZER,
    ("aten::linalg_vector_norm", "bigtrain::update", "bigtrain::step"): OPTIMIZER,
    ("aten::add_", "torch::autograd::AccumulateGrad", *BACKWARD): OPTIMIZER,
    ("torch::autograd::AccumulateGrad", *BACKWARD): CALLS,
    ("aten::item", *UPDATE): CALLS,
    ("aten::cat", "bigtrain::batch", "bigtrain::step"): COPIES,
    ("aten::copy_", "bigtrain::data", "bigtrain::step"): DATA,
    ("bigtrain::data", "bigtrain::step"): DATA,
    ("bigtrain::step",): CALLS,
    ("c10d::allreduce_", *UPDATE): COMMUNICATION,
    ("aten::copy_", "FSDP::all_gather_copy_out", *FORWARD): COMMUNICATION,
    ("FSDP::pre_forward", *FORWARD): COMMUNICATION,
    ("## Call CompiledFxGraph f35 ##", "CompiledFunction", *FORWARD): FUSED,
    ("aten::mm", "## Call CompiledFxGraph f35 ##", "CompiledFunction", *FORWARD): MATRIX,
    ("aten::fill_", "## Call CompiledFxGraph f35 ##", "CompiledFunction", *FORWARD): FUSED,
    ("Torch-Compiled Region: 0/0", *FORWARD): CALLS,
    ("elsewhere::something", *FORWARD): OTHER,
    ("aten::_no_such_operator", *FORWARD): OTHER,
}  # fmt: skip

KERNELS = {
    ("nvjet_hsh_128x256_64x4_2x1_v_bz_TNT", "aten::mm"): MATRIX,
    ("void cublasLt::splitKreduce_kernel<32, 16, int>", "aten::addmm"): MATRIX,
    ("sm90_xmma_gemm_bf16bf16_bf16f32", ""): MATRIX,
    ("void flash_fwd_kernel<Flash_fwd_kernel_traits<64>>", "torch_attn::_varlen_attn"): ATTENTION,
    ("void flash::flash_bwd_dot_do_o_kernel<true>", ""): ATTENTION,
    ("void at::native::vectorized_elementwise_kernel<4, FillFunctor<int>>", "aten::fill_"): MEMORY,
    ("Memset (Device)", "aten::zero_"): MEMORY,
    ("Memset (Device)", ""): MEMORY,
    ("Memcpy HtoD (Pinned -> Device)", "aten::copy_"): COPIES,
    ("Memcpy DtoH (Device -> Pinned)", "aten::_local_scalar_dense"): COPIES,
    ("Memcpy DtoD (Device -> Device)", "aten::copy_"): ELEMENTWISE,
    ("ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)", "nccl:_all_gather_base"): COMMUNICATION,
    ("triton_per_fused_add_native_layer_norm_0", "triton_per_fused_add_native_layer_norm_0"): FUSED,
    ("triton_tem_fused_addmm_3", "## Call CompiledFxGraph f35 ##"): MATRIX,
    ("void at::native::vectorized_layer_norm_kernel<float>", "aten::native_layer_norm"): NORMALIZATION,
    ("void at::native::(anonymous namespace)::vectorized_layer_norm_kernel", ""): NORMALIZATION,
    ("void at::native::indexSelectLargeIndex<float>", "aten::index_select"): ELEMENTWISE,
    ("void at::native::vectorized_elementwise_kernel<4, GeluCUDAKernelImpl>", "aten::gelu"): ELEMENTWISE,
    ("void at::native::reduce_kernel<512, 1>", ""): ELEMENTWISE,
    ("void unheard_of()", ""): OTHER,
    ("void unheard_of()", "elsewhere::something"): OTHER,
}


@pytest.mark.parametrize(("names", "expected"), OPERATORS.items())
def test_an_operator_has_the_class(names: tuple[str, ...], expected: str) -> None:
    assert class_of_operator(names) == expected


@pytest.mark.parametrize(("named", "expected"), KERNELS.items())
def test_a_kernel_has_the_class(named: tuple[str, str], expected: str) -> None:
    kernel, launching = named
    assert class_of_kernel(kernel, [launching, *FORWARD] if launching else []) == expected


@pytest.mark.parametrize(
    ("kernel", "around", "expected"),
    [
        ("void at::native::vectorized_elementwise_kernel<4, Exp>", ("aten::exp_", "_LinearCrossEntropy"), LOSS),
        ("nvjet_hsh_128x256", ("aten::mm", "_LinearCrossEntropy"), MATRIX),
        ("triton_poi_fused_lamb_0", ("triton_poi_fused_lamb_0", *UPDATE), OPTIMIZER),
        ("void multi_tensor_apply_kernel<FusedAdamMathFunctor>", ("aten::_fused_adamw_", *UPDATE), OPTIMIZER),
        ("nvjet_hsh_128x256", ("aten::mm", *UPDATE), OPTIMIZER),
        ("void at::native::indexing_backward_kernel<float>", ("aten::index_put_", "_RowsBackward"), EMBEDDING),
        ("Memcpy HtoD (Pinned -> Device)", ("aten::copy_", "bigtrain::batch"), COPIES),
    ],
)
def test_a_kernel_belongs_where_it_was_launched(kernel: str, around: tuple[str, ...], expected: str) -> None:
    assert class_of_kernel(kernel, around) == expected
