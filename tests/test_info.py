"""`dsv4 info` prints the published checkpoints' totals and the cache's sizes, to the byte."""

import math
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from dsv4_jax.cache.schema import CacheSchema, new_arrays
from dsv4_jax.config import Config
from dsv4_jax.info import (
    block_bytes,
    find_config,
    layer_ranges,
    render,
    state_bytes,
)
from dsv4_jax.numerics import Numerics
from tests.checkpoints import random_config, random_tensors

GOLDEN = Path(__file__).parent / "golden" / "tiny-flash"
PRESETS = {"flash": Config.FLASH, "pro": Config.PRO, "mini": Config.MINI}

# First words of a line and the numbers that stand behind them. The published totals:
WEIGHTS = {
    "flash": {
        "total": [69_187, 159_609_485_896],
        "stored elements": [158_069_433_298],
        "0-1": [2, 1_565, 3_566_148_952],
        "2": [1, 1_576, 3_596_055_640],
        "3-41 step 2": [20, 1_569, 3_568_596_312],
        "4-42 step 2": [20, 1_576, 3_589_851_224],
        "mtp.0": [1, 1_575, 3_593_787_756],
        "one routed expert (w1, w2, w3 and scales)": [13_369_344],
        "everything except routed experts": [9_017_195_080],
    },
    "pro": {
        "total": [145_116, 864_704_792_696],
        "stored elements": [861_608_274_846],
        "0-1": [2, 2_337, 13_874_466_328],
        "2": [1, 2_344, 13_909_746_200],
        "3-59 step 2": [29, 2_337, 13_868_262_424],
        "4-60 step 2": [29, 2_344, 13_903_542_296],
        "mtp.0": [1, 2_343, 13_956_587_692],
        "one routed expert (w1, w2, w3 and scales)": [35_094_528],
        "everything except routed experts": [29_174_270_072],
    },
}
KINDS = {
    "flash": {"0-1": "SWA hash", "2": "CSA hash", "3-41 step 2": "HCA scored"},
    "pro": {"0-1": "HCA hash", "2": "CSA hash", "3-59 step 2": "HCA scored"},
}
DTYPES = {
    "flash": {
        "BF16": 433,
        "F32": 417,
        "F8_E4M3": 375,
        "F8_E8M0": 34_167,
        "I8": 33_792,
        "I64": 3,
    },
    "pro": {"BF16": 619, "F32": 590, "F8_E4M3": 528, "F8_E8M0": 71_952, "I8": 71_424, "I64": 3},
}
# At 1,048,576 tokens: layers, entries each, bytes with FP8 records and MXFP4 keys, with FP8 keys,
# in BF16.
CACHE = {
    "flash": {
        "bytes of an entry": [584, 584, 1024],
        "bytes of an indexer key": [68, 132, 256],
        "window rings": [43, 128, 3_214_336],
        "CSA entries": [21, 262_144, 3_214_934_016],
        "indexer keys": [21, 262_144, 374_341_632],
        "HCA entries": [20, 8_192, 95_682_560],
        "total": [3_688_172_544, 4_040_494_080, 7_219_838_976],
        "growth per 128 tokens": [449_824, 492_832, 880_640],
        "growth per token": [3514.25, 3850.25, 6880],
        "MTP window rings": [1, 128, 74_752, 74_752, 131_072],
    },
    "pro": {
        "bytes of an entry": [584, 584, 1024],
        "bytes of an indexer key": [68, 132, 256],
        "window rings": [61, 128, 4_559_872],
        "CSA entries": [30, 262_144, 4_592_762_880],
        "indexer keys": [30, 262_144, 534_773_760],
        "HCA entries": [31, 8_192, 148_307_968],
        "total": [5_280_404_480, 5_783_720_960, 10_334_371_840],
        "growth per token": [5031.4375, 5511.4375, 9848],
        "MTP window rings": [1, 128, 74_752, 74_752, 131_072],
    },
}
# Bytes of a CSA layer, of an HCA layer, of all layers.
TAILS = {
    "flash": {
        "reference buffers": [81_920, 524_288, 12_206_080],
        "minimal rows": [51_200, 520_192, 11_479_040],
        "minimal rows, online HCA": [51_200, 6_144, 1_198_080],
    },
    "pro": {
        "reference buffers": [81_920, 524_288, 18_710_528],
        "minimal rows": [51_200, 520_192, 17_661_952],
        "minimal rows, online HCA": [51_200, 6_144, 1_726_464],
    },
}


