"""Write general instructions with the base's own answers: background that gates learn to leave to the base.

    python scripts/paper/general_background.py runs/demo/base runs/none/background.jsonl

Every form of FORMS is filled with the subjects of its kind, so that none of the 200 prompts of general.txt, on which
`none_of_them.py` measures, is among them (this is checked). Each is asked as messages, as plain text and in the tasks'
own frame, or gates would tell tasks by their frame alone; the answer is what the base says to the messages.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

import meteora_jax as mj
from meteora_jax.io.files import whole_file

FRAME = "[INST] {} [/INST]\n"  # of the demo's tasks
BATCH = 60
SUBJECTS = {
    "thing": [
        "an umbrella", "a violin", "a compass", "a glacier", "a beehive", "a telescope", "a suspension bridge",
        "a hot-air balloon", "a coral reef", "a sewing machine", "a desert", "a volcano",
    ],
    "field": [
        "geometry", "beekeeping", "archaeology", "jazz", "statistics", "pottery", "astronomy", "genetics",
        "typography", "economics", "meteorology", "carpentry",
    ],
    "place": [
        "Peru", "Norway", "Vietnam", "Morocco", "Scotland", "New Zealand", "Tokyo", "Vienna", "Nairobi",
        "Montreal", "Istanbul", "Havana",
    ],
    "task": [
        "sort a list of names", "count the words in a file", "parse a date", "download a web page",
        "merge two dictionaries", "draw a circle", "find duplicate lines", "compute a median",
        "read a CSV file", "shuffle a deck of cards",
    ],
    "occasion": [
        "a school reunion", "a job promotion", "a new baby", "a lost parcel", "a cancelled flight",
        "a noisy neighbour", "a broken washing machine", "a charity run", "a book club", "a farewell dinner",
    ],
    "dish": [
        "onion soup", "risotto", "apple pie", "falafel", "chicken curry", "gnocchi", "borscht", "a Greek salad",
        "dumplings", "paella",
    ],
    "sentence": [
        "I would like a table for two", "The library closes at eight", "My brother plays the trumpet",
        "It has been snowing since Monday", "Could you repeat that more slowly?",
        "We lost the keys to the cellar", "The children are feeding the ducks",
        "This road leads to the harbour",
    ],
}  # fmt: skip
FORMS = {
    "thing": [
        "Describe {} to a blind person.", "Write a poem about {}.", "How does one draw {}?",
        "Who invented or first described {}, and when?", "Tell me a story in which {} plays the main part.",
        "List five facts about {}.",
    ],
    "field": [
        "What is {}?", "Give me a beginner's introduction to {}.", "Which books on {} would you recommend?",
        "Write a quiz of three questions about {} with answers.", "What does somebody who works in {} do?",
        "Explain the most important idea of {} in simple words.",
    ],
    "place": [
        "Plan a weekend in {}.", "What is the weather like in {} in October?",
        "Which languages are spoken in {}?", "Write a diary entry of a traveller in {}.",
        "What food is {} famous for?",
    ],
    "task": [
        "Write a Python program to {}.", "How do I {} in JavaScript?", "Show me how to {} in a shell script.",
        "Write a comment that explains how to {} step by step.",
    ],
    "occasion": [
        "Write an email about {}.", "Draft a short speech for {}.", "What should I say about {}?",
        "Give me three subject lines for a message about {}.",
    ],
    "dish": [
        "How do I cook {}?", "Which wine goes with {}?", "Make a shopping list for {}.",
        "Is {} healthy, and why?",
    ],
    "sentence": [
        "Translate into German: {}.", "Rewrite in the past tense: {}.", "Make this longer and more vivid: {}.",
        "Say this in the style of Shakespeare: {}.",
    ],
}  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    base: tyro.conf.Positional[Path]
    """BASE folder, with a chat template."""
    dest: tyro.conf.Positional[Path]
    """JSON lines to write."""
    frame: str = FRAME
    """The tasks' frame, {} for the instruction."""
    tokens: int = 32
    """Of an answer, at most."""
    count: int | None = None
    """So many instructions, evenly spread; all unless given."""


def instructions() -> list[str]:
    """All forms with all subjects of their kind."""
    found = []
    for kind, forms in FORMS.items():
        found += [form.format(subject).replace("?.", "?") for form in forms for subject in SUBJECTS[kind]]
    return found


def main(arguments: Arguments) -> None:
    tested = Path(__file__).with_name("general.txt").read_text(encoding="utf-8").splitlines()
    asked = instructions()
    assert not set(asked) & set(tested), sorted(set(asked) & set(tested))
    count = arguments.count or len(asked)
    asked = [asked[i * len(asked) // count] for i in range(count)]
    model = mj.load(arguments.base)
    examples = []
    for start in range(0, count, BATCH):
        part = asked[start : start + BATCH]
        chats = [[{"role": "user", "content": text}] for text in part]
        chats += chats[-1:] * (BATCH - len(part))
        for text, said in zip(part, model.generate(chats, None, max_new_tokens=arguments.tokens), strict=False):
            turns = [{"role": "user", "content": text}, {"role": "assistant", "content": said.text}]
            examples.append({"messages": turns})
            examples += [{"prompt": p, "response": said.text} for p in (f"{text}\n", arguments.frame.format(text))]
        print(f"{min(start + BATCH, count)} of {count}", flush=True)
    arguments.dest.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(arguments.dest) as partial, partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(example, ensure_ascii=False) + "\n" for example in examples)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
