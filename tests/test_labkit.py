"""labkit: claims, timing, hardware limits, models."""

import math
import os
import shutil
import subprocess
import sys
import time

import nbformat
import pytest
import torch
from nbclient import NotebookClient

from labkit import hardware, models, timing
from labkit.claims import MIME, check


class TestClaims:
    @pytest.mark.parametrize(
        "how",
        [
            {"predicted": 131072, "measured": torch.tensor(131072), "rel": 0},
            {"predicted": 64, "measured": 63.9, "rel": 0.01},
            {"predicted": 0, "measured": 3e-7, "abs": 1e-5},
            {"predicted": 2.0, "measured": 3.5, "op": ">"},
            {"predicted": [1, 2], "measured": (1, 2), "op": "=="},
            {"predicted": math.inf, "measured": math.inf, "rel": 0},
        ],
    )
    def test_agreement_prints_one_line(self, how, capsys):
        check("a claim", unit="B", **how)
        out = capsys.readouterr().out
        assert out.startswith("✓ a claim: predicted ") and out.count("\n") == 1

    @pytest.mark.parametrize(
        "how",
        [
            {"predicted": 131072, "measured": 131073, "rel": 0},
            {"predicted": 64, "measured": 65, "rel": 0.01},
            {"predicted": 0, "measured": 1e-9, "rel": 0.5},
            {"predicted": 1, "measured": math.nan, "rel": 1},
            {"predicted": 1, "measured": math.nan, "abs": 1e9},
            {"predicted": 1, "measured": math.nan, "op": "<="},
            {"predicted": 2.0, "measured": 2.0, "op": ">"},
            {"predicted": [1, 2], "measured": [2, 1], "op": "=="},
            {"predicted": math.inf, "measured": 1.0, "rel": 0.1},
        ],
    )
    def test_disagreement_raises_with_both_values_and_the_unit(self, how):
        with pytest.raises(AssertionError) as raised:
            check("a claim", unit="GiB", **how)
        for part in ("a claim", repr(how["predicted"]), repr(how["measured"]), "GiB"):
            assert part in str(raised.value)

    @pytest.mark.parametrize(
        "how",
        [{}, {"rel": 0.1, "abs": 1}, {"op": "!="}, {"rel": -1}, {"abs": math.nan}, {"rel": math.inf}],
    )
    def test_unusable_conditions_are_refused(self, how):
        with pytest.raises(ValueError):
            check("a claim", predicted=1, measured=1, **how)

    def test_several_values_or_text_with_a_tolerance_are_refused(self):
        with pytest.raises(ValueError):
            check("a claim", predicted=1, measured=torch.ones(2), rel=0.1)
        with pytest.raises(ValueError):
            check("a claim", predicted="a", measured="a", rel=0.1)

    def test_line_does_not_show_what_another_processor_would_change(self, capsys):
        check("noise", predicted=0, measured=3.2e-7, abs=1e-5)
        check("noise", predicted=0, measured=-1.1e-6, abs=1e-5)
        check("digits", predicted=2.4987654, measured=2.51234567, rel=0.1)
        check("digits", predicted=2.4987611, measured=2.51234599, rel=0.1)
        first, second, third, fourth = capsys.readouterr().out.splitlines()
        assert (first, third) == (second, fourth)

    def test_notebook_output_carries_line_and_record(self):
        source = 'from labkit.claims import check\ncheck("bytes", predicted=4, measured=4, unit="B", rel=0)'
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)])
        [output] = NotebookClient(notebook, kernel_name="python3").execute().cells[0].outputs
        assert output.data["text/plain"] == "✓ bytes: predicted 4 B, measured 4 B (equal)"
        assert output.data[MIME] == {"claim": "bytes", "predicted": 4, "measured": 4, "unit": "B", "condition": "equal"}


