"""Which attention of the installed diffusers has no row: a new release shows what is missing."""

import importlib
import inspect
import pkgutil

import pytest
from diffusers.models import attention_processor, transformers
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_processor import Attention

from comcat_hf.modeling.hosts.diffusers import ADAPTED, FAMILIES


# Modules of `diffusers.models.transformers` and the attention classes in them that adapters are not built for.
CLASSES = """
ace_step_transformer.AceStepAttention minimax_music3_rvq_depth_decoder.MiniMaxMusic3DepthAttention
transformer_anyflow.AnyFlowAttention transformer_anyflow_far.AnyFlowAttention
transformer_bria_fibo2.BriaFibo2Attention transformer_cosmos.CosmosAttention
transformer_cosmos3.Cosmos3PackedMoTAttention transformer_ernie_image.ErnieImageAttention
transformer_helios.HeliosAttention transformer_hidream_image.HiDreamAttention
transformer_ideogram4.Ideogram4Attention transformer_joyimage.JoyImageAttention
transformer_joyimage_edit_plus.JoyImageEditPlusAttention transformer_kandinsky.Kandinsky5Attention
transformer_kandinsky6.Kandinsky6Attention transformer_kandinsky6_sr.Kandinsky6SRAttention
transformer_krea2.Krea2Attention transformer_longcat_audio_dit.AudioDiTAttention transformer_ltx2.LTX2Attention
transformer_minimax_h3.MiniMaxH3Attention transformer_minimax_music3.MiniMaxMusic3Attention
transformer_motif_video.MotifVideoAttention transformer_motif_video.MotifVideoCrossAttention
transformer_prx.PRXAttention transformer_qwenimage21.QwenImage21Attention
transformer_rfd4_proteina.RFD4ProteinaPairAttention transformer_sana_wm.MultiHeadCrossAttention
transformer_sana_wm_refiner.SanaWMLTX2Attention transformer_stable_audio3.StableAudio3CrossAttention
transformer_stable_audio3.StableAudio3SelfAttention transformer_wan_animate.WanAnimateFaceBlockCrossAttention
transformer_wan_animate.WanAttention transformer_wan_animate_2.WanAnimate2Attention
"""
# Processors that are refused by name: second kernel calls, caches, perturbed attention, names of earlier releases, and
# those that nobody has written a row for.
PROCESSORS = """
AceStepAttnProcessor2_0 AllegroAttnProcessor2_0 AnyFlowAttnProcessor AnyFlowCausalAttnProcessor
AnyFlowCrossAttnProcessor AttnAddedKVProcessor AttnAddedKVProcessor2_0 AudioDiTCrossAttnProcessor
AudioDiTSelfAttnProcessor BriaFibo2AttnProcessor CogView4TrainingAttnProcessor Cosmos3AttnProcessor
CosmosAttnProcessor2_0 CosmosAttnProcessor2_5 CustomDiffusionAttnProcessor CustomDiffusionAttnProcessor2_0
CustomDiffusionXFormersAttnProcessor EasyAnimateAttnProcessor2_0 ErnieImageSingleStreamAttnProcessor
Flux2KVAttnProcessor Flux2KVParallelSelfAttnProcessor FluxAttnProcessor2_0 FluxAttnProcessor2_0_NPU
FluxIPAdapterAttnProcessor FluxIPAdapterJointAttnProcessor2_0 FluxSingleAttnProcessor2_0 FusedFluxAttnProcessor2_0
FusedFluxAttnProcessor2_0_NPU FusedHunyuanAttnProcessor2_0 GlmImageAttnProcessor HeliosAttnProcessor
HiDreamAttnProcessor HunyuanVideo15AttnProcessor2_0 IPAdapterAttnProcessor IPAdapterAttnProcessor2_0
IPAdapterXFormersAttnProcessor Ideogram4AttnProcessor JoyImageAttnProcessor JoyImageEditPlusAttnProcessor
Kandinsky5AttnProcessor Kandinsky6AttnProcessor Kandinsky6SRAttnProcessor Krea2AttnProcessor
LTX2AudioVideoAttnProcessor LTX2PerturbedAttnProcessor LTXVideoAttentionProcessor2_0 LoRAAttnAddedKVProcessor
LoRAAttnProcessor LoRAAttnProcessor2_0 LoRAXFormersAttnProcessor LuminaAttnProcessor2_0 MiniMaxH3AttnProcessor
MiniMaxMusic3AttnProcessor MiniMaxMusic3DepthAttnProcessor MochiAttnProcessor2_0 MochiVaeAttnProcessor2_0
MotifVideoAttnProcessor2_0 MotifVideoCrossAttnProcessor2_0 NucleusMoEAttnProcessor2_0 OmniGenAttnProcessor2_0
PAGCFGHunyuanAttnProcessor2_0 PAGCFGIdentitySelfAttnProcessor2_0 PAGCFGJointAttnProcessor2_0
PAGCFGSanaLinearAttnProcessor2_0 PAGHunyuanAttnProcessor2_0 PAGIdentitySanaLinearAttnProcessor2_0
PAGIdentitySelfAttnProcessor2_0 PAGJointAttnProcessor2_0 PRXAttnProcessor2_0 QwenImage21AttnProcessor
QwenImage21FlexAttnProcessor RFD4ProteinaPairAttnProcessor SD3IPAdapterJointAttnProcessor2_0
SanaLinearAttnProcessor3_0 SanaMultiscaleAttnProcessor2_0 SanaWMCrossAttnProcessor
SanaWMLTX2AudioVideoAttnProcessor SanaWMLTX2PerturbedAttnProcessor SanaWMLTX2RefinerAttnProcessor
SkyReelsV2AttnProcessor2_0 SlicedAttnAddedKVProcessor StableAudio3CrossAttnProcessor StableAudio3SelfAttnProcessor
StableAudioAttnProcessor2_0 WanAnimate2AttnProcessor WanAnimate2CrossAttnProcessor WanAnimateFaceBlockAttnProcessor
WanAttnProcessor2_0 XFormersAttnAddedKVProcessor XFormersJointAttnProcessor XLAFluxFlashAttnProcessor2_0
"""


@pytest.fixture(scope="module")
def found() -> list[tuple[str, type]]:
    """Every class that the modules of attention define, with the name of its module."""
    prefix = f"{transformers.__name__}."
    modules = [importlib.import_module(prefix + module.name) for module in pkgutil.iter_modules(transformers.__path__)]
    return [
        (module.__name__.removeprefix(prefix), cls)
        for module in (attention_processor, *modules)
        for _, cls in inspect.getmembers(module, inspect.isclass)
        if cls.__module__ == module.__name__
    ]


def test_attention_classes(found):
    known = {family.host for family in (*FAMILIES, *ADAPTED)}
    classes = {
        f"{module}.{cls.__name__}"
        for module, cls in found
        if issubclass(cls, AttentionModuleMixin | Attention) and f"{cls.__module__}.{cls.__name__}" not in known
    }
    assert classes == set(CLASSES.split())


def test_processors(found):
    known = {name for family in (*FAMILIES, *ADAPTED) for name in family.processors}
    assert {cls.__name__ for _, cls in found if "Processor" in cls.__name__} - known == set(PROCESSORS.split())
