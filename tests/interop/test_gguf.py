"""GGUF: blocks against llama.cpp's reference decoder, whole files against transformers and llama.cpp itself."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from places import ROOT
from runs import compress as run
from thorough import some
from tiny import tiny_checkpoint
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from compress.checkpoint import packing
from compress.errors import FormatError
from compress.interop import exporter as exporting
from compress.interop import gguf_file
from compress.interop import llama_cpp as _llama_cpp
from compress.interop.gguf_blocks import Blocks, pack, widest
from compress.interop.layouts.gguf import EXPORT
from compress.weights.table import DATATYPES, Table, select_bits
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

DEMO = ROOT / "examples" / "demo"
VOCABULARY = 320
PROBE = torch.randint(0, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(5))
# llama.cpp rounds activations to 8 bits in groups of 32 before it multiplies; a wrong row order or scale gives differences of 1.
LOGPROB = 0.15
TEXT = [
    "The quick brown fox, 1234 times:\n\tjumps over   the lazy dog's back!",
    "naïve café – Straße №5 こんにちは 🙂",
    " x  y\n\n z",
]


def quiet(*_: Any) -> None:
    pass


# ------------------------------------------------------------------------------------------------ blocks


def uniform(bits: int, zero: bool = False, bipolar: bool = False, size: int = 64) -> Uniform:
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (5, 128), generator=generator, dtype=torch.uint8)
    scale = (torch.randint(1, 256, (5, 128 // size), generator=generator).float() * 2.0**-12).bfloat16()
    zeros = torch.randint(0, 1 << bits, (5, 128 // size), generator=generator, dtype=torch.uint8) if zero else None
    return Uniform(codes, scale, bits, size, zeros, bipolar=bipolar)


def table(datatype: str, kind: str = "bfloat16") -> Table:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, len(DATATYPES[datatype][0]), (5, 128), generator=generator, dtype=torch.uint8)
    codes[codes == len(DATATYPES[datatype][0]) // 2] = 0  # -0 is never written
    scale = (torch.randint(1, 256, (5, 4), generator=generator).float() * 2.0**-12).bfloat16()
    if kind == "e8m0":
        scale = torch.randint(100, 140, (5, 4), generator=generator).to(torch.uint8)
    choice = torch.randint(0, len(DATATYPES[datatype]), (5, 4), generator=generator, dtype=torch.uint8)
    return Table(codes, scale, datatype, 32, select=choice if select_bits(datatype) else None)


def decoded(part: Any) -> tuple[str, torch.Tensor]:
    weight = CompressedWeight(part)
    scheme = EXPORT.scheme(packing.pack(weight)[1], None)
    data = pack(scheme, weight)
    assert tuple(data.shape) == (part.shape[0], scheme.row_bytes)
    values = gguf.dequantize(data.numpy(), gguf.GGMLQuantizationType[scheme.kind])
    return scheme.kind, torch.from_numpy(values)


CASES = [
    *((uniform(bits), "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0") for bits in range(1, 9)),
    *((uniform(bits, zero=True), "Q4_0" if bits <= 3 else "Q5_0" if bits == 4 else "Q8_0") for bits in range(1, 8)),
    *((uniform(bits, bipolar=True), "Q4_0" if bits <= 3 else "Q5_0" if bits == 4 else "Q8_0") for bits in range(2, 8)),
    (uniform(4, size=32), "Q4_0"),
    (uniform(4, size=128), "Q4_0"),
    (table("fp3"), "Q4_0"),
    (table("fp4"), "Q5_0"),
    (table("bitmod-fp3"), "Q4_0"),
    (table("bitmod-fp4"), "Q8_0"),
    (table("fp4", "e8m0"), "MXFP4"),
]


@pytest.mark.parametrize(("part", "kind"), CASES)
def test_the_reference_decoder_gets_the_values(part: Any, kind: str) -> None:
    found, values = decoded(part)
    assert found == kind
    assert torch.equal(values, part.dequantize())


def test_golden_blocks() -> None:
    """-16..15 on Q4_0 with d = 2, and 0..31 on Q5_0 and Q8_0 with d = 1."""
    two = Uniform(torch.arange(32).unsqueeze(0).div(2, rounding_mode="floor").to(torch.uint8), torch.full((1, 1), 2.0), 4, 32)
    expected = "0040 8090 91a1 a2b2 b3c3 c4d4 d5e5 e6f6 f7"
    codes = [i // 2 for i in range(32)]
    expected = "0040" + "".join(f"{codes[i] | codes[i + 16] << 4:02x}" for i in range(16))
    assert expected == "0040" + "80809191a2a2b3b3c4c4d5d5e6e6f7f7"
    assert bytes(pack(Blocks((1, 32), "Q4_0", 32, 4), CompressedWeight(two)).flatten().tolist()).hex() == expected
    counted = Uniform(torch.arange(32).unsqueeze(0).to(torch.uint8), torch.ones(1, 1), 5, 32)
    five = "003c" + "0000ffff" + "".join(f"{i | i << 4:02x}" for i in range(16))
    assert bytes(pack(Blocks((1, 32), "Q5_0", 32, 5), CompressedWeight(counted)).flatten().tolist()).hex() == five
    eight = "003c" + bytes((i - 16) % 256 for i in range(32)).hex()
    assert bytes(pack(Blocks((1, 32), "Q8_0", 32, 8), CompressedWeight(counted)).flatten().tolist()).hex() == eight


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (uniform(4, size=16), "groups of 16, where a block has 32 columns"),
        (uniform(8, zero=True), "has values from -255 to 255 scales"),
        (uniform(8, bipolar=True), "has values from -255 to 255"),
        (table("nf4"), "on no grid"),
    ],
)
def test_what_blocks_cannot_hold(part: Any, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decoded(part)


def test_scales_are_never_rounded() -> None:
    part = uniform(4)
    part.scale[2, 1] = 2.0**-30
    with pytest.raises(FormatError, match="1 of 10 scales that F16 cannot hold"):
        decoded(part)


def test_experts_share_the_type_that_holds_all() -> None:
    assert widest(["Q4_0", "Q8_0", "Q5_0"]) == "Q8_0"
    assert widest(["MXFP4", "MXFP4"]) == "MXFP4"
    assert widest(["MXFP4", "Q4_0"]) is None
    assert widest(["Q4_0", "BF16"]) is None


# ------------------------------------------------------------------------------------------------ files


def byte_level(split: str = "gpt-2") -> Tokenizer:
    """A small BPE tokenizer that splits as GPT-2, Llama 3 or Qwen2 does."""
    tokenizer = Tokenizer(models.BPE())
    if split == "gpt-2":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        expression = next(e for e, name in _llama_cpp._SPLITS.items() if name == split)
        steps = [pre_tokenizers.Split(Regex(expression), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=310, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*TEXT, "the brown dog jumps over the lazy fox 12 123 times"] * 5, trainer)
    return tokenizer


def pieces() -> Tokenizer:
    """A small tokenizer of the kind of Llama 2: pieces with byte fallback."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=318, special_tokens=special, limit_alphabet=30, show_progress=False)
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog", "the dog the fox"] * 5, trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][:3]  # bytes are no special tokens
    return Tokenizer.from_str(json.dumps(values))


