"""Seconds per turn of a chat that reuses its KV cache, and of one that reads the whole chat again.

Both ways ask the same questions of the quickstart's real small model; each takes its turn, the best
of the repeats counts, and the answers must be the same, or the script fails.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from wegeft_cli.inference.chat import Conversation, open_conversation

DEFAULT_MODEL = Path(".cache/quickstart/model")
QUESTIONS = (
    "Tell me about the city of Rome.",
    "Which river flows through it?",
    "What do people there like to eat?",
    "How do I get there from Paris by train?",
    "What should I see in two days?",
    "Sum up what you told me.",
)


def hold(talk: Conversation, *, reuses: bool) -> list[tuple[int, float, str]]:
    """Hold the whole talk once.

    Args:
        talk: A conversation.
        reuses: Whether what was read stays read.

    Returns:
        Of each turn the prompt's tokens, the seconds, and the answer.
    """
    talk.reset()
    turns = []
    for question in QUESTIONS:
        if not reuses:
            talk.clear_prefix_caches()
        asked = [*talk.messages, {"role": "user", "content": question}]
        text = talk.form.write({"messages": asked}, talk.system)
        length = len(talk.opened.tokenizer(text, add_special_tokens=False)["input_ids"])
        reply = talk.ask(question)
        turns.append((length, reply.seconds, reply.text))
        talk.keep(question, reply)
        print(f"{reuses=} {length} tokens, {reply.seconds:.1f} s", file=sys.stderr, flush=True)
    return turns


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Seconds per turn of a talk.")
    parser.add_argument("--model", type=Path, default=DEFAULT_MODEL)
    parser.add_argument("--max-new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    talk = open_conversation(given.model, template="chat", max_new_tokens=given.max_new_tokens)
    runs_of = {
        reuses: [hold(talk, reuses=reuses) for _ in range(given.repeats)]
        for reuses in (False, True)
    }
    best = {
        reuses: [min(turn[1] for turn in turns) for turns in zip(*runs, strict=True)]
        for reuses, runs in runs_of.items()
    }
    if len({tuple(text for _, _, text in run) for runs in runs_of.values() for run in runs}) != 1:
        sys.exit("the two ways answer differently")
    print("turn  tokens of the prompt  read again (s)  cached (s)")
    for turn, (length, _, _) in enumerate(runs_of[True][0]):
        print(f"{turn + 1:4}  {length:20}  {best[False][turn]:14.2f}  {best[True][turn]:10.2f}")


if __name__ == "__main__":
    main()
