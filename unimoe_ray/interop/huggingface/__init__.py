"""Uni-MoE for users of transformers. Importing this registers the classes, and the Auto classes then know them::

import unimoe_ray.interop.huggingface
from transformers import AutoModelForMultimodalLM, AutoProcessor

processor = AutoProcessor.from_pretrained(folder)
model = AutoModelForMultimodalLM.from_pretrained(folder)
inputs = processor("<image> what shape is in the image?", images=[picture])
print(processor.batch_decode(model.generate(**inputs, max_new_tokens=16), skip_special_tokens=True))
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from unimoe_ray.interop.huggingface.configuration import UniMoEConfig
from unimoe_ray.interop.huggingface.modeling import UniMoEForConditionalGeneration
from unimoe_ray.interop.huggingface.processing import UniMoEProcessor

__all__ = ["UniMoEConfig", "UniMoEForConditionalGeneration", "UniMoEProcessor"]

AutoConfig.register(UniMoEConfig.model_type, UniMoEConfig, exist_ok=True)
for auto in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    auto.register(UniMoEConfig, UniMoEForConditionalGeneration, exist_ok=True)
AutoProcessor.register(UniMoEConfig, UniMoEProcessor, exist_ok=True)
