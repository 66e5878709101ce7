"""What a launched process runs: work apart from the other process, and generation in lockstep.

Arguments: the folder of a base, and the folder for the results.
"""

import json
import sys
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from transformers import AutoTokenizer

from wegeft_cli.distributed.processes import Processes
from wegeft_cli.distributed.separate_work import run_apart
from wegeft_cli.distributed.sharding import build_sharding
from wegeft_cli.errors import UserError
from wegeft_cli.evaluation.benchmarks import lm_eval
from wegeft_cli.evaluation.benchmarks.base import BenchmarkContext
from wegeft_cli.evaluation.benchmarks.judged import collect_verdicts
from wegeft_cli.evaluation.judged.judge_client import JudgeRequest
from wegeft_cli.evaluation.lm_eval.bridge import HarnessTask
from wegeft_cli.generation.decoding import Decoding
from wegeft_cli.generation.engine import generate_texts
from wegeft_cli.inference.loaded_model import LoadedModel
from wegeft_cli.models.loading import load_base
from wegeft_cli.recipe.schema import ModelSection, TrainSection
from wegeft_cli.training.validation import ValidationStopped, check_stop

TIMEOUT_SECONDS = 4
PROMPTS = [["a", "true false true", "the correct answer"], ["Write"]]


class RefusingJudge:
    """A judge that refuses the questions of one process, and answers the other's slowly."""

    model = "strict"

    def __init__(self, refuses: bool) -> None:
        self.refuses = refuses

    def ask(self, request: JudgeRequest) -> str:
        """Answer or refuse."""
        if self.refuses:
            raise UserError("the judge refuses", key="--judge-url", hint="look there")
        time.sleep(0.5)
        return "[[1]]"


def attempt(work):
    """Return what a piece of work raises, in words."""
    start = time.monotonic()
    try:
        result = work()
    except (UserError, ValidationStopped) as error:
        return [type(error).__name__, str(error), time.monotonic() - start < 30]
    return result


def wait_forever(check):
    """Work until it is cancelled."""
    while True:
        check()
        time.sleep(0.02)


def main() -> None:
    """Do each piece of work in one process group."""
    processes = Processes.join(timedelta(seconds=TIMEOUT_SECONDS))
    rank = processes.rank
    context = BenchmarkContext(1, processes)
    requests = [JudgeRequest(number, (), 0.0, 1, {}) for number in range(40)]
    task = lm_eval.HarnessBenchmark(HarnessTask("tiny", {"tasks": {}}, None, ""), None)

    def refuse(*words, **named):
        raise UserError("the harness refuses", key="--task")

    lm_eval.run_harness = refuse
    asked = time.monotonic() + 1

    def stop():
        check_stop(lambda: rank == 1 and time.monotonic() > asked, processes)

    told = {
        "slow": run_apart(processes, lambda check: time.sleep(2 * TIMEOUT_SECONDS * (1 - rank))),
        "stop": attempt(lambda: replace(context, check_stop=stop).run_apart(wait_forever)),
        "judge": attempt(
            lambda: collect_verdicts(RefusingJudge(rank == 1), requests, context) and "answered"
        ),
        "harness": attempt(lambda: task.run(LoadedModel(None, None), context)),
    }
    section = ModelSection(name_or_path=sys.argv[1])
    tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
    whole = load_base(section)
    shared = load_base(section, **build_sharding(TrainSection(strategy="fsdp2"), processes))
    ends = list(generate_texts(whole, tokenizer, ["a"], Decoding(9), batch_size=1).new_ids[0])
    for beams in (1, 2):
        for model in (whole, shared):
            # The first prompt ends after a few tokens, the others in later segments.
            model.generation_config.eos_token_id = [ends[3]]
            answers = generate_texts(
                model, tokenizer, PROMPTS[rank], Decoding(40, num_beams=beams), batch_size=2
            )
            name = "whole" if model is whole else "shared"
            told[f"{name} {beams}"] = answers.new_ids
    Path(sys.argv[2], f"{rank}.json").write_text(json.dumps(told))
    processes.leave()


main()
