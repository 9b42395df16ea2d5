"""What only a GPU has: kernels for half precision, moves between devices, offloading, compiled graphs."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForImageClassification

import comcat_hf
from comcat_hf import ComCATConfig, initialize_comcat_weights, load_comcat_weights, plan_of, save_comcat_weights
from comcat_hf.compression.finetuning import finetune
from comcat_hf.modeling import apply_ranks
from comcat_hf.training.seeds import random_states, set_random_states
from tests.customization.pipelines import WIDTH, tiny_sd, tiny_unet
from tests.helpers import assert_close, compressed, full_ranks, small_vit


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:Already found a `peft_config`"),
]
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
every_kind = pytest.mark.parametrize("adapter", [{"qk_rank": 3, "vo_rank": 2}, {"qk_rank": 2, "core": True}], ids=str)
# Of the range of the outputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
MATH = "aten::_scaled_dot_product_attention_math"


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """By default convolutions in float32 round their inputs to TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def vit_on_gpu(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, dict[str, Tensor]]:
    model, inputs = small_vit(hidden_size=96, intermediate_size=192, num_hidden_layers=3)
    return model.to("cuda", dtype), on_gpu(inputs, dtype)


def on_gpu(inputs: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: value.to("cuda", dtype if value.is_floating_point() else None) for name, value in inputs.items()}


def batches(dtype: torch.dtype, count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    return [on_gpu({"pixel_values": torch.randn(8, 3, 32, 32, generator=generator)}, dtype) for _ in range(count)]


def unet_with_wide_heads() -> nn.Module:
    """Two heads of 40 and 80, the widths of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    return (
        tiny_unet(block_out_channels=(80, 160), attention_head_dim=2, norm_num_groups=8).eval().requires_grad_(False)
    )


def unet_inputs(dtype: torch.dtype, device: str = "cuda") -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 16, 16, generator=generator).to(device, dtype),
        "timestep": torch.full((2,), 500, device=device),
        "encoder_hidden_states": torch.randn(2, 7, WIDTH, generator=generator).to(device, dtype),
    }


@torch.no_grad()
def logits(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    return model(**inputs).logits


@torch.no_grad()
def predicted(unet: nn.Module, dtype: torch.dtype, device: str = "cuda") -> Tensor:
    return unet(**unet_inputs(dtype, device)).sample


def add(unet: nn.Module, adapter: dict, name: str = "dog") -> nn.Module:
    torch.manual_seed(3)
    unet.add_adapter(ComCATConfig(mode="customize", init_weights=False, **adapter), adapter_name=name)
    return unet


def paths_of(call) -> set[str]:
    """The ways that scaled dot products took."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace, torch.no_grad():
        call()
    return {event.key for event in trace.key_averages() if event.key.startswith("aten::_scaled_dot_product")}


class TestCompress:
    @every_dtype
    @pytest.mark.parametrize("reduction, informed", [(0.3, True), (0.3, False)])
    def test_half_precision_follows_float32(self, dtype, reduction, informed):
        model, inputs = vit_on_gpu(dtype)
        before = copy.deepcopy(model.state_dict())
        given = {"batches": batches(dtype)} if informed else {}
        small = comcat_hf.compress(model, reduction, **given)
        assert all(p.is_cuda and p.dtype == dtype for p in small.parameters())
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        again = {"batches": batches(torch.float32)} if informed else {}
        expected = comcat_hf.compress(model.float(), plan=plan_of(small), **again)
        assert_close(
            [logits(small, inputs).float()],
            [logits(expected, on_gpu(inputs, torch.float32))],
            2 * TOLERANCE[dtype] if dtype != torch.float32 else 1e-3,
        )

    def test_a_gpu_finds_what_a_cpu_finds(self):
        model, inputs = vit_on_gpu()
        small = comcat_hf.compress(model, 0.4, batches=batches(torch.float32))
        on_cpu = [{name: value.cpu() for name, value in batch.items()} for batch in batches(torch.float32)]
        expected = comcat_hf.compress(model.cpu(), plan=plan_of(small), batches=on_cpu)
        found = logits(small, inputs).cpu()
        assert_close([found], [logits(expected, {"pixel_values": inputs["pixel_values"].cpu()})], 1e-3)

    def test_batches_may_lie_on_the_cpu(self):
        model, inputs = vit_on_gpu()
        there = comcat_hf.compress(model, 0.4, batches=batches(torch.float32))
        here = comcat_hf.compress(model, 0.4, batches=[b["pixel_values"].cpu() for b in batches(torch.float32)])
        assert plan_of(here) == plan_of(there)
        assert_close([logits(here, inputs)], [logits(there, inputs)], 1e-4)

    @every_dtype
    def test_full_rank_is_the_dense_model(self, dtype):
        model, inputs = vit_on_gpu(dtype)
        dense = logits(model, inputs).float()
        apply_ranks(model, full_ranks(model, "model"))
        assert_close([logits(model, inputs).float()], [dense], TOLERANCE[dtype])

    @every_dtype
    @pytest.mark.parametrize("how", ["cuda", "auto", "moved"])
    def test_saved_and_loaded(self, tmp_path, dtype, how):
        model, inputs = vit_on_gpu(dtype)
        small = comcat_hf.compress(model, 0.3)
        small.save_pretrained(tmp_path)
        placed = {} if how == "moved" else {"device_map": how}
        loaded = AutoModelForImageClassification.from_pretrained(tmp_path, dtype=dtype, **placed)
        loaded = loaded.to("cuda") if how == "moved" else loaded
        assert all(p.is_cuda and p.dtype == dtype for p in loaded.parameters())
        assert torch.equal(logits(loaded, inputs), logits(small, inputs))

    @every_dtype
    def test_as_an_adapter(self, dtype):
        model, inputs = vit_on_gpu(dtype)
        found = comcat_hf.collect_statistics(model, batches(dtype))
        plan = comcat_hf.allocate_ranks(model, 0.3, statistics=found, mlp="rank", strategy="spectrum")
        wrapped = get_peft_model(model, ComCATConfig.from_plan(plan))
        initialize_comcat_weights(wrapped, statistics=found)
        assert all(p.is_cuda for p in wrapped.parameters())
        expected = logits(wrapped, inputs).float()
        assert_close([logits(wrapped.merge_and_unload(), inputs).float()], [expected], TOLERANCE[dtype])

    def test_search(self):
        model, _ = vit_on_gpu()
        labelled = [batch | {"labels": torch.arange(8, device="cuda") % 5} for batch in batches(torch.float32)]
        plan = comcat_hf.search_ranks(model, labelled, 0.4, epochs=2)
        assert 0.4 <= plan.reached <= 0.405

    @every_half
    def test_finetuning_in_mixed_precision(self, dtype):
        AcceleratorState._reset_state(True)
        model, _ = vit_on_gpu()
        small = comcat_hf.compress(model, 0.4, batches=batches(torch.float32))
        labelled = [batch | {"labels": torch.arange(8, device="cuda") % 5} for batch in batches(torch.float32)]
        precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}[dtype]
        losses = finetune(
            *(small, model, labelled, 8, 1e-3), accelerator=Accelerator(mixed_precision=precision), progress=False
        )
        AcceleratorState._reset_state(True)
        assert losses[-1]["total"] < losses[0]["total"]
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in small.parameters())

    def test_compiled(self):
        model, inputs = vit_on_gpu(torch.float16)
        small = comcat_hf.compress(model, 0.4, batches=batches(torch.float16))
        expected = logits(small, inputs).float()
        with torch.no_grad():
            found = torch.compile(small, fullgraph=True)(**inputs).logits.float()
        assert_close([found], [expected], TOLERANCE[torch.float16])


