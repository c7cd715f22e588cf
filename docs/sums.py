"""R and R_Q of a game of addition: the Challenger asks for sums, the Solver adds."""

import re

SUM = re.compile(
    r"(?:what is |what's |calculate |compute )?(\d{1,6}) ?(?:\+|plus) ?(\d{1,6})(?: ?= ?)?[?.]*",
    re.IGNORECASE | re.ASCII,
)


def asked(query):
    """The two numbers of a query that asks for one sum and nothing else, or None."""
    found = SUM.fullmatch(query.strip())
    return found and (int(found[1]), int(found[2]))


def right_sum(prompts, completions, **_):
    """R: 1 if the query asks for one sum and the last number of the answer is it, else 0."""
    last_numbers = [re.findall("[0-9]+", completion)[-1:] for completion in completions]
    pairs = [asked(prompt) for prompt in prompts]
    rights = [[str(sum(pair))] if pair else None for pair in pairs]
    return [float(last == right) for last, right in zip(last_numbers, rights, strict=True)]


def clear_sum(prompts, completions, **_):
    """R_Q: 3 if the query asks for one sum and nothing else, or else 0."""
    return [3.0 if asked(prompt) else 0.0 for prompt in prompts]
