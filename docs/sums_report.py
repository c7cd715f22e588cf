"""What runs of the game of sums have learned, and what their Challengers asked.

    python docs/sums_report.py --alpaca OUTPUTS.json --out DIR MODEL RUN ...

MODEL: a hub id or folder, to begin with. RUN: a run folder that is named VARIANT-SEED.
OUTPUTS.json: another model's answers to AlpacaEval's instructions, as AlpacaEval has them in
results/alpaca-7b/model_outputs.json. What was measured stands in DIR/held_out.json, and is not
measured again.
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
HEAD = "1-9: plus|What +|a + b|10-99: plus|What +|a + b|1-9 new|10-99 new|subject|log pi"


def measure(name, alpaca):
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
        right.append(sums.right_sum(queries, answer(queries, 16)))
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
    """The pairs of numbers that a run's queries ask for; None for a query that does not ask for one
    sum alone. -> a list per iteration"""
    pairs = {}
    for play in lsp.read_jsonl(Path(run, "plays.jsonl")):
        pairs.setdefault(play["iteration"], []).append(sums.asked(play["query"]))
    return [*pairs.values()]


def shares(right, known):
    """Eight shares of right answers: to sums of 1 to 9 and of 10 to 99 in each wording, then to
    those of them that are not among the known pairs, in all wordings together."""
    new = [[pair for pair in pairs if pair not in known] for pairs in (SMALL, LARGE)]
    answers = [[right[f"{a} {b}"] for a, b in pairs] for pairs in (SMALL, LARGE, *new)]
    means = [np.mean(each, axis=0) if each else np.full(3, np.nan) for each in answers]
    return [*means[0], *means[1], means[2].mean(), means[3].mean()]


def blocks(pairs, length=5):
    """The share of clear sums, and the mean of these sums or nan, of what a run asked: a list of
    pairs per iteration. -> (iterations / length, 2)"""
    parts = [sum(pairs[i : i + length], []) for i in range(0, len(pairs), length)]
    totals = [[sum(pair) for pair in part if pair] for part in parts]
    clear = [len(some) / len(part) for some, part in zip(totals, parts, strict=True)]
    return np.stack([clear, [np.mean(some or np.nan) for some in totals]], axis=1)


def draw(groups):
    """What the Challenger asks, over the iterations. groups: {label: pairs of each run}"""
    figure, panels = evaluation.new_figure(2, 2, 3)
    panels[0].set(title="share of queries that ask for one clear sum", ylim=(-0.02, 1.02))
    panels[1].set(title="mean of the sums that they ask for")
    for label, runs in groups.items():
        values = [blocks(pairs) for pairs in runs]
        shortest = min(map(len, values))  # a run may be unfinished
        values = np.stack([each[:shortest] for each in values])  # (seeds, blocks, 2)
        for n, axes in enumerate(panels):
            axes.set_xlabel("iteration")
            evaluation.draw_band(axes, 2 + 5 * np.arange(values.shape[1]), values[:, :, n], label)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser("sums_report.py")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--alpaca", required=True)
    parser.add_argument("--out", required=True)
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
        if name not in found:
            found[name] = measure(f"{name}/checkpoint" if is_run else name, alpaca)
            lsp.write_atomically(log, json.dumps(found))
        pairs = asked(name) if is_run else []
        known = {pair for row in pairs for pair in row}
        row = [*shares(found[name]["right"], known), found[name]["subject"], found[name]["log_pi"]]
        print(f"{Path(name).name:16}", *(f"{x:11.3f}" for x in row), flush=True)
        group = Path(name).name.rpartition("-")[0]
        rows.setdefault(group, []).append(row)
        runs.setdefault(group, []).extend([pairs] if is_run else [])
    for group, values in rows.items():
        mean, error = evaluation.mean_and_error(np.array(values))
        for label, numbers in (("mean", mean), ("error", error)):
            print(f"{group + ' ' + label:16}", *(f"{x:11.3f}" for x in numbers))
    asking = {group: some for group, some in runs.items() if some and group != "grpo"}
    evaluation.save_figure(draw(asking), Path(args.out, "sums.png"))


if __name__ == "__main__":
    lsp.run_main(main)