class TestKernels:
    @every_dtype
    @pytest.mark.parametrize("qk, vo", [(5, 12), (12, 5), (4, None), (None, 4), (8, 8)])
    @pytest.mark.parametrize("family", ["vit", "bert", "clip_text"])
    def test_compressed_attention_is_fused(self, family, qk, vo, dtype):
        model, inputs = compressed(family, qk, vo)
        model, inputs = model.to("cuda", dtype), on_gpu(inputs, dtype)
        found = paths_of(lambda: model(**inputs))
        assert found and MATH not in found

    @every_dtype
    @every_kind
    def test_widened_heads_are_fused(self, adapter, dtype):
        unet = add(unet_with_wide_heads().to("cuda", dtype), adapter)
        with sdpa_kernel(FUSED):
            found = paths_of(lambda: predicted(unet, dtype))
        assert found and MATH not in found
        if dtype != torch.float32:
            flash = {"aten::_scaled_dot_product_flash_attention", "aten::_scaled_dot_product_cudnn_attention"}
            assert found & flash
        unet.fuse_lora()
        with sdpa_kernel(FUSED):
            assert MATH not in paths_of(lambda: predicted(unet, dtype))

    def test_fp16_flash_in_training(self):
        unet = add(unet_with_wide_heads().to("cuda", torch.float16), {"qk_rank": 3, "vo_rank": 2})
        with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
            unet(**unet_inputs(torch.float16)).sample.float().square().mean().backward()
        grads = [p.grad for n, p in unet.named_parameters() if "comcat_" in n]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)


