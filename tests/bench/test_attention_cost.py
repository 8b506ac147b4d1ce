"""The benchmarks run, and linear attention takes memory that grows with the tokens and not with their square."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import attention_cost
import sana_step
from run_alone import run_alone

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
pytestmark = linux

#: A map of 128 × 128 tokens: a 1-byte matrix of every token against every other is 268 MB.
TOKENS = 128 * 128


@pytest.mark.parametrize("name", ["lit:2", "relu:2", "clear:4"])
def test_a_block_of_16384_tokens_holds_far_less_than_a_matrix_of_all_by_all(name: str, tmp_path: Path) -> None:
    operator = attention_cost.parse_operator(name, 32, 2, 2)
    graph = attention_cost.write_block(operator, 32, 2, tmp_path)
    cost = run_alone(graph, attention_cost.block_inputs(TOKENS, 32, 4), threads=1, repeat=0)
    assert 0 < cost.working < TOKENS**2 / 3


def test_the_benchmark_writes_numbers_a_table_and_a_plot(tmp_path: Path) -> None:
    small = ["--width", "24", "--heads", "2", "--linear-heads", "2", "--length", "3", "--threads", "1", "--repeat", "1"]
    sizes = ["--tokens", "12", "64", "--memory", "2e-5", *small]
    attention_cost.main([str(tmp_path), *sizes, "--operators", "softmax-standard", "lit", "clear:2", "proxy:2"])
    document = json.loads((tmp_path / "attention_cost.json").read_text())
    assert [(row["operator"], row["tokens"]) for row in document["rows"]][:3] == [
        ("softmax-standard", 12),
        ("softmax-standard", 64),
        ("lit", 12),
    ]
    left_out = [row for row in document["rows"] if "left_out" in row]
    assert [(row["operator"], row["tokens"]) for row in left_out] == [("softmax-standard", 64)]
    assert all(row["best"] > 0 and row["peak"] >= row["idle"] > 0 for row in document["rows"] if row not in left_out)
    table = (tmp_path / "attention_cost.md").read_text()
    assert table.count("| clear:2 |") == 3
    assert "would need" in table
    assert "<svg" in (tmp_path / "attention_cost.svg").read_text()


def test_a_process_that_fails_says_why(tmp_path: Path) -> None:
    (tmp_path / "no.onnx").write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="ONNX Runtime refuses the graph"):
        run_alone(tmp_path / "no.onnx", {}, threads=1, repeat=1)


def test_a_step_of_sana_is_measured() -> None:
    config = {
        "num_layers": 1,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 2,
        "cross_attention_head_dim": 8,
        "cross_attention_dim": 16,
    }
    cost = sana_step.step(config, 96, dtype="fp16", threads=1, repeat=1, length=3)
    assert cost.peak > cost.idle > 0
    assert len(cost.seconds) == 1


@pytest.mark.full
def test_a_step_of_sana_at_4096_pixels_takes_less_than_8_gb() -> None:
    config = {**sana_step.SHAPE, **sana_step.TEXT}
    cost = sana_step.step(config, 4096, dtype="fp32", threads=2, repeat=0)
    print(json.dumps(cost.as_dict()))
    assert cost.peak < 8e9


@pytest.mark.full
def test_linear_attention_costs_at_most_4_4_times_as_much_for_4_times_the_tokens(tmp_path: Path) -> None:
    attention_cost.main([str(tmp_path), "--tokens", "16384", "65536", "--operators", "lit", "relu"])
    rows = json.loads((tmp_path / "attention_cost.json").read_text())["rows"]
    for key in ("best", "working"):
        for name, times in attention_cost.growth(rows, key).items():
            assert times <= 4.4, (name, key, times)
