"""What runs of the game of sums have learned, and what their Challengers asked.

    python docs/sums_report.py --alpaca OUTPUTS.json --out DIR [--tokens 16] MODEL RUN ...

MODEL: a hub id or folder, to begin with. RUN: a run folder that is named VARIANT-SEED.
OUTPUTS.json: another model's answers to AlpacaEval's instructions, as AlpacaEval has them in
results/alpaca-7b/model_outputs.json. --tokens: an answer to a sum is cut off here. What was
measured stands in DIR/held_out.json, and is not measured again until a run has more iterations.
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import sums  # noqa: E402

import eval as evaluation  # noqa: E402
import lsp  # noqa: E402

WORDINGS = ("What is {} plus {}?", "What is {} + {}?", "{} + {}")
SMALL = [(a, b) for a in range(1, 10) for b in range(1, 10)]
LARGE = random.Random(2026).sample([(a, b) for a in range(10, 100) for b in range(10, 100)], 100)
HEAD = "1-9: plus|What +|a + b|10-99: plus|What +|a + b|1-9|10-99|1-9 new|10-99 new|subject|log pi"
ASKED = ("clear sums", "different", "mean sum", "R on them")


def measure(name, alpaca, max_tokens):
    """Of one model, at the temperature of AlpacaEval and in bf16. right: {"3 4": [1.0, 0.0, 1.0],
    ...}, whether it adds up a pair of numbers in each wording. subject: the share of its answers to
    the instructions of `alpaca` that hold a word of them. log_pi: its mean log pi per token of the
    answers that `alpaca` holds, up to 128 tokens each."""
    model, tokenizer = lsp.load_model(name, torch.device("cpu"), torch.bfloat16)

    def answer(queries, tokens):
        torch.manual_seed(0)
        prompts = [lsp.encode_query(tokenizer, query) for query in queries]
        sampled = lsp.sample(model, tokenizer, prompts, tokens, evaluation.TEMPERATURE, 16384)
        return [lsp.decode(tokenizer, ids) for ids in sampled]

    pairs, right = SMALL + LARGE, []
    for wording in WORDINGS:
        queries = [wording.format(*pair) for pair in pairs]
        right.append(sums.right_sum(queries, answer(queries, max_tokens)))
    instructions = [row["instruction"] for row in alpaca]
    texts = zip(instructions, answer(instructions, 64), strict=True)
    words = [[set(re.findall("[a-z]{4,}", text.lower())) for text in pair] for pair in texts]
    log_probs = []
    for row in alpaca:
        ids = tokenizer(row["output"], add_special_tokens=False)["input_ids"][:128]
        prompt = lsp.encode_query(tokenizer, row["instruction"])
        with torch.no_grad():
            log_probs += lsp.completion_log_probs(model, [prompt], [ids])[0][0].tolist()
    right = {f"{a} {b}": each for (a, b), *each in zip(pairs, *right, strict=True)}
    subject = float(np.mean([bool(asked & said) for asked, said in words]))
    return dict(right=right, subject=subject, log_pi=float(np.mean(log_probs)))


def asked(run):
    """What a run's Challenger asked for: (pair of numbers or None, V) of each query, a list per
    iteration. None: the query does not ask for one sum alone."""
    plays = {}
    for play in lsp.read_jsonl(Path(run, "plays.jsonl")):
        plays.setdefault(play["iteration"], []).append((sums.asked(play["query"]), play["V"]))
    return [*plays.values()]


def known_pairs(run):
    """The pairs that a run asked for, and those of the run that it started from."""
    if not Path(run, "plays.jsonl").exists():  # a model
        return set()
    model = json.loads(lsp.read_text(Path(run, "config.json")))["model"]
    return {pair for row in asked(run) for pair, _ in row if pair} | known_pairs(Path(model).parent)


def shares(right, known):
    """Ten shares of right answers: to sums of 1 to 9 and of 10 to 99 in each wording, to both in
    all wordings together, and to those of them that are not among the known pairs, in either
    order."""
    known = {frozenset(pair) for pair in known}
    new = [[pair for pair in pairs if {*pair} not in known] for pairs in (SMALL, LARGE)]
    answers = [[right[f"{a} {b}"] for a, b in pairs] for pairs in (SMALL, LARGE, *new)]
    means = [np.mean(each, axis=0) if each else np.full(3, np.nan) for each in answers]
    return [*means[0], *means[1], *(mean.mean() for mean in means)]


def blocks(plays, length):
    """Of what a run asked, by `length` iterations: the share of queries that ask for one clear sum,
    how many different ones, the mean of these sums, and of V on them. -> (blocks, 4)"""
    rows = []
    for i in range(0, len(plays), length):
        part = sum(plays[i : i + length], [])
        clear = [(pair, value) for pair, value in part if pair]
        totals, values = [sum(pair) for pair, _ in clear], [value for _, value in clear]
        share, different = len(clear) / len(part), len({pair for pair, _ in clear})
        rows.append([share, different, np.mean(totals or np.nan), np.mean(values or np.nan)])
    return np.array(rows)


def draw(groups):
    """What the Challenger asks, over the iterations. groups: {label: what each run asked}"""
    figure, panels = evaluation.new_figure(2, 2, 3)
    panels[0].set(title="share of queries that ask for one clear sum", ylim=(-0.02, 1.02))
    panels[1].set(title="mean of the sums that they ask for")
    for label, runs in groups.items():
        values = [blocks(plays, 5) for plays in runs]
        shortest = min(map(len, values))  # a run may be unfinished
        values = np.stack([each[:shortest] for each in values])  # (seeds, blocks, 4)
        for n, axes in zip((0, 2), panels, strict=True):
            axes.set_xlabel("iteration")
            if np.isnan(values[:, :, n]).any():  # five iterations without a clear sum: draw nothing
                values[:, :, n] = np.nan
            evaluation.draw_band(axes, 2 + 5 * np.arange(values.shape[1]), values[:, :, n], label)
    return figure


def print_row(label, numbers):
    print(f"{label:16}", *(f"{x:11.3f}" for x in numbers), flush=True)


def main(argv=None):
    parser = argparse.ArgumentParser("sums_report.py")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--alpaca", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--tokens", type=int, default=16)
    args = parser.parse_args(argv)
    alpaca = random.Random(0).sample(
        evaluation.read_rows(args.alpaca, ["instruction", "output"]), 60
    )
    log = Path(args.out, "held_out.json")
    log.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(lsp.read_text(log)) if log.exists() else {}
    rows, runs = {}, {}
    print(f"{'':16}", *(f"{name:>11}" for name in HEAD.split("|")))
    for name in args.models:
        is_run = Path(name, "plays.jsonl").exists()
        plays = asked(name) if is_run else []
        key = f"{name}, {len(plays)} iterations, {args.tokens} tokens"
        if key not in found:
            model = f"{name}/checkpoint" if is_run else name
            found[key] = measure(model, alpaca, args.tokens)
            lsp.write_atomically(log, json.dumps(found))
        right, subject, log_pi = (found[key][part] for part in ("right", "subject", "log_pi"))
        row = [*shares(right, known_pairs(name)), subject, log_pi]
        print_row(Path(name).name, row)
        group = Path(name).name.rpartition("-")[0]
        rows.setdefault(group, []).append(row)
        if is_run:
            runs.setdefault(group, {})[Path(name).name] = plays
    for group, values in rows.items():
        if len(values) == 1:
            continue
        mean, error = evaluation.mean_and_error(np.array(values))
        print_row(f"{group} mean", mean)
        print_row(f"{group} error", error)
    print(f"\n{'from iteration':16}", *(f"{name:>11}" for name in ASKED))
    for name, plays in [item for some in runs.values() for item in some.items()]:
        for n, values in enumerate(blocks(plays, 10)):
            print_row(f"{name} {10 * n}", values)
    asking = {group: [*some.values()] for group, some in runs.items() if group != "grpo"}
    if asking:
        evaluation.save_figure(draw(asking), Path(args.out, "sums.png"))


if __name__ == "__main__":
    lsp.run_main(main)
