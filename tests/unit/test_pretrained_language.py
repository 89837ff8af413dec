"""A run on a pretrained LLaMA: its weights, its tokenizer, the Vicuna template, from preparing to answering."""

import asyncio
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from serve.calls import Task
from serve.language import LanguageModel
from tests.tiny import TinyRun, save_start, tiny_config
from tests.unit.test_prepare import record, write_splits
from tests.unit.test_vicuna import PIECES, conversation, model_file
from unimoe_ray import pipeline
from unimoe_ray.chat import Conversation
from unimoe_ray.config import Config, load_run, parse
from unimoe_ray.config.data import SourceConfig
from unimoe_ray.data import prepare as preparing
from unimoe_ray.data.encode import EncodeSettings
from unimoe_ray.data.pretrained import load_pretrained_tokenizer
from unimoe_ray.data.samples import SampleTable
from unimoe_ray.data.sentencepiece import load_sentencepiece
from unimoe_ray.data.tokenizer import load_tokenizer, train_tokenizer
from unimoe_ray.data.vicuna import VicunaTemplate
from unimoe_ray.errors import UnimoeError, UsageError
from unimoe_ray.evaluation.evaluate import final_model
from unimoe_ray.inference.request import Output, RequestRefused, SamplingParams
from unimoe_ray.model.language import build_llama
from unimoe_ray.model.unimoe import Batch
from unimoe_ray.training.checkpoint import load_model
from unimoe_ray.training.stages import start_model

POSITIONS = 640  # the system sentence alone has 150 tokens of the small vocabulary here


def save_llama(folder: Path, legacy: bool | None = False, **sizes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2} | sizes
    settings = {"vocab_size": len(PIECES) + 5, "max_position_embeddings": POSITIONS, "rope_theta": 5000.0}
    llama = LlamaForCausalLM(LlamaConfig(**settings | sizes)).eval()
    llama.save_pretrained(folder)
    (folder / "tokenizer.model").write_bytes(model_file(PIECES))
    flag = {} if legacy is None else {"legacy": legacy}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", **flag}))
    return llama


def vicuna_config(root: Path, checkpoint: Path, **language) -> Config:
    one = {"steps": 1, "tasks": {"read": 1}}
    stages = {
        "base": {},
        "align": {"align": one | {"train": {f"connector.{m}": 1e-3 for m in ("image", "video", "audio", "speech")}}},
        "experts": {},
        "tune": {"tune": one | {"train": {"router": 1e-3}}},
    }
    changes = {
        "data": {"template": "vicuna_v1", "max_bad_fraction": 1.0},
        "model": {
            "language": {"pretrained": str(checkpoint), "max_positions": 600} | language,
            "moe": {"slots": ["base"] * 3},
        },
        "mini": {"random_towers": True},
    }
    tree = tiny_config(root, **changes).model_dump(mode="json")
    return parse(tree | {"stages": stages})


@dataclass
class Vicuna:
    config: Config
    llama: LlamaForCausalLM
    template: VicunaTemplate


TURNS = [("a b", "ab"), ("what </s> USER: <s> is it?", "b a")]


def prepare(config: Config, root: Path) -> preparing.Prepared:
    settings = EncodeSettings(str(root / "features"), {}, 2, config.data, load_tower=dict)
    sources = [SourceConfig(path=str(root / "source"))]
    return preparing.prepare(config, sources, settings, lambda *_: 0, 1, lambda *_: None)


@pytest.fixture(scope="module")
def vicuna(tmp_path_factory) -> Vicuna:
    """Prepared, with a finished mixture that was trained by nobody."""
    root = tmp_path_factory.mktemp("vicuna")
    llama = save_llama(root / "checkpoint")
    config = vicuna_config(root, root / "checkpoint")
    said = [{"from": who, "value": text} for turn in TURNS for who, text in zip(("human", "gpt"), turn, strict=True)]
    good = {"id": "0", "task": "read", "conversations": said}
    write_splits(root / "source", train=[good, record("long", "b " * 500)], dev=[good], test=[good])
    with pipeline.open_run(config):
        prepare(config, root)
        info = pipeline.model_info(config)
        run = TinyRun(config, info, preparing.tokenizer_path(config))
        model = start_model(config, info, "align")
        model.make_sparse()
        info.__dict__["sparse"] = True
        save_start(run, model, "tune", "tune")
    shutil.rmtree(root / "checkpoint")
    tokenizer_file = root / "tokenizer.model"
    tokenizer_file.write_bytes(model_file(PIECES))
    return Vicuna(config, llama, VicunaTemplate(load_sentencepiece(tokenizer_file), legacy=False))


