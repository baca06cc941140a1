"""The native container: sites as named tensors, and the table in config.json, which is hostile until it is checked."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import shutil
import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from places import TESTS
from runs import compress, steps

from compress.checkpoint import packing
from compress.checkpoint.packed_source import PackedSource
from compress.checkpoint.part_file import part_specs, read_part, write_part
from compress.checkpoint.site_table import fold, read_table, unfold, write_table
from compress.checkpoint.source import INDEX, SINGLE, Source
from compress.checkpoint.tensor_file import load, read_header, save
from compress.errors import CheckpointError, FormatError
from compress.weights.uniform import Uniform
from compress.weights.weight import CompressedWeight

GOLDEN = TESTS / "golden"
fuzz = settings(max_examples=300, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
Tiny = Callable[..., Path]


@contextmanager
def quickly(seconds: float = 5.0, nbytes: int | None = None) -> Iterator[None]:
    """Fail where the block takes long, in processor time, or allocates more than `nbytes` at a time."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {seconds} s")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    if nbytes is not None:
        tracemalloc.start()
    try:
        yield
        assert nbytes is None or tracemalloc.get_traced_memory()[1] <= nbytes
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def weight(
    rows: int = 32, columns: int = 64, bits: int = 3, size: int = 16, zero: bool = True, seed: int = 0
) -> CompressedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = columns // size

    def codes(*shape: int) -> torch.Tensor:
        return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)

    scale = torch.randn(rows, groups, generator=generator).to(torch.bfloat16)
    return CompressedWeight(Uniform(codes(rows, columns), scale, bits, size, codes(rows, groups) if zero else None))


def spec(bits: int = 4, rows: int = 64, columns: int = 64, size: int = 32, **more: Any) -> packing.Spec:
    return {"shape": [rows, columns], "base": {"format": "bitpack", "bits": bits, "group_size": size, "zero": False, **more}}


# ---------------------------------------------------------------------------------------------------- weights and parts


def test_a_weight_there_and_back() -> None:
    for bits in range(1, 9):
        original = weight(bits=bits)
        tensors, described = packing.pack(original)
        assert packing.layout(described).keys() == tensors.keys() == {"codes", "scale", "zero"}
        back = packing.unpack(json.loads(json.dumps(described)), {**tensors, "other": torch.empty(0)})
        assert torch.equal(back.dequantize(), original.dequantize())
        assert back.stored_bits == original.stored_bits == 8 * sum(tensor.nbytes for tensor in tensors.values())


def test_only_known_parts_and_formats_are_read() -> None:
    tensors, described = packing.pack(weight())
    for changed in (
        {**described, "outliers": described["base"]},
        {"shape": described["shape"]},
        {**described, "base": None},
        {**described, "base": [1]},
        {**described, "base": {**described["base"], "format": "codebook"}},
        {**described, "base": {**described["base"], "format": "_bits"}},
        {**described, "base": {**described["base"], "format": ["bitpack"]}},
        {**described, "base": {key: value for key, value in described["base"].items() if key != "format"}},
        {key: value for key, value in described.items() if key != "shape"},
        {**described, "shape": [32, 65]},
        {**described, "shape": [True, 64]},
        {**described, "shape": [2**31, 64]},
        {**described, "shape": [10**4000, 10**4000]},
    ):
        for use in (
            lambda c=changed: packing.layout(c),
            lambda c=changed: packing.unpack(c, tensors),
            lambda c=changed: packing.unpack_rows(c, tensors, 0, 16),
        ):
            with quickly(), pytest.raises(FormatError):
                use()
    with pytest.raises(FormatError, match="no format stores"):
        packing.pack(SimpleNamespace(shape=(1, 1), parts={"base": "no part"}))  # type: ignore[arg-type]