def section(text: str, title: str) -> list[str]:
    """The lines under a heading."""
    (found,) = (part for part in text.split("\n\n") if part.startswith(title))
    return found.splitlines()[1:]


def numbers(lines: list[str], label: str) -> list[float]:
    """Of the first line that begins with the label."""
    line = next(
        line.strip().removeprefix(label)
        for line in lines
        if re.fullmatch(rf"\s*{re.escape(label)}(\s{{2,}}.*)?", line)
    )
    values = [word.replace(",", "") for word in line.split() if word[0].isdigit()]
    return [float(value) for value in values]


@pytest.fixture(scope="module")
def texts():
    return {name: render(config, name, num_gpus=8) for name, config in PRESETS.items()}


@pytest.mark.parametrize("name", ["flash", "pro"])
class TestReleasedModels:
    def test_weights(self, texts, name):
        expected = dict(WEIGHTS[name])
        on_disk = section(texts[name], "Weights on disk")
        layers = section(texts[name], "Layers")
        assert numbers(on_disk, "total") == expected.pop("total")
        for label in [label for label in expected if label[0].isdigit() or label[0] == "m"]:
            count, _, *sizes = numbers(layers, label)
            assert [count, *sizes] == expected.pop(label), label
        for label, values in expected.items():
            assert numbers(on_disk, label) == values, label

    def test_every_layer_is_accounted_for(self, texts, name):
        lines = section(texts[name], "Layers")[1:]
        rows = [re.split(r"\s{2,}", line.strip()) for line in lines]
        totals = [sum(int(r[1]) * int(r[i].replace(",", "")) for r in rows) for i in (-2, -1)]
        assert totals == WEIGHTS[name]["total"]
        count = sum(int(r[1]) for r in rows[:-2])
        assert count == PRESETS[name].num_hidden_layers
        kinds = {r[0]: f"{r[2]} {r[3]}" for r in rows}
        assert kinds.items() >= KINDS[name].items()

    def test_dtypes(self, texts, name):
        lines = section(texts[name], "Weights on disk")[1:]
        shipped = [line.replace("MXFP4 experts", "") for line in lines[:7]]
        tensors = {dtype: numbers(shipped, dtype)[0] for dtype in DTYPES[name]}
        assert tensors == DTYPES[name]
        num_bytes = sum(numbers(shipped, dtype)[1] for dtype in DTYPES[name])
        assert num_bytes == WEIGHTS[name]["total"][1]

    def test_cache(self, texts, name):
        lines = section(texts[name], "Cache of a sequence of 1,048,576 tokens")
        for label, values in CACHE[name].items():
            assert numbers(lines, label)[: len(values)] == values, label

    def test_tails(self, texts, name):
        lines = section(texts[name], "Compressor tails")
        for label, values in TAILS[name].items():
            assert numbers(lines, label) == values, label

    def test_one_row_per_line_and_nothing_abbreviated(self, texts, name):
        text = texts[name].replace("8 GPUs of 141 GB", "")
        for line in text.splitlines():
            assert len(line) < 140
            assert not re.search(r"\d\s?([KMGTkmg]i?B?|e\+?\d+)\b", line), line
        assert "…" not in text


def test_parameters(texts):
    """The published sizes: 284 B with 13 B active, 1.6 T with 49 B active."""
    rounded = {
        "flash": {"backbone": 284.332, "MTP blocks": 6.610, "active per token": 13.27},
        "pro": {"backbone": 1572.997, "MTP blocks": 25.840, "active per token": 48.85},
    }
    for name, expected in rounded.items():
        lines = section(texts[name], "Parameters")
        lines = [line.replace(" (backbone with head, without embedding)", "") for line in lines]
        for label, billions in expected.items():
            digits = 2 if label == "active per token" else 3
            assert round(numbers(lines, label)[0] / 1e9, digits) == billions, (name, label)