class TestTiming:
    def test_candidates_take_turns_after_their_warm_up(self):
        calls = []
        result = timing.compare({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=1)
        assert calls == ["a", "b"] + ["a", "b"] * 3
        assert [len(runs) for runs in result.runs.values()] == [3, 3]

    def test_seconds_in_ratio_out(self):
        result = timing.compare({"slow": lambda: time.sleep(0.03), "fast": lambda: time.sleep(0.01)})
        assert 0.03 <= result.seconds("slow") < 0.06
        assert 2 < result.ratio("slow", "fast") < 4

    def test_known_runs_give_known_statistics(self):
        result = timing.Timings({"a": [1.0, 2.0, 3.0, 4.0, 5.0], "b": [1.0, 1.0, 1.0, 4.0, 1.0]}, threads=1)
        assert (result.seconds("a"), result.spread("a"), result.ratio("a", "b")) == (3.0, 2 / 3, 2.0)

    def test_threads_are_fixed_and_given_back_even_after_an_error(self):
        before = torch.get_num_threads()
        seen = []

        def fail():
            seen.append(torch.get_num_threads())
            raise RuntimeError

        with pytest.raises(RuntimeError):
            timing.compare({"fails": fail}, threads=before + 1)
        assert seen == [before + 1] and torch.get_num_threads() == before

    def test_nothing_to_time_is_refused(self):
        with pytest.raises(ValueError):
            timing.compare({})
        with pytest.raises(ValueError):
            timing.compare({"a": lambda: None}, repeats=0)


class TestHardware:
    def test_roofline_is_the_later_of_arithmetic_and_traffic(self):
        memory = hardware.roofline(1e9, 1e9, flops_per_s=1e12, bytes_per_s=1e11)
        assert (memory.seconds, memory.bound, memory.intensity, memory.ridge) == (1e-2, "memory", 1.0, 10.0)
        compute = hardware.roofline(1e12, 1e9, flops_per_s=1e12, bytes_per_s=1e11)
        assert (compute.seconds, compute.bound) == (1.0, "compute")

    def test_roofline_refuses_what_has_no_bound(self):
        for arguments in ((1, 1, 0, 1), (1, 1, 1, 0), (1, 0, 1, 1), (-1, 1, 1, 1)):
            with pytest.raises(ValueError):
                hardware.roofline(*arguments[:2], flops_per_s=arguments[2], bytes_per_s=arguments[3])

    def test_this_machine(self):
        here = hardware.machine()
        assert here.device == ("cuda" if torch.cuda.is_available() else "cpu")
        assert here.cores >= 1 and here.memory_gib > 1 and str(here.cores) in str(here)

    def test_measured_rates_are_physical(self):
        # From a slow shared core to a fast workstation; outside lies a wrong unit.
        assert 1e9 < hardware.copy_bandwidth(mib=128) < 1e12
        assert 1e9 < hardware.matmul_rate(n=512) < 1e13

    def test_data_sheets_are_dense_rates_with_a_source(self):
        for name, chip in hardware.ACCELERATORS.items():
            assert chip.source.startswith("https://"), name
            # Every one of these has its ridge between 100 and 700 FLOP/byte; a sparse rate or GB for GiB would leave it.
            assert 100 < chip.bf16_flops / chip.bandwidth < 700, name
            assert chip.fp8_flops is None or 1.9 < chip.fp8_flops / chip.bf16_flops < 2.1, name


class TestModels:
    def test_smollm2_answers(self):
        model, tokenizer = models.smollm2()
        chat = [{"role": "user", "content": "What is the capital of France?"}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        reply = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert "Paris" in tokenizer.decode(reply)
        assert model.dtype == torch.float32 and not model.training

    def test_smollm2_cuts_every_digit_alone(self):
        """As the GGUF file says and SmolLM2 was trained; without it a space joins the digit after it."""
        _, tokenizer = models.smollm2()
        assert tokenizer.tokenize("  12 a1") == ["ĠĠ", "1", "2", "Ġa", "1"]

    def test_minilm_embeds(self):
        vectors = models.minilm().encode(["A cat sleeps.", "A kitten is asleep.", "Bonds fell on Tuesday."])
        assert vectors.shape == (3, 384)
        assert torch.tensor(vectors).norm(dim=1).sub(1).abs().max() < 1e-5
        assert vectors[0] @ vectors[1] > vectors[0] @ vectors[2] + 0.3

    def test_loading_prints_nothing(self):
        code = "from labkit.models import smollm2, minilm; smollm2(); minilm()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

    def test_missing_wheel_names_the_command(self):
        with pytest.raises(FileNotFoundError, match=r"pip install --no-deps --force-reinstall \"absent-model==1.0\""):
            models.packaged("absent-model==1.0", "absent_model/weights.bin", "00")

    def test_another_file_is_refused(self):
        requirement, file, _ = models.MINILM
        with pytest.raises(ValueError, match="sha256 differs"):
            models.packaged(requirement, file, "00")

    def test_damaged_cache_is_made_anew_while_two_processes_ask(self, tmp_path):
        good = models.smollm2_dir()
        cache = tmp_path / "cache"
        shutil.copytree(good, cache / good.name)
        weights = cache / good.name / "model.safetensors"
        with open(weights, "r+b") as file:
            file.seek(300_000_000)
            byte = file.read(1)
            file.seek(300_000_000)
            file.write(bytes([byte[0] ^ 1]))
        left_by_a_killed_run = cache / f"{good.name}.killed"
        left_by_a_killed_run.mkdir()
        command = [sys.executable, "-c", "from labkit.models import smollm2_dir; print(smollm2_dir())"]
        environment = {**os.environ, "LABKIT_CACHE": str(cache)}
        both = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
        assert [process.communicate()[0].strip() for process in both] == [str(cache / good.name)] * 2
        assert models._intact(cache / good.name)
        assert not left_by_a_killed_run.exists()
        assert models._sha256(weights) == models._sha256(good / "model.safetensors")


@pytest.mark.parametrize(
    ("able", "dtype"),
    [
        ({"avx512_f": True, "avx512_bf16": True}, torch.bfloat16),
        ({"avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, torch.float32),
        ({"sve_bf16": True}, torch.bfloat16),
        ({}, torch.float32),
    ],
)
def test_bfloat16_only_where_the_cpu_has_it(monkeypatch, able, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert hardware.quick_dtype() == dtype