def checkpoint(folder: Path, family: str, tokenizer: Tokenizer, steps: list[dict[str, Any]], **changes: Any) -> Path:
    model = tiny_checkpoint(
        folder / "dense", family, hidden_size=64, intermediate_size=96, num_hidden_layers=2, vocab_size=VOCABULARY, **changes
    )
    end = "<|end|>" if tokenizer.token_to_id("<|end|>") is not None else "</s>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, bos_token=end).save_pretrained(model)
    run(model, folder / "packed", None, steps)
    return folder / "packed"


def rtn(match: str = "*.*", bits: int = 4, **options: Any) -> dict[str, Any]:
    return {"match": match, "method": "quant/rtn", "options": {"bits": bits, "group_size": 32, **options}}


def export(model: Path, out: Path) -> dict[str, Any]:
    return exporting.export(exporting.prepare(str(model), "gguf"), out, quiet)


def llama_cpp(path: Path, ids: list[int], texts: list[str] | None = None) -> dict[str, Any]:
    """Load a file with llama.cpp, in a process of its own; return log probabilities after `ids` by token, and tokens of texts."""
    code = """
    import json, sys, urllib.request
    import xllamacpp
    path, ids, texts = json.loads(sys.argv[1])
    p = xllamacpp.CommonParams()
    p.model.path, p.n_ctx, p.n_parallel, p.warmup, p.n_gpu_layers, p.cpuparams.n_threads = path, 128, 1, False, 0, 1
    server = xllamacpp.Server(p)
    top = []
    asked = {"prompt": ids, "n_predict": 1, "n_probs": 20, "temperature": 0.0, "cache_prompt": False}
    if ids:
        answer = server.handle_completions(asked)
        answer = json.loads(answer) if isinstance(answer, str) else answer
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
    tokens = []
    for text in texts:
        body = json.dumps({"content": text, "add_special": False, "parse_special": False}).encode()
        request = urllib.request.Request(server.listening_address + "/tokenize", body, {"Content-Type": "application/json"})
        tokens.append(json.load(urllib.request.urlopen(request))["tokens"])
    print("RESULT" + json.dumps({"logprobs": {t["id"]: t["logprob"] for t in top}, "tokens": tokens}), flush=True)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), json.dumps([str(path), ids, texts or []])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line = next((part for part in done.stdout.splitlines() if "RESULT" in part), None)
    assert line is not None, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(line[line.index("RESULT") + 6 :])
    return found


def ours(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    import compress

    model = compress.load(str(folder), dtype=torch.float32)
    with torch.no_grad():
        result: torch.Tensor = model(ids, use_cache=False).logits[0, -1].log_softmax(-1)
    return result


def speaking(model: Path) -> torch.Tensor:
    """Ids after which the model goes on with a letter: the server tells nothing of the end of a text, or half a character."""
    tokenizer = byte_level()
    letters = [token for token in range(VOCABULARY) if tokenizer.decode([token]).strip().isalnum()]
    probes = (torch.randint(1, VOCABULARY, (1, 12), generator=torch.Generator().manual_seed(seed)) for seed in range(40))
    return next(ids for ids in probes if int(ours(model, ids).argmax()) in letters)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"attention_bias": True}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama 3 positions": ("llama", {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 16}}),
    "mistral": ("mistral", {"sliding_window": 128, "head_dim": 16}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {"use_sliding_window": False}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen2_moe": ("qwen2_moe", {"mlp_only_layers": [], "shared_expert_intermediate_size": 64}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True, "head_dim": 32}),
}


@pytest.mark.parametrize("name", some(FAMILIES, "llama 3 positions", "mixtral", "qwen3"))
def test_llama_cpp_computes_what_we_do(name: str, tmp_path: Path) -> None:
    family, changes = FAMILIES[name]
    model = checkpoint(
        tmp_path, family, byte_level(), [rtn("*.v_proj", 8), rtn("*.k_proj", 4, symmetric=False), rtn()], **changes
    )
    made = export(model, tmp_path / "out")
    assert made["left_out"] == []
    probe = speaking(model)
    expected = ours(model, probe)
    found = llama_cpp(tmp_path / "out" / "model.gguf", probe[0].tolist())["logprobs"]
    assert len(found) == 20
    difference = max(abs(expected[int(token)] - value) for token, value in found.items())
    assert difference < LOGPROB, difference


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_transformers_decodes_the_file(family: str, tmp_path: Path) -> None:
    """To float32, so that every logit is that of ours."""
    changes = {"use_sliding_window": False} if family == "qwen2" else {"sliding_window": None} if family == "mistral" else {}
    model = checkpoint(tmp_path, family, byte_level(), [rtn(bits=3, symmetric=False)], **changes)
    export(model, tmp_path / "out")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf", dtype=torch.float32)
    with torch.no_grad():
        logits = loaded(PROBE, use_cache=False).logits[0, -1].log_softmax(-1)
    torch.testing.assert_close(logits, ours(model, PROBE), rtol=1e-4, atol=1e-4)


def test_the_demo_as_llama_cpp_sees_it(tmp_path: Path) -> None:
    """The model and tokenizer of the demo: the same tokens of a text, and the same next token."""
    run(DEMO, tmp_path / "packed", None, [{"match": "*.*", "method": "quant/rtn", "options": {"bits": 4, "group_size": 128}}])
    made = export(tmp_path / "packed", tmp_path / "out")
    assert made["types"] == {"BF16": 1, "F32": 13, "Q4_0": 42}
    texts = [json.loads(line)["text"] for line in (DEMO / "evaluation.jsonl").read_text().splitlines()[:6]]
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    ids = tokenizer.encode(texts[0]).ids[:60]
    found = llama_cpp(tmp_path / "out" / "model.gguf", ids, texts)
    assert found["tokens"] == [tokenizer.encode(text).ids for text in texts]
    expected = ours(tmp_path / "packed", torch.tensor([ids]))
    assert max(abs(expected[int(token)] - value) for token, value in found["logprobs"].items()) < LOGPROB
    assert max(found["logprobs"], key=found["logprobs"].__getitem__) == str(int(expected.argmax()))


@pytest.mark.parametrize("kind", ["gpt-2", "llama-bpe", "qwen2", "pieces"])
def test_tokenizers(kind: str, tmp_path: Path) -> None:
    tokenizer = pieces() if kind == "pieces" else byte_level(kind)
    model = checkpoint(tmp_path, "llama", tokenizer, [rtn()])
    export(model, tmp_path / "out")
    found = llama_cpp(tmp_path / "out" / "model.gguf", [], TEXT)["tokens"]
    assert found == [tokenizer.encode(text, add_special_tokens=False).ids for text in TEXT]


def test_metadata(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", byte_level(), [rtn()])
    export(model, tmp_path / "out")
    reader = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf"))
    values = {key: field.contents() for key, field in reader.fields.items()}
    assert values["general.architecture"] == "llama"
    assert values["general.file_type"] == gguf.LlamaFileType.MOSTLY_Q4_0
    assert values["llama.attention.head_count_kv"] == 2
    assert values["llama.vocab_size"] == VOCABULARY == len(values["tokenizer.ggml.tokens"])
    assert values["tokenizer.ggml.eos_token_id"] == 0
    types = dict(zip(values["tokenizer.ggml.tokens"], values["tokenizer.ggml.token_type"], strict=True))
    assert types["<|end|>"] == _llama_cpp.CONTROL
    assert types[f"[PAD{VOCABULARY - 1}]"] == _llama_cpp.UNUSED
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.gguf", "README.md", "export.json"}


def test_rows_of_queries_are_in_pairs() -> None:
    rows = torch.arange(16).unsqueeze(1)
    assert _llama_cpp.reorder(rows, 2).flatten().tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]


def test_a_reader_that_gets_other_values_stops_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint(tmp_path, "llama", byte_level(), [rtn()])
    monkeypatch.setattr(gguf, "dequantize", lambda data, kind: np.zeros((data.shape[0], 64), np.float32))
    with pytest.raises(Exception, match="reads back with other values"):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------ what is refused


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c.update(model_type="olmo2"), "model_type is 'olmo2'; of what llama.cpp reads, gguf exports are written for"),
        (lambda c: c.update(hidden_act="gelu"), "hidden_act is 'gelu'"),
        (lambda c: c.update(rope_parameters={"rope_type": "longrope", "rope_theta": 1.0}), "rope_type is 'longrope'"),
        (lambda c: c.pop("hidden_size"), "config.json has no 'hidden_size'"),
    ],
)
def test_configs_that_llama_cpp_would_compute_otherwise(change: Change, reason: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", byte_level(), [rtn()])
    config = json.loads((model / "config.json").read_text())
    change(config)
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=reason):
        exporting.prepare(str(model), "gguf")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: t["model"].update(type="Unigram"), "model is 'Unigram'; expected BPE"),
        (lambda t: t["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "splits text by an expression that is not known"),
        (lambda t: t["added_tokens"][0].update(id=5000), "has id 5000; the model has 320 rows"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have(change: Change, reason: str, tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "llama", byte_level(), [rtn()])
    values = json.loads((model / "tokenizer.json").read_text())
    change(values)
    (model / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=reason):
        exporting.prepare(str(model), "gguf")
    (model / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"no tokenizer\.json"):
        exporting.prepare(str(model), "gguf")


def test_dense_and_packed_experts_of_one_block(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "mixtral", byte_level(), [rtn("*.experts.[012].*"), rtn("*.self_attn.*")])
    with pytest.raises(FormatError, match="the experts of a block as one tensor of one type"):
        exporting.prepare(str(model), "gguf")


def test_experts_of_several_widths_get_the_widest(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "mixtral", byte_level(), [rtn("*.experts.1.*", 6), rtn(bits=3)])
    made = export(model, tmp_path / "out")
    assert made["types"]["Q8_0"] == 6
    probe = speaking(model)
    found = llama_cpp(tmp_path / "out" / "model.gguf", probe[0].tolist())["logprobs"]
    expected = ours(model, probe)
    assert max(abs(expected[int(token)] - value) for token, value in found.items()) < LOGPROB


def test_a_window_limits_the_context(tmp_path: Path) -> None:
    model = checkpoint(tmp_path, "mistral", byte_level(), [rtn()], sliding_window=64, head_dim=16)
    made = export(model, tmp_path / "out")
    assert made["notes"] == ["context length 64: attention sees no more, and llama.cpp has no window for this architecture"]
    reader = gguf.GGUFReader(str(tmp_path / "out" / "model.gguf"))
    assert reader.fields["llama.context_length"].contents() == 64
    assert gguf_file.FILE == "model.gguf"