def test_a_part_file_there_and_back(tmp_path: Path) -> None:
    weights = {f"model.layers.0.{n}": weight(bits=bits, seed=bits) for n, bits in (("a_proj", 2), ("b_proj", 5))}
    tensors, specs = {}, {}
    for site, value in weights.items():
        mine, specs[site] = packing.pack(value)
        tensors |= {f"{site}.{leaf}": tensor for leaf, tensor in mine.items()}
    write_part(tmp_path / "part", tensors, specs)
    found = dict(read_part(tmp_path / "part"))
    assert list(found) == list(weights)
    assert all(torch.equal(found[site].dequantize(), weights[site].dequantize()) for site in weights)
    assert part_specs(read_header(tmp_path / "part")[1]) == specs


@pytest.mark.parametrize(
    "metadata", [{}, {"sites": ""}, {"sites": "{"}, {"sites": "[]"}, {"sites": '{"a": 3}'}, {"sites": "[" * 10**5}]
)
def test_a_part_file_without_its_descriptions(tmp_path: Path, metadata: dict[str, str]) -> None:
    save(tmp_path / "part", {"a.codes": torch.zeros(1)}, metadata)
    with pytest.raises(FormatError, match="a part"):
        list(read_part(tmp_path / "part"))


def test_a_part_file_without_its_tensors(tmp_path: Path) -> None:
    tensors, described = packing.pack(weight())
    write_part(tmp_path / "part", {f"a.{leaf}": tensor for leaf, tensor in tensors.items() if leaf != "zero"}, {"a": described})
    with pytest.raises(FormatError, match=r"no tensor 'a\.zero'"):
        list(read_part(tmp_path / "part"))
    write_part(
        tmp_path / "part", {f"a.{leaf}": tensor for leaf, tensor in tensors.items()}, {"a": {**described, "shape": [32, 32]}}
    )
    with pytest.raises(FormatError, match="codes"):
        list(read_part(tmp_path / "part"))


# ---------------------------------------------------------------------------------------------------- folded names


def unfolded(patterns: list[str]) -> list[str]:
    return [name for pattern in patterns for name in unfold(pattern)]


def check_fold(names: set[str]) -> list[str]:
    patterns = fold(sorted(names))
    assert sorted(unfolded(patterns)) == sorted(names)  # each once
    assert sorted(unfolded(fold(reversed(sorted(names))))) == sorted(names)
    return patterns


words = st.sampled_from(
    ["model", "q_proj", "#", "", "-", "1-2", "0,1", "00", "007", "+1", "1_0", " 1", "1 ", "-1", "1.5", "٣", "²", "½", "1e3"]
)
long = st.sampled_from(["9999999", "10000000", "1" * 20, "1" * 900])
pieces = st.integers(0, 12).map(str) | words | long
any_names = st.sets(st.lists(pieces, min_size=1, max_size=4).map(".".join).filter(lambda name: len(name) < 990), max_size=30)


@fuzz
@given(names=any_names)
def test_folding_loses_and_invents_nothing(names: set[str]) -> None:
    check_fold(names)


@fuzz
@given(
    layers=st.integers(1, 6),
    experts=st.integers(1, 9),
    gone=st.sets(st.tuples(st.integers(0, 5), st.integers(0, 8), st.sampled_from(["up", "down"]))),
)
def test_folding_experts(layers: int, experts: int, gone: set[tuple[int, int, str]]) -> None:
    whole = {(layer, expert, kind) for layer in range(layers) for expert in range(experts) for kind in ("up", "down")}
    patterns = check_fold({f"model.layers.{layer}.experts.{expert}.{kind}" for layer, expert, kind in whole - gone})
    if not whole & gone:
        assert len(patterns) == 2


def test_folded_names_look_as_documented() -> None:
    names = [f"model.layers.{layer}.mlp.experts.{expert}.up_proj" for layer in range(32) for expert in (0, 1, 2, 5)]
    assert fold(names) == ["model.layers.{0-31}.mlp.experts.{0-2,5}.up_proj"]
    assert fold(["lm_head"]) == ["lm_head"]
    assert fold([]) == []
    assert unfold("a.{3,1-2}.b{0}c") == ["a.3.b0c", "a.1.b0c", "a.2.b0c"]
    assert unfold("") == [""]


