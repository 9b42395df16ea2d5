"""Mode "customize" in diffusion transformers: norms, rotations, second streams, sibling projections."""

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_flux2 import Flux2KVAttnProcessor
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn import functional as F

from comcat_hf import ComCATConfig
from comcat_hf.errors import UnsupportedModuleError
from comcat_hf.modeling.families import at_path
from tests.helpers import assert_close, classes_of, tensors_of
from tests.processes import in_processes
from tests.tuners.cases import equal, layers_of
from tests.tuners.diffusion import DIM, HEADS, TEXT, TRANSFORMERS, WIDTH
from tests.tuners.formula import check_formula, record, run


# Ranks and scales of adapters that are active together.
ADAPTERS = {"a": (2, 3, 1.0), "b": (3, None, -0.7), "c": (None, 5, 1.9)}
# Linear attention has no scores.
TARGETS = {"sana": r".*attn2"}
every_model = pytest.mark.parametrize("name", TRANSFORMERS)
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Already found a `peft_config`")


def adapted(name: str, *adapters: dict[str, Any], **settings: Any) -> tuple[nn.Module, dict[str, Any]]:
    """A model with adapters named "a", "b", … that are all active: by default the three of the formula, random."""
    model, inputs = TRANSFORMERS[name]()
    model.requires_grad_(False)
    made = adapters or [{"qk_rank": qk, "vo_rank": vo, "scale": t} for qk, vo, t in ADAPTERS.values()]
    names = [chr(ord("a") + index) for index in range(len(made))]
    settings = {"init_weights": False, "target_modules": TARGETS.get(name), **settings}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for adapter, fields in zip(names, made, strict=True):
            inject_adapter_in_model(ComCATConfig(mode="customize", **{**settings, **fields}), model, adapter)
    for layer in layers_of(model).values():
        layer.set_adapter(names)
    return model, inputs


@every_model
def test_the_formula(name, monkeypatch):
    model, inputs = adapted(name)
    check_formula(model, inputs, monkeypatch)


FULL, CORE = {"qk_rank": 2, "vo_rank": 3}, {"qk_rank": 3, "vo_rank": 2, "core": True}
every_kind = pytest.mark.parametrize("adapter", [FULL, CORE], ids=["full", "core"])


def _dead(path: str, model: nn.Module) -> bool:
    """Whether a factor is one of text that a last block drops."""
    stem, _, rest = path.partition(".comcat_factors.")
    last = [n for n, m in layers_of(model).items() if len(m.view.streams) > 1][-1:]
    return stem in last and ".further.0." in rest and rest.endswith(("query.weight", "output.weight", "core.weight"))


