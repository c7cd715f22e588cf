"""Tests of sums.py and sums_report.py."""

import json
import random
import shutil

import numpy as np
import pytest
import sums
import sums_report
import torch
from pytest import approx

import test_lsp


def test_the_sums_are_rewarded_as_they_say():
    clear_ones = ["What is 3 plus 4?", "3 + 4", "3+4", "What is 3 + 4 = ?", "calculate 3 plus 4."]
    others = ["3 + 4 + 5", "3 + 4 = 7", "What is 3 + 4? What is 5 + 6?", "\u0663 + 4", "3 x 4", ""]
    asked = clear_ones + others
    assert sums.clear_sum(prompts=asked, completions=[""] * 11) == [3.0] * 5 + [0.0] * 6
    for answer, reward in (("It is 7.", 1), ("3 + 4 = 7", 1), ("7 or 8", 0), ("", 0), ("07", 0)):
        rewards = sums.right_sum(prompts=asked, completions=[answer] * 11)
        assert rewards == [reward] * 5 + [0.0] * 6


def test_the_held_out_sums_are_different_ones_of_both_sizes():
    assert len({*sums_report.SMALL}) == 81 and len({*sums_report.LARGE}) == 100
    assert {n for pair in sums_report.SMALL for n in pair} == {*range(1, 10)}
    assert all(10 <= n <= 99 for pair in sums_report.LARGE for n in pair)


def test_shares_are_of_all_held_out_sums_and_of_those_that_the_run_never_asked():
    draw = random.Random(0)
    pairs = sums_report.SMALL + sums_report.LARGE
    right = {f"{a} {b}": [float(draw.random() < p) for p in (0.1, 0.5, 0.9)] for a, b in pairs}
    known = {*draw.sample(pairs, 50), (4, 123)}
    wanted, both, new = [], [], []
    for some in (sums_report.SMALL, sums_report.LARGE):
        for n in range(3):
            wanted.append(sum(right[f"{a} {b}"][n] for a, b in some) / len(some))
        both.append(sum(wanted[-3:]) / 3)
        unseen = []
        for a, b in some:
            if (a, b) not in known and (b, a) not in known:
                unseen += right[f"{a} {b}"]
        new.append(sum(unseen) / len(unseen))
    assert sums_report.shares(right, known) == approx(wanted + both + new)
    assert np.isnan(sums_report.shares(right, {*pairs})[8:]).all()


@pytest.fixture
def run(tmp_path):
    """A run of twelve iterations of two queries; one of them asks for a sum up to iteration 4."""
    queries = [("3 + 4" if n < 5 else "no sum", f"what is {n}?") for n in range(12)]
    records = [
        {"iteration": n, "query": query, "V": n / 4}
        for n, pair in enumerate(queries)
        for query in pair
    ]
    (tmp_path / "lsp-0").mkdir()
    (tmp_path / "lsp-0/config.json").write_text('{"model": "hub/id"}')
    log = tmp_path / "lsp-0/plays.jsonl"
    log.write_text("".join(json.dumps(record) + "\n" for record in records))
    return log.parent


def test_blocks_hold_the_share_of_clear_sums_their_variety_and_their_means(run):
    plays = sums_report.asked(run)
    assert plays[0] == [((3, 4), 0), (None, 0)] and plays[6] == [(None, 1.5)] * 2
    wanted = [[0.5, 1, 7, 0.5], *[[0, 0, np.nan, np.nan]] * 2]
    assert np.array_equal(sums_report.blocks(plays, 5), wanted, equal_nan=True)
    plays[1][1] = ((1, 12), 0.5)
    wanted = [
        [0.75, 2, 9, 0.25],
        [0.5, 1, 7, 0.625],
        [0.25, 1, 7, 1],
        *[[0, 0, np.nan, np.nan]] * 3,
    ]
    assert np.array_equal(sums_report.blocks(plays, 2), wanted, equal_nan=True)


def test_pairs_are_known_that_a_run_asked_and_those_that_its_first_model_had_asked(run):
    assert sums_report.known_pairs(run) == {(3, 4)} and sums_report.known_pairs("hub/id") == set()
    later = shutil.copytree(run, run.parent / "lsp-lsp-0")
    (later / "config.json").write_text(json.dumps({"model": f"{run}/checkpoint"}))
    play = {"iteration": 0, "query": "20 + 5", "V": 0.0}
    (later / "plays.jsonl").write_text(json.dumps(play) + "\n")
    assert sums_report.known_pairs(later) == {(3, 4), (20, 5)}


def test_the_report_measures_each_model_once_and_counts_as_a_loop_does(run, capsys, monkeypatch):
    tokenizer = test_lsp.byte_tokenizer()
    model = test_lsp.tiny_llama(vocab_size=len(tokenizer)).bfloat16()
    loaded = []
    monkeypatch.setattr(
        sums_report.lsp, "load_model", lambda name, *_: (loaded.append(name), (model, tokenizer))[1]
    )
    rows = [{"instruction": f"Name river {n}", "output": "The Nile. " * n} for n in range(1, 61)]
    (run.parent / "alpaca.json").write_text(json.dumps(rows))
    flags = ["--alpaca", str(run.parent / "alpaca.json"), "--out", str(run.parent / "report")]
    sums_report.main([*flags, "base", str(run)])
    assert " mean " not in capsys.readouterr().out.split("from iteration")[0].split("\n", 1)[1]
    other = shutil.copytree(run, run.parent / "lsp-1")
    for _ in range(2):
        sums_report.main([*flags, "base", str(run), str(other)])
        table, asked = capsys.readouterr().out.split("from iteration")
        lines = {line[:16].strip(): line[16:].split() for line in table.splitlines()}
        assert lines["lsp mean"] == lines["lsp-0"] == lines["lsp-1"]
        assert {*lines["lsp error"]} == {"0.000"} and "sums.png: written" in asked
        assert f"{'lsp-1 0':16}{'0.250':>12}{'1.000':>12}{'7.000':>12}{'0.500':>12}" in asked
        assert f"{'lsp-1 10':16}{'0.000':>12}{'0.000':>12}{'nan':>12}{'nan':>12}" in asked
    with (other / "plays.jsonl").open("a") as log:
        log.write('{"iteration": 12, "query": "1 + 1", "V": 0.0}\n')
    sums_report.main([*flags, "base", str(run), str(other)])
    assert loaded == ["base", f"{run}/checkpoint", *[f"{other}/checkpoint"] * 2]
    found = json.loads((run.parent / "report/held_out.json").read_text())
    found = {key.partition(",")[0]: values for key, values in found.items()}
    assert found["base"] == found[str(run)] and len(found["base"]["right"]) == 181
    log_probs = []
    for row in rows:
        prompt = sums_report.lsp.encode_query(tokenizer, row["instruction"])
        ids = tokenizer(row["output"], add_special_tokens=False)["input_ids"][:128]
        with torch.no_grad():
            log_probs += test_lsp.plain_log_probs(model, prompt, ids).tolist()
    assert found["base"]["log_pi"] == approx(sum(log_probs) / len(log_probs), rel=1e-3)
    lengths, sample = [], sums_report.lsp.sample
    monkeypatch.setattr(
        sums_report.lsp, "sample", lambda *a: [*map(lengths.append, (a[3],))] and sample(*a)
    )
    (run.parent / "report/sums.png").unlink()
    sums_report.main([*flags, "base", "--tokens", "3"])  # a model alone has no picture
    assert lengths == [3, 3, 3, 64] and not (run.parent / "report/sums.png").exists()