@pytest.mark.parametrize("name", ["a{", "a}", "a.{0-1}", "{}"])
def test_names_with_braces_cannot_be_folded(name: str) -> None:
    with pytest.raises(FormatError, match="braces"):
        fold(["model.layers.0.q_proj", name])


HOSTILE_PATTERNS = [
    "a.{0-99999999}",
    "a.{0-9999999}",
    "a.{0-9999999}.{0-9999999}",
    "a" + ".{0-999}" * 3,
    "a" + ".{0-1}" * 100,
    "a" + ".{0-9999999}" * 1000,
    "a" + ".{0}" * 100_000,
    "a.{" + ",".join(["0-9999999"] * 100_000) + "}",
    "a.{" + "1" * 1_000_000 + "}",
    "a.{" + "0," * 100_000 + "0}}",
    "n" * 1_000_000,
    "n" * 1_000_000 + ".{0-9}",
    "{{0-1}}",
    "{0-{1-2}}",
    "a.{0-1",
    "a.0-1}",
    "a.}{",
    "{}",
    "{,}",
    "{0,}",
    "{,0}",
    "{-}",
    "{-1}",
    "{1-}",
    "{1--2}",
    "{1-2-3}",
    "{5-3}",
    "{a}",
    "{0x1}",
    "{1.0}",
    "{1_0}",
    "{ 1}",
    "{1 }",
    "{1\n}",
    "{+1}",
    "{٣}",
    "{²}",
    "{1,٣-٤}",
]


@pytest.mark.parametrize("pattern", HOSTILE_PATTERNS, ids=lambda p: p[:20].encode("ascii", "backslashreplace").decode())
def test_hostile_patterns(pattern: str) -> None:
    with quickly(nbytes=(16 << 20) + 100 * len(pattern)), pytest.raises(FormatError) as caught:
        unfold(pattern)
    assert len(str(caught.value)) < 300
    with quickly(20.0), pytest.raises(FormatError):
        read_table({"format_version": 1, "specs": [spec()], "sites": {"b": 0, pattern: 0}})


@fuzz
@given(pattern=st.text(alphabet="a.{}0129-,", max_size=30) | st.text(max_size=10))
def test_fuzzed_patterns(pattern: str) -> None:
    try:
        with quickly():
            names = unfold(pattern, 5000)
    except FormatError:
        return
    assert 1 <= len(names) <= 5000
    assert all("{" not in name and "}" not in name for name in names)
    if len(set(names)) == len(names):  # what it stands for can be written again
        check_fold(set(names))


# ---------------------------------------------------------------------------------------------------- the table

specs_strategy = st.builds(spec, bits=st.integers(1, 8), rows=st.integers(1, 5), size=st.sampled_from([16, 32, 64]))


@fuzz
@given(names=any_names, data=st.data())
def test_a_table_there_and_back(names: set[str], data: st.DataObject) -> None:
    pool = data.draw(st.lists(specs_strategy, min_size=1, max_size=4))
    specs = {name: data.draw(st.sampled_from(pool)) for name in sorted(names)}
    table = json.loads(json.dumps(write_table(specs, None)))
    assert read_table(table) == specs
    assert len(table["specs"]) <= len(pool)


def many_experts(bits: Callable[[], int]) -> dict[str, packing.Spec]:
    return {
        f"model.layers.{layer}.mlp.experts.{expert}.{name}": spec(bits(), *shape, size=128)
        for layer in range(48)
        for expert in range(128)
        for name, shape in (("gate_proj", (768, 2048)), ("up_proj", (768, 2048)), ("down_proj", (2048, 768)))
    }


