"""Code protocols: prompts of published work and extraction of code from an answer."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from wegeft_cli.errors import UserError
from wegeft_cli.generation.decoding import Decoding

DEFAULT_CODE_PROTOCOL = "humaneval"

# Chen et al. 2021, section 2.1: a completion ends before any of these.
_STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

# LoRA-GA, reproduce/eval_humaneval.py: the line break with a blank after "task." is its own.
_LORA_GA = (
    "Below is an instruction that describes a task.\n Write a response that appropriately "
    "completes the request.\n\n### Instruction:\nComplete the following Python code: \n"
    "Notes: respond with the entire complete function definition\n"
    "do not add any comments, be as concise in your code as possible\n"
    "use only built-in libraries, assume no additional imports other than those provided (if any)\n"
    "use `    ` (4 spaces) for each level of indentation\n\n"
    "code:\n```python\n%s\n```\n\n### Response:\n```python\n"
)
_LORA_GA_SOURCE_TOKENS = 768
_CHAT = (
    "Complete this Python function. Answer with the whole function in one code block.\n\n"
    "```python\n%s\n```"
)
_STRINGS = re.compile(r'""".*?"""|\'\'\'.*?\'\'\'', re.DOTALL)
_BLOCK = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_DEFINITION_STARTS = ("def ", "async def ", "import ", "from ", "class ", "@")


@dataclass(frozen=True)
class CodeProtocol:
    """Prompt, decoding and extraction of the code."""

    name: str
    description: str
    template: str
    """The prompt with `%s` for the problem's."""
    decoding: Decoding
    num_samples: int
    """Answers per problem."""
    extract: Callable[[str], str]
    """Output -> completion, which follows the problem's prompt."""
    is_chat: bool = False
    """Whether the template is a user message in the model's own chat template."""
    fixed: str | None = None
    """The protocol without this one's faults."""

    def prompt(self, problem_prompt: str) -> str:
        """Return the text that the model continues, or the user message."""
        return self.template.replace("%s", problem_prompt, 1)

    def template_hash(self) -> str:
        """Return the first 16 hex digits of the SHA-256 of the template."""
        return hashlib.sha256(self.template.encode()).hexdigest()[:16]


def cut_at_stop(text: str) -> str:
    """Return a completion up to the first stop text."""
    ends = [end for end in (text.find(stop) for stop in _STOP) if end >= 0]
    return text[: min(ends)] if ends else text


def normalise_lora_ga(text: str) -> str:
    """Return the completion in an output as LoRA-GA repairs it, faults included.

    Fences, triple-quoted strings and blank lines are removed; text after the closing fence stays.
    The first line that contains `def` is the margin; each deeper width of indentation is one level
    more than the next smaller one in the whole text.
    """
    text = _STRINGS.sub("", text.replace("```", "").replace("\t", "    "))
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    widths = [len(line) - len(line.lstrip(" ")) for line in lines]
    margins = [width for line, width in zip(lines, widths, strict=True) if "def" in line]
    margin = margins[0] if margins else 0
    deeper = sorted({width for width in widths if width > margin})
    levels = {width: level for level, width in enumerate(deeper, start=1)}
    return "\n".join(
        "    " * levels.get(width, 0) + line.lstrip()
        for line, width in zip(lines, widths, strict=True)
    )


def first_block(text: str) -> str:
    """Return the first block of code in the text after an opened fence, or in a chat answer.

    The block is unchanged except that an indented definition moves back to the margin.
    """
    if text.lstrip().startswith("```"):
        block = _BLOCK.search(text)
        code = block.group(1) if block else ""
    else:
        code = text.split("```", maxsplit=1)[0]
    if code.lstrip().startswith(_DEFINITION_STARTS):
        return code.lstrip()
    return code


def first_block_of_chat(text: str) -> str:
    """Return the first fenced block of an answer, or the answer without one."""
    block = _BLOCK.search(text)
    return first_block(block.group(1) if block else text)


_ALL = (
    CodeProtocol(
        "humaneval",
        "Chen et al. 2021: the model continues the function; the answer ends before a new "
        "definition, comment, condition or print at the margin. Greedy, one sample; "
        "--num-samples and --temperature sample more.",
        "%s",
        Decoding(512, stop=_STOP),
        1,
        cut_at_stop,
    ),
    CodeProtocol(
        "lora_ga",
        "LoRA-GA's, on which WeGeFT's HumanEval builds: an instruction, five samples at "
        "temperature 0.8 and top-p 0.95. Kept faults: triple-quoted strings are cut out of the "
        "code, indentation is guessed, text after the closing fence is run (a right answer can "
        "fail: canonical solutions reach 163 of 164).",
        _LORA_GA + " ",
        Decoding(512, temperature=0.8, top_p=0.95, max_prompt_tokens=_LORA_GA_SOURCE_TOKENS),
        5,
        normalise_lora_ga,
        fixed="lora_ga_fixed",
    ),
    CodeProtocol(
        "lora_ga_fixed",
        "lora_ga's prompt as in training (no space at its end) and its sampling; the first block "
        "of code, unchanged.",
        _LORA_GA,
        Decoding(512, temperature=0.8, top_p=0.95),
        5,
        first_block,
    ),
    CodeProtocol(
        "lora_pro",
        "LoRA-Pro's: as lora_ga, faults included, with one sample.",
        _LORA_GA + " ",
        Decoding(512, temperature=0.8, top_p=0.95, max_prompt_tokens=_LORA_GA_SOURCE_TOKENS),
        1,
        normalise_lora_ga,
        fixed="lora_pro_fixed",
    ),
    CodeProtocol(
        "lora_pro_fixed",
        "lora_ga_fixed with one sample: the prompt as in training, the first block of code, "
        "unchanged.",
        _LORA_GA,
        Decoding(512, temperature=0.8, top_p=0.95),
        1,
        first_block,
    ),
    CodeProtocol(
        "chat",
        "For instruction-tuned models: the function as a user message in the model's own chat "
        "template, greedy; the first block of code of the answer.",
        _CHAT,
        Decoding(1024),
        1,
        first_block_of_chat,
        is_chat=True,
    ),
)

CODE_PROTOCOLS: Mapping[str, CodeProtocol] = {protocol.name: protocol for protocol in _ALL}


def find_code_protocol(name: str | None) -> CodeProtocol:
    """Return a code protocol by name; raise UserError if there is none. Default: humaneval."""
    name = name or DEFAULT_CODE_PROTOCOL
    if name not in CODE_PROTOCOLS:
        near = difflib.get_close_matches(name, CODE_PROTOCOLS, n=1)
        known = ", ".join(CODE_PROTOCOLS)
        raise UserError(
            f"`{name}` does not score the task `humaneval`",
            key="protocol",
            hint=f"did you mean `{near[0]}`?" if near else f"use one of {known}",
        )
    return CODE_PROTOCOLS[name]
