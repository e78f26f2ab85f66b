"""The libraries, and of those with kernels of their own, which a run uses."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from bigtrain.amp.rules import NEEDED_CAPABILITY
from bigtrain.doctor.devices import version_of
from bigtrain.doctor.finding import Finding, fault, note, ok
from bigtrain.doctor.probe import Probe
from bigtrain.optim.kernels import nvidia_apex_present
from bigtrain.planner.hardware import Hardware

NEEDED = ("datasets", "tokenizers", "safetensors", "tensorboard")
OPTIONAL = {
    "transformers": ("hf", "Hugging Face models in a loop of one's own"),
    "deepspeed": ("deepspeed", "sharding.engine: deepspeed"),
    "accelerate": ("trackers", "trackers other than TensorBoard"),
}
"""What may be absent: the extra that brings it, and what it is for."""


def library_findings() -> Iterator[Finding]:
    """Look at the libraries without kernels of their own."""
    for name in NEEDED:
        version = version_of(name)
        yield ok(name, version) if version else fault(name, "absent", f"pip install {name}")
    for name, (extra, purpose) in OPTIONAL.items():
        version = version_of(name)
        do = f"only if you want {purpose}: pip install 'bigtrain[{extra}]'"
        yield ok(name, version) if version else note(name, "absent", do)


def kernel_findings(gpus: Hardware | None, probe: Probe | str | None) -> Iterator[Finding]:
    """Look at fused kernels: whether each library is there, and whether a run uses it."""
    yield _apex(gpus)
    yield _attention(gpus, probe)
    yield _flash_attention()
    yield _flash_optim()
    yield _torchao(gpus)


def _apex(gpus: Hardware | None) -> Finding:
    instead = "LAMB runs on bigtrain's own kernels"
    if nvidia_apex_present():
        if gpus is not None:
            return ok("apex", "present, used: its fused kernel is LAMB's in fp32, where weights are not sharded")
        return ok("apex", f"present, not used without a GPU: {instead}")
    if find_spec("apex") is not None:
        do = "pip uninstall apex; build NVIDIA's from its source with --cuda_ext if you want its LAMB"
        return note("apex", f"an `apex` without NVIDIA's CUDA kernels, not used: {instead}", do)
    return ok("apex", f"absent, not needed: {instead}")


def _attention(gpus: Hardware | None, probe: Probe | str | None) -> Finding:
    if gpus is None:
        return ok("attention", "torch's flash kernel for CPUs, used a document at a time")
    if isinstance(probe, Probe) and probe.varlen:
        return ok("attention", "torch's flash attention over documents of any lengths, used in bf16 and fp16")
    capability = gpus.capability
    if capability is not None and capability < (8, 0):
        text = f"scaled_dot_product_attention, a document at a time: compute capability {capability[0]}.{capability[1]}"
        return note("attention", text, "flash attention needs a GPU of 8.0 or more, such as an A100")
    text = "scaled_dot_product_attention, a document at a time: torch offers no variable lengths here"
    return note("attention", text, "install a CUDA build of torch 2.11 to 2.13")


def _flash_attention() -> Finding:
    there = find_spec("flash_attn") is not None
    there = there or find_spec("flash_attn_interface") is not None
    if there:
        text = "present: a run on a GPU that compiles no blocks (train.compile: false) times it beside torch's own"
        return ok("flash-attn", f"{text} attention, and takes the faster")
    return ok("flash-attn", "absent, not needed: attention is torch's own")


def _flash_optim() -> Finding:
    there = find_spec("flashoptim") is not None
    text = "present, not used" if there else "absent, not needed"
    return ok("FlashOptim", f"{text}: states in few bits (bf16, 8bit, 4bit) are bigtrain's own on every device")


def _torchao(gpus: Hardware | None) -> Finding:
    there, fp8 = find_spec("torchao") is not None, NEEDED_CAPABILITY["fp8"]
    state = "present" if there else "absent"
    if gpus is None or (gpus.capability or (0, 0)) < fp8:
        return ok("torchao", f"{state}, not used: only amp.precision: fp8 is, on GPUs of {fp8[0]}.{fp8[1]} or more")
    if there:
        return ok("torchao", "present, used by amp.precision: fp8 alone")
    return note("torchao", "absent, so amp.precision: fp8 is not to be had", "if you want it: pip install torchao")