@pytest.mark.parametrize(
    ("widths", "limit"), [((4,), 2_000), ((2, 3), 100_000), (tuple(range(1, 9)), 200_000)], ids=["uniform", "two", "eight"]
)
def test_the_table_of_a_large_model_is_small(widths: tuple[int, ...], limit: int) -> None:
    generator = random.Random(0)
    specs = many_experts(lambda: generator.choice(widths))
    assert len(specs) == 48 * 128 * 3
    table = write_table(specs, "model.layers.0.mlp.experts.0.gate_proj.weight")
    assert len(json.dumps(table, indent=2)) < limit  # as it is written into config.json
    assert read_table(json.loads(json.dumps(table))) == specs


VALID = write_table({"a.0.q": spec(4), "a.1.q": spec(4), "a.1.k": spec(3), "h": spec(8, group="U8")}, "a.0.q.weight")


@pytest.mark.parametrize(
    "change",
    [{"format_version": value} for value in (None, 0, 2, -1, 10**4000, True, 1.0, "1", [1], {})]
    + [{"specs": value} for value in (None, 3, "x", {}, [], [None], [3], [[]], [{}], ["x"], [spec(), {}])]
    + [{"sites": value} for value in (None, 3, "x", [], [["a", 0]])]
    + [{"sites": {"a": value}} for value in (None, -1, 3, 10**4000, True, False, 0.0, "0", [0], {})]
    + [{"sites": {"a.{0-3}": 0, "a.2": 1}}, {"sites": {"a.{1,1}": 0}}, {"sites": {"": 0, "{0": 0}}]
    + [{"guard": value} for value in (3, True, [], ["a.0.q"], {}, "", "other", "other.weight", "a.0.q", "a.0.q.codes")],
    ids=lambda change: str(change)[:60],
)
def test_a_table_with_other_things_than_expected(change: dict[str, Any]) -> None:
    with quickly(nbytes=16 << 20), pytest.raises(FormatError) as caught:
        read_table({**VALID, **change})
    assert "quantization_config" in str(caught.value) or "bitpack" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_table_that_adds_up_to_too_much() -> None:
    sites = {f"a.{n}.{{0-299999}}": 0 for n in range(100)}
    with quickly(30.0), pytest.raises(FormatError, match="too many sites"):
        read_table({**VALID, "sites": sites, "guard": None})


numbers = st.integers(-2, 70) | st.sampled_from([2**31, 2**63, 2**64, 10**4000])
odd = (
    st.none()
    | st.booleans()
    | numbers
    | st.floats()
    | st.sampled_from(["", "a", "bitpack", "U8", "_bits", "a.{0-1}.q", "h", "\ud800"])
)
anything = st.recursive(odd, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3))


def damage(value: Any, data: st.DataObject) -> Any:
    """Change one value somewhere inside: replaced, removed, or joined by another."""
    if isinstance(value, dict | list) and value and data.draw(st.integers(0, 9)) > 0:
        key = data.draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
        kind = data.draw(st.sampled_from(["inside", "inside", "inside", "remove", "add"]))
        if kind == "inside":
            value[key] = damage(value[key], data)
        elif kind == "remove":
            del value[key]
        elif isinstance(value, dict):
            value[data.draw(st.text(max_size=3) | st.sampled_from(sorted(value)))] = data.draw(anything)
        else:
            value.append(data.draw(anything))
        return value
    return data.draw(anything)


@settings(fuzz, max_examples=600)
@given(data=st.data())
def test_fuzzed_tables(data: st.DataObject) -> None:
    config = copy.deepcopy(VALID)
    for _ in range(data.draw(st.integers(1, 3))):
        config = damage(config, data)
    if not isinstance(config, dict):
        return
    try:
        with quickly():
            table = read_table(config)
    except FormatError as error:
        assert len(str(error)) < 400
        return
    for described in table.values():
        assert packing.layout(described)
    assert read_table(write_table(table, None)) == table