class TestCustomize:
    @every_dtype
    @every_kind
    def test_like_float32_on_a_cpu(self, adapter, dtype):
        unet = add(unet_with_wide_heads(), adapter)
        expected = predicted(unet, torch.float32, "cpu")
        plain = predicted(unet_with_wide_heads(), torch.float32, "cpu")
        assert (expected - plain).abs().max() > 0.1 * plain.std()
        unet.to("cuda", dtype)
        assert_close([predicted(unet, dtype).float().cpu()], [expected], TOLERANCE[dtype])

    @every_dtype
    @every_kind
    def test_added_on_the_gpu(self, adapter, dtype):
        unet = add(unet_with_wide_heads().to("cuda", dtype), adapter)
        assert all(p.is_cuda and p.dtype == dtype for p in unet.parameters())
        found = predicted(unet, dtype)
        unet.to("cpu").to("cuda")
        assert torch.equal(predicted(unet, dtype), found)

    @every_dtype
    @every_kind
    def test_fused_and_back(self, adapter, dtype):
        unet = add(unet_with_wide_heads().to("cuda", dtype), adapter)
        expected = predicted(unet, dtype)
        unet.fuse_lora()
        assert_close([predicted(unet, dtype).float()], [expected.float()], TOLERANCE[dtype])
        unet.unfuse_lora()
        assert torch.equal(predicted(unet, dtype), expected)

    @every_half
    @every_kind
    def test_saved_and_loaded(self, tmp_path, adapter, dtype):
        unet = add(unet_with_wide_heads().to("cuda", dtype), adapter)
        save_comcat_weights({"unet": unet}, tmp_path, adapter_name="dog")
        other = unet_with_wide_heads().to("cuda", dtype)
        load_comcat_weights({"unet": other}, tmp_path, adapter_name="dog")
        assert all(p.is_cuda and p.dtype == dtype for p in other.parameters())
        assert torch.equal(predicted(other, dtype), predicted(unet, dtype))

    @every_half
    @every_kind
    def test_float32_factors_under_autocast(self, adapter, dtype):
        """As the training does it: the base in half precision, the factors in float32."""
        unet = add(unet_with_wide_heads().to("cuda", dtype), adapter)
        expected = predicted(unet, dtype).float()
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        with torch.autocast("cuda", dtype):
            found = unet(**unet_inputs(dtype)).sample.float()
        assert_close([found.detach()], [expected], TOLERANCE[dtype])
        (found.square().mean() * 1024).backward()
        trained = [p for p in unet.parameters() if p.requires_grad]
        assert trained and all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in trained)

    @every_kind
    def test_compiled_with_other_scales(self, adapter):
        unet = add(unet_with_wide_heads().to("cuda", torch.float16), adapter)
        compiled = torch.compile(unet, fullgraph=True)
        for scale in (1.0, 0.5):
            unet.set_adapters(["dog"], [scale])
            expected = predicted(unet, torch.float16).float()
            assert_close([predicted(compiled, torch.float16).float()], [expected], TOLERANCE[torch.float16])

    @every_kind
    @pytest.mark.parametrize("way", ["model", "sequential"])
    def test_offloaded(self, tmp_path, adapter, way):
        def build() -> StableDiffusionPipeline:
            pipe = StableDiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.float16)
            pipe.set_progress_bar_config(disable=True)
            return pipe

        def draw(pipe: StableDiffusionPipeline) -> Tensor:
            generator = torch.Generator().manual_seed(0)
            how = {"generator": generator, "height": 16, "width": 16, "output_type": "latent"}
            return pipe("a cat", num_inference_steps=2, **how).images.float().cpu()

        tiny_sd(tmp_path)
        pipe = build().to("cuda")
        plain = draw(pipe)
        add(pipe.unet, adapter)
        save_comcat_weights(pipe, tmp_path / "dog", adapter_name="dog")
        expected = draw(pipe)
        assert not torch.equal(expected, plain)
        for first in ("adapter", "offloading"):
            other = build()
            if first == "adapter":
                load_comcat_weights(other, tmp_path / "dog", adapter_name="dog")
            getattr(other, f"enable_{way}_cpu_offload")()
            if first == "offloading":
                load_comcat_weights(other, tmp_path / "dog", adapter_name="dog")
            # With hooks on the projections nothing is joined to them, which rounds otherwise.
            assert_close([draw(other)], [expected], TOLERANCE[torch.float16])


def test_random_states_of_the_gpu_come_back():
    device = torch.device("cuda")
    before = random_states(device)
    drawn = torch.randn(3, device=device)
    set_random_states(before, device)
    assert torch.equal(torch.randn(3, device=device), drawn)


def test_a_padded_batch():
    """A mask, which the memory-efficient kernel wants aligned."""
    model, inputs = compressed("bert", 5, 12)
    expected = logits(model, inputs)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        found = logits(model.to("cuda", dtype), on_gpu(inputs, dtype)).float().cpu()
        assert_close([found], [expected], TOLERANCE[dtype])