def test_parameters_of_a_random_model():
    """Counted in a checkpoint made without the library."""
    official = random_config(mtp=True)
    shapes = {k: x.shape for k, x in random_tensors(official, seed=0).items() if "tid2eid" not in k}
    lines = section(render(Config.from_dict(official), "random"), "Parameters")
    assert numbers(lines, "total") == [sum(math.prod(shape) for shape in shapes.values())]

    def used(name: str) -> bool:
        parts = name.split(".")
        return "experts" not in parts or int(parts[parts.index("experts") + 1]) < 3

    active = sum(
        math.prod(shape)
        for name, shape in shapes.items()
        if used(name) and not name.startswith(("mtp", "embed"))
    )
    label = "active per token (backbone with head, without embedding)"
    assert numbers(lines, label) == [active]


def test_formats(texts):
    """NVFP4 doubles the experts' scale bytes; MXFP4 stays in the MTP block."""
    for name, gigabytes in (("flash", 168.3), ("pro", 913.1)):
        lines = section(texts[name], "Weights on disk")[1:]
        nvfp4 = next(i for i, line in enumerate(lines) if "NVFP4" in line)
        lines[nvfp4] = lines[nvfp4].replace("NVFP4 experts", "")
        config = PRESETS[name]
        matrices = 3 * config.n_routed_experts
        assert numbers(lines[nvfp4:], "U8")[0] == matrices * config.num_hidden_layers
        assert numbers(lines[nvfp4:], "I8")[0] == matrices
        assert round(numbers(lines[nvfp4:], "total")[1] / 1e9, 1) == gigabytes


@pytest.mark.parametrize(
    "config",
    [
        Config.MINI,
        Config.FLASH,
        Config.PRO,
        Config.from_json(GOLDEN),
        replace(Config.MINI, index_head_dim=64, head_dim=320, sliding_window=96),
    ],
    ids=["mini", "flash", "pro", "golden", "other widths"],
)
def test_plan_is_what_a_cache_takes(config):
    """The arrays of a real cache, but for lengths and block tables."""
    schema = CacheSchema.of(config, Numerics.CHECKPOINT, jnp.bfloat16)

    def planes(max_sequences, num_blocks):
        arrays = new_arrays(schema, max_sequences, num_blocks)
        return jax.tree.leaves(arrays), [arrays.lengths, arrays.block_table]

    everything, tables = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        for leaves in jax.eval_shape(lambda: planes(3, 5))
    )
    assert everything - tables == 3 * state_bytes(config) + 5 * block_bytes(config)