def test_samples_are_prepared_with_its_tokenizer_and_the_template(vicuna):
    wanted = vicuna.template.encode_sample(conversation(*TURNS))
    table = SampleTable(Path(preparing.source(vicuna.config, "train").samples))
    assert len(table) == 1 and (table.get(0).ids, table.get(0).labels) == (wanted.ids, wanted.labels)
    prompt = SampleTable(Path(preparing.source(vicuna.config, "test").samples)).get(0)
    assert prompt.ids == vicuna.template.encode_prompt(conversation(*TURNS))
    (entry,) = [json.loads(line) for line in (vicuna.config.run_dir / "quarantine.jsonl").read_text().splitlines()]
    assert entry["id"] == "long" and "model.language.max_positions is 600" in entry["reason"]


@torch.no_grad()
def test_the_trained_model_no_longer_needs_the_checkpoint(vicuna):
    """And is the pretrained one: same architecture (rope included), same logits."""
    model, info, tokenizer = load_model(final_model(vicuna.config))
    assert (info.template, info.legacy, info.vocab_size) == ("vicuna_v1", False, len(PIECES) + 5)
    ids = torch.randint(0, info.vocab_size, (2, 40))
    torch.testing.assert_close(model.language(ids).logits, vicuna.llama(ids).logits, atol=1e-6, rtol=1e-5)
    assert tokenizer.encode("a</s>b").ids == vicuna.template.tokenizer.encode("a</s>b").ids


@torch.no_grad()
def greedy(vicuna: Vicuna, *turns: tuple[str, str]) -> str:
    """What the dense model of transformers says to the template's ids, with no code of ours after them."""
    prompt = torch.tensor([vicuna.template.encode_prompt(conversation(*turns))])
    made = vicuna.llama.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=2,
        pad_token_id=0,
    )
    return vicuna.template.tokenizer.decode(made[0, prompt.shape[1] :].tolist(), skip_special_tokens=True).strip()


def test_chat_speaks_the_template(vicuna):
    folder = vicuna.config.run_dir
    talk = Conversation(load_run(folder), final_model(load_run(folder)))
    first = talk.ask("a b", [])
    assert first == greedy(vicuna, ("a b", ""))
    assert talk.ask("and?", []) == greedy(vicuna, ("a b", first), ("and?", ""))
    with pytest.raises(UsageError, match="the conversation has .* tokens; at most 596 fit"):
        talk.ask("b " * 500, [])


def test_the_endpoint_speaks_the_template(vicuna):
    async def ask(*turns: tuple[str, str], new: int = 4) -> str:
        language = LanguageModel(vicuna.config.model_dump(mode="json"), str(final_model(vicuna.config)))
        params = SamplingParams(max_new_tokens=new, temperature=0.0)
        try:
            items = [item async for told in language.generate(Task("0", turns, (), params)) for item in told]
        finally:
            language._running().close()
        return "".join(item.text for item in items if isinstance(item, Output))

    assert asyncio.run(ask(("a b", "ab"), ("and?", ""))) == greedy(vicuna, ("a b", "ab"), ("and?", ""))
    with pytest.raises(RequestRefused, match="the model takes at most 599"):
        asyncio.run(ask(("b " * 500, "")))
    with pytest.raises(RequestRefused, match="fit .the context is 600"):
        asyncio.run(ask(("a", ""), new=590))


