"""Groups of datasets with one fine-tuned model each: names, metrics, means."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from wegeft_cli.evaluation.benchmarks.groups import MEAN


@dataclass(frozen=True)
class Member:
    """One dataset."""

    name: str
    aliases: tuple[str, ...] = ()
    """Other names that its folder or its part of a hub's set may have."""
    metric: str = "accuracy"
    """By which the group counts it."""


@dataclass(frozen=True)
class ClassGroup:
    """Datasets of classes (or numbers) under one name."""

    name: str
    description: str
    parts: Mapping[str, tuple[Member, ...]]
    """Part -> its sets; the score is the mean of the parts' means."""

    @property
    def members(self) -> tuple[Member, ...]:
        """All datasets."""
        return tuple(member for part in self.parts.values() for member in part)

    def find_member(self, words: Iterable[str]) -> Member | None:
        """Return the dataset of the first word that names one, ignoring case, dashes and _."""
        by_name = {
            _plain(name): member
            for member in self.members
            for name in (member.name, *member.aliases)
        }
        return next((by_name[plain] for plain in map(_plain, words) if plain in by_name), None)

    def mean(self, scores: Mapping[str, float]) -> dict[str, object]:
        """Return the entry in `groups`: score, tasks, aggregate, metrics, means of parts."""
        means = {
            part: sum(scores[member.name] for member in members) / len(members)
            for part, members in self.parts.items()
        }
        mean: dict[str, object] = {
            "group": self.name,
            "score": sum(means.values()) / len(means),
            "num_tasks": len(self.members),
            "tasks": [member.name for member in self.members],
            "aggregate": MEAN,
            "metrics": {member.name: member.metric for member in self.members},
        }
        if len(self.parts) > 1:
            mean["aggregate"] = f"mean of the means of {', '.join(self.parts)}"
            mean["parts"] = means
            mean["mean_of_tasks"] = sum(scores.values()) / len(scores)
        return mean


_GLUE = (
    Member("cola", metric="matthews_correlation"),
    Member("sst2"),
    Member("mrpc", metric="f1"),
    Member("stsb", metric="pearson"),
    Member("qqp", metric="f1"),
    Member("mnli", ("mnli_matched",)),
    Member("qnli"),
    Member("rte"),
)
_FGVC = (
    Member("cub", ("cub200", "cub_200_2011")),
    Member("nabirds"),
    Member("flowers", ("oxford_flowers", "oxford_flowers102", "flowers102")),
    Member("cars", ("stanford_cars",)),
    Member("dogs", ("stanford_dogs",)),
)
_VTAB = {
    "natural": (
        Member("cifar100", ("cifar",)),
        Member("caltech101"),
        Member("dtd"),
        Member("flowers102", ("oxford_flowers102", "flowers")),
        Member("pets", ("oxford_iiit_pet",)),
        Member("svhn", ("svhn_cropped",)),
        Member("sun397"),
    ),
    "specialized": (
        Member("camelyon", ("patch_camelyon",)),
        Member("eurosat"),
        Member("resisc45"),
        Member("retinopathy", ("diabetic_retinopathy", "diabetic_retinopathy_detection")),
    ),
    "structured": (
        Member("clevr_count"),
        Member("clevr_distance", ("clevr_dist",)),
        Member("dmlab"),
        Member("kitti", ("kitti_distance", "kitti_dist")),
        Member("dsprites_location", ("dsprites_loc",)),
        Member("dsprites_orientation", ("dsprites_ori",)),
        Member("smallnorb_azimuth", ("smallnorb_azim", "snorb_azim")),
        Member("smallnorb_elevation", ("smallnorb_elev", "snorb_elev")),
    ),
}

CLASS_GROUPS: Mapping[str, ClassGroup] = {
    group.name: group
    for group in (
        ClassGroup(
            "glue",
            "GLUE by each task's own metric: f1 for MRPC and QQP, Matthews' correlation for CoLA, "
            "Pearson's for STS-B, accuracy for the others; without WNLI",
            {"glue": _GLUE},
        ),
        ClassGroup("fgvc", "the five fine-grained sets", {"fgvc": _FGVC}),
        ClassGroup("vtab", "VTAB-1k: the mean of its three groups' means", _VTAB),
    )
}
"""Groups that are scored over several runs, one of each set."""


def _plain(name: str) -> str:
    return "".join(sign for sign in name.lower() if sign.isalnum())