@every_kind
@every_model
def test_start_gradients_and_off(name, adapter):
    model, inputs = TRANSFORMERS[name]()
    base = run(model, inputs)
    model, inputs = adapted(name, adapter, init_weights=True)
    # Layer by layer: weights of this size let scores of hundreds enlarge rounding from one to the next.
    for path, (args, kwargs, output, *_) in record(model, inputs).items():
        layer = layers_of(model)[path]
        assert_close(tensors_of(output)[:1], tensors_of(layer.base_layer(*args, **kwargs))[:1], 1e-6)
    for layer in layers_of(model).values():
        for parameter in layer.comcat_factors.parameters():
            nn.init.normal_(parameter, std=0.3)
    found = run(model, inputs)
    assert not equal(found, base)
    sum(tensor.square().sum() for tensor in found).backward()
    silent = {n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert all(_dead(path, model) for path in silent), silent
    for layer in layers_of(model).values():
        layer.enable_adapters(False)
    assert equal(run(model, inputs), base)


@pytest.mark.parametrize("adapters", [(), [{"vo_rank": 2, "core": True}] * 2], ids=["full", "core"])
@every_model
def test_merged(name, adapters):
    model, inputs = adapted(name, *adapters)
    with torch.no_grad():
        expected = run(model, inputs)
        for layer in layers_of(model).values():
            layer.merge(safe_merge=True)
            if adapters and layer.view.sibling is None:
                dense, merged = layer.base_layer.state_dict(), layer.merged_layer.state_dict()
                assert {k: v.shape for k, v in merged.items()} == {k: v.shape for k, v in dense.items()}
        assert_close(run(model, inputs), expected)
        for layer in layers_of(model).values():
            layer.unmerge()
        assert equal(run(model, inputs), expected)
        for path, layer in layers_of(model).items():
            merged = layer.unload_and_optionally_merge_module(True, False, None)
            model.get_submodule(path.rpartition(".")[0])._modules[path.rpartition(".")[2]] = merged
        assert not layers_of(model)
        assert_close(run(model, inputs), expected)


def test_a_core_after_a_norm_is_not_merged():
    for name in ("sd3", "flux"):
        model, _ = adapted(name, CORE)
        layer = next(iter(layers_of(model).values()))
        if name == "sd3":
            layer.merge()
        else:
            with pytest.raises(UnsupportedModuleError, match=r"normalises its queries.*vo_rank alone"):
                layer.merge()


FEW = ("sd3.5", "flux", "flux2", "qwen", "wan", "hunyuan-video")
some_models = pytest.mark.parametrize("name", FEW)


def cast(value: Any, dtype: torch.dtype) -> Any:
    """Floating point numbers anywhere in arguments, in another dtype."""
    if isinstance(value, dict):
        return {key: cast(item, dtype) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def gradients(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
    sum(tensor.float().square().sum() for tensor in run(model, inputs)).backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@every_kind
@some_models
def test_gradient_checkpointing(name, adapter):
    found = []
    for checkpointing in (False, True):
        model, inputs = adapted(name, adapter)
        if checkpointing:
            model.enable_gradient_checkpointing()
        found.append(gradients(model.train(), inputs))
    assert found[0].keys() == found[1].keys() and found[0]
    assert all(torch.equal(gradient, found[1][path]) for path, gradient in found[0].items())


@every_kind
@some_models
def test_float32_factors_beside_a_half_precision_base(name, adapter):
    model, inputs = adapted(name, adapter)
    for path, parameter in model.named_parameters():
        parameter.data = parameter.data if "comcat_" in path else parameter.data.bfloat16()
    low = cast(inputs, torch.bfloat16)
    found = gradients(model, low)
    assert found and all(gradient.dtype == torch.float32 for gradient in found.values())
    for path, (args, kwargs, output, *_) in record(model, low).items():
        exact = copy.deepcopy(layers_of(model)[path]).float()
        expected = exact(*cast(args, torch.float32), **cast(kwargs, torch.float32))
        assert_close([tensors_of(output)[0].float()], tensors_of(expected)[:1], 0.03)


@pytest.mark.parametrize("name", ["sd3", "flux2", "hunyuan-video"])
def test_compiled(name):
    """A block as one graph, with a sibling in it or a layer shared with an MLP; a scale may change."""
    torch._dynamo.reset()
    model, inputs = adapted(name, FULL, CORE)
    path = list(layers_of(model))[-1].rpartition(".")[0]
    block, counter = model.get_submodule(path), CompileCounter()
    block.compile(backend=counter, fullgraph=True)
    compiled, block._compiled_call_impl = block._compiled_call_impl, None
    for scale in (1.0, 0.3):
        for layer in layers_of(model).values():
            layer.set_scale("a", scale)
        expected = run(model, inputs)
        block._compiled_call_impl = compiled
        assert_close(run(model, inputs), expected, 1e-6)
        block._compiled_call_impl = None
    assert counter.frame_count == 1


@some_models
def test_through_the_model(name):
    """As diffusers does it: several adapters, scales, fusing and back, deleting; a LoRA on the same projections."""
    model, inputs = TRANSFORMERS[name]()
    base = run(model, inputs)
    for adapter, fields in (("one", FULL), ("two", {**FULL, "scale": 0.5})):
        model.add_adapter(ComCATConfig(mode="customize", init_weights=False, **fields), adapter)
    lora = LoraConfig(r=2, target_modules=["to_q", "add_k_proj", "proj_out", "to_out.0"], init_lora_weights=False)
    model.add_adapter(lora, "style")
    with torch.no_grad():
        model.set_adapters(["one", "two"], [1.0, 0.4])
        both = run(model, inputs)
        names = inspect.signature(model.forward).parameters
        scaled = {next(name for name in names if name.endswith("attention_kwargs")): {"scale": 0.5}}
        assert_close(run(model, inputs), both, 0)
        half = run(model, {**inputs, **scaled})
        model.set_adapters(["one", "two"], [0.5, 0.2])
        assert_close(half, run(model, inputs), 1e-6)
        model.set_adapters(["one", "two", "style"], [1.0, 0.4, 1.0])
        three = run(model, inputs)
        assert not equal(both, base) and not equal(three, both)
        model.disable_adapters()
        assert equal(run(model, inputs), base)
        model.enable_adapters()
        model.fuse_lora()
        assert_close(run(model, inputs), three, 2e-5)
        model.unfuse_lora()
        assert_close(run(model, inputs), three, 2e-5)
        model.set_adapters(["one", "two"], [1.0, 0.4])
        assert_close(run(model, inputs), both, 2e-5)
        model.delete_adapters(["one", "two", "style"])
        assert_close(run(model, inputs), base, 2e-5)


@some_models
def test_offloaded(name):
    model, inputs = adapted(name, FULL, CORE)
    expected = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    with torch.no_grad():
        assert_close(run(model, inputs), expected, 1e-6)


@pytest.mark.parametrize("name", ["sd3", "flux", "auraflow", "wan"])
def test_projections_that_diffusers_fuses(name):
    model, inputs = adapted(name, FULL)
    expected = run(model, inputs)
    model.fuse_qkv_projections()
    assert any("to_qkv" in path for path, _ in model.named_modules())
    with torch.no_grad():
        assert_close(run(model, inputs), expected)
        for layer in layers_of(model).values():
            layer.merge()
        assert_close(run(model, inputs), expected)


def test_copies():
    model, inputs = adapted("flux", FULL, CORE)
    expected = run(model, inputs)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert equal(run(copied, inputs), expected)
        hooks = [layer._handover for layer in layers_of(copied).values() if layer._handover is not None]
        assert hooks and not any(
            hook is other._handover for hook in hooks for other in layers_of(model).values() if other._handover
        )


@pytest.mark.parametrize(
    "name", ["sd3", "sd3.5", "flux", "flux2", "cogview4", "lumina2", "ltx", "wan", "hunyuan-video"]
)
def test_the_formula_of_cores(name):
    """Queries are moved within the head after their norm and before their rotation, attended values before `D`."""
    model, inputs = adapted(name, CORE, {**CORE, "scale": -0.6})
    for path, (args, kwargs, output, *_) in record(model, inputs).items():
        layer, handles = layers_of(model)[path], []
        view, dense = layer.view, layer.base_layer
        residuals = [(layer.comcat_factors[adapter], t) for adapter, t in (("a", 1.0), ("b", -0.6))]

        def moved(states: Tensor, index: int, pair: str, *, view=view, layer=layer, residuals=residuals) -> Tensor:
            heads = states.unflatten(-1, (-1, view.head_dim)) if states.shape[-1] != view.head_dim else states
            at = next(place for place in (-2, -3) if heads.shape[place] == view.num_heads)
            rows = heads.movedim(at, 0).flatten(1, -2)
            result = rows
            for residual, t in residuals:
                core = getattr(residual.streams[index], f"{pair}_core")
                first, last = layer.bases(pair, core.rank)
                result = result + t * rows @ first @ core.weight @ last.mT
            shape = heads.movedim(at, 0).shape
            return result.view(shape).movedim(0, at).reshape(states.shape)

        for index, stream in enumerate(view.streams):
            if residuals[0][0].streams[index].qk_core is None:
                continue
            norm = getattr(dense, stream.norm_query or "", None)
            last = norm if norm is not None else getattr(dense, stream.query)
            handles.append(last.register_forward_hook(lambda m, a, out, i=index, f=moved: f(out, i, "qk")))
            if view.sibling is None and not view.family.fused:
                to_out = at_path(dense, stream.output)
                handles.append(to_out.register_forward_pre_hook(lambda m, a, i=index, f=moved: f(a[0], i, "vo")))
        if view.family.fused:
            size = view.num_heads * view.head_dim

            def before(module, args, size=size, f=moved):
                return torch.cat([f(args[0][..., :size], 0, "vo"), args[0][..., size:]], dim=-1)

            handles.append(dense.to_out.register_forward_pre_hook(before))
        with torch.no_grad():
            expected = tensors_of(dense(*args, **kwargs))
            if view.sibling is not None:
                expected = [moved(tensor, 0, "vo") for tensor in expected]
        for handle in handles:
            handle.remove()
        assert_close(tensors_of(output)[:1], expected[:1], 1e-5)


def _wan_image_to_video() -> nn.Module:
    return TRANSFORMERS["wan"](added_kv_proj_dim=DIM, image_dim=TEXT)[0]


def _with_processor(name: str, processor: Any) -> nn.Module:
    model, _ = TRANSFORMERS[name]()
    layer = next(m for m in model.modules() if hasattr(m, "processor"))
    layer.set_processor(processor)
    return model


def _unknown() -> Any:
    class OwnAttnProcessor(type(TRANSFORMERS["qwen"]()[0].transformer_blocks[0].attn.processor)):
        pass

    return OwnAttnProcessor()


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (
            _wan_image_to_video,
            r"blocks\.0\.attn2 is a .*second call.*image-to-video.*exclude_modules=",
        ),
        (
            lambda: _with_processor("flux", FluxIPAdapterAttnProcessor(DIM, DIM)),
            r"transformer_blocks\.0\.attn: .*FluxIPAdapterAttnProcessor calls its kernel a second.*unload_ip_adapter",
        ),
        (
            lambda: _with_processor("sd3", SD3IPAdapterJointAttnProcessor2_0(DIM, DIM, WIDTH, timesteps_emb_dim=8)),
            r"transformer_blocks\.0\.attn: .*SD3IPAdapterJointAttn.* calls its kernel a second.*unload_ip_adapter",
        ),
        (lambda: _with_processor("flux2", Flux2KVAttnProcessor()), "Flux2KVAttnProcessor keeps keys.*has no cache"),
        (
            lambda: _with_processor("qwen", _unknown()),
            "OwnAttnProcessor does not compute.*Qwen.*exclude_modules",
        ),
    ],
    ids=["wan-i2v", "flux-ip", "sd3-ip", "kv-cache", "unknown"],
)
@every_kind
def test_what_is_refused_when_the_adapter_is_added(build, says, adapter):
    model = build()
    classes = classes_of(model)
    with pytest.raises(UnsupportedModuleError, match=says):
        model.add_adapter(ComCATConfig(mode="customize", **adapter))
    assert classes_of(model) == classes and not hasattr(model, "peft_config")


def test_sage_attention_takes_cores_alone():
    model, _ = TRANSFORMERS["flux"]()
    for layer in (m for m in model.modules() if hasattr(m, "processor")):
        layer.processor._attention_backend = AttentionBackendName.SAGE
    with pytest.raises(UnsupportedModuleError, match=r"attn: the attention backend sage takes heads of 64.*core=True"):
        model.add_adapter(ComCATConfig(mode="customize", **FULL))
    model.add_adapter(ComCATConfig(mode="customize", **CORE))
    assert {layer.size() for layer in layers_of(model).values()} == {(HEADS, WIDTH)}


def test_the_rest_of_a_model_with_an_image_to_video_module():
    model = _wan_image_to_video()
    model.add_adapter(ComCATConfig(mode="customize", exclude_modules=["attn2"], **FULL))
    assert list(layers_of(model)) == ["blocks.0.attn1"]


def _sharded() -> None:
    model, _ = TRANSFORMERS["flux"]()
    mesh = init_device_mesh("cpu", (1,))
    linear = model.transformer_blocks[0].attn.add_k_proj
    linear.weight = nn.Parameter(distribute_tensor(linear.weight.data, mesh, [Shard(0)]))
    with pytest.raises(UnsupportedModuleError, match=r"attn\.add_k_proj: .*DTensor.*tensor parallel.*exclude_modules"):
        model.add_adapter(ComCATConfig(mode="customize", **CORE))


def test_tensor_parallel_weights_are_refused():
    in_processes(_sharded, count=1)


def test_linear_attention_takes_values_alone():
    model, inputs = TRANSFORMERS["sana"]()
    with pytest.raises(UnsupportedModuleError, match=r"attn1 is a Attention whose query/key.*linear.*qk_rank=None"):
        inject_adapter_in_model(ComCATConfig(mode="customize", **FULL), model)
    model, inputs = adapted("sana", {"vo_rank": 3, "scale": 0.6}, target_modules=["attn1"])
    ((path, (args, kwargs, output, *_)),) = record(model, inputs).items()
    layer = layers_of(model)[path]
    factors, dense, value = layer.comcat_factors["a"], layer.base_layer, layer.base_layer.to_v
    with torch.no_grad():
        base = dense(*args, **kwargs)
        # The same attention over other values, the first columns of a head in the place of its own.
        padded = F.pad(factors.value.weight.unflatten(0, (HEADS, 3)), (0, 0, 0, WIDTH - 3)).flatten(0, 1)
        states: list[Tensor] = []
        handle = dense.to_out[0].register_forward_pre_hook(lambda module, args: states.append(args[0]))
        value.weight.data, kept = padded, value.weight.data
        dense(*args, **kwargs)
        value.weight.data = kept
        handle.remove()
        further = states[0].unflatten(-1, (HEADS, WIDTH))[..., :3].flatten(-2)
        assert_close([output], [base + 0.6 * factors.output(further)], 1e-5)


def test_a_lora_on_layers_shared_with_an_mlp():
    model, inputs = adapted("flux2", FULL, CORE)
    alone = run(model, inputs)
    targets = r".*single.*(to_qkv_mlp_proj|to_out)"
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, init_lora_weights=False), model, "style")
    for layer in layers_of(model).values():
        layer.set_adapter(["a", "b"])
    expected = run(model, inputs)
    assert not equal(expected, alone)
    for module in [m for m in model.modules() if isinstance(m, LoraLayer)]:
        module.merge()
    assert_close(run(model, inputs), expected)