class TestPlan:
    def plan(self, config, **options):
        return section(render(config, "model", **options), "Memory plan")

    def test_what_fits(self):
        lines = self.plan(Config.FLASH, num_gpus=2, gpu_memory_gb=100.0)
        left = 200 * 10**9 - 159_609_485_896
        state, block = state_bytes(Config.FLASH), block_bytes(Config.FLASH)
        assert (state, block) == (3_214_336 + 21 * 81_920 + 20 * 6_144, 449_824)
        sequences = [left // (state + n // 128 * block) for n in (8192, 65536, 1048576)]
        assert numbers(lines, "MXFP4 experts") == [
            159_609_485_896,
            2,
            left,
            left // block * 128,
            *sequences,
        ]
        assert numbers(lines, "fixed state per sequence (window rings, tails)") == [state]
        assert numbers(lines, "cache per token") == [3514.25]
        assert not any("MXFP4 experts: the weights do not fit" in line for line in lines)

    def test_what_does_not(self):
        lines = self.plan(Config.FLASH)
        missing = "18,609,485,896 bytes are missing; they need 2 GPUs."
        assert f"  MXFP4 experts: the weights do not fit, {missing}" in lines
        assert numbers(lines, "MXFP4 experts") == [159_609_485_896, 2, 0, 0, 0, 0, 0]

    def test_exactly_full(self):
        lines = self.plan(Config.FLASH, gpu_memory_gb=159.609485896)
        assert numbers(lines, "MXFP4 experts") == [159_609_485_896, 1, 0, 0, 0, 0, 0]
        assert not any("MXFP4 experts: the weights" in line for line in lines)

    def test_short_context(self):
        """Lengths beyond the context are left out; a started block counts."""
        config = replace(Config.MINI, max_position_embeddings=200)
        lines = self.plan(config, gpu_memory_gb=0.1)
        weights, needed, left, _, *fits = numbers(lines, "MXFP4 experts")
        assert (needed, left) == (1, 10**8 - weights)
        assert fits == [left // (state_bytes(config) + 2 * block_bytes(config))]

    def test_window_only_model(self):
        config = replace(Config.MINI, compress_ratios=[0] * 6)
        lines = self.plan(config)
        assert "unlimited" in next(line for line in lines if "MXFP4 experts" in line)
        assert numbers(lines, "cache per token") == [0]

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"num_gpus": 0}, "num_gpus: got 0"),
            ({"num_gpus": -1}, "num_gpus: got -1"),
            ({"gpu_memory_gb": 0.0}, r"gpu_memory_gb: got 0\.0"),
            ({"gpu_memory_gb": -1.0}, r"gpu_memory_gb: got -1\.0"),
            ({"gpu_memory_gb": 1e-12}, "gpu_memory_gb: got 1e-12"),
            ({"gpu_memory_gb": float("nan")}, "gpu_memory_gb: got nan"),
            ({"gpu_memory_gb": float("inf")}, "gpu_memory_gb: got inf"),
        ],
    )
    def test_impossible_machines(self, options, message):
        with pytest.raises(ValueError, match=message):
            render(Config.MINI, "mini", **options)


def test_sizes_follow_the_config():
    config = replace(
        Config.MINI,
        head_dim=320,
        qk_rope_head_dim=32 * 2,
        index_head_dim=64,
        sliding_window=96,
        max_position_embeddings=1000,
    )
    lines = section(render(config, "other"), "Cache of a sequence of 1,000 tokens")
    # 256 FP8 channels, 64 BF16, 8 bytes of scales; 32 bytes of E2M1, 2 scales; 64 FP8, 1 float.
    assert numbers(lines, "bytes of an entry") == [392, 392, 640]
    assert numbers(lines, "bytes of an indexer key") == [34, 68, 128]
    assert numbers(lines, "window rings")[:3] == [6, 96, 6 * 96 * 392]
    assert numbers(lines, "CSA entries")[:3] == [2, 250, 2 * 250 * 392]
    assert numbers(lines, "HCA entries")[:3] == [2, 7, 2 * 7 * 392]
    tails = section(render(config, "other"), "Compressor tails")
    assert numbers(tails, "reference buffers")[:2] == [
        2 * 8 * 2 * (320 + 64) * 4,
        2 * 128 * 320 * 4,
    ]


def test_sizes_that_no_record_holds():
    lines = section(render(Config.from_json(GOLDEN), "tiny"), "Cache")
    assert numbers(lines, "bytes of an entry") == [96]
    assert any("no FP8 records: head_dim - qk_rope_head_dim is 32" in line for line in lines)


def test_title(texts):
    assert texts["mini"].startswith("mini: 6 layers, hidden size 256, 4 heads of 512, 16 experts")


@pytest.mark.parametrize(
    ("layers", "text"),
    [
        ([0], "0"),
        ([0, 1], "0-1"),
        ([0, 1, 2], "0-2"),
        ([2, 4], "2, 4"),
        ([2, 4, 6], "2-6 step 2"),
        ([0, 2, 3, 4], "0, 2-4"),
        ([0, 1, 2, 5, 7, 9, 20], "0-2, 5-9 step 2, 20"),
        ([1, 4, 9], "1, 4, 9"),
    ],
)
def test_layer_ranges(layers, text):
    assert layer_ranges(layers) == text


class TestFindConfig:
    def test_presets_and_paths(self):
        assert find_config("flash") == Config.FLASH
        assert find_config("pro") == Config.PRO
        assert find_config("mini") == Config.MINI
        assert find_config(GOLDEN) == find_config(str(GOLDEN / "config.json"))

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path))):
            find_config(tmp_path)