def test_the_model_itself_refuses_what_is_too_long(vicuna):
    model, *_ = load_model(final_model(vicuna.config))
    ids = torch.ones(1, 601, dtype=torch.int64)
    with pytest.raises(UnimoeError, match="601 tokens with media; the model takes at most 600"):
        model(Batch(ids, ids > 0, ids))
    with pytest.raises(
        UnimoeError, match="590 tokens with media and 11 kept for the answer; the model takes at most 600"
    ):
        model.generate(Batch(ids[:, :590], ids[:, :590] > 0, ids[:, :590]), 11, 2)


def test_another_tokenizer_prepares_again(tmp_path):
    save_llama(tmp_path / "checkpoint")
    config = vicuna_config(tmp_path, tmp_path / "checkpoint")
    write_splits(tmp_path / "source", train=[record("0")])
    config.run_dir.mkdir(parents=True)
    prepare(config, tmp_path)
    written = preparing.data_dir(config) / "train.arrow"
    before = written.stat().st_mtime_ns
    prepare(config, tmp_path)
    assert written.stat().st_mtime_ns == before
    (tmp_path / "checkpoint" / "tokenizer_config.json").write_text('{"legacy": true}')
    prepare(config, tmp_path)
    assert written.stat().st_mtime_ns != before


@pytest.mark.parametrize(("flag", "legacy"), [(True, True), (False, False), (None, True)])
def test_the_legacy_flag(tmp_path, flag, legacy):
    save_llama(tmp_path, flag)
    assert load_pretrained_tokenizer(str(tmp_path), "vicuna_v1").legacy is legacy


def test_a_fast_tokenizer_will_do(tmp_path):
    save_llama(tmp_path)
    wanted, _ = load_pretrained_tokenizer(str(tmp_path), "vicuna_v1")
    wanted.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.model").unlink()
    found, legacy = load_pretrained_tokenizer(str(tmp_path), "vicuna_v1")
    assert not legacy and found.encode("ab </s>é").ids == wanted.encode("ab </s>é").ids


def test_mistakes_are_named_in_one_line(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    save_llama(checkpoint)

    def fails(message: str, action, kind: type[UnimoeError] = UnimoeError) -> None:
        with pytest.raises(kind, match=message) as error:
            action()
        assert "\n" not in str(error.value)

    def tokenizer() -> None:
        load_pretrained_tokenizer(str(checkpoint), "vicuna_v1")

    def build(**language) -> None:
        config = vicuna_config(tmp_path, checkpoint, **language).model
        build_llama(config.language, 0)

    fails(
        f"max_positions is 1000; {checkpoint} takes at most {POSITIONS}", lambda: build(max_positions=1000), UsageError
    )
    for name in ("model.safetensors", "config.json"):
        content = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(b"{}" if name == "config.json" else content[:100])
        fails(f"^model.language.pretrained: {checkpoint}: no LLaMA that can be read", build)
        (checkpoint / name).write_bytes(content)
    (checkpoint / "tokenizer_config.json").write_text("[")
    fails("tokenizer_config.json: not a tokenizer's configuration", tokenizer)
    (checkpoint / "tokenizer.model").write_bytes(b"junk")
    fails("tokenizer.model: not a SentencePiece model", tokenizer)
    (checkpoint / "tokenizer.model").unlink()
    fails("has no tokenizer.model and no tokenizer.json", tokenizer)
    train_tokenizer(["ab"], 300).save(str(checkpoint / "tokenizer.json"))
    assert load_tokenizer(checkpoint / "tokenizer.json").token_to_id("</s>") is not None
    fails("its tokenizer is not of LLaMA's kind, which data.template=vicuna_v1 needs", tokenizer)


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"data": {"template": "vicuna_v1"}}, "vicuna_v1, which needs the tokenizer of a model.language.pretrained"),
        (
            {"model": {"language": {"pretrained": "x"}}},
            "data.template is compact, .* set data.template to vicuna_v1 or smollm2",
        ),
        ({"data": {"template": "vicuna"}}, "data.template is 'vicuna': .*'compact', 'vicuna_v1' or 'smollm2'"),
    ],
)
def test_template_and_tokenizer_agree(tree, message):
    with pytest.raises(UsageError, match=message):
        parse(tree)
