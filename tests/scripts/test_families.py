"""Ten families of the matrix: every stage, with the outcome that docs/models.md states."""

import pytest
from families.names import FAMILIES
from families.stages import STAGES, run_stages

NO_SUCH_NAMES = {"published": "matches no linear layer"}
CLASSIFIER = {"export": "this is a classifier's adapter"}
NOTHING = {
    **dict.fromkeys(
        ("batch", "checkpointing", "merge", "export", "inspect"), "nothing was trained"
    ),
    "plain": "nothing was merged",
}


def refused(message):
    return {**NOTHING, **NO_SUCH_NAMES, **dict.fromkeys(("plan", "train", "fallback"), message)}


# Family -> the stages that are refused, with a part of the message. Every other stage is ok.
EXPECTED = {
    "causal_lm/llama": {},
    "causal_lm/qwen3": {},
    "causal_lm/gemma3_text": {},
    "causal_lm/gpt2": NO_SUCH_NAMES,
    "causal_lm/mixtral": NO_SUCH_NAMES,
    "causal_lm/bert": refused("is an encoder here"),
    "sequence_classification/bert": CLASSIFIER,
    "sequence_classification/distilbert": {**CLASSIFIER, **NO_SUCH_NAMES},
    "image_classification/swin": CLASSIFIER,
    "image_classification/resnet": refused("no linear layer is adapted"),
}


def test_the_matrix_is_large_enough():
    assert len(FAMILIES["causal_lm"]) >= 60
    assert len(FAMILIES["sequence_classification"]) >= 20
    assert len(FAMILIES["image_classification"]) >= 15
    assert all(len(set(names)) == len(names) for names in FAMILIES.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPECTED)
def test_a_family_has_the_outcomes_of_the_page(name, tmp_path, one_thread):
    task, model_type = name.split("/")
    stages = run_stages(task, model_type, tmp_path)
    found = {stage: row["message"] for stage, row in stages.items() if row["outcome"] != "ok"}
    assert found.keys() == EXPECTED[name].keys()
    assert all(stages[stage]["outcome"] == "refused" for stage in found)
    assert all(message in found[stage] for stage, message in EXPECTED[name].items())
    assert {*STAGES} <= stages.keys()
