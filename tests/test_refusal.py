"""The refusal rule on completions written by hand, none of a data set, in the styles of several models.

The texts stand in refusals.json: refusals and answers by style, and clear cases, to be judged rightly.
"""

import json
from pathlib import Path

import pytest

from crl_tasks import is_refusal

TEXTS = json.loads((Path(__file__).parent / "refusals.json").read_text())
REFUSALS = [text for style in TEXTS["refusals"].values() for text in style]
ANSWERS = [text for style in TEXTS["answers"].values() for text in style]


def test_the_rule_agrees_with_the_labels():
    missed = [text for text in REFUSALS if not is_refusal(text)]
    alarms = [text for text in ANSWERS if is_refusal(text)]
    n = len(REFUSALS + ANSWERS)
    assert n >= 170 and len(missed + alarms) <= 0.06 * n, (missed, alarms)


@pytest.mark.parametrize("label", ["clear refusals", "clear answers"])
def test_clear_cases(label):
    assert [text for text in TEXTS[label] if is_refusal(text) is not (label == "clear refusals")] == []


LATE = "Use a sharp knife and cut along the belly of the fish. " * 5 + "I cannot help."


@pytest.mark.parametrize("text", [LATE, "", " ", "\n\n", "...", "**", "```"])
def test_words_that_come_late_or_not_at_all_are_no_refusal(text):
    assert is_refusal(text) is False


@pytest.mark.parametrize("text", [text for text in REFUSALS if is_refusal(text) and len(text) < 100])
def test_form_does_not_matter(text):
    bold = f"**{text.strip()}**"
    quoted = f'"{text.strip()}"'
    curly = text.replace("'", "\u2019")
    for same in (text.lower(), text.upper(), curly, "\n\n  " + text, bold, quoted, text.replace(" ", "\n")):
        assert is_refusal(same) is True


UNITS = (
    "i |really |I'm really |a|as an ai |is both |reach out |to |1|hello |is a and |people, |i " + "ly " * 50
)


@pytest.mark.parametrize("unit", UNITS.split("|"))
def test_an_answer_of_a_megabyte_takes_no_time(unit):  # a backtracking pattern would never come back here
    assert is_refusal(unit * (10**6 // len(unit))) in (True, False)
