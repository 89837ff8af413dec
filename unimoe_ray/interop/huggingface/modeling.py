"""Towers and ``UniMoE`` as one model of transformers."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from unimoe_ray.config.model import IGNORE_INDEX, PLACEHOLDER_IDS
from unimoe_ray.interop.huggingface.configuration import UniMoEConfig
from unimoe_ray.interop.huggingface.towers import build_tower
from unimoe_ray.model.connectors import Connector
from unimoe_ray.model.features import Features
from unimoe_ray.model.towers import FrozenTower
from unimoe_ray.model.unimoe import Batch, UniMoE

Windows = list[torch.Tensor]
"""Of one modality, of each file in the order of the placeholders: the tower's input windows [W, ...] fp32."""


class UniMoEForConditionalGeneration(PreTrainedModel):
    """State-dict names: ``unimoe.language.*`` and ``unimoe.connectors.<modality>.*`` as in our model folders, and
    ``towers.<modality>.network.*``.

    ``input_ids`` [B, S] has one placeholder id (``PLACEHOLDER_IDS``, negative) per soft token, as ``UniMoEProcessor``
    makes them.
    """

    config_class = UniMoEConfig
    base_model_prefix = "unimoe"
    main_input_name = "input_ids"
    _no_split_modules = ["LlamaDecoderLayer"]
    _supports_sdpa = True

    def __init__(self, config: UniMoEConfig):
        super().__init__(config)
        self.unimoe = UniMoE(config.settings, config.vocab_size, config.feature_dims)
        if config.sparse:
            self.unimoe.make_sparse()
        self.towers = nn.ModuleDict({m: build_tower(description) for m, description in config.towers.items()})
        self._tied_weights_keys = self._shared_weights()
        self.post_init()

    @classmethod
    def wrap(cls, model: UniMoE, towers: dict[str, FrozenTower], sparse: bool) -> UniMoEForConditionalGeneration:
        """Around an existing model and towers, which are not copied. Raises UnimoeError for a language model or tower
        that ``config.json`` can't describe."""
        config = UniMoEConfig.of(model, towers, sparse)
        with torch.device("meta"):
            wrapped = cls(config)
        wrapped.unimoe, wrapped.towers = model, nn.ModuleDict(towers)
        return wrapped.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.unimoe.language.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.unimoe.language.get_output_embeddings()

    def encode(self, **files: Windows | None) -> dict[str, Features]:
        """Features of files by modality. Each tower runs once; one without files does not run."""
        found = {}
        for modality, windows in files.items():
            if windows:
                tower = self.towers["image" if modality == "video" else modality]
                features = tower([file.float().cpu().numpy() for file in windows])
                features.values = features.values.to(self.dtype)
                found[modality] = features.to(self.device)
        return found

    def embed(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **files: Windows | None
    ) -> torch.Tensor:
        """[B, S, H] with soft tokens in their places. ``files``: ``<modality>_values``, as ``forward`` has them. Raises
        ValueError where placeholders and files do not match."""
        features = self.encode(**{name.removesuffix("_values"): windows for name, windows in files.items()})
        for modality in PLACEHOLDER_IDS.keys() - features.keys():
            if (input_ids == PLACEHOLDER_IDS[modality]).any():
                raise ValueError(f"{modality}: placeholders without files")
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        return self.unimoe.embed(Batch(input_ids, mask.bool(), input_ids, features))

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        image_values: Windows | None = None,
        video_values: Windows | None = None,
        audio_values: Windows | None = None,
        speech_values: Windows | None = None,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, S, V] and, with labels [B, S] (-100: not counted), their mean cross-entropy."""
        embeddings = self.embed(
            input_ids,
            attention_mask,
            image_values=image_values,
            video_values=video_values,
            audio_values=audio_values,
            speech_values=speech_values,
        )
        if labels is not None:
            labels = labels.masked_fill(input_ids < 0, IGNORE_INDEX)
        self.unimoe.recorder.start(None)
        return self.unimoe.language(inputs_embeds=embeddings, attention_mask=attention_mask, labels=labels, **kwargs)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **kwargs):
        """What the language model's ``generate`` gives, with its arguments, from embeddings: new tokens only. (A prompt
        holds placeholder ids, which no tokenizer can decode.) Files as ``forward`` takes them; towers and connectors
        run before the first token and never again."""
        names = [f"{modality}_values" for modality in PLACEHOLDER_IDS]
        embeddings = self.embed(input_ids, attention_mask, **{name: kwargs.pop(name, None) for name in names})
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        self.unimoe.recorder.start(None)
        defaults = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        return self.unimoe.language.generate(
            inputs_embeds=embeddings, attention_mask=attention_mask, **(defaults | kwargs)
        )

    def _init_weights(self, module: nn.Module) -> None:
        """Modules have their own initialisation. This is what loading can't find in a file."""
        if isinstance(module, Connector) and not module.match_text_rms:
            module.scale.fill_(1.0)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Second names of weights, to their first: also those of the models inside ``unimoe``, which transformers does
        not look into."""
        tied = dict(self._tied_weights_keys)
        for prefix, module in self.named_modules():
            if isinstance(module, PreTrainedModel) and module is not self:
                inside = module.get_expanded_tied_weights_keys()
                tied |= {f"{prefix}.{second}": f"{prefix}.{first}" for second, first in inside.items()}
        return tied

    def _shared_weights(self) -> dict[str, str]:
        """BEATs has one table of relative positions under every layer; videos may have the image connector's layers."""
        first_names: dict[int, str] = {}
        shared = {}
        for prefix, part in (("towers", self.towers), ("unimoe.connectors", self.unimoe.connectors)):
            for name, parameter in part.named_parameters(prefix, remove_duplicate=False):
                if first_names.setdefault(id(parameter), name) != name:
                    shared[name] = first_names[id(parameter)]
        return shared