# ---------------------------------------------------------------------------------------------------- checkpoints


@pytest.fixture(scope="module")
def checkpoint(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model in the native format, in several shards."""
    out = tmp_path_factory.mktemp("packed") / "out"
    compress(tiny("qwen2"), out, None, steps("quant/rtn", bits=3, group_size=16, symmetric=False), max_shard_size="20KB")
    return out


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def test_a_packed_checkpoint_reads_like_the_original(checkpoint: Path, tiny: Tiny) -> None:
    original, source, plain = Source.open(tiny("qwen2")), PackedSource.open_packed(checkpoint), Source.open(checkpoint)
    assert (checkpoint / INDEX).exists()
    assert set(source.entries) == set(original.entries)
    assert {n: e.shape for n, e in source.entries.items()} == {n: e.shape for n, e in original.entries.items()}
    assert "quantization_config" not in source.config
    assert source.stored_nbytes == plain.nbytes  # the guard is empty
    assert source.numel == original.numel
    for name in original.entries:
        site = name.removesuffix(".weight")
        if site in source.table:
            assert 0 < (source.tensor(name) - original.tensor(name)).norm() < 0.5 * original.tensor(name).norm()
            assert torch.equal(source.tensor(name), source.compressed(site).dequantize())
        else:
            assert torch.equal(source.tensor(name), original.tensor(name))


def test_what_is_not_in_the_native_format(tiny: Tiny, copied: Path) -> None:
    with pytest.raises(FormatError, match="no quantization_config of compress"):
        PackedSource.open_packed(tiny("qwen2"))
    config = config_of(copied)
    for method in ("gptq", None, 3, ["compress"], {}):
        config["quantization_config"]["quant_method"] = method
        (copied / "config.json").write_text(json.dumps(config))
        with pytest.raises(FormatError, match="no quantization_config of compress"):
            PackedSource.open_packed(copied)


SITE = "model.layers.1.self_attn.q_proj"
GUARD = "model.layers.0.mlp.down_proj.weight"


def damaged(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """Change the tensors of a checkpoint, which gets a single file."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load(file)[0]
        file.unlink()
    (folder / INDEX).unlink()
    change(tensors)
    save(folder / SINGLE, tensors)
    return folder


def replaced(leaf: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{SITE}.{leaf}": change(tensors[f"{SITE}.{leaf}"])})


def added(leaf: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({f"{SITE}.{leaf}": torch.zeros(32, 32)})


TAMPERED: dict[str, tuple[Callable[[dict[str, torch.Tensor]], Any], str]] = {
    "codes missing": (lambda tensors: tensors.pop(f"{SITE}.codes"), "codes is missing"),
    "zero missing": (lambda tensors: tensors.pop(f"{SITE}.zero"), "zero is missing"),
    "codes longer": (replaced("codes", lambda t: torch.cat([t, t[:1]])), "codes is I32"),
    "codes shorter": (replaced("codes", lambda t: t[:-1]), "codes is I32"),
    "codes empty": (replaced("codes", lambda t: t[:0]), "codes is I32"),
    "codes as bytes": (replaced("codes", lambda t: t.view(torch.uint8)), "codes is U8"),
    "codes unsigned": (replaced("codes", lambda t: t.view(torch.uint32)), "codes is U32"),
    "codes in rows": (replaced("codes", lambda t: t.view(32, -1)), "codes is I32"),
    "scale in float16": (replaced("scale", lambda t: t.half()), "scale is F16"),
    "scale turned": (replaced("scale", lambda t: t.T.contiguous()), "scale is BF16"),
    "scale a scalar": (replaced("scale", lambda t: t[0, 0]), "scale is BF16"),
    "dense beside packed": (added("weight"), "weight is not described"),
    "another group": (added("group"), "group is not described"),
    "a guard that is full": (lambda tensors: tensors.update({GUARD: torch.ones(4)}), "guard, is not empty"),
}


@pytest.mark.parametrize("name", TAMPERED)
def test_tensors_that_the_table_does_not_describe(copied: Path, name: str) -> None:
    assert config_of(copied)["quantization_config"]["guard"] == GUARD
    change, expected = TAMPERED[name]
    with pytest.raises(FormatError, match=expected) as caught:
        PackedSource.open_packed(damaged(copied, change))
    assert str(copied) in str(caught.value)


def test_a_bias_of_a_site_is_described_by_nobody(checkpoint: Path) -> None:
    assert f"{SITE}.bias" in PackedSource.open_packed(checkpoint).entries


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_scale_that_is_not_finite(copied: Path, value: float) -> None:
    def poison(scale: torch.Tensor) -> torch.Tensor:
        scale[3, 1] = value
        return scale

    source = PackedSource.open_packed(damaged(copied, replaced("scale", poison)))
    for read in (lambda: source.compressed(SITE), lambda: source.tensor(f"{SITE}.weight")):
        with pytest.raises(CheckpointError, match=f"{SITE}.scale: 1 of 64 values"):
            read()


@settings(fuzz, max_examples=150)
@given(data=st.data())
def test_fuzzed_configs_of_a_checkpoint(checkpoint: Path, data: st.DataObject) -> None:
    folder = checkpoint.with_name("fuzzed")
    if not folder.exists():
        shutil.copytree(checkpoint, folder)
    config = config_of(checkpoint)
    for _ in range(data.draw(st.integers(1, 2))):
        config["quantization_config"] = damage(config["quantization_config"], data)
    (folder / "config.json").write_text(json.dumps(config))
    try:
        with quickly():
            source = PackedSource.open_packed(folder)
    except CheckpointError as error:
        assert len(str(error)) < 800
        return
    for site in source.table:
        assert source.compressed(site).shape == tuple(source.table[site]["shape"])


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"specs": []},
        {"specs": [{}]},
        {"sites": None},
        {"sites": {"lm_head": 10**9}},
        {"sites": {"model.layers.{0-9999999}": 0}},
        {"guard": 3},
    ],
    ids=str,
)
def test_transformers_gets_the_same_refusal(copied: Path, change: dict[str, Any]) -> None:
    from transformers import AutoModelForCausalLM

    config = config_of(copied)
    config["quantization_config"].update(change)
    (copied / "config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError):
        AutoModelForCausalLM.from_pretrained(copied)


# ---------------------------------------------------------------------------------------------------- golden checkpoints


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_checkpoints_of_every_version_keep_their_values(version: str) -> None:
    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    source = PackedSource.open_packed(GOLDEN / version)
    found = {name: hashlib.sha256(source.tensor(name).numpy().tobytes()).hexdigest() for name in source.entries}
    assert found == expected["sha256"]
    assert sum((GOLDEN / version / name).stat().st_size for name in ("config.json", SINGLE, "expected.json")) < 30_000


@pytest.mark.parametrize("version", sorted(path.name for path in GOLDEN.iterdir() if path.is_dir()))
def test_checkpoints_of_every_version_load_with_transformers(version: str) -> None:
    from transformers import AutoModelForCausalLM

    expected = json.loads((GOLDEN / version / "expected.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / version, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor(expected["probe"]), use_cache=False).logits
    # The numbers are written with four digits after the point; sums of 32 products differ by less.
    torch.testing.assert_close(logits, torch.tensor(expected["logits"]), rtol=1e-4, atol=1e-4)


def test_the_first_version_holds_what_its_script_says() -> None:
    source = PackedSource.open_packed(GOLDEN / "v1")
    parts = [source.compressed(site).base for site in source.table]
    assert {part.bits for part in parts} == set(range(1, 9))
    assert {(part.zero is None, part.group is None) for part in parts} == {(a, b) for a in (True, False) for b in (True, False)}
